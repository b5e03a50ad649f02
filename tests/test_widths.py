"""Which sizes a width gives, and that the MACs the rules count are those that torch counts."""

import itertools

import pytest
import torch
from torch import nn

from dslify import widths
from dslify.axes import analyse, node_macs
from dslify.capture import capture, scope_inputs
from dslify.cut import find_cut, partition
from dslify.graft import region_module, samples_of
from dslify.macs import node_macs as counted
from dslify.switch import Layout
from tests.zoo import ZOO

ROUNDING = 1e-9  # of a share


@pytest.fixture(scope="module", params=ZOO)
def captured(request):
    network = ZOO[request.param]
    inner, args, kwargs = scope_inputs(network.build(), network.scope, (network.batch(1),))
    return network, capture(inner, args, kwargs)


def region_axes(captured):
    network, graph = captured
    at = network.at.removeprefix(f"{network.scope}.")
    cut = find_cut(graph.module.graph, at)
    return analyse(region_module(graph.module, partition(graph.module.graph, cut)))


def test_the_rules_count_what_torch_counts(captured):
    _, graph = captured
    mine = sum(node_macs(graph.module, samples_of(graph.module.graph, Layout(0))).values())
    theirs = sum(counted(graph.module, graph.args, graph.kwargs).values()) // graph.samples
    assert mine == pytest.approx(theirs, rel=1e-3), "they differ by what a division per node leaves"


def without(monkeypatch, axes, width, **constants):
    """What choose() gives with other constants of the module."""
    with monkeypatch.context() as context:
        for name, value in constants.items():
            context.setattr(widths, name, value)
        return widths.choose(axes, width)


def test_fours_cost_little(captured, monkeypatch):
    axes = region_axes(captured)
    for width in (0.1, 0.3):
        fours = widths.choose(axes, width)
        less = without(monkeypatch, axes, width, FREE=0.0)
        nearest = without(monkeypatch, axes, width, FREE=0.0, LESS=0.0)
        assert fours.keys() == less.keys() == nearest.keys()
        for atom, kept in fours.items():
            assert less[atom] in (nearest[atom], 4 * (nearest[atom] // 4))
            assert less[atom] >= (1 - widths.LESS) * nearest[atom]
            assert kept in (less[atom], 4 * -(-less[atom] // 4))
        # each rounding is priced alone; together they may multiply
        for total in (axes.macs, axes.params):
            assert total(fours) <= (1 + 2 * widths.FREE + ROUNDING) * total(less)


def linear(*widths_of):
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(widths_of)))
    graph = capture(model, (torch.randn(2, widths_of[0]),))
    return analyse(region_module(graph.module, partition(graph.module.graph, find_cut(graph.module.graph, "0"))))


def test_a_multiple_of_four_where_it_is_free_and_only_there():
    beside_a_wide_one = {atom.hint: kept for atom, kept in widths.choose(linear(8, 8, 60, 8, 4096, 8), 0.1).items()}
    assert beside_a_wide_one[60] == 8
    alone = {atom.hint: kept for atom, kept in widths.choose(linear(8, 8, 60, 8), 0.1).items()}
    assert alone[60] == 6


def test_down_to_a_multiple_of_four_where_that_takes_little():
    found = {atom.hint: kept for atom, kept in widths.choose(linear(8, 8, 130, 8, 60, 8), 0.1).items()}
    assert found[130] == 12, "13 is 8 % more"
    assert found[60] == 6, "4 would be a third less"


def test_the_same_network_gets_the_same_sizes():
    network = ZOO["codec"]

    def sizes():
        inner, args, kwargs = scope_inputs(network.build(), network.scope, (network.batch(1),))
        graph = capture(inner, args, kwargs)
        axes = region_axes((network, graph))
        return list(widths.choose(axes, 0.2).values())

    assert sizes() == sizes() == sizes()
