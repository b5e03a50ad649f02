"""Evaluation: figures with known answers, the traps that make a comparison void, and a real routed run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dslify
from dslify.calibrate import calibrate
from dslify.data import open_data
from dslify.errors import OptionError, VerifyError
from dslify.measure import evaluate, judge
from dslify.observe import Observations
from dslify.resampling import correlation, quietest, random_spread, ranks, spearman
from dslify.switch import DSLayer, Layout, Mask, Switch, dsl_layers

ROUNDING = 1e-5  # float32 convolutions in batches of another size
DRAWS = 20_000  # of a simulation; the standard error of a standard deviation is then 0.5 %
SIMULATED = 0.03  # six such standard errors


def observed(
    score: np.ndarray,
    difference: np.ndarray,
    threshold: float,
    *,
    loudness: np.ndarray | None = None,
    labels: list[str] | None = None,
    sources: list[str] | None = None,
    metric: dict[str, np.ndarray] | None = None,
) -> Observations:
    n, taken = len(score), score < threshold
    return Observations(
        score,
        difference,
        np.zeros(n) if loudness is None else loudness,
        tuple(labels or [""] * n),
        tuple(sources or [str(at) for at in range(n)]),
        torch.ones(1),
        taken,
        np.where(taken, difference, 0.0),
        metric or {},
    )


def spread_out(n: int = 200, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=n))


def test_a_perfect_switch_is_the_oracle():
    difference = spread_out()
    result = judge(observed(difference, difference, float(np.median(difference))), 1.0)
    assert [row.name for row in result.rows] == ["full", "light", "mixed", "random", "oracle", "loudness"]
    assert result["full"].difference == 0
    assert result["light"].difference == pytest.approx(difference.mean())
    assert result["mixed"].difference == pytest.approx(result["oracle"].difference)
    assert result["random"].difference == pytest.approx(0.5 * difference.mean())
    assert {row.share for row in result.rows} == {0.0, 0.5, 1.0}
    assert result.reach == pytest.approx(1)
    assert not result.void
    assert "avoids" in result.verdict
    assert result.saved_interval[0] > 0.4
    (kind,) = result.kinds
    assert (kind.pearson, kind.spearman, kind.log_error, kind.ratio) == pytest.approx((1, 1, 0, 1))


def test_a_blind_switch_is_no_better_than_random():
    difference = spread_out()
    score = np.random.default_rng(1).permutation(difference)
    result = judge(observed(score, difference, float(np.median(score))), 1.0)
    assert result.verdict.startswith("random routing is as good within the interval")
    assert result.saved_interval[0] < 0 < result.saved_interval[1]
    assert abs(result.kinds[0].spearman) < 0.2
    assert result["oracle"].difference < result["mixed"].difference
    assert result["mixed"].difference == pytest.approx(result["random"].difference, abs=3 * result["random"].spread)


@pytest.mark.parametrize(
    ("scale", "threshold", "words"),
    [(1e-3, 1e-3, "any routing would do"), (1.0, -1.0, "no sample went light"), (1.0, 1e9, "every sample went light")],
)
def test_void_comparisons_say_so(scale: float, threshold: float, words: str):
    difference = spread_out() * scale
    result = judge(observed(difference, difference, threshold), threshold)
    assert result.void
    assert words in result.verdict
    json.dumps(result.to_json(), allow_nan=False)


def test_loudness_routes_the_quietest():
    difference = spread_out()
    score = np.random.default_rng(1).permutation(difference)
    result = judge(observed(score, difference, 1.0, loudness=20 * np.log10(difference)), 1.0)
    assert result["loudness"].difference == pytest.approx(result["oracle"].difference)
    assert result.kinds[0].loudness_spearman == pytest.approx(1)
    assert result.saved_loudness == pytest.approx(1 - result["mixed"].difference / result["oracle"].difference)
    low, high = result.saved_loudness_interval
    assert low < result.saved_loudness < high < 0


def test_shares_and_predictions_per_label():
    difference = np.concatenate([np.linspace(0.01, 0.02, 50), np.linspace(0.5, 1.5, 150)])
    labels = ["silence"] * 50 + ["speech"] * 150
    score = difference * np.where(np.arange(200) < 50, 2.0, 1.0)
    result = judge(observed(score, difference, 0.75, labels=labels), 0.75)
    everything, silence, speech = result.kinds
    assert [kind.label for kind in result.kinds] == ["all", "silence", "speech"]
    assert (everything.n, silence.n, speech.n) == (200, 50, 150)
    assert silence.share == 1
    assert silence.ratio == pytest.approx(2)
    assert silence.log_error == pytest.approx(np.log(2), rel=0.1)  # the floor of the logarithm takes a little
    assert speech.share == pytest.approx(np.mean(difference[50:] < 0.75))
    assert speech.share_interval[0] < speech.share < speech.share_interval[1]
    assert everything.share == pytest.approx(0.25 * silence.share + 0.75 * speech.share)
    assert speech.mixed == pytest.approx(np.where(difference[50:] < 0.75, difference[50:], 0).mean())


def test_the_users_metric_is_composed_and_a_blind_one_is_noted():
    difference = spread_out()
    taken = difference < 1
    quality = {"full": np.full(200, 4.5), "light": 4.5 - difference, "mixed": 4.6 - np.where(taken, difference, 0)}
    result = judge(observed(difference, difference, 1.0, metric=quality), 1.0)
    assert result["full"].metric == 4.5
    assert result["oracle"].metric == pytest.approx(4.5 - np.where(taken, difference, 0).mean())
    assert result["mixed"].metric == pytest.approx(result["oracle"].metric + 0.1)  # as measured, not as put together
    assert result["random"].metric == pytest.approx(4.5 - taken.mean() * difference.mean())
    assert not result.notes
    blind = judge(observed(difference, difference, 1.0, metric=dict.fromkeys(quality, np.ones(200))), 1.0)
    assert "does not tell light from full" in blind.notes[0]


def test_random_spread_is_that_of_all_permutations():
    difference = spread_out(30)
    draws = np.random.default_rng(0).permuted(np.tile(difference, (DRAWS, 1)), axis=1)[:, :12].sum(1) / 30
    outcomes = np.stack([0 * difference, difference], 1)
    assert random_spread(outcomes, np.array([18, 12])) == pytest.approx(draws.std(), rel=SIMULATED)
    for counts in ([30, 0], [0, 30]):
        assert random_spread(outcomes, np.array(counts)) == pytest.approx(0)


def test_intervals_are_over_sources():
    """Segments of one source are copies here: they must not make the interval narrower."""
    once = spread_out(40)
    alone = judge(observed(once, once, 1.0), 1.0)
    many = np.repeat(once, 10)
    sources = [str(at) for at in range(40) for _ in range(10)]
    grouped = judge(observed(many, many, 1.0, sources=sources), 1.0)
    wrong = judge(observed(many, many, 1.0), 1.0)
    assert (grouped.n, grouped.sources) == (400, 40)
    assert grouped["mixed"].interval == pytest.approx(alone["mixed"].interval)
    widths = [np.diff(result["light"].interval)[0] for result in (alone, grouped, wrong)]
    assert widths[1] == pytest.approx(widths[0])
    assert widths[2] < widths[0] / 2


def test_unequal_sources_do_not_widen_what_does_not_vary():
    sources = [str(at) for at in range(1, 20) for _ in range(at)]
    same = np.full(len(sources), 0.7)
    assert judge(observed(same, same, 1.0, sources=sources), 1.0)["light"].interval == pytest.approx((0.7, 0.7))


def test_the_order_of_the_samples_does_not_matter():
    random = np.random.default_rng(0)
    order = random.permutation(120)
    difference = random.exponential(size=120)
    score = difference * random.uniform(0.5, 2, size=120)
    labels, sources = [("a", "b", "b")[at % 3] for at in range(120)], [str(at // 7) for at in range(120)]
    one = judge(observed(score, difference, 0.5, labels=labels, sources=sources), 0.5)
    other = judge(
        observed(
            score[order], difference[order], 0.5, labels=[labels[at] for at in order],
            sources=[sources[at] for at in order],
        ),
        0.5,
    )  # fmt: skip
    for a, b in zip((*one.rows, *one.kinds), (*other.rows, *other.kinds), strict=True):
        for name, value in vars(a).items():
            if value is not None and not isinstance(value, str):
                assert value == pytest.approx(vars(b)[name], nan_ok=True), name


def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 test sets of 30 sources from a known population; a percentile interval of 30 is right in over 90 %."""
    held = 0
    for seed in range(200):
        difference = np.random.default_rng(seed).exponential(size=30)
        low, high = judge(observed(difference, difference, 1.0), 1.0)["light"].interval
        held += low <= 1 <= high
    assert 171 <= held <= 194  # binomial(200, 0.915): two and a half standard deviations; 0.95 would be 190


