"""Graphs through JSON: the same function, bit for bit, and nothing that runs when a hostile file is read."""

from __future__ import annotations

import contextlib
import copy
import json
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from transformers.modeling_outputs import BaseModelOutput

from dslify.capture import capture
from dslify.errors import StoreError
from dslify.graph_json import decode, encode
from dslify.guards import Guards
from dslify.nameable import FUNCTIONS, operator_named, tree_spec
from tests.zoo import ZOO

NAMES = [name for name in ZOO if ZOO[name].scope is None]


class Everything(nn.Module):
    """Nested inputs and outputs, keywords, slices, infinities, types, frozen weights, a name that is no identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.bias.requires_grad_(False)
        self.register_buffer("window", torch.hann_window(6))
        self.register_buffer("table", torch.arange(6.0))
        self.odd = nn.ModuleDict({"a-b": nn.Linear(6, 6)})

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, extra: dict[str, Tensor]) -> dict[str, Any]:
        y = self.odd["a-b"](self.second(self.first(x)) * self.window + self.table)
        masked = y.masked_fill(y < 0, float("-inf")).clamp(min=-1e30)
        return {"y": [y[:, 1:5:2], masked], "half": pair[0].to(torch.float16), "sum": (pair[1] + extra["k"],)}


def everything_inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (torch.randn(2, 6), (torch.randn(2, 3), torch.randn(2, 3))), {"extra": {"k": torch.randn(2, 3)}}


def graph_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    graph = capture(module.eval(), args, kwargs).module
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Guards):
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


@pytest.fixture(scope="module")
def everything() -> fx.GraphModule:
    return graph_of(Everything(), *everything_inputs())


def through_text(graph: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    data = json.loads(json.dumps(encode(graph, tensors)))
    own = {
        key: nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.clone()
        for key, t in tensors.items()
    }
    return decode(data, own), data


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_the_zoo_come_back_bit_for_bit(name):
    network = ZOO[name]
    graph = graph_of(network.build(), (network.batch(1),), {})
    again, data = through_text(graph)
    batch = network.batch(1, seed=3)
    with torch.no_grad():
        for mine, theirs in zip(leaves(again(batch)), leaves(graph(batch)), strict=True):
            assert torch.equal(mine, theirs)
    assert list(again.state_dict()) == list(graph.state_dict())
    assert encode(again, {}) == data
    stacks = [[node.meta.get("nn_module_stack") or None for node in one.graph.nodes] for one in (again, graph)]
    assert stacks[0] == stacks[1]
    assert any(stacks[0])


def test_everything_comes_back(everything):
    again, data = through_text(everything)
    args, kwargs = everything_inputs()
    mine, theirs = again(*args, **kwargs), everything(*args, **kwargs)
    assert pytree.tree_structure(mine) == pytree.tree_structure(theirs)
    assert all(torch.equal(a, b) for a, b in zip(leaves(mine), leaves(theirs), strict=True))
    assert mine["half"].dtype == torch.float16
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in everything.named_parameters()
    ]
    assert not again.second.bias.requires_grad
    assert list(again.state_dict()) == list(everything.state_dict())
    assert encode(again, {}) == data
    mine["y"][1].clamp(-9, 9).sum().backward()
    assert again.first.weight.grad.abs().sum() > 0


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Answer:
    pair: Pair
    nothing: Tensor | None = None


class OwnOutput(BaseModelOutput):
    """A user's own output class, which a file may not name."""


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 4, 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Answer:
        y, _ = self.layer(x)
        with torch.autocast("cpu", enabled=False):
            y = self.out(y)
        with torch.set_grad_enabled(True):
            z = self.out(torch.cat([y, y], -1))
        return Answer(Pair(y, z))


def test_recurrent_layers_and_regions_come_back_and_own_classes_as_dicts_and_tuples():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    graph = graph_of(Mixed(), (x,), {})
    again, data = through_text(graph)
    assert {"aten.lstm.input", "higher_order.wrap_with_autocast"} <= {item["target"] for item in data["nodes"]}
    assert isinstance(graph(x), Answer)
    found = again(x)
    assert type(found) is dict
    assert list(found) == ["pair"]
    assert type(found["pair"]) is tuple
    assert all(torch.equal(a, b) for a, b in zip(found["pair"], graph(x).pair, strict=True))
    assert encode(again, {}) == data

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> OwnOutput:  # type: ignore[override]
            return OwnOutput(last_hidden_state=super().forward(x))

    again, _ = through_text(graph_of(Own(6, 2), (x,), {}))
    assert list(again(x)) == ["last_hidden_state"]
    assert type(again(x)) is dict


