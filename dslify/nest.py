"""Cutting a network that holds Dynamic Switch Layers already: which of its graphs a new cut lies in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .capture import Graph, capture
from .cut import exits
from .errors import CaptureError, CutError
from .functional import copied, tensor_at
from .graft import inline
from .guards import Guards
from .switch import DSLayer, Layout, dsl_layers, route


@dataclass(frozen=True)
class Host:
    """The graph that a new cut goes into: the network's own (layer None), or the full path of a layer.

    first: where the graph's first input keeps its samples.
    """

    graph: Graph
    layer: DSLayer | None
    first: Layout


def host_of(net: fx.GraphModule, at: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Host:
    """Where the cut `at` lies in a network with layers, with the values that enter there on the example inputs.

    net: gets the captured values of its nodes if it was loaded from a file, which does not hold them. Raises CutError.
    """
    remember_values(net, args, kwargs)
    entering: dict[DSLayer, tuple[Any, ...]] = {}
    layers = dsl_layers(net)
    hooks = [layer.register_forward_pre_hook(lambda layer, seen: entering.update({layer: seen})) for layer in layers]
    with torch.no_grad(), route(net, "full"):
        expected = net(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    places: dict[str, DSLayer | None] = {}
    for layer in (None, *layers):  # outermost first: a path that reaches into a full path leaves it there
        graph = net.graph if layer is None else _full(layer).graph
        places |= dict.fromkeys(exits(graph), layer)
        places |= {node.name: layer for node in graph.nodes if node.name == at}
    if at not in places:
        raise CutError(f"--at {at}: no such module in this network; the cut points are {', '.join(places)}.")
    dynamic = layers[0].plan.dynamic if layers[0].plan else ""
    host = places[at]
    if host is None:
        return Host(Graph(net, args, kwargs, dynamic, 0.0, expected), None, Layout(0))
    with torch.no_grad(), route(host, "full"):
        answer = host.full(*entering[host])
    return Host(Graph(_full(host), entering[host], {}, dynamic, 0.0, answer), host, host.inputs[0])


def plain(region: fx.GraphModule) -> fx.GraphModule:
    """The region with the full path in place of every layer inside it; itself, if it holds none."""
    if not dsl_layers(region):
        return region
    flat = cast(fx.GraphModule, copied(region))
    flatten(flat)
    return flat


def flatten(net: nn.Module) -> None:
    """Put the full path in place of every layer, innermost first."""
    for module in reversed([module for module in net.modules() if isinstance(module, fx.GraphModule)]):
        for node in list(module.graph.nodes):
            if _layer_at(module, node) is not None:
                inline(module, node)


def _layer_at(module: nn.Module, node: fx.Node) -> DSLayer | None:
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, DSLayer) else None


def _full(layer: DSLayer) -> fx.GraphModule:
    return cast(fx.GraphModule, layer.full)


def _graphs(net: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The network's own graph, and the full path of every layer."""
    yield net
    yield from map(_full, dsl_layers(net))


def remember_values(net: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give every node its captured value again (`meta["val"]`): capture the plain network, which is the same nodes."""
    nodes = [node for module in _graphs(net) for node in module.graph.nodes]
    if all("val" in node.meta for node in net.graph.nodes if node.op == "placeholder"):
        return
    for at, node in enumerate(nodes):
        node.meta["place"] = at
    flat = plain(net)
    for node in list(flat.graph.nodes):
        if node.op == "call_module" and isinstance(flat.get_submodule(str(node.target)), Guards):
            flat.graph.erase_node(node)
    flat.recompile()
    again = capture(flat, args, kwargs).module
    mine, theirs = ([n for n in g.graph.nodes if n.op in ("placeholder", "call_function")] for g in (flat, again))
    called, called_again = ([n.op == "placeholder" or n.target for n in found] for found in (mine, theirs))
    if called != called_again:
        raise CaptureError(
            "The network from this file cannot be captured a second time; insert both layers before it is saved."
        )
    for node, found in zip(mine, theirs, strict=True):
        nodes[node.meta["place"]].meta["val"] = found.meta["val"]
    for node in nodes:
        del node.meta["place"]
    for module in _graphs(net):
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(held := tensor_at(module, str(node.target)), Tensor):
                node.meta["val"] = held.detach().to("meta")
    for layer in reversed(dsl_layers(net)):
        _hand_over(net, layer)


def _hand_over(net: fx.GraphModule, layer: DSLayer) -> None:
    """The values of a layer's call and of its full path's inputs."""
    for module in _graphs(net):
        for call in module.graph.nodes:
            if _layer_at(module, call) is not layer:
                continue
            outputs = list(_full(layer).graph.nodes)[-1].args[0]
            values = tuple(node.meta.get("val") for node in outputs)  # type: ignore[union-attr]
            call.meta["val"] = values[0] if len(values) == 1 else values
            for user in call.users if len(values) > 1 else ():
                user.meta["val"] = values[user.args[1]]
            inputs = [node for node in _full(layer).graph.nodes if node.op == "placeholder"]
            for entering, given in zip(inputs, call.args, strict=True):
                entering.meta["val"] = given.meta.get("val") if isinstance(given, fx.Node) else given
