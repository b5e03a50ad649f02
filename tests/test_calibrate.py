"""Thresholds: known scores in, known thresholds out, and what calibrate refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dslify.calibrate import (
    FEWEST,
    calibrate,
    collect,
    largest_count,
    levels,
    nearest_count,
    risk_by_count,
    threshold_after,
)
from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.switch import DSLayer, Layout, Mask, Switch, dsl_layers, route
from dslify.train import finetune

ROUNDING = 1e-5  # float32 sums of 64 values, relative to values near 1


class Known(nn.Module):
    """The first channel's mean over time: a score, or an error, that the test writes into the input."""

    def __init__(self, channel: int):
        super().__init__()
        self.channel = channel

    def forward(self, pooled: Tensor) -> Tensor:
        """(batch, entries, channels) -> (batch,)"""
        return pooled[:, :, self.channel].mean(1)


class Full(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, value: Tensor) -> tuple[Tensor]:
        return (self.conv(value),)


class Light(nn.Module):
    """The full answer plus what channel 1 says: the difference is known before anything runs."""

    def __init__(self, full: Full):
        super().__init__()
        self.inner = [full]  # a list hides it from parameters(): the two paths of the test share the weights

    def forward(self, value: Tensor) -> tuple[Tensor]:
        return (self.inner[0](value)[0] + value[:, 1].mean(1)[:, None, None],)


def known_network(scale: float = 1.0) -> nn.Module:
    """Input (batch, 3, 16): channel 0 is the score, channel 1 the difference, channel 2 noise."""
    torch.manual_seed(0)
    full = Full()
    layer = DSLayer(Mask((1, 3, 1)), Known(0), Light(full), full, [Layout(0)], [Layout(0)], 1)  # type: ignore[arg-type]
    layer.scale.fill_(scale)
    return nn.Sequential(nn.Identity(), layer, nn.ELU()).eval()


def known_data(scores: list[float], differences: list[float] | None = None) -> Tensor:
    data = torch.randn(len(scores), 3, 16, generator=torch.Generator().manual_seed(1))
    data[:, 0] = torch.tensor(scores)[:, None]
    data[:, 1] = torch.tensor(differences or [0.5] * len(scores))[:, None]
    return data


def really_light(net: nn.Module, data: Tensor) -> list[bool]:
    with torch.no_grad(), route(net, "mixed"):
        net(data)
    taken = dsl_layers(net)[0].paths.light_taken  # type: ignore[union-attr]
    return taken.tolist()  # type: ignore[union-attr]


def test_share_sends_the_lowest_scores_light():
    net, scores = known_network(), [(7 * at) % 40 / 40 for at in range(40)]
    data = known_data(scores)
    result = calibrate(net, data, light_share=0.3)
    assert (result.n, result.share, result.light_share) == (40, 0.3, 0.3)
    assert really_light(net, data) == [score < 12 / 40 for score in scores]
    assert result.threshold == pytest.approx(11.5 / 40, rel=ROUNDING)  # half way between two scores
    assert result.threshold == dsl_layers(net)[0].threshold.item()
    assert result.mean_difference == pytest.approx(0.3 * 0.5, rel=ROUNDING)
    assert "12 of 40 samples" in result.how


@pytest.mark.parametrize(("share", "light"), [(0.0, 0), (1.0, 40)])
def test_none_and_all(share: float, light: int):
    net, data = known_network(), known_data([at / 40 for at in range(40)])
    assert calibrate(net, data, light_share=share).share == share
    assert sum(really_light(net, data)) == light


def test_equal_scores_stay_together_and_the_nearest_share_is_taken():
    net = known_network()
    data = known_data([0.1] * 10 + [0.2] * 25 + [0.3] * 5)
    result = calibrate(net, data, light_share=0.5)  # 10 or 35 of 40 can go light: 10 is nearer to 20
    assert result.share == 0.25
    assert sum(really_light(net, data)) == 10
    assert "asked for 50.0 %" in result.how
    assert calibrate(known_network(), known_data([0.1] * 10 + [0.2] * 20 + [0.3] * 10), light_share=0.5).share == 0.25


def test_bounded_mean_difference_takes_the_largest_threshold():
    net = known_network(scale=2.0)
    scores, differences = [at / 40 for at in range(40)], [0.4] * 40
    data = known_data(scores, differences)  # relative: 0.2 each, so k light samples cost 0.2 k / 40
    result = calibrate(net, data, max_difference=0.0501)
    assert sum(really_light(net, data)) == 10
    assert result.mean_difference == pytest.approx(0.05, rel=ROUNDING)
    assert (result.max_difference, result.light_share) == (0.0501, None)
    assert "without a guarantee" in result.how
    assert "40 samples" in result.how
    assert calibrate(net, data, max_difference=0.2001).share == 1.0
    assert calibrate(net, data, max_difference=0.004).share == 0.0
    assert sum(really_light(net, data)) == 0


def test_the_stored_scale_counts_and_an_unmeasured_one_is_measured():
    data = known_data([at / 40 for at in range(40)])
    once, twice = (calibrate(known_network(scale), data, light_share=1.0).mean_difference for scale in (1.0, 2.0))
    assert once == pytest.approx(2 * twice, rel=ROUNDING)
    net = known_network(scale=0.0)
    with torch.no_grad(), route(net, "full"):
        expected = dsl_layers(net)[0](data).abs().mean().item()
    result = calibrate(net, data, light_share=1.0)
    assert dsl_layers(net)[0].scale.item() == pytest.approx(expected, rel=ROUNDING)
    assert result.mean_difference == pytest.approx(0.5 / expected, rel=ROUNDING)


scores_with_ties = st.lists(st.integers(0, 12).map(lambda at: at / 8), min_size=1, max_size=60)