def test_tied_weights_stay_tied_and_transient_buffers_transient():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in ("a.weight", "b.weight", "c.table"):
        x = graph.call_function(operator.mul, (x, graph.create_node("get_attr", name)))
    graph.output(x)
    root = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Module()})
    root["b"].weight = root["a"].weight
    root["c"].register_buffer("table", torch.full((2,), 3.0))
    module = fx.GraphModule(root, graph)
    module.c.register_buffer("table", root["c"].table, persistent=False)  # fx makes every buffer persistent
    again, _ = through_text(module)
    assert again.a.weight is again.b.weight
    assert list(again.state_dict()) == ["a.weight", "b.weight"]
    assert torch.equal(again(torch.ones(1)), module(torch.ones(1)))


def test_meta_and_class_name_stay(everything):
    everything.meta["dslify"] = {"at": "first", "example": [[[2, 6], "float32"]]}
    again, _ = through_text(everything)
    assert again.meta["dslify"] == everything.meta.pop("dslify")
    assert type(again).__name__ == type(everything).__name__


def test_every_listed_function_is_found_again():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for function in FUNCTIONS.values():
        graph.call_function(function, (x, x, x))
    graph.output(x)
    again, _ = through_text(fx.GraphModule(nn.Module(), graph))
    targets = [node.target for node in again.graph.nodes if node.op == "call_function"]
    assert targets == list(FUNCTIONS.values())


def test_what_a_file_cannot_hold_is_named():
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Bilinear(2, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x).sigmoid()

    with pytest.raises(StoreError, match="inner is a Bilinear"):
        encode(fx.symbolic_trace(Calls()))
    graph = fx.Graph()
    graph.output(graph.call_method("sigmoid", (graph.placeholder("x"),)))
    with pytest.raises(StoreError, match="call_method"):
        encode(fx.GraphModule(nn.Module(), graph))
    graph = fx.Graph()
    graph.output(graph.call_function(print, (graph.placeholder("x"),)))
    with pytest.raises(StoreError, match="print"):
        encode(fx.GraphModule(nn.Module(), graph))
    graph = fx.Graph()
    graph.output(graph.call_function(operator.add, (graph.placeholder("x"), 1 + 2j)))
    with pytest.raises(StoreError, match="complex"):
        encode(fx.GraphModule(nn.Module(), graph))


# Hostile files. RUN is source that leaves a mark; each change puts it, or something that leads to it, into a graph.

RUN = "getattr(__import__('os'), 'mkdir')('was_run')"  # without a dot, since paths are split at those


def node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(item for item in data["nodes"] if item["op"] == op)


def wrapped(kind: str, **fields: Any) -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    inner = {"type": kind, "context": None, "children_spec": [leaf], **fields}
    arguments = {"type": "builtins.tuple", "context": "null", "children_spec": [inner]}
    keywords = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [arguments, keywords]}])


