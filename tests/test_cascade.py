"""Networks with several layers: what one pass sees of each, how a sample goes, and the routing against its rivals."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import dslify
from dslify import report
from dslify.cascade import MOST_WAYS, forced, parents, ways
from dslify.data import open_data
from dslify.errors import OptionError
from dslify.measure import compare, evaluate
from dslify.observe import Observations, Outcomes, collect, collect_all, collect_routed
from dslify.resampling import quietest, random_spread
from dslify.switch import DSLayer, Layout, Mask, Switch, dsl_layers, route
from tests.cascades import NETWORKS, cascade, sounds
from tests.test_report import text

ROUNDING = 1e-5  # float32 convolutions in batches of another size
DRAWS = 4000  # of a simulation: its mean is then known to 1.6 % of a standard deviation, that itself to 1.1 %
MEAN_ERROR, SPREAD_ERROR = 4 / DRAWS**0.5, 4 / (2 * DRAWS) ** 0.5  # four standard errors of each, relative
ABOVE = {"classifier": (None, 0), "codec": (None, 0), "in a row": (None, None)}


@pytest.fixture(params=list(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class Passed(nn.Module):
    """A layer of which only mask and full path are left."""

    def __init__(self, layer: DSLayer):
        super().__init__()
        self.mask, self.full = layer.mask, layer.full

    def forward(self, cut: Tensor, *crossing: object) -> object:
        outputs = self.full(self.mask(cut), *crossing)
        return outputs[0] if len(outputs) == 1 else outputs


def without(net: nn.Module, layer: DSLayer) -> nn.Module:
    """The network with the full path alone in place of a layer."""
    for holder in net.modules():
        for title, child in list(holder.named_children()):
            if child is layer and isinstance(holder, fx.GraphModule):
                setattr(holder, title, Passed(layer))
    return net


def test_the_ways_through_layers():
    assert ways([None]) == ((False,), (True,))
    assert ways([None, 0, 1]) == ((False,) * 3, (False, False, True), (False, True, None), (True, None, None))
    assert ways([None, None]) == ((False, False), (False, True), (True, False), (True, True))
    inside_the_second = ways([None, None, 1])
    assert len(inside_the_second) == 6
    assert all((way[2] is None) == bool(way[1]) for way in inside_the_second)
    assert len(ways([None] * 5)) == MOST_WAYS
    with pytest.raises(OptionError, match="more than 32 ways through the 40 Dynamic Switch Layers"):
        ways([None] * 40)


def test_which_layer_lies_in_which(name):
    assert parents(dsl_layers(cascade(name))) == ABOVE[name]


def test_the_innermost_layer_that_holds_another_is_its_parent():
    def layer(full: nn.Module) -> DSLayer:
        return DSLayer(Mask((1, 6, 1)), Switch(6), nn.Identity(), full, [Layout(0)], [Layout(0)], 1)

    net = nn.Sequential(layer(nn.Sequential(layer(layer(nn.Identity())), layer(nn.Identity()))), layer(nn.Identity()))
    assert parents(dsl_layers(net)) == (None, 0, 1, 0, None)


def test_a_forced_way_is_left_as_it_was_found(name):
    net, data = cascade(name), sounds(4)
    layers = dsl_layers(net)
    layers[0].route = "both"
    with torch.no_grad(), forced(layers, ways(parents(layers))[0]):
        assert [layer.route for layer in layers] == ["full", "full"]
        full = net(data)
    assert [layer.route for layer in layers] == ["both", None]
    with torch.no_grad(), route(net, "full"):
        assert torch.equal(net(data), full)


def test_one_pass_sees_what_a_pass_for_each_layer_would(name):
    data = open_data(sounds(), labels=["a", "b"] * 30)
    found = collect_all(cascade(name), data, batch_size=7, progress=False)
    assert len(found) == 2
    for at, seen in enumerate(found):
        net = cascade(name)
        alone = collect(without(net, dsl_layers(net)[1 - at]), data, progress=False)
        np.testing.assert_allclose(seen.score, alone.score, rtol=ROUNDING)
        np.testing.assert_allclose(seen.difference, alone.difference, rtol=ROUNDING)
        torch.testing.assert_close(seen.scale, alone.scale)
        assert (seen.labels, seen.sources) == (alone.labels, alone.sources)
        assert not len(seen.taken)
        assert not len(seen.reached)
    assert abs(found[0].difference - found[1].difference).max() > 0.01


def test_a_pass_leaves_the_network_as_it_was(name):
    net = cascade(name).train()
    collect_routed(net, open_data(sounds(9)), {}, batch_size=4, progress=False)
    assert net.training
    assert [(layer.route, len(layer._forward_hooks)) for layer in dsl_layers(net)] == [(None, 0)] * 2


def ran(net: nn.Module, data: Tensor) -> dict[str, int]:
    """How many samples each path saw when the data is really routed, by the names of cost()."""
    counts: dict[str, int] = {}
    handles = []
    for at, layer in enumerate(dsl_layers(net)):
        for path in ("switch", "light", "full"):
            key = f"{path} {at + 1}" if at else path

            def note(_: nn.Module, inputs: tuple[Tensor, ...], key: str = key) -> None:
                counts[key] = counts.get(key, 0) + len(inputs[0])

            handles.append(getattr(layer, path).register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in data.split(13):
            net(batch)
    for handle in handles:
        handle.remove()
    return counts


def test_the_mixed_row_is_what_really_ran(name):
    net, data = cascade(name), sounds()
    counts, n = ran(net, data), len(data)
    assert {"light", "full", "light 2", "full 2"} <= set(counts)
    macs = {row.name: row.macs for row in dslify.cost(net)}
    result = evaluate(net, data, batch_size=7, progress=False)
    real = macs["base"] + sum(macs[path] * times for path, times in counts.items()) / n
    for routing in ("mixed", "random", "oracle", "loudness"):
        assert result[routing].macs == pytest.approx(real)
    assert result["full"].macs == macs["base"] + macs["full"] + macs["full 2"]
    assert result.composed == pytest.approx(result["mixed"].difference, rel=1e-4)
    for layer, suffix in zip(result.layers, ("", " 2"), strict=True):
        taken, reached = counts[f"light{suffix}"], counts[f"switch{suffix}"]
        assert layer.reached == reached / n
        assert layer.share == taken / reached
        assert layer.of_all == taken / n
        assert layer.kinds[0].n == reached
        assert layer.threshold == dsl_layers(net)[layer.layer - 1].threshold.item()


def test_full_light_and_mixed_are_as_measured(name):
    """Against the network itself, with its own output as the metric."""
    net, data = cascade(name), sounds()
    result = evaluate(net, data, metric=lambda output, _: output.flatten(1).mean(1), batch_size=7, progress=False)
    for mode in ("full", "light", "mixed"):
        with torch.no_grad(), route(net, mode):
            expected = net(data).flatten(1).mean().item()
        assert result[mode].metric == pytest.approx(expected, rel=1e-4), mode
    last = dsl_layers(net)[0 if ABOVE[name][1] == 0 else 1]
    kept = {}
    for mode in ("full", "light", "mixed"):
        handle = last.register_forward_hook(lambda _, __, output, mode=mode: kept.update({mode: output.clone()}))
        with torch.no_grad(), route(net, mode):
            net(data)
        handle.remove()
    scale = kept["full"].abs().mean()
    for mode in ("light", "mixed"):
        expected = ((kept[mode] - kept["full"]).abs().mean() / scale).item()
        assert result[mode].difference == pytest.approx(expected, rel=1e-4), mode
    assert result.composed == pytest.approx(result["mixed"].difference, rel=1e-4)
    assert result["full"].difference == 0
    assert result["full"].share == 0
    assert result["light"].share == 1
    assert 0 < result["mixed"].share < 1
    assert result["oracle"].difference < result["random"].difference
    assert not [note for note in result.notes if "put together" in note]


def observations(score: np.ndarray, difference: np.ndarray, taken: np.ndarray, reached: np.ndarray) -> Observations:
    n = len(score)
    return Observations(
        score, difference, -np.arange(n, dtype=float), ("",) * n, tuple(map(str, range(n))), torch.ones(1), taken,
        np.zeros(n), {}, reached,
    )  # fmt: skip


def made_up(nested: bool, n: int = 40) -> tuple[tuple[Observations, Observations], Outcomes]:
    """Two layers, a third and then a half of the samples light; the outcomes of all ways are random numbers."""
    random = np.random.default_rng(0)
    above = (None, 0 if nested else None)
    first = random.permutation(n) < n // 3
    reached = ~first if nested else np.ones(n, bool)
    second = reached & (np.arange(n) % 2 == 0)
    gaps = random.exponential(size=(n, len(ways(above)))) * [0, *[1] * (len(ways(above)) - 1)]
    layers = [
        observations(random.exponential(size=n), random.exponential(size=n), taken, there)
        for taken, there in ((first, np.ones(n, bool)), (second, reached))
    ]
    return (layers[0], layers[1]), Outcomes(above, gaps, {}, np.zeros(n), {})


@pytest.mark.parametrize("nested", [True, False])
def test_random_is_the_mean_of_all_draws_of_the_same_shares(nested: bool):
    (first, second), outcomes = made_up(nested)
    n, k, j = len(first), int(first.taken.sum()), int(second.taken.sum())
    known = ways(outcomes.parents)
    random = np.random.default_rng(1)
    means = []
    for _ in range(DRAWS):
        light = random.permutation(n) < k
        there = ~light if nested else np.ones(n, bool)
        chosen = np.zeros(n, bool)
        chosen[random.choice(np.flatnonzero(there), j, replace=False)] = True
        way = [known.index((bool(a), (bool(b) if c else None))) for a, b, c in zip(light, chosen, there, strict=True)]
        means.append(outcomes.difference[np.arange(n), way].mean())
    row = compare((first, second), outcomes, [("difference", 1.0)] * 2)["random"]
    assert row.difference == pytest.approx(np.mean(means), abs=MEAN_ERROR * np.std(means))
    assert row.share == pytest.approx((k + j) / n if nested else 1 - (1 - k / n) * (1 - j / n))
    if nested:  # in a row the number of samples on each way varies too
        assert row.spread == pytest.approx(np.std(means), rel=SPREAD_ERROR)
        assert random_spread(outcomes.difference, np.array([n - k - j, j, k])) == pytest.approx(row.spread)


def test_the_spread_is_that_of_all_ways_to_deal():
    outcomes = np.random.default_rng(0).exponential(size=(5, 3))
    deals = set(itertools.permutations([0, 0, 1, 1, 2]))
    means = [outcomes[range(5), deal].mean() for deal in deals]
    assert len(deals) == 30
    assert random_spread(outcomes, np.array([2, 2, 1])) == pytest.approx(np.std(means))


def test_the_oracle_knows_the_true_difference_of_what_reaches_each_layer():
    (first, second), outcomes = made_up(nested=True)
    n, k, j = len(first), int(first.taken.sum()), int(second.taken.sum())
    one = np.argsort(first.difference)[:k]
    rest = np.setdiff1d(np.arange(n), one)
    two = rest[np.argsort(second.difference[rest])[:j]]
    total = outcomes.difference[one, 2].sum() + outcomes.difference[two, 1].sum()
    result = compare((first, second), outcomes, [("difference", 1.0)] * 2)
    assert result["oracle"].difference == pytest.approx(total / n)
    loud_one = np.arange(n)[-k:]  # the last are the quietest
    loud_two = np.arange(n)[-k - j : -k]
    total = outcomes.difference[loud_one, 2].sum() + outcomes.difference[loud_two, 1].sum()
    assert result["loudness"].difference == pytest.approx(total / n)


def test_a_share_of_samples_can_be_full():
    values, capacity = np.array([3.0, 1.0, 2.0, 2.0, 9.0]), np.array([1.0, 0.5, 0.0, 1.0, 1.0])
    weights = quietest(values, 1.0, capacity)
    np.testing.assert_allclose(weights * capacity, [0, 0.5, 0, 0.5, 0])
    np.testing.assert_allclose(quietest(values, capacity.sum(), capacity) * capacity, capacity)


def test_nobody_reaches_a_layer_behind_one_that_stops_all():
    net = cascade("classifier")
    dsl_layers(net)[0].threshold.fill_(1e9)
    result = evaluate(net, sounds(), progress=False)
    first, second = result.layers
    assert (first.share, second.reached, second.of_all, second.kinds) == (1, 0, 0, ())
    assert "every sample went light" in result.verdict
    assert result["mixed"].difference == pytest.approx(result["light"].difference)
    shown = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert shown["layers"][1]["share"] is None
    assert text(report.evaluation(result))


def test_rows_by_label_and_by_source():
    net, data = (
        cascade("classifier"),
        open_data(sounds(), labels=["a", "b"] * 30, sources=[at // 6 for at in range(60)]),
    )
    result = evaluate(net, data, progress=False)
    assert [kind.label for kind in result.layers[1].kinds] == ["all", "a", "b"]
    assert sum(kind.n for kind in result.layers[1].kinds[1:]) == result.layers[1].kinds[0].n < 60
    assert result.sources == 10
    assert result.kinds == result.layers[0].kinds
    assert len(evaluate(net, data, by="source", progress=False).kinds) == 11
    assert len(evaluate(net, data, by="all", progress=False).kinds) == 1
    with pytest.raises(OptionError, match="by is one of label, source, all; got 'speaker'"):
        evaluate(net, data, by="speaker")
    shown = text(report.evaluation(result))
    for words in ("thresholds", "layer 1, of what reaches it", "layer 2, of what reaches it", "light, of"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80


def gated(shares: tuple[float, float] = (0.3, 0.5)) -> nn.Module:
    """The classifier, with gates in place of switches."""
    net = cascade("classifier")
    layers = dsl_layers(net)
    for layer in layers:
        layer.switch.kind = "positive"
    for layer, seen, share in zip(layers, collect_all(net, open_data(sounds()), progress=False), shares, strict=True):
        layer.threshold.fill_(float(np.quantile(seen.score, share)))
    return net


def test_gates_are_judged_by_what_they_stop():
    net, labels = gated(), [str(at % 4) for at in range(60)]
    positive = np.array([label in ("1", "2") for label in labels])
    data = open_data(sounds(), labels=labels)
    (first, second), _ = collect_routed(net, data, {}, progress=False)
    result = evaluate(net, data, positive="1-2", progress=False)
    for layer, seen in zip(result.layers, (first, second), strict=True):
        there = seen.reached
        assert layer.switch == "positive"
        assert layer.gating.recall == pytest.approx(1 - seen.taken[there & positive].mean())
        assert layer.gating.stopped == pytest.approx(seen.taken[there & ~positive].mean())
        low, high = layer.gating.recall_interval
        assert low <= layer.gating.recall <= high
        assert np.isnan([layer.kinds[0].pearson_log, layer.kinds[0].spearman, layer.kinds[0].ratio]).all()
    ended = first.taken | second.taken
    assert result.gating.recall == pytest.approx(1 - ended[positive].mean())
    assert result.gating.stopped == pytest.approx(ended[~positive].mean())
    assert 0 < result.gating.recall < 1
    assert evaluate(net, data, positive={"1", "2"}, progress=False).gating == result.gating
    shown = text(report.evaluation(result))
    assert "all gates together" in shown
    assert "correlation of logs" not in " ".join(shown.split())
    plain = evaluate(net, data, progress=False)
    assert plain.gating is None
    assert any("positive=" in note for note in plain.notes)
    json.dumps(result.to_json(), allow_nan=False)


def test_positive_labels_without_a_gate_are_refused():
    with pytest.raises(OptionError, match="no layer of this network is a gate"):
        evaluate(cascade("classifier"), open_data(sounds(), labels=["a", "b"] * 30), positive="a")
