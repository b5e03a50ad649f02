"""Thresholds: known scores in, known thresholds out, and what calibrate refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dslify
from dslify.calibrate import FEWEST, calibrate
from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.observe import collect
from dslify.switch import DSLayer, Layout, Mask, Switch, dsl_layers, route
from dslify.thresholds import largest_count, levels, nearest_count, risk_by_count, threshold_after
from dslify.train import finetune

ROUNDING = 1e-5  # float32 sums of 64 values, relative to values near 1


class Known(nn.Module):
    """The first channel's mean over time: a score, or an error, that the test writes into the input."""

    kind = "difference"

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
        ({"max_metric": 0.5, "max_difference": 0.1, "metric": len}, "both max_difference and max_metric"),
        ({"light_share": 1.5}, "0 to 1; got 1.5"),
        ({"light_share": -0.1}, "0 to 1; got -0.1"),
        ({"light_share": float("nan")}, "0 to 1; got nan"),
        ({"max_difference": 0.0}, "above 0"),
        ({"max_difference": -1.0}, "above 0"),
        ({"max_difference": float("inf")}, "above 0"),
        ({"max_metric": 0.0, "metric": len}, "above 0; got 0"),
        ({"max_metric": 0.1}, "metric and max_metric go together"),
        ({"max_difference": 0.1, "metric": len}, "metric and max_metric go together"),
        ({"light_share": 0.5, "guarantee": "mean"}, "give max_difference or max_metric"),
        ({"light_share": 0.5, "confidence": 0.9}, "give max_difference or max_metric"),
        ({"max_difference": 0.1, "guarantee": "all"}, "one of mean, routed; got 'all'"),
        ({"max_difference": 0.1, "guarantee": "mean", "confidence": 0.9}, "takes no confidence"),
        ({"max_difference": 0.1, "confidence": 1.0}, "between 0 and 1"),
        ({"max_difference": 0.1, "confidence": 0.9, "bound": 0.1}, "bound has to be larger"),
        ({"max_difference": 0.1, "confidence": 0.9, "bound": -1.0}, "above 0; got -1"),
        ({"max_difference": 0.1, "bound": 2.0}, "leave it out"),
        ({"light_share": 0.5, "curve": "curve.txt"}, "end in .csv or .json"),
        ({"light_share": 0.5, "curve": "no/such/folder/curve.csv"}, "nothing can be written there"),
    ],
)
def test_refused_options(options: dict[str, Any], words: str):
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


def test_a_network_without_a_layer():
    with pytest.raises(OptionError, match="holds no Dynamic Switch Layer"):
        calibrate(nn.Sequential(nn.Conv1d(3, 4, 1)), known_data([0.5] * 40), light_share=0.5)


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


def graded(n: int, seed: int = 0) -> Tensor:
    """Scores that are the differences, evenly spread over 0 to 1 and shuffled."""
    values = [(at + 0.5) / n for at in np.random.default_rng(seed).permutation(n).tolist()]
    return known_data(values, values)


def test_a_mean_that_is_promised_leaves_room_for_the_next_sample():
    net, data = known_network(), graded(100)
    point = calibrate(net, data, max_difference=0.0801)
    promised = calibrate(net, data, max_difference=0.0801, guarantee="mean")
    assert (point.share, promised.share) == (0.4, 0.37)  # k^2 / 2 / 100^2 within (101 * 0.0801 - 1) / 100
    assert (promised.guarantee, promised.epsilon, promised.delta) == ("mean", 0.0801, None)
    assert (promised.units, promised.bound, promised.risk) == (100, 1.0, pytest.approx(37**2 / 2 / 100**2, rel=1e-4))
    assert promised.promise == (
        "for new samples like these 100, the mean difference over all samples is at most 0.0801 on average "
        "(above 1 it counts as 1)"
    )
    assert (point.guarantee, point.promise, point.units) == (None, None, None)


