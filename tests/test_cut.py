"""Cut points: containers, modules without one exit, values overwritten in place, and what it all costs to find out."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import dslify
from dslify.capture import capture
from dslify.cut import Flow, cut_points_of, exits, find_cut, partition
from dslify.errors import CutError
from dslify.functional import parameters_read

aten = torch.ops.aten
LOOKS = 4  # at the inputs of each node, for one cut


class Stage(nn.Module):
    """`blocks` and `heads` are never called themselves."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)])
        self.heads = nn.ModuleDict({"a": nn.Conv1d(4, 4, 1), "b": nn.Conv1d(4, 4, 1)})

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](x) + self.heads["b"](x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 1)
        self.stages = nn.ModuleList([Stage(), Stage()])
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stages[0](self.shared(self.shared(self.stem(x))))
        y, (h, _) = self.lstm(self.stages[1](x).transpose(1, 2))
        return self.out(y) + h.sum()


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(2, 1, 10),))


def test_a_container_is_left_by_its_last_part(captured):
    graph = captured.module.graph
    places = exits(graph)
    assert places["stages.1.blocks"] is places["stages.1.blocks.1"]
    assert find_cut(graph, "stages.0.blocks") is places["stages.0.blocks.1"]
    assert places["stages"] is places["stages.1"]
    net = dslify.insert(Net().eval(), "stages.0.blocks", 0.5, (torch.randn(1, 1, 10),))
    assert len(dslify.dsl_layers(net)) == 1


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("shared", r"called 2 times.*near it are"),
        ("lstm", r"returns 2 values.*near it are"),
        ("stages.0.heads", r"its parts stages\.0\.heads\.a, stages\.0\.heads\.b are left by 2 values"),
        ("stages.0.block", r"no such module in the network; the nearest cut points are stages\.0\.blocks"),
        ("x", r"this is an input"),
    ],
)
def test_what_has_no_single_exit_is_refused_with_reason_and_neighbours(captured, at, words):
    with pytest.raises(CutError, match=f"--at {at}: .*{words}"):
        find_cut(captured.module.graph, at, captured.module)


def test_points_tell_what_their_partitions_hold(captured):
    points = {point.path: point for point in cut_points_of(captured, prefix="net.")}
    parts = partition(captured.module.graph, find_cut(captured.module.graph, "stages.0.blocks"))
    point = points["net.stages.0.blocks"]
    assert point.base_params == parameters_read(captured.module, parts.base) == 8 + 3 * 20
    assert point.region_params == parameters_read(captured.module, parts.region)
    assert point.crossing == tuple(node.name for node in parts.crossing)
    assert point.base_macs == 10 * (4 + 4 * 16)
    assert point.base_macs + point.region_macs == 10 * (4 + 2 * 16 + 2 * 4 * 16 + 24 * (4 + 6) + 12)
    assert points["net.shared"].reason == "it is called 2 times"


class Overwrites(nn.Module):
    """`early` reads the stem's value before the module `write` overwrites a part of it."""

    def __init__(self, early):
        super().__init__()
        self.stem, self.side, self.last = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)
        self.early = early

    def forward(self, x):
        y = self.stem(x)
        before = self.side(y) if self.early else 0
        y[:, :2] = y[:, :2] * 3
        after = 0 if self.early else self.side(y)
        return F.relu(self.last(y)) + before + after


def test_a_value_that_the_base_overwrites_later_is_not_read_behind_the_cut():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 10)
    early = Overwrites(True).eval()
    with pytest.raises(CutError, match=r"reads conv1d before .* overwrites that in place"):
        dslify.insert(early, "last", 0.5, (x,))
    reasons = {point.path: point.reason for point in dslify.cut_points(early, (x,))}
    assert "overwrites that in place" in reasons["last"]
    late = Overwrites(False).eval()
    net = dslify.insert(late, "last", 0.5, (x,))
    with torch.no_grad(), dslify.route(net, "full"):
        assert torch.equal(net(x), late(x))


def big_graph(modules, nodes_each):
    """A chain of residual blocks in nested stages, some of which write in place, with the origin of every node."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4)
    value = x
    for at in range(modules):
        skip, path = value, f"stages.{at // 50}.blocks.{at % 50}"
        for _ in range(nodes_each - 1):
            value = graph.call_function(aten.relu.default, (value,))
        value = graph.call_function(aten.add.Tensor, (value, skip))
        for node in list(graph.nodes)[-nodes_each:]:
            node.meta["val"] = torch.empty(2, 4)
            stack = [f"stages.{at // 50}", path, *([f"{path}.act"] if node is not value else [])]
            node.meta["nn_module_stack"] = {each: (each, "Module") for each in stack}
    graph.output(value)
    return graph


class Counted(dict):
    """A dictionary that counts how often it is asked."""

    asked = 0

    def __getitem__(self, key):
        self.asked += 1
        return super().__getitem__(key)


def test_a_cut_of_a_big_graph_looks_at_each_node_a_few_times():
    """2,000 nodes and 500 modules."""
    graph = big_graph(250, 8)
    found = exits(graph)
    assert len(found) == 250 * 2 + 250 // 50 * 2 + 1
    cuts = {node for node in found.values() if isinstance(node, fx.Node)} - {found["stages"]}
    plain = Flow.of(graph)
    flow = Flow(plain.nodes, Counted(plain.reads), plain.written)
    sizes = [len(partition(graph, node, flow=flow).region) for node in cuts]
    assert max(sizes) == 250 * 8 - 7
    assert flow.reads.asked <= LOOKS * len(cuts) * len(plain.nodes)


class TwoHalves(nn.Module):
    """The right half is split off in the base, and read behind the cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, -1)
        return self.left(left).relu() + self.right(right)


def test_a_part_of_a_split_crosses_and_not_the_split():
    graph = capture(TwoHalves(), (torch.randn(2, 4),)).module.graph
    parts = partition(graph, find_cut(graph, "left"))
    assert [node.name for node in parts.crossing] == ["getitem_1"]