def test_one_source_gives_no_interval_and_few_are_noted():
    difference = spread_out(40)
    result = judge(observed(difference, difference, 1.0, sources=["a"] * 40), 1.0)
    assert result["mixed"].interval is None
    assert result.saved_interval is None
    assert "1 sources only" in result.notes[0]


def test_observations_without_routing_are_refused():
    difference = spread_out(5)
    with pytest.raises(VerifyError, match="routed=True"):
        judge(Observations(difference, difference, difference, ("",) * 5, ("",) * 5, torch.ones(1)), 1.0)


def test_rank_correlation_by_hand():
    x, y, once = np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4]), np.ones((1, 4))
    np.testing.assert_allclose(ranks(x, once), [[1, 2.5, 2.5, 4]])
    assert spearman(x, y, once)[0] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(correlation(np.full(4, 0.1), y, once)[0])
    assert np.isnan(spearman(x[:1], y[:1], once[:, :1])[0])


values = st.lists(st.integers(0, 6).map(float), min_size=3, max_size=12)


@given(values, st.data())
def test_a_weight_is_as_good_as_that_many_copies(x, draw):
    count = len(x)
    y = draw.draw(st.lists(st.integers(0, 6).map(float), min_size=count, max_size=count))
    weights = draw.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(lambda w: sum(w) > 2))
    times = np.array(weights)
    for statistic in (correlation, spearman):
        weighted = statistic(np.array(x), np.array(y), times[None].astype(float))[0]
        copied = statistic(np.repeat(x, times), np.repeat(y, times), np.ones((1, times.sum())))[0]
        assert weighted == pytest.approx(copied, nan_ok=True)
    inside = np.repeat(np.arange(count), times)
    expected = ranks(np.repeat(x, times), np.ones((1, times.sum())))[0]
    np.testing.assert_allclose(ranks(np.array(x), times[None].astype(float))[0][inside], expected)