def test_confidence_alone_is_about_what_goes_light():
    net, data = known_network(), graded(400)
    result = calibrate(net, data, max_difference=0.3, confidence=0.9)
    assert (result.guarantee, result.delta) == ("routed", pytest.approx(0.1))
    assert 0.48 < result.share < 0.6  # an oracle would take 0.6
    assert result.risk == pytest.approx(result.share / 2, rel=1e-3)
    assert result.promise is not None
    assert result.promise.startswith("with 90 % confidence, for new samples like these 400, the mean difference among")
    surer = calibrate(net, data, max_difference=0.3, confidence=0.999)
    assert 0 < surer.share < result.share


def test_a_guarantee_that_nothing_meets_sends_nothing_light_and_says_so():
    net = known_network()
    result = calibrate(
        net, known_data([at / 100 for at in range(100)], [0.5] * 100), max_difference=0.1, confidence=0.9
    )
    assert (result.share, result.threshold) == (0, 0)
    assert "nothing could be promised" in result.notes[0]


@pytest.mark.parametrize(("options", "least"), [({"guarantee": "mean"}, 199), ({"guarantee": "routed"}, 789)])
def test_too_few_sources_for_a_promise_says_how_many_are_needed(options: dict[str, Any], least: int):
    net = known_network()
    data = open_data(graded(120), sources=[at // 2 for at in range(120)])
    with pytest.raises(DataError, match=f"at least {least} sources .samples of one source count once.; got 60"):
        calibrate(net, data, max_difference=0.005, **options)
    assert dsl_layers(net)[0].threshold == 0


def test_segments_of_one_recording_count_once():
    data, thrice = graded(90), graded(90).repeat_interleave(3, 0)
    for options in ({"guarantee": "mean"}, {"guarantee": "routed"}):
        once = calibrate(known_network(), data, max_difference=0.4, **options)
        same = open_data(thrice, sources=[at // 3 for at in range(270)])
        many = calibrate(known_network(), same, max_difference=0.4, **options)
        assert (once.threshold, once.share, once.units) == (many.threshold, many.share, many.units)
        assert "new recordings like these 90, every one counted once" in str(many.promise)
        apart = calibrate(known_network(), thrice, max_difference=0.4, **options)
        assert apart.share > once.share > 0


def excess(output: Tensor, _inputs: Tensor) -> Tensor:
    return output.mean((1, 2))


def test_a_metric_of_the_users_bounds_what_the_light_path_adds_to_it():
    net, data = known_network(), graded(200)
    with torch.no_grad(), route(net, "light"):
        light = excess(net(data), data)
    with torch.no_grad(), route(net, "full"):
        added = (light - excess(net(data), data)).clamp(0, 1).double().numpy()
    order = np.argsort(data[:, 0].mean(1).numpy())
    costs = np.concatenate([[0], np.cumsum(added[order])]) / 200
    point = calibrate(net, data, metric=excess, max_metric=0.1)
    assert point.share == (np.flatnonzero(costs <= 0.1)[-1]) / 200
    assert (point.max_metric, point.max_difference, point.bound) == (0.1, None, 1.0)
    assert point.risk == pytest.approx(costs[int(point.share * 200)], rel=1e-4)
    mean = calibrate(net, data, metric=excess, max_metric=0.1, guarantee="mean")
    assert mean.share == (np.flatnonzero(costs <= (201 * 0.1 - 1) / 200)[-1]) / 200
    assert "mean excess of the metric over all samples" in str(mean.promise)
    assert 0 < calibrate(net, data, metric=excess, max_metric=0.3, confidence=0.9).share < 1
    cut = calibrate(net, data, metric=excess, max_metric=0.1, bound=0.3)
    assert cut.share > point.share
    assert "lose more than 0.3 on the light path" in cut.notes[0]
    with pytest.raises(OptionError, match="not finite"):
        calibrate(net, data, metric=lambda output, _: output[:, 0, 0] / 0, max_metric=0.1)


class Within(nn.Module):
    """A full path that holds a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor) -> tuple[Tensor]:
        return (self.layer(value),)


def nest() -> nn.Module:
    """Channel 0 is the score of the outer layer, channel 2 of the one in its full path; channel 1 the difference."""
    net = known_network()
    (outer,) = dsl_layers(net)
    inner_full = outer.full
    inner = DSLayer(Mask((1, 3, 1)), Known(2), Light(inner_full), inner_full, [Layout(0)], [Layout(0)], 1)
    inner.scale.fill_(1.0)
    outer.full = Within(inner)
    return net.eval()


def nested_data(n: int) -> Tensor:
    data, random = known_data([0.0] * n), np.random.default_rng(2)
    data[:, 0] = torch.tensor((random.permutation(n) + 0.5) / n)[:, None]
    data[:, 2] = torch.tensor((random.permutation(n) + 0.5) / n)[:, None]
    data[:, 1] = data[:, 0]
    return data


def test_the_inner_layer_is_set_on_what_the_outer_lets_through():
    net, data = nest(), nested_data(200)
    result = calibrate(net, data, light_share=0.25)
    outer, inner = result.layers
    assert (outer.n, outer.share, inner.n, inner.share) == (200, 0.25, 150, pytest.approx(0.25, abs=0.004))
    assert (result.threshold, result.share) == (outer.threshold, outer.share)
    assert [layer.threshold.item() for layer in dsl_layers(net)] == [outer.threshold, inner.threshold]
    passed = data[:, 0, 0] >= outer.threshold
    assert int((data[passed, 2, 0] < inner.threshold).sum()) == round(inner.share * 150)
    assert json.loads(json.dumps(result.to_json()))["layers"][1]["n"] == 150


def test_layers_share_a_bound_and_a_risk_evenly_and_no_source_serves_two():
    net, data = nest(), nested_data(600)
    point = calibrate(net, data, max_difference=0.1)
    assert [record.max_difference for record in point.layers] == [0.05, 0.05]
    result = calibrate(net, data, max_difference=0.4, confidence=0.9)
    outer, inner = result.layers
    assert [record.epsilon for record in result.layers] == [0.2, 0.2]
    assert [record.delta for record in result.layers] == [pytest.approx(0.05)] * 2
    assert outer.n == 300
    assert inner.n == int((data[1::2, 0, 0] >= outer.threshold).sum())
    before = [layer.threshold.item() for layer in dsl_layers(net)]
    with pytest.raises(DataError, match=r"at least 20 samples.*at layer 2 of 2"):
        calibrate(net, data, light_share=1.0)
    assert [layer.threshold.item() for layer in dsl_layers(net)] == before


def test_a_metric_in_a_nest_is_judged_one_layer_at_a_time():
    outer, inner = calibrate(nest(), nested_data(200), metric=excess, max_metric=0.2).layers
    assert outer.max_metric == inner.max_metric == 0.1
    assert 0 < outer.share < 1
    assert 0 < inner.share < 1


def test_the_whole_trade_off(tmp_path: Path):
    net, data = known_network(), graded(300)
    rows = dslify.tradeoff(net, data, confidence=0.9)
    assert dsl_layers(net)[0].threshold == 0
    assert len(rows) == 200
    assert [rows[0].share, rows[-1].share] == [0, 1]
    for row in rows:
        k = round(row.share * 300)
        assert sum(value < row.threshold for value in data[:, 0].mean(1).tolist()) == k
        assert row.mean == pytest.approx(k**2 / 2 / 300**2, rel=1e-3)
        assert row.routed == pytest.approx(k / 2 / 300, rel=1e-3)
        assert row.mean_bound == pytest.approx((300 * row.mean + 1) / 301)
        assert row.routed_bound > row.routed or k == 0
    assert rows[0].routed_bound == 1
    result = calibrate(net, data, max_difference=0.2, confidence=0.9, curve=tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["threshold"]) for row in table] == [row.threshold for row in rows]
    assert list(table[0]) == ["layer", "threshold", "share", "mean", "routed", "mean_bound", "routed_bound"]
    near = min(rows, key=lambda row: abs(row.threshold - result.threshold))
    assert near.routed_bound == pytest.approx(0.2, rel=0.1)  # what the walk lets through is at its bound
    calibrate(nest(), nested_data(200), light_share=0.5, curve=tmp_path / "curve.json")
    found = json.loads((tmp_path / "curve.json").read_text())
    assert {row["layer"] for row in found} == {1, 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.csv", "curve.json"]
    with pytest.raises(OptionError, match="confidence lies between 0 and 1"):
        dslify.tradeoff(net, data, confidence=1)
