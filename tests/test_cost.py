"""Costs: what the parts of a network add up to, with one layer, several in each other or in a row, and tied weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import dslify
from dslify import report
from dslify.cascade import Way, forced, parents, ways
from dslify.errors import OptionError
from dslify.macs import count, parameter_count
from dslify.switch import DSLayer, Layout, Mask, Switch, dsl_layers
from tests.cascades import NETWORKS, cascade, classifier, codec
from tests.test_report import text


@pytest.fixture(params=list(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def macs_of(net: nn.Module) -> int:
    """Of one sample, on the route that the layers are set to."""
    if isinstance(net, fx.GraphModule):
        return count(lambda value: fx.Interpreter(net).run(value, enable_io_processing=False), torch.zeros(1, 1, 64))[0]
    return count(net, torch.zeros(1, 1, 64))[0]


def paid_for(way: Way) -> list[str]:
    """Names of the rows that a sample on this way costs."""
    found = ["base"]
    for at, light in enumerate(way):
        number = f" {at + 1}" if at else ""
        found += [] if light is None else [f"switch{number}", f"{'light' if light else 'full'}{number}"]
    return found


def test_the_parts_of_every_way_add_up_to_what_runs(name):
    net = cascade(name)
    rows = {row.name: row for row in dslify.cost(net)}
    layers = dsl_layers(net)
    for way in ways(parents(layers)):
        with forced(layers, way):
            assert sum(rows[part].macs for part in paid_for(way)) == macs_of(net), way


def test_base_and_full_paths_are_the_network_that_was_given(name):
    original = NETWORKS[name][0]()
    kept = [row for row in dslify.cost(cascade(name)) if row.name.startswith(("base", "full"))]
    assert len(kept) == 3
    assert sum(row.macs for row in kept) == macs_of(original)
    assert sum(row.params for row in kept) == parameter_count(original)


def test_every_parameter_belongs_to_one_row(name):
    net = cascade(name)
    rows = dslify.cost(net)
    assert [(row.name, row.layer) for row in rows] == [
        ("base", 0), ("switch", 1), ("light", 1), ("full", 1), ("switch 2", 2), ("light 2", 2), ("full 2", 2),
    ]  # fmt: skip
    assert sum(row.params for row in rows) == parameter_count(net)
    assert all(row.bytes > 0 for row in rows)


def test_one_layer_is_counted_as_before_a_second_came():
    one = dslify.insert(codec(), at="1", width=0.25, example_inputs=(torch.randn(2, 1, 64),))
    rows, more = dslify.cost(one), dslify.cost(cascade("codec"))
    assert [row.name for row in rows] == ["base", "switch", "light", "full"]
    assert rows[:2] == more[:2]
    inner = {row.name: row for row in more}
    assert rows[3].macs == inner["full"].macs + inner["full 2"].macs
    assert rows[3].params == inner["full"].params + inner["full 2"].params
    assert rows[3].bytes == inner["full"].bytes + inner["full 2"].bytes
    assert len({row.bytes for row in rows}) == 4


def test_costing_leaves_the_layers_as_they_were():
    net = cascade("classifier")
    with torch.no_grad():
        net(torch.randn(2, 1, 64))
    before = [layer.paths for layer in dsl_layers(net)]
    dslify.cost(net)
    assert all(layer.paths is paths for layer, paths in zip(dsl_layers(net), before, strict=True))
    assert [(layer.route, len(layer._forward_pre_hooks)) for layer in dsl_layers(net)] == [(None, 0)] * 2


class Tied(nn.Module):
    """One matrix, read before the cut and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def test_a_shared_weight_counts_where_it_is_read():
    net = dslify.insert(Tied().eval(), at="first", width=0.25, example_inputs=(torch.randn(2, 16),))
    rows = {row.name: row for row in dslify.cost(net)}
    assert (rows["base"].params, rows["full"].params) == (256, 272)


class Outside(nn.Module):
    """A scope with work around it that is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.around = classifier(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.inner(x))


def test_of_a_scope_the_captured_part_is_counted():
    whole = Outside().eval()
    net = dslify.insert(whole, "0", 0.25, (torch.randn(2, 1, 64),), scope="inner")
    kept = [row for row in dslify.cost(net) if row.name in ("base", "full")]
    assert sum(row.params for row in kept) == parameter_count(whole.inner)
    assert sum(row.macs for row in kept) == macs_of(whole.inner)


def test_a_layer_put_in_by_hand_is_refused():
    layer = DSLayer(Mask((1, 6, 1)), Switch(6), nn.Identity(), nn.Identity(), [Layout(0)], [Layout(0)], 1)
    with pytest.raises(OptionError, match="put in by hand"):
        dslify.cost(nn.Sequential(nn.Conv1d(1, 6, 4), layer))
    with pytest.raises(OptionError, match="holds no Dynamic Switch Layer"):
        dslify.cost(classifier())


def test_a_table_of_several_layers_has_no_ratios():
    one = dslify.insert(codec(), at="1", width=0.25, example_inputs=(torch.randn(2, 1, 64),))
    assert "x" in text(report.surgery(dslify.cost(one)))
    shown = text(report.surgery(dslify.cost(cascade("codec"))))
    assert "full 2" in shown
    assert "x" not in shown.replace("\n", "")
