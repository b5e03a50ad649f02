"""AxisMap + kept sizes -> the light graph: the region again, narrower, with inherited weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from .axes import AxisMap, Kept, sizes
from .functional import empty_graph_module, op_name, put_tensor, tensor_at
from .rules import Axis, Scaled, arguments, indices, project, set_argument

aten = torch.ops.aten
PIECE = 2**18  # values of a weight that are squared at a time


def strongest(axes: AxisMap, kept: Kept) -> dict[Axis, Tensor]:
    """For each atom the entries to keep, in order: those with the largest L2 norm over all parameters
    that contain it."""
    strength: dict[Axis, Tensor] = {}
    for name in axes.weights:
        weight = tensor_at(axes.region, name)
        if not weight.is_floating_point():
            continue
        shrinking = [at for at, axis in enumerate(axes.parameters[name]) if any(atom in kept for atom in axis.atoms())]
        if not shrinking:
            continue
        for at, strengths in _squared_norms(weight.detach(), shrinking).items():
            for atom, share in project(strengths, axes.parameters[name][at]):
                if atom in kept:
                    strength[atom] = strength.get(atom, 0) + share
    return {atom: strength[atom].topk(size).indices.sort().values for atom, size in kept.items()}


def _squared_norms(weight: Tensor, dims: list[int]) -> dict[int, Tensor]:
    """Per axis the sum of squares over all others, piece by piece: squares of the whole would leave the cache."""
    if weight.numel() <= PIECE:
        return {at: sums.double() for at, sums in _sums(weight.float().square(), dims).items()}
    rows = max(1, PIECE * len(weight) // weight.numel())
    parts = [_sums(piece.float().square(), dims) for piece in weight.split(rows)]
    stacked = {at: [part[at].double() for part in parts] for at in dims}
    return {at: torch.cat(sums) if at == 0 else torch.stack(sums).sum(0) for at, sums in stacked.items()}


def _sums(values: Tensor, dims: list[int]) -> dict[int, Tensor]:
    """Per axis the sum over all others; the first axis goes first, since the last ones are often a kernel of 3 x 3."""
    if values.dim() == 1:
        return dict.fromkeys(dims, values)
    rest = values.sum(0) if any(dims) else values
    sums = {
        at: rest.sum([dim for dim in range(rest.dim()) if dim != at - 1]) if rest.dim() > 1 else rest
        for at in dims
        if at
    }
    return sums | ({0: values.flatten(1).sum(1)} if 0 in dims else {})


def build(axes: AxisMap, kept: Kept, projected: frozenset[int] = frozenset()) -> fx.GraphModule:
    """The narrow copy of the region: (cut, *crossing) -> tuple, its own parameters named as the region's.

    projected: boundaries at which a 1x1 projection changes the width; it starts as the selection of the kept channels.
    """
    chosen = strongest(axes, kept)
    size = sizes(kept)
    root = empty_graph_module("Light")
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    entering = {b.node: at for at, b in enumerate(axes.boundaries) if b.is_input}
    leaving = {b.node: at for at, b in enumerate(axes.boundaries) if not b.is_input}
    tensors: dict[int, Any] = {}
    entries = cache(lambda axis: indices(axis, chosen.get))
    placeholders = [node for node in axes.region.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        env[node] = graph.node_copy(node, lambda n: env[n])
    for node in placeholders:
        if entering.get(node) in projected:
            env[node] = _project(graph, root, axes, entering[node], chosen, env[node])
    for node in axes.region.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            outs = [
                _project(graph, root, axes, leaving[n], chosen, env[n]) if leaving.get(n) in projected else env[n]
                for n in node.args[0]
            ]
            graph.output(tuple(outs))
            continue
        if node.op == "get_attr" and node.target in axes.parameters:
            _narrow(root, axes, node.target, kept, entries, tensors)
        elif node.op == "get_attr":
            put_tensor(root, str(node.target), _body(axes, tensor_at(axes.region, str(node.target)), size, kept))
        env[node] = _copied(graph, axes, node, size, kept, env)
    root.graph = graph
    return root


def _body(axes: AxisMap, held: Any, size: Any, kept: Kept) -> Any:
    """The graph of a higher-order operator with its sizes written anew; anything else as it is."""
    if not isinstance(held, fx.GraphModule):
        return held
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in held.graph.nodes:
        env[node] = _copied(graph, axes, node, size, kept, env)
    root = nn.Module()
    for node in held.graph.nodes:
        if node.op == "get_attr":
            put_tensor(root, str(node.target), _body(axes, tensor_at(held, str(node.target)), size, kept))
    return fx.GraphModule(root, graph)


def _copied(
    graph: fx.Graph, axes: AxisMap, node: fx.Node, size: Any, kept: Kept, env: dict[fx.Node, fx.Node]
) -> fx.Node:
    """A node in the narrow copy; `meta["region_node"]` names the original."""
    copied = graph.node_copy(node, lambda n: env[n])
    copied.meta["region_node"] = node.name
    return _resized(graph, axes, node, copied, size, kept, env)


def _narrow(
    root: nn.Module,
    axes: AxisMap,
    target: str,
    kept: Kept,
    entries: Callable[[Axis], Tensor],
    tensors: dict[int, Any],
) -> None:
    """Put the kept entries of one parameter or buffer under the same name; tied ones stay tied."""
    source = tensor_at(axes.region, target)
    if id(source) not in tensors:
        value = source.detach()
        for at, axis in enumerate(axes.parameters[target]):
            if any(atom in kept for atom in axis.atoms()):
                value = value.index_select(at, entries(axis.find()).to(value.device))
        if value.data_ptr() == source.data_ptr() or not value.is_contiguous():
            value = value.clone(memory_format=torch.contiguous_format)
        is_weight = isinstance(source, nn.Parameter)
        tensors[id(source)] = nn.Parameter(value, value.is_floating_point()) if is_weight else value
    put_tensor(root, target, tensors[id(source)])


def _resized(
    graph: fx.Graph, axes: AxisMap, old: fx.Node, new: fx.Node, size: Any, kept: Kept, env: dict[fx.Node, fx.Node]
) -> fx.Node:
    """Write the size arguments of a copied node anew."""
    name = op_name(old)
    if name == "aten.sym_size.int":
        axis = axes.binding.terms[old.args[0]][old.args[1]].find()  # type: ignore[index]
        before, after = axis.hint, size(axis)
        if before != after:  # the graph goes on to reckon in the original sizes
            return _scaled(graph, new, after, before)
        return new
    for argument, compute in axes.binding.rewrites.get(old, {}).items() if kept else ():
        with graph.inserting_before(new):
            value = _written(graph, compute(size), env)
        if argument == "split_sizes" and "split_with_sizes" not in name:
            new.target, new.args, new.kwargs = (
                aten.split_with_sizes.default,
                (new.args[0], value, arguments(old)["dim"]),
                {},
            )
        else:
            set_argument(new, argument, value)
    return new


def _written(graph: fx.Graph, value: Any, env: dict[fx.Node, fx.Node]) -> Any:
    """An argument in terms of the narrow copy's nodes."""
    match value:
        case Scaled():
            return _scaled(graph, env[value.node], value.before, value.after)
        case list() | tuple():
            return [_written(graph, item, env) for item in value]
    return map_arg(value, lambda n: env[n])


