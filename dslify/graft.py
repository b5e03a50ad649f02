"""Graph surgery around a cut: the region as a module, the layer as one node, and back."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .axes import AxisMap, Boundary
from .capture import Graph
from .cut import Partition
from .errors import CutError
from .functional import empty_graph_module, hint_of, is_tensor, put_tensor, symbolic, tensor_at
from .mask import Mask
from .switch import DSLayer, Layout, Switch, SwitchKind


def region_module(module: fx.GraphModule, parts: Partition) -> fx.GraphModule:
    """The region as a module of its own: (cut, *crossing) -> tuple. Shares its parameters with `module`."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in (parts.cut, *parts.crossing):
        env[node] = graph.placeholder(node.name)
        env[node].meta.update(node.meta)
    inside = {*parts.region, *(used for node in parts.region for used in node.all_input_nodes if used.op == "get_attr")}
    for node in module.graph.nodes:
        if node in inside:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in parts.outputs))
    return _holding(module, graph, "Full")


def _holding(module: fx.GraphModule, graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """A graph module of what `graph` reads of `module`, and nothing else."""
    own = empty_graph_module(class_name)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            put_tensor(own, str(node.target), tensor_at(module, str(node.target)))
    own.graph = graph
    return own


def region_inputs(module: fx.GraphModule, parts: Partition, captured: Graph) -> tuple[Any, ...]:
    """Values of (cut, *crossing) on the example."""
    wanted = {node: at for at, node in enumerate((parts.cut, *parts.crossing))}
    found: dict[int, Any] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                found[wanted[n]] = value.detach().clone() if isinstance(value, Tensor) else value
            return value

    with torch.no_grad():
        Watching(module).run(*pytree.tree_leaves((captured.args, captured.kwargs)), enable_io_processing=False)
    return tuple(found[at] for at in range(len(wanted)))


def layouts(
    module: fx.GraphModule, parts: Partition, samples: Layout
) -> tuple[list[Layout | None], list[Layout | None]]:
    """Where (cut, *crossing) and the outputs of a region keep their samples; samples: as in make_layer()."""
    batch = batch_of(module.graph, samples)
    entering = [layout(node, batch) for node in (parts.cut, *parts.crossing)]
    return entering, [layout(node, batch) for node in parts.outputs]


def make_layer(
    module: fx.GraphModule,
    parts: Partition,
    axes: AxisMap,
    light: nn.Module,
    full: nn.Module,
    inputs: Sequence[Any],
    mask: str,
    kind: SwitchKind,
    seed: int,
    samples: Layout,
) -> DSLayer:
    """The DSLayer of a cut, in eval mode, with a fresh mask ("channel", "element" or "activation") and switch.

    samples: where the graph's first input keeps its samples.
    """
    entering, leaving = layouts(module, parts, samples)
    first = entering[0] if entering[0] is not None and entering[0].axis is not None else Layout(0)
    channel_axis = cut_channels(axes.boundaries[0], first)
    shape = [1] * len(parts.cut.meta["val"].shape)
    for at, size in enumerate(map(symbolic, parts.cut.meta["val"].shape)):
        if at == channel_axis or (mask == "element" and isinstance(size, int) and at != first.axis):
            shape[at] = size
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    switch = Switch(shape[channel_axis], kind=kind)
    torch.random.set_rng_state(state)
    layer = DSLayer(
        Mask(shape, "activation" if mask == "activation" else "weight"),
        switch,
        light,
        full,
        [first, *(found or Layout() for found in entering[1:])],
        [found or Layout() for found in leaving],
        channel_axis,
        routable=None not in entering and None not in leaving and _separable(full, entering, leaving, inputs),
    )
    return layer.eval()


def _separable(full: nn.Module, entering: Sequence[Any], leaving: Sequence[Any], inputs: Sequence[Any]) -> bool:
    """Whether taking samples out of a batch and running the region on them gives those samples' answers.

    Only values whose batch axis holds several entries per sample leave a doubt (which of them belong together).
    """
    if all(place.per_sample == 1 for place in (*entering, *leaving)):
        return True
    batch = 2
    cut = inputs[0]
    if cut.shape[entering[0].axis or 0] // entering[0].per_sample != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    doubled = []
    for place, value in zip(entering, inputs, strict=True):
        if place.scales:
            doubled.append(value * batch)
        elif place.axis is None or not isinstance(value, Tensor):
            doubled.append(value)
        else:
            noise = torch.rand(value.shape, generator=generator) if value.is_floating_point() else 0
            doubled.append(torch.cat([value, value + noise], place.axis))
    with torch.no_grad():
        whole = full(*doubled)
        for sample in range(batch):
            index = torch.tensor([sample])
            part = full(*(place.take(value, index, batch) for place, value in zip(entering, doubled, strict=True)))
            for place, mine, both in zip(leaving, part, whole, strict=True):
                if place.axis is not None and not torch.allclose(
                    mine, place.take(both, index, batch), rtol=1e-3, atol=1e-4
                ):
                    return False
    return True


def cut_channels(boundary: Boundary, first: Layout) -> int:
    """The cut's channel axis: the one parameters act on, else the second (images, sound) or the last (sequences)."""
    if boundary.channel_axis is not None and boundary.channel_axis != first.axis:
        return boundary.channel_axis
    rank = len(boundary.axes)
    at = 1 if rank in (2, 4, 5) else rank - 1
    if rank < 2 or not isinstance(symbolic(boundary.node.meta["val"].shape[at]), int):
        raise CutError(f"The value at the cut, of {rank} axes, has no channel axis of fixed size; choose another cut.")
    return at


def batch_of(graph: fx.Graph, samples: Layout) -> Any:
    """The symbol of the batch size, None where the capture fixed it. samples: as in make_layer()."""
    size = symbolic(_size_of(graph, samples))
    return None if isinstance(size, int) else size / samples.per_sample


def samples_of(graph: fx.Graph, samples: Layout) -> int:
    """Batch size of the captured values. samples: as in make_layer()."""
    return max(1, hint_of(_size_of(graph, samples)) // samples.per_sample)


def _size_of(graph: fx.Graph, samples: Layout) -> Any:
    """Size of the axis with the samples in the graph's first tensor; 1 where there is none."""
    for node in graph.nodes:
        if node.op == "placeholder" and is_tensor(node) and node.meta["val"].dim() and samples.axis is not None:
            return node.meta["val"].shape[samples.axis]
    return 1


def layout(node: fx.Node, batch: Any) -> Layout | None:
    """Where a captured value keeps its samples, from its symbolic shape; None if they cannot be told apart."""
    value = node.meta.get("val")
    if batch is None:
        return None
    if not isinstance(value, Tensor):
        expression = getattr(getattr(value, "node", None), "expr", None)
        if expression is None or batch not in expression.free_symbols:
            return Layout()
        return Layout(scales=True) if batch not in (expression / batch).free_symbols else None
    for at, size in enumerate(map(symbolic, value.shape)):
        if isinstance(size, int) or batch not in size.free_symbols:
            continue
        times = size / batch
        return Layout(at, int(times)) if times.is_Integer else None
    return Layout()


def assemble(module: fx.GraphModule, parts: Partition, layer: DSLayer) -> fx.GraphModule:
    """base, the layer as one node, tail: a new module around the graph of `module`, which is used up."""
    graph, last = module.graph, list(module.graph.nodes)[-1]
    name = next(name for name in ("dsl", *(f"dsl_{i}" for i in range(1, 100))) if not hasattr(module, name))
    module.add_submodule(name, layer)
    with graph.inserting_before(last):
        call = graph.call_module(name, (parts.cut, *parts.crossing))
        values = [node.meta.get("val") for node in parts.outputs]
        call.meta["val"] = values[0] if len(values) == 1 else tuple(values)
        for at, node in enumerate(parts.outputs):
            given = call if len(values) == 1 else graph.call_function(operator.getitem, (call, at))
            given.meta["val"] = values[at]
            node.replace_all_uses_with(given)
    for node in parts.tail:  # the base runs as a whole before the layer, the tail after it
        last.prepend(node)
    for node in reversed(parts.region):
        graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):  # parameters that only the region read
        if not node.users:
            graph.erase_node(node)
    return _holding(module, graph, module.__class__.__name__)


def inline(module: fx.GraphModule, call: fx.Node) -> None:
    """Replace a DSLayer's node by the nodes of its full path."""
    full = cast(fx.GraphModule, module.get_submodule(f"{call.target}.full"))
    env: dict[fx.Node, Any] = dict(zip((n for n in full.graph.nodes if n.op == "placeholder"), call.args, strict=True))
    outputs: tuple[Any, ...] = ()
    with module.graph.inserting_before(call):
        for node in full.graph.nodes:
            if node.op == "output":
                outputs = tuple(env[out] for out in node.args[0])
            elif node.op != "placeholder":
                if node.op == "get_attr":
                    put_tensor(module, str(node.target), tensor_at(full, str(node.target)))
                env[node] = module.graph.node_copy(node, env.__getitem__)
    if len(outputs) == 1:
        call.replace_all_uses_with(outputs[0])
    else:
        for user in list(call.users):
            user.replace_all_uses_with(outputs[cast(int, user.args[1])])
            module.graph.erase_node(user)
    target = str(call.target)
    module.graph.erase_node(call)
    module.delete_submodule(target)
    module.graph.lint()
    module.recompile()
