"""Routing in eager: it costs a handful of operators, and the answers are those of each sample on its own path."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.routing as bench
import dslify
from dslify.parts import Scored
from dslify.switch import Layout, Switch


class Operators(TorchDispatchMode):
    """Counts the operators that run in the block."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def operators(call, *args):
    with torch.no_grad(), Operators() as counting:
        call(*args)
    return counting.seen


@pytest.fixture(scope="module")
def cut():
    """(layer, activation at the cut, score that splits it): a value with 4 of 8 samples below."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3, 1, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, 1, 1), nn.Tanh()).eval()
    x = torch.randn(8, 2, 40)
    net = dslify.insert(model, "1", 0.5, (x[:1],))
    (layer,) = dslify.dsl_layers(net)
    with torch.no_grad():
        net(x)
    return layer, layer.paths.masked, layer.paths.score.sort().values[3:5].mean()


@pytest.mark.parametrize(("threshold", "path"), [(float("inf"), "light"), (0.0, "full")])
def test_a_single_sample_is_routed_by_two_looks_at_numbers(cut, threshold, path):
    layer, masked, _ = cut
    layer.threshold.fill_(threshold)
    routing = operators(layer, masked[:1])
    routing.subtract(operators(Scored(layer), masked[:1]))
    routing.subtract(operators(getattr(layer, path), masked[:1]))
    assert {name: count for name, count in routing.items() if count} == {"_local_scalar_dense": 2}


def test_a_split_batch_copies_every_sample_once_on_the_way_in_and_once_on_the_way_out(cut):
    layer, masked, threshold = cut
    layer.threshold.copy_(threshold)
    routing = operators(layer, masked)
    routing.subtract(operators(Scored(layer), masked))
    for path in (layer.light, layer.full):
        routing.subtract(operators(path, masked[:4]))
    assert layer.paths.light_taken.sum() == 4
    assert routing["index_select"] == routing["index_copy_"] == 2
    assert routing["index_copy"] == routing["nonzero"] == routing["clone"] == routing["all"] == routing["any"] == 0


def test_a_split_batch_gives_each_sample_the_answer_of_its_own_path(cut):
    layer, masked, threshold = cut
    layer.threshold.copy_(threshold)
    with torch.no_grad():
        found = layer(masked)
        taken = layer.paths.light_taken
        light, full = (path(masked[which])[0] for path, which in ((layer.light, taken), (layer.full, ~taken)))
    assert torch.equal(found[taken], light)
    assert torch.equal(found[~taken], full)
    assert not torch.equal(light, full)


def test_gradients_reach_both_paths_through_a_split_batch(cut):
    layer, masked, threshold = cut
    layer.threshold.copy_(threshold)
    value = masked.clone().requires_grad_()
    layer(value).sum().backward()
    taken = layer.paths.light_taken
    for path, which in (("light", taken), ("full", ~taken)):
        other = masked.clone().requires_grad_()
        with dslify.route(layer, path):
            layer(other).sum().backward()
        assert torch.allclose(value.grad[which], other.grad[which], atol=1e-6)
        assert value.grad[which].abs().sum() > 0


def test_samples_of_several_entries_are_put_back_in_place():
    layout, whole = Layout(1, 2), torch.zeros(3, 6)
    part = torch.arange(6.0).reshape(3, 2) + 1
    found = layout.put(whole, part, torch.tensor([2]))
    assert found is whole
    assert torch.equal(layout.take(whole, torch.tensor([2]), 3), part)
    assert whole[:, :4].abs().sum() == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("middle", [0.0, 50.0])
def test_deviations_are_right_for_quiet_and_for_offset_values(scale, middle):
    x = middle * scale + scale * torch.randn(4, 500, 6, generator=torch.Generator().manual_seed(0))
    exact = (x.double().var(1, correction=0) + Switch.FLOOR**2).sqrt().log()
    found = Switch(6).features(x)
    assert torch.allclose(found[:, 6:12].double(), exact, rtol=1e-5, atol=1e-6)
    magnitude = (x.double().abs().mean(1) + Switch.FLOOR).log()
    assert torch.allclose(found[:, 12:].double(), magnitude, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[:, :6].double(), x.double().mean(1), rtol=1e-6, atol=1e-6 * scale)


def test_gradients_of_the_features_are_those_of_the_moments():
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Switch(3).double().features, (x,))


def test_the_benchmark_gives_every_ratio():
    make = lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Tanh())  # noqa: E731
    found = bench.measured("tiny", bench.Case(make, (2, 200), "1", 0.5), seconds=0.3)
    assert set(found.parts) == {"network", "base", "layer", "mask and switch", "light", "full"}
    assert found.parts["network"] > found.parts["base"] > 0
    assert found.batch > -1
    assert set(found.single) == {"light", "full", "base and light", "base and full"}
    lines = bench.table([found]).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| tiny | ")
    assert lines[2].count("%") == 6