@given(scores_with_ties, st.floats(0, 1))
def test_no_reachable_share_is_nearer(values: list[float], share: float):
    score = np.array(values)
    ordered, counts = levels(score)
    k = nearest_count(counts, share * len(score))
    tau = threshold_after(ordered, k)
    assert np.count_nonzero(score < tau) == k
    reachable = {int(np.count_nonzero(score < cut)) for cut in [*values, np.inf]} | {0}
    assert set(counts.tolist()) == reachable
    assert all(abs(k - share * len(score)) <= abs(other - share * len(score)) for other in reachable)


@given(scores_with_ties, st.randoms(use_true_random=False), st.floats(1e-3, 2), st.floats(1e-3, 2))
def test_mean_difference_is_bounded_largest_and_monotone(values, random, bound, other):
    score = np.array(values)
    difference = np.array([random.random() for _ in values])
    ordered, counts = levels(score)
    risk = risk_by_count(score, difference)
    assert (np.diff(risk) >= 0).all()
    k = largest_count(counts, risk, bound)
    light = score < threshold_after(ordered, k)
    assert light.sum() == k
    assert np.where(light, difference, 0).mean() <= bound + ROUNDING
    above = counts[counts > k]
    if len(above):
        more = score < threshold_after(ordered, int(above[0]))
        assert np.where(more, difference, 0).mean() > bound - ROUNDING
    assert (largest_count(counts, risk, other) <= k) or other > bound


@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.data())
def test_a_threshold_separates_neighbours_in_every_format(dtype, draw):
    """Also where no number lies between two scores, and where the scores are 0 or negative."""
    start = draw.draw(st.floats(-4, 4, width=16, allow_subnormal=False))
    steps = [torch.tensor(start, dtype=dtype)]
    for _ in range(5):
        steps.append(torch.nextafter(steps[-1], torch.tensor(float("inf"), dtype=dtype)))
    score = np.array([step.item() for step in steps])
    for k in range(len(score) + 1):
        assert np.count_nonzero(score < threshold_after(score, k, dtype)) == k


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"light_share": 0.5, "max_difference": 0.1}, "exactly one"),
        ({"light_share": 1.5}, "0 to 1; got 1.5"),
        ({"light_share": -0.1}, "0 to 1; got -0.1"),
        ({"light_share": float("nan")}, "0 to 1; got nan"),
        ({"max_difference": 0.0}, "above 0"),
        ({"max_difference": -1.0}, "above 0"),
        ({"max_difference": float("inf")}, "above 0"),
    ],
)
def test_refused_options(options: dict[str, float], words: str):
    net = known_network()
    with pytest.raises(OptionError, match=words):
        calibrate(net, known_data([0.5] * 40), **options)
    assert dsl_layers(net)[0].threshold.item() == 0


def test_too_few_samples_says_how_many_are_needed():
    with pytest.raises(DataError, match=f"at least {FEWEST} samples.*got {FEWEST - 1}"):
        calibrate(known_network(), known_data([0.5] * (FEWEST - 1)), light_share=0.5)


def test_scores_that_are_no_numbers():
    net = known_network()
    net[1].switch = Switch(3)
    with torch.no_grad():
        net[1].switch.out.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="score of 40 of 40 samples is not a finite number"):
        calibrate(net, known_data([0.5] * 40), light_share=0.5)


def test_networks_without_exactly_one_layer():
    data = known_data([0.5] * 40)
    with pytest.raises(OptionError, match="holds no Dynamic Switch Layer"):
        calibrate(nn.Sequential(nn.Conv1d(3, 4, 1)), data, light_share=0.5)
    with pytest.raises(OptionError, match="holds 2 Dynamic Switch Layers"):
        calibrate(nn.Sequential(known_network(), known_network()), data, light_share=0.5)


def test_what_training_has_seen_is_counted(tmp_path):
    data = known_data([at / 40 for at in range(40)])
    net = known_network()
    net[1].switch = Switch(3)
    history = finetune(
        net, data[:10], switch_data=data[10:16], steps=0, switch_steps=2, run_dir=tmp_path / "run", progress=False
    )
    for training in (history, tmp_path / "run"):
        result = calibrate(net, data, light_share=0.5, training=training)
        assert result.overlap == 16
        assert any("16 of 40 samples were used in training" in note for note in result.notes)
    clean = calibrate(net, data[16:], light_share=0.5, training=history)
    assert (clean.overlap, clean.notes) == (0, ())
    assert calibrate(net, data, light_share=0.5).overlap is None
    with pytest.raises(DataError, match="name the folder of a run"):
        calibrate(net, data, light_share=0.5, training=tmp_path)


def test_few_sources_are_mentioned():
    samples = open_data(known_data([at / 40 for at in range(40)]), sources=[at // 10 for at in range(40)])
    result = calibrate(known_network(), samples, light_share=0.5)
    assert result.sources == 4
    assert "4 sources" in result.notes[0]


def test_collecting_leaves_the_network_as_it_was():
    net = known_network().train()
    net[0].eval()
    before = [module.training for module in net.modules()]
    seen = collect(net, open_data(known_data([0.1, 0.2, 0.3])), batch_size=2, routed=True)
    assert [module.training for module in net.modules()] == before
    assert dsl_layers(net)[0].route is None
    assert not dsl_layers(net)[0]._forward_hooks
    np.testing.assert_allclose(seen.score, [0.1, 0.2, 0.3], rtol=ROUNDING)
    np.testing.assert_allclose(seen.difference, 0.5, rtol=ROUNDING)
    assert not seen.taken.any()


def test_a_result_is_plain_json():
    result = calibrate(known_network(), known_data([at / 40 for at in range(40)]), light_share=0.5)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["share"] == 0.5
