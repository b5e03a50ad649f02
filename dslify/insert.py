"""The surgery: insert() puts a Dynamic Switch Layer into a network, remove() takes it out again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .axes import AxisMap, Boundary, analyse, choose, decide_projections
from .capture import Graph, capture, evaluating, scope_inputs
from .cut import Partition, find_cut, partition
from .errors import CutError, OptionError, VerifyError
from .functional import copied, tensor_at
from .light import build
from .macs import node_macs
from .plan import Plan, narrowed, projections
from .switch import DSLayer, Layout, Mask, Switch, dsl_layers, route
from .verify import PERMUTED, check_light, permutation_error

MASKS = ("channel", "element")
EXACT = 1e-6  # relative: full route against the given network


def insert(
    model: nn.Module,
    at: str,
    width: float = 0.1,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    scope: str | None = None,
    to: str | None = None,
    mask: str = "channel",
    projection: bool = True,
    cost: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Cut `model` behind `at` and put a Dynamic Switch Layer there.

    model: left untouched, nothing is shared with it. at: path of a submodule ("encoder.block3") or name of a graph node.
    width: share of every free axis that the light path keeps, in (0, 1]. cost: instead of a width, the share of the
    region's MACs that the light path may have, in (0, 1). example_inputs: positional inputs of one forward (tensors of
    shape (batch, ...)); found out when not given (dslify.example_inputs_for). scope: submodule whose forward is captured;
    the rest of the model need not be capturable. to: last module of the region (default: everything behind the cut).
    mask: "channel" or "element". projection: let a learned 1x1 projection narrow the trunk where that saves MACs.

    Returns a new module in eval mode: the captured graph with a DSLayer as one node, or with `scope` a copy of the model
    that holds it. Its full route is the given network. Untrained, it takes the full path always (threshold 0).
    Raises CaptureError, CutError, OptionError, VerifyError.
    """
    _check_options(width, cost, mask)
    if example_inputs is None:
        from .load import example_inputs_for

        example_inputs, _ = example_inputs_for(model)
    inner, args, kwargs = scope_inputs(model, scope, example_inputs, example_kwargs) if scope else (model, example_inputs, dict(example_kwargs or {}))
    captured = capture(inner, args, kwargs)
    net = insert_into(captured, _inside(at, scope), width, scope, _inside(to, scope) if to else None, mask, projection, cost, seed)
    if scope is None:
        return net
    memo = {id(inner): net}
    with evaluating(model):
        whole = copied(model, memo)
    whole.eval()
    return whole


