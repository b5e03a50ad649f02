"""A network with a layer as three graphs from its inputs to its outputs: front (base, mask, switch), light and full."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .functional import empty_graph_module, put_tensor, tensor_at
from .guards import Guards
from .switch import DSLayer

_RESERVED = ("masked", "score", "threshold")  # names of values that the parts add
SCORED = "dsl_scored"  # name of the front graph's Scored


@dataclass(frozen=True)
class Parts:
    """The graphs around the first layer that a network's input meets. They share their tensors with the network.

    front: (*inputs) -> (masked, score, *passed), score of shape (batch,). light, full: (masked, *passed) -> outputs,
    flat, without None, each with what follows the layer. passed: the other values of the base that these read, by name;
    numbers are among them. full holds the layers inside the full path, and both hold those that follow. inputs,
    outputs: names, of the arguments of the network's forward and of the keys of its answer where there are any.
    """

    layer: DSLayer
    front: fx.GraphModule
    light: fx.GraphModule
    full: fx.GraphModule
    passed: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Scored(nn.Module):
    """Mask and switch of a layer: the activation at the cut -> (masked, score), one score for each sample, as a call
    of a part is decided as a whole; where a layer has segments, the runtime makes a call of each."""

    def __init__(self, layer: DSLayer):
        super().__init__()
        self.mask, self.switch = layer.mask, layer.switch
        whole = copy(layer)
        whole.segments = None
        self._pooled, self._switch_input = whole.pooled, whole.switch_input

    def forward(self, cut: Tensor) -> tuple[Tensor, Tensor]:
        masked = self.mask(cut)
        return masked, self.score(self._switch_input(cut, masked))

    def score(self, read: Tensor) -> Tensor:
        """read: what the switch reads, the activation after the mask or before it (DSLayer.unmasked)."""
        found: Tensor = self.switch(self._pooled(read))
        return found


def first_call(net: fx.GraphModule) -> fx.Node | None:
    """The node of the first layer in a graph, None without one."""
    calls = (node for node in net.graph.nodes if node.op == "call_module")
    return next((node for node in calls if isinstance(net.get_submodule(str(node.target)), DSLayer)), None)


def parts_of(net: fx.GraphModule) -> Parts:
    """The three graphs of a network that holds a layer. The checks of its inputs' shapes are left out."""
    call = cast(fx.Node, first_call(net))
    layer = cast(DSLayer, net.get_submodule(str(call.target)))
    behind = {call}
    for node in net.graph.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    output = list(net.graph.nodes)[-1]
    base = [node for node in net.graph.nodes if node not in behind and node is not output and not _guards(net, node)]
    tail = [node for node in net.graph.nodes if node in behind and node is not call and node is not output]
    crossing = [value for value in call.args[1:] if isinstance(value, fx.Node)]
    read = [used for node in (*tail, output) for used in node.all_input_nodes if used not in behind]
    constant = _constant(net)
    passed = tuple(dict.fromkeys(node for node in (*crossing, *read) if node not in constant))
    leaves = cast(Sequence[Any], pytree.tree_leaves(output.args[0]))
    inputs = _input_names(net)
    names = _output_names(net, len(leaves), {*inputs, *_RESERVED, *(node.name for node in passed)})
    answers = {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, fx.Node)}

    def path(region: nn.Module) -> fx.GraphModule:
        graph, own = fx.Graph(), empty_graph_module(type(net).__name__)
        cut = graph.placeholder("masked")
        env: dict[fx.Node, Any] = {node: graph.placeholder(node.name) for node in passed}
        for value in crossing:
            _copy(graph, own, net, value, env)
        entering = [cut, *(env[value] if isinstance(value, fx.Node) else value for value in call.args[1:])]
        leaving = _region(graph, own, region, entering, len(layer.outputs))
        if len(layer.outputs) == 1:
            env[call] = leaving[0]
        for node in tail:
            if call in node.all_input_nodes and len(layer.outputs) > 1:  # a getitem
                env[node] = leaving[cast(int, node.args[1])]
            else:
                _copy(graph, own, net, node, env)
        for answer in answers.values():
            _copy(graph, own, net, answer, env)
        graph.output(tuple(env[answer] for answer in answers.values()))
        own.graph = graph
        return own

    return Parts(
        layer,
        _front(net, layer, base, cast(fx.Node, call.args[0]), passed),
        path(layer.light),
        path(layer.full),
        tuple(node.name for node in passed),
        inputs,
        tuple(answers),
    )