FACTORY = {"default_factory_module": "hostile_module", "default_factory_name": "x", "dict_context": ["a"]}
ENUM = json.dumps({"__enum__": True, "fqn": "hostile_module:X", "name": "A"})
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "argument name": lambda d: d["codegen"]["arguments"].__setitem__(0, f"x={RUN}"),
    "argument name, a keyword": lambda d: d["codegen"]["arguments"].__setitem__(0, "lambda"),
    "placeholder": lambda d: node(d, "placeholder").update(target=f"x={RUN}"),
    "node name": lambda d: node(d, "call_function").update(name=f"x={RUN};y"),
    "class name": lambda d: d.update({"class": f"X:\n {RUN}"}),
    "keyword of a call": lambda d: node(d, "call_function").update(kwargs={f"a={RUN}, b": 1}),
    "tensor path": lambda d: d["tensors"].update({f'a"), {RUN}, ("': next(iter(d["tensors"].values()))}),
    "module path": lambda d: d["modules"].update({f'a"), {RUN}, ("': None}),
    "path of a method": lambda d: node(d, "get_attr").update(target="forward.__globals__"),
    "path of a class": lambda d: node(d, "get_attr").update(target="__class__"),
    "tensor over a method": lambda d: d["tensors"].update(forward=next(iter(d["tensors"].values()))),
    "call of a method": lambda d: node(d, "call_function").update(op="call_module", target="__dict__.update"),
    "method of a value": lambda d: node(d, "call_function").update(op="call_method", target="save"),
    "unknown kind of node": lambda d: node(d, "call_function").update(op="run"),
    "eval": lambda d: node(d, "call_function").update(target="builtins.eval", args=[RUN], kwargs={}),
    "attrgetter": lambda d: node(d, "call_function").update(target="operator.attrgetter", args=["a"], kwargs={}),
    "os.system": lambda d: node(d, "call_function").update(target="os.system", args=["touch was_run"], kwargs={}),
    "torch.load": lambda d: node(d, "call_function").update(target="torch.load", args=["x"], kwargs={}),
    "TorchScript's save": lambda d: node(d, "call_function").update(target="aten.save.default", args=[1, "x"]),
    "from_file": lambda d: node(d, "call_function").update(target="aten.from_file.default", args=["x", True, 9]),
    "image file": lambda d: node(d, "call_function").update(target="image.write_file.default"),
    "not an operator": lambda d: node(d, "call_function").update(target="aten.__class__.mro"),
    "device": lambda d: node(d, "call_function").update(args=[{"device": f"cpu'); {RUN} #"}]),
    "dtype": lambda d: node(d, "call_function").update(args=[{"dtype": "load"}]),
    "number": lambda d: node(d, "call_function").update(args=[{"float": RUN}]),
    "unknown value": lambda d: node(d, "call_function").update(args=[{"source": RUN}]),
    "node from behind": lambda d: node(d, "call_function").update(args=[{"node": d["nodes"][-2]["name"]}]),
    "same node twice": lambda d: d["nodes"].insert(1, d["nodes"][0]),
    "keyword of the network": lambda d: d["codegen"].update(
        {"in": d["codegen"]["in"].replace("extra", "a':0}),0);" + RUN.replace("'", "\\u0027") + "#")}
    ),
    "module named by a tree": lambda d: d["codegen"].update(
        {"in": wrapped("collections.defaultdict", context=FACTORY)}
    ),
    "enumeration named by a tree": lambda d: d["codegen"].update({"in": wrapped("builtins.dict", context=ENUM)}),
    "type of a tree": lambda d: d["codegen"].update({"in": wrapped("collections.namedtuple", context='"x"')}),
    "missing weight": lambda d: d["tensors"].update({next(iter(d["tensors"])): "nowhere"}),
    "no nodes": lambda d: d.update(nodes=None),
    "nodes of another kind": lambda d: d.update(nodes=[3]),
}


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module that leaves a mark when it is imported."""
    (tmp_path / "hostile_module.py").write_text(f"import enum\n{RUN}\nx = list\nclass X(enum.Enum):\n    A = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_and_runs_nothing(everything, change, hostile_folder):
    tensors: dict[str, Tensor] = {}
    data = copy.deepcopy(encode(everything, tensors))
    CHANGES[change](data)
    with pytest.raises(StoreError) as refusal:
        decode(data, tensors)
    assert len(str(refusal.value)) < 400
    assert not (hostile_folder / "was_run").exists()
    assert "hostile_module" not in sys.modules


def fires_by_codegen() -> None:
    graph = fx.Graph()
    graph.output(graph.create_node("placeholder", f"x={RUN}", name="x"))
    fx.GraphModule(nn.Module(), graph)


def fires_by_path() -> None:
    graph = fx.Graph()
    path = f'a"), {RUN}, ("'
    root = nn.Module()
    object.__setattr__(root, path, torch.ones(1))
    graph.output((graph.placeholder("x"), graph.create_node("get_attr", path)))
    module = fx.GraphModule(root, graph)
    module.a = None
    module(1)


def fires_by_from_file() -> None:
    torch.ops.aten.from_file.default("was_run", True, 9)


def fires_by_tree() -> None:
    pytree.treespec_loads(wrapped("collections.defaultdict", context=FACTORY))


def fires_by_enumeration() -> None:
    pytree.treespec_loads(wrapped("builtins.dict", context=ENUM))


@pytest.mark.parametrize(
    "fire", [fires_by_codegen, fires_by_path, fires_by_from_file, fires_by_tree, fires_by_enumeration]
)
def test_the_same_changes_do_run_without_the_checks(fire, hostile_folder):
    """Or else the test above could not fail."""
    with contextlib.suppress(AttributeError, TypeError, RuntimeError):
        fire()
    assert (hostile_folder / "was_run").exists()


def test_operators_and_trees_that_are_needed_pass():
    assert operator_named("aten.lstm.input") is torch.ops.aten.lstm.input
    assert operator_named("torchvision.nms.default").name() == "torchvision::nms"
    for value in [((1, [2]), {"a": {"b": 3}}), ({"x": None},)]:
        spec = pytree.tree_structure(value)
        assert tree_spec(pytree.treespec_dumps(spec)) == spec
    from transformers.modeling_outputs import BaseModelOutput

    spec = pytree.tree_structure(BaseModelOutput(last_hidden_state=torch.ones(1)))
    assert tree_spec(pytree.treespec_dumps(spec)) == spec