def _scaled(graph: fx.Graph, size: fx.Node, before: int, after: int) -> fx.Node:
    """size // before * after, for a size that is a multiple of what `before` has more than `after`."""
    shared = math.gcd(before, after)
    return graph.call_function(
        operator.floordiv, (graph.call_function(operator.mul, (size, after // shared)), before // shared)
    )


def _project(
    graph: fx.Graph, root: nn.Module, axes: AxisMap, at: int, chosen: dict[Axis, Tensor], value: fx.Node
) -> fx.Node:
    """A 1x1 projection of one boundary's channels: selection on the way in, its transpose on the way out."""
    boundary = axes.boundaries[at]
    keep = indices(boundary.channels, chosen.get)
    whole, dtype = boundary.channels.hint, boundary.node.meta["val"].dtype
    selection = torch.zeros(len(keep), whole, dtype=dtype)
    selection[torch.arange(len(keep)), keep] = 1
    matrix = selection if boundary.is_input else selection.T.contiguous()
    axis, rank = boundary.channel_axis or 0, len(boundary.axes)
    convolution = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}.get(rank)
    name = f"projection{at}"
    if axis == 1 and convolution is not None:
        root.register_parameter(name, nn.Parameter(matrix.reshape(*matrix.shape, *[1] * (rank - 2))))
        return graph.call_function(convolution, (value, graph.create_node("get_attr", name)))
    root.register_parameter(name, nn.Parameter(matrix))
    weight = graph.create_node("get_attr", name)
    if axis == rank - 1:
        return graph.call_function(aten.linear.default, (value, weight))
    last = graph.call_function(aten.transpose.int, (value, axis, -1))
    return graph.call_function(aten.transpose.int, (graph.call_function(aten.linear.default, (last, weight)), axis, -1))