def _constant(net: fx.GraphModule) -> set[fx.Node]:
    """Nodes that no input reaches: weights, and what is made of weights alone. Every graph that reads them has them."""
    found: set[fx.Node] = set()
    for node in net.graph.nodes:
        if node.op != "placeholder" and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _guards(net: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(net.get_submodule(str(node.target)), Guards)


def _front(
    net: fx.GraphModule, layer: DSLayer, base: Sequence[fx.Node], cut: fx.Node, passed: Sequence[fx.Node]
) -> fx.GraphModule:
    graph, own = fx.Graph(), empty_graph_module(type(net).__name__)
    env: dict[fx.Node, Any] = {}
    for node in base:
        _copy(graph, own, net, node, env)
    own.add_module(SCORED, Scored(layer).eval())
    scored = graph.call_module(SCORED, (env[cut],))
    both = [graph.call_function(operator.getitem, (scored, at)) for at in (0, 1)]
    graph.output((*both, *(env[node] for node in passed)))
    own.graph = graph
    return own


def _region(graph: fx.Graph, own: fx.GraphModule, region: nn.Module, entering: Sequence[Any], count: int) -> list[Any]:
    """A path's nodes; the light path is a module of its own, whose weights have the full path's names."""
    if isinstance(region, fx.GraphModule) and first_call(region) is not None:
        env: dict[fx.Node, Any] = {}
        given = iter(entering)
        for node in region.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                return [env[value] for value in node.args[0]]
            else:
                _copy(graph, own, region, node, env)
    own.add_module("dsl_path", region)
    call = graph.call_module("dsl_path", tuple(entering))
    return [graph.call_function(operator.getitem, (call, at)) for at in range(count)]


def _copy(graph: fx.Graph, own: fx.GraphModule, source: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> None:
    """A node behind those that it reads, of which only constant ones can be missing."""
    if node not in env:
        for used in node.all_input_nodes:
            _copy(graph, own, source, used, env)
        if node.op in ("get_attr", "call_module"):
            put_tensor(own, str(node.target), tensor_at(source, str(node.target)))
        env[node] = graph.node_copy(node, env.__getitem__)


def _input_names(net: fx.GraphModule) -> tuple[str, ...]:
    """As the forward calls them ("input", not fx's "input_1"), where that tells them apart."""
    nodes = [node for node in net.graph.nodes if node.op == "placeholder"]
    names = tuple(str(node.target) for node in nodes)
    plain = all(name.isidentifier() and name not in _RESERVED for name in names) and len(set(names)) == len(names)
    return names if plain else tuple(node.name for node in nodes)


def _output_names(net: fx.GraphModule, count: int, taken: Container[str]) -> tuple[str, ...]:
    """ "output" for a single value, else keys of a dict or dataclass where there are any, else output_0, output_1 ...

    taken: names of other values, which no key may have.
    """
    spec = getattr(net.graph._codegen, "pytree_info", None)
    numbered = tuple(f"output_{at}" for at in range(count)) if count != 1 else ("output",)
    if spec is None or spec.out_spec is None:
        return numbered
    tree = pytree.tree_unflatten(list(range(count)), spec.out_spec)
    names = tuple(
        "_".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", at)))) for key in path)
        for at, (path, _) in enumerate(pytree.tree_flatten_with_path(tree)[0])
    )
    plain = all(name.isidentifier() and name not in taken for name in names) and len(set(names)) == count
    return names if plain else numbered