@given(values, st.data())
def test_the_quietest_share_the_border_evenly(x, draw):
    array = np.array(x)
    count = draw.draw(st.integers(0, len(x)))
    weights = quietest(array, count)
    assert weights.sum() == pytest.approx(count)
    assert ((weights >= 0) & (weights <= 1)).all()
    for a in np.unique(array):
        assert len(set(weights[array == a].tolist())) == 1
    assert (np.diff(weights[np.argsort(array, kind="stable")]) <= 0).all()


class Part(nn.Module):
    """A convolutional path, (batch, 6, time) -> one output (batch, 2, time)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(6, hidden, 3, padding=1), nn.ELU(), nn.Conv1d(hidden, 2, 1))

    def forward(self, value: Tensor) -> tuple[Tensor]:
        return (self.layers(value),)


def small_network(routable: bool = True) -> nn.Module:
    torch.manual_seed(0)
    parts = Part(2), Part(16)
    layer = DSLayer(Mask((1, 6, 1)), Switch(6), *parts, [Layout(0)], [Layout(0)], 1, routable=routable)
    return nn.Sequential(nn.Conv1d(1, 6, 4, stride=2), layer, nn.ELU(inplace=True), nn.Conv1d(2, 1, 1)).eval()


def sounds(n: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    levels = torch.logspace(-3, 0, n)[torch.randperm(n, generator=generator)]
    return torch.randn(n, 1, 64, generator=generator) * levels[:, None, None]


@pytest.mark.parametrize("routable", [True, False])
def test_a_really_routed_run_equals_the_composed_one(routable: bool):
    net, data = small_network(routable), sounds()
    threshold = calibrate(net, data, light_share=0.4).threshold
    result = evaluate(net, data, batch_size=7)
    assert result["mixed"].share == pytest.approx(0.4)
    assert result["mixed"].difference == pytest.approx(result.composed, rel=ROUNDING)
    assert 0 < result["mixed"].difference < result["light"].difference
    assert result.threshold == threshold
    assert result.notes == ()
    assert result["mixed"].macs is None
    again = evaluate(net, data, batch_size=60)
    assert again["light"].difference == pytest.approx(result["light"].difference, rel=ROUNDING)
    assert evaluate(net, data, batch_size=7).to_json() == result.to_json()


def test_a_metric_sees_outputs_and_inputs():
    net, data = small_network(), sounds()
    calibrate(net, data, light_share=0.5)
    result = evaluate(net, data, metric=lambda output, given: output.mean((1, 2)) - given[:, 0, 0])
    with torch.no_grad(), dslify.route(net, "light"):
        expected = (net(data).mean((1, 2)) - data[:, 0, 0]).mean().item()
    assert result["light"].metric == pytest.approx(expected, rel=ROUNDING)
    assert result["mixed"].metric not in (result["light"].metric, result["full"].metric)
    with pytest.raises(OptionError, match=r"one number per sample, shape \(32,\)"):
        evaluate(net, data, metric=lambda output, given: output.mean())


def test_a_routing_fault_is_noted():
    """Light samples that come out of a batch differently than alone must not go unnoticed."""
    net, data = small_network(), sounds()
    calibrate(net, data, light_share=0.5)
    layer = dsl_layers(net)[0]
    right = layer._merge
    layer._merge = lambda layout, light, *rest: right(layout, 2 * light, *rest)  # type: ignore[method-assign]
    result = evaluate(net, data)
    assert "put together" in result.notes[0]


def test_costs_of_an_inserted_network():
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 8, 4, stride=2), nn.ELU(), nn.Conv1d(8, 32, 3), nn.ELU(), nn.Conv1d(32, 4, 3)]
    net = dslify.insert(nn.Sequential(*layers).eval(), at="1", width=0.25, example_inputs=(torch.randn(2, 1, 64),))
    samples = open_data(sounds(), labels=["quiet", "loud"] * 30)
    calibrate(net, samples, light_share=0.5)
    result = evaluate(net, samples)
    macs = {row.name: row.macs for row in dslify.cost(net)}
    assert result["full"].macs == macs["base"] + macs["full"]
    assert result["light"].macs == macs["base"] + macs["light"]
    half = macs["base"] + macs["switch"] + 0.5 * (macs["light"] + macs["full"])
    assert result["mixed"].macs == result["random"].macs == pytest.approx(half)
    assert [kind.label for kind in result.kinds] == ["all", "loud", "quiet"]
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["rows"][2]["name"] == "mixed"