def insert_into(
    captured: Graph, at: str, width: float, scope: str | None, to: str | None, mask: str, projection: bool, cost: float | None, seed: int
) -> fx.GraphModule:
    """insert() for a network that is captured already; consumes the capture."""
    module = captured.module
    cut = find_cut(module.graph, at, module)
    parts = partition(module.graph, cut, find_cut(module.graph, to) if to else None)
    macs = node_macs(module, captured.args, captured.kwargs)
    full = _region(module, parts)
    axes = analyse(full)
    inputs = _region_inputs(module, parts, captured)
    error = permutation_error(axes, inputs, seed)
    if not error < PERMUTED:
        raise VerifyError(
            f"The light path behind {at} cannot be trusted: permuting its channels changes the answer by {error:.1e} of its size, so an "
            "operator there is not understood; choose another cut, or report the network."
        )
    if cost is not None:
        width = _width_for(axes, cost, projection)
    projected = decide_projections(axes, width) if projection else frozenset()
    kept = choose(axes, width, projected) if width < 1 else {}
    light = build(axes, kept, projected)
    check_light(light, full, inputs)

    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # the switch's first weights
    layer, routable = _layer(module, parts, axes, light, full, mask)
    torch.random.set_rng_state(generator_state)

    samples = _samples(captured)
    computing = [node for node in parts.base if node.op == "call_function"]
    region_macs = sum(macs.get(node, 0) for node in parts.region)
    layer.plan = Plan(
        at=at,
        scope=scope,
        width=width,
        dynamic=captured.dynamic,
        cut_shape=tuple(str(size) if isinstance(size, int) else "*" for size in cut.meta["val"].shape),
        crossing=tuple(node.name for node in parts.crossing),
        params={"base": _param_count(module, computing), "full": axes.params(), "light": _count(light)},
        macs={"base": sum(macs.get(n, 0) for n in parts.base) // samples, "full": region_macs // samples, "light": axes.macs(kept, projected)},
        projections=projections(axes, kept, projected),
        tensors=narrowed(axes, kept, projected),
        ledger=axes.ledger,
        seed=seed,
    )
    net = _assemble(module, parts, layer, routable)
    net.meta["dslify"] = {
        "source": None,
        "at": at,
        "scope": scope,
        "dynamic": captured.dynamic,
        "example": [[list(leaf.shape), str(leaf.dtype).removeprefix("torch.")] for leaf in pytree.tree_leaves((captured.args, captured.kwargs)) if isinstance(leaf, Tensor)],
    }
    _check_full_route(net, captured)
    return net


def remove(net: nn.Module) -> nn.Module:
    """The network without its Dynamic Switch Layers: the full path in their place, with the weights as they are now.

    The mask goes too. Returns a new module (with a scope: a copy of the whole model); `net` is untouched.
    """
    if not dsl_layers(net):
        raise OptionError("This network holds no Dynamic Switch Layer that could be removed.")
    plain = copied(net)
    for module in list(plain.modules()):
        if isinstance(module, fx.GraphModule):
            for node in list(module.graph.nodes):
                if node.op == "call_module" and isinstance(module.get_submodule(node.target), DSLayer):
                    _inline(module, node)
            module.meta.pop("dslify", None)
    return plain


def _check_options(width: float, cost: float | None, mask: str) -> None:
    if not 0 < width <= 1:
        raise OptionError(f"width is the share of channels that the light path keeps, above 0 and at most 1; got {width}.")
    if cost is not None and not 0 < cost < 1:
        raise OptionError(f"cost is the light path's share of the MACs behind the cut, between 0 and 1; got {cost}.")
    if mask not in MASKS:
        raise OptionError(f"mask is one of {', '.join(MASKS)}; got {mask!r}.")


def _inside(path: str, scope: str | None) -> str:
    return path.removeprefix(f"{scope}.") if scope else path


def _region(module: fx.GraphModule, parts: Partition) -> fx.GraphModule:
    """The region as a module of its own: (cut, *crossing) -> tuple. Shares its parameters with `module`."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in (parts.cut, *parts.crossing):
        env[node] = graph.placeholder(node.name)
        env[node].meta.update(node.meta)
    weights = {used for node in parts.region for used in node.all_input_nodes if used.op == "get_attr"}
    for node in module.graph.nodes:
        if node in weights or node in parts.region:
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[node] for node in parts.outputs))
    return fx.GraphModule(module, graph, class_name="Full")


def _region_inputs(module: fx.GraphModule, parts: Partition, captured: Graph) -> tuple[Any, ...]:
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


def _layer(module: fx.GraphModule, parts: Partition, axes: AxisMap, light: nn.Module, full: nn.Module, mask: str) -> tuple[DSLayer, bool]:
    batch = _batch_symbol(module.graph)
    inputs = [layout(node, batch) for node in (parts.cut, *parts.crossing)]
    outputs = [layout(node, batch) for node in parts.outputs]
    routable = batch is not None and all(found is not None for found in (*inputs, *outputs))
    first = inputs[0] if inputs[0] is not None and inputs[0].axis is not None else Layout(0)
    channel_axis = _cut_channels(axes.boundaries[0], first)
    shape = [1] * len(parts.cut.meta["val"].shape)
    for at, size in enumerate(parts.cut.meta["val"].shape):
        if at == channel_axis or (mask == "element" and isinstance(size, int) and at != first.axis):
            shape[at] = size
    layer = DSLayer(
        Mask(shape),
        Switch(shape[channel_axis]),
        light,
        full,
        [first, *(found or Layout() for found in inputs[1:])],
        [found or Layout() for found in outputs],
        channel_axis,
        routable=routable,
    )
    return layer.eval(), routable


def _cut_channels(boundary: Boundary, first: Layout) -> int:
    """The cut's channel axis: the one parameters act on, else the second (images, sound) or the last (sequences)."""
    if boundary.channel_axis is not None and boundary.channel_axis != first.axis:
        return boundary.channel_axis
    rank = len(boundary.axes)
    at = 1 if rank in (2, 4, 5) else rank - 1
    if rank < 2 or not isinstance(boundary.node.meta["val"].shape[at], int):
        raise CutError(f"The value at the cut, of {rank} axes, has no channel axis of fixed size; choose another cut.")
    return at


def _batch_symbol(graph: fx.Graph) -> Any:
    """The symbol of the first input's first axis, None where the capture fixed it."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.dim():
            size = value.shape[0]
            return None if isinstance(size, int) else size.node.expr
    return None


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
    for at, size in enumerate(value.shape):
        if isinstance(size, int) or batch not in size.node.expr.free_symbols:
            continue
        times = size.node.expr / batch
        return Layout(at, int(times)) if times.is_Integer else None
    return Layout()


def _assemble(module: fx.GraphModule, parts: Partition, layer: DSLayer, routable: bool) -> fx.GraphModule:
    """base, the layer as one node, tail."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    name = next(name for name in ("dsl", *(f"dsl_{i}" for i in range(1, 100))) if not hasattr(module, name))
    module.add_submodule(name, layer)
    for node in parts.base:
        env[node] = graph.node_copy(node, lambda n: env[n])
    call = graph.call_module(name, tuple(env[node] for node in (parts.cut, *parts.crossing)))
    if len(parts.outputs) == 1:
        env[parts.outputs[0]] = call
        call.meta["val"] = parts.outputs[0].meta.get("val")
    else:
        call.meta["val"] = tuple(node.meta.get("val") for node in parts.outputs)
        for at, node in enumerate(parts.outputs):
            env[node] = graph.call_function(operator.getitem, (call, at))
            env[node].meta["val"] = node.meta.get("val")
    for node in (*parts.tail, list(module.graph.nodes)[-1]):
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.set_codegen(module.graph._codegen)
    for node in reversed(graph.nodes):  # parameters that only the region read
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    net = fx.GraphModule(module, graph, class_name=module.__class__.__name__)
    net.eval()
    return net


def _inline(module: fx.GraphModule, call: fx.Node) -> None:
    """Replace a DSLayer's node by the nodes of its full path."""
    layer = module.get_submodule(str(call.target))
    full = layer.full
    env: dict[fx.Node, Any] = dict(zip((n for n in full.graph.nodes if n.op == "placeholder"), call.args, strict=True))
    outputs: tuple[Any, ...] = ()
    with module.graph.inserting_before(call):
        for node in full.graph.nodes:
            if node.op == "output":
                outputs = tuple(env[out] for out in node.args[0])
            elif node.op != "placeholder":
                if node.op == "get_attr":
                    _adopt(module, full, str(node.target))
                env[node] = module.graph.node_copy(node, lambda n: env[n])
    if len(outputs) == 1:
        call.replace_all_uses_with(outputs[0])
    else:
        for user in list(call.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
    target = str(call.target)
    module.graph.erase_node(call)
    module.delete_submodule(target)
    module.graph.lint()
    module.recompile()


def _adopt(module: nn.Module, source: nn.Module, target: str) -> None:
    """Put a tensor of the full path back under its own name."""
    owner, _, name = target.rpartition(".")
    here = module
    for part in owner.split(".") if owner else ():
        if not hasattr(here, part):
            here.add_module(part, nn.Module())
        here = here.get_submodule(part)
    value = tensor_at(source, target)
    if isinstance(value, nn.Parameter):
        here.register_parameter(name, value)
    else:
        here.register_buffer(name, value)


def _width_for(axes: AxisMap, cost: float, projection: bool) -> float:
    """The largest width whose light path has at most `cost` of the region's MACs, by bisection."""
    whole = axes.macs()

    def share(width: float) -> float:
        projected = decide_projections(axes, width) if projection else frozenset()
        return axes.macs(choose(axes, width, projected), projected) / max(1, whole)

    low, high = 1e-3, 1.0
    if share(low) > cost:
        raise OptionError(f"cost {cost} cannot be reached by narrowing: the narrowest light path has {share(low):.3f} of the region's MACs.")
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= cost else (low, middle)
    return round(low, 4)


def _check_full_route(net: fx.GraphModule, captured: Graph) -> None:
    with torch.no_grad():
        expected = captured.expected
        with route(net, "full"):
            found = net(*captured.args, **captured.kwargs)
    for mine, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(theirs, Tensor) and theirs.numel():
            scale = theirs.abs().max().double().clamp_min(1e-12) if theirs.is_floating_point() else 1.0
            if not ((mine.double() - theirs.double()).abs().max() / scale <= EXACT) and theirs.isfinite().all():
                raise VerifyError("The full route does not give the network's own answer on the example input.")


def _samples(captured: Graph) -> int:
    first = next((leaf for leaf in pytree.tree_leaves((captured.args, captured.kwargs)) if isinstance(leaf, Tensor) and leaf.dim()), None)
    return max(1, first.shape[0]) if first is not None else 1


def _param_count(module: nn.Module, nodes: Sequence[fx.Node]) -> int:
    targets = {str(used.target) for node in nodes for used in node.all_input_nodes if used.op == "get_attr"}
    tensors = {id(tensor): tensor.numel() for tensor in (tensor_at(module, target) for target in targets) if isinstance(tensor, nn.Parameter)}
    return sum(tensors.values())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
