"""Light paths that are no narrow copy: a constant answer (exit), pooled features and a linear layer (head), identity.

Each is a graph over ATen like any other light path, so that it is stored and exported in the same way.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import CutError
from .functional import empty_graph_module, is_tensor, size_words, symbolic
from .lengths import size_node
from .switch import Layout, Switch

aten = torch.ops.aten
ANSWERS = ("exit", "head", "identity")


def answering(
    kind: str,
    region: fx.GraphModule,
    inputs: Sequence[Any],
    entering: Sequence[Layout | None],
    leaving: Sequence[Layout | None],
    channel_axis: int,
    learned: bool = True,
) -> fx.GraphModule:
    """A light path (cut, *crossing) -> tuple in place of `region`, for any number of samples.

    kind "exit" (GC, arXiv 2303.08970): a constant for each output, held as answer0, answer1 ... (see mean_answer), and
    the same all along an axis whose size varies. It starts as the mean of the full path's answers on the example.
    learned: floating-point constants are parameters, else buffers.
    "head" (an early exit): mean and deviation of the cut over its free axes, and for each output one linear layer,
    which starts as that constant. Outputs that are no floating-point numbers, and those that all samples share, stay
    constants. "identity" (layer dropping): what enters at the cut leaves; one output of the same shape and type.

    inputs: values of (cut, *crossing). entering, leaving: where these and the outputs keep their samples, None where
    that is not known. channel_axis: of the cut. Raises CutError where the size of an output cannot be reckoned from
    those of the inputs, or for an identity that does not fit.
    """
    nodes = list(region.graph.nodes)
    outputs: tuple[fx.Node, ...] = nodes[-1].args[0]
    site = _Site([node for node in nodes if node.op == "placeholder"])
    if kind == "identity":
        _check_identity(site.inputs[0], outputs)
        answers: list[Any] = [site.inputs[0]]
    else:
        with torch.no_grad():
            full = region(*inputs)
        pooled = _pooled(site, entering[0] or Layout(0), channel_axis) if kind == "head" else None
        answers = []
        for at, (node, value, layout) in enumerate(zip(outputs, full, leaving, strict=True)):
            place, sizes = layout or Layout(), site.sizes(kind, node)
            if not isinstance(value, Tensor):
                answers += sizes
                continue
            varying = [axis for axis, size in enumerate(sizes) if isinstance(size, fx.Node) and axis != place.axis]
            times = {axis: sizes[axis] for axis in varying}
            answer = mean_answer(value, place, varying)
            if pooled is None or not value.is_floating_point() or place.axis is None:
                found = _constant(site, f"answer{at}", answer, place, learned)
                if place.axis is not None:
                    total = sizes[place.axis]
                    single = place.per_sample == 1
                    times[place.axis] = total if single else site.call(operator.floordiv, total, place.per_sample)
            else:
                found = _linear(site, f"head{at}", answer, place, pooled, inputs[0], channel_axis)
            answers.append(_repeated(site, found, times, value.dim()))
    site.graph.output(tuple(answers))
    site.graph.eliminate_dead_code()
    site.root.graph = site.graph
    return site.root.eval()  # type: ignore[return-value]


def mean_answer(value: Tensor, layout: Layout, varying: Sequence[int] = ()) -> Tensor:
    """The mean of an output over its samples, and along the axes `varying`, as "exit" holds it: of the output's shape
    without the axis of the samples (with several entries per sample, those come first), 1 on the axes that vary. Whole
    numbers are rounded. Where all samples share the output it is the output itself.
    """
    exact = value.is_floating_point() or value.is_complex()
    mean = value.detach() if exact else value.detach().double()
    if varying:
        mean = mean.mean(list(varying), keepdim=True)
    if layout.axis is not None:
        rest = [size for at, size in enumerate(mean.shape) if at != layout.axis]
        entries = [] if layout.per_sample == 1 else [layout.per_sample]
        mean = layout.rows(mean).mean(0).reshape([*entries, *rest])
    return mean.clone() if exact else mean.round().to(value.dtype)


class _Site:
    """The graph that is being built. given: the region's placeholders, which it copies."""

    def __init__(self, given: Sequence[fx.Node]):
        self.graph, self.root = fx.Graph(), empty_graph_module("Light")
        self.inputs = [self.graph.node_copy(node) for node in given]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def sizes(self, kind: str, node: fx.Node) -> list[fx.Node | int]:
        """Of the axes of an output of the region, or the value of an output that is itself a size."""
        value = node.meta["val"]
        wanted = value.shape if is_tensor(node) else [value]
        countable = all(isinstance(size, (int, torch.SymInt)) for size in wanted)
        found = [size_node(self.graph, size, self.inputs) for size in wanted] if countable else [None]
        known = [size for size in found if size is not None]
        if len(known) < len(found):
            what = f"of shape {_shape(value)}" if is_tensor(node) else f"a {type(value).__name__}"
            raise CutError(
                f"light {kind!r} needs outputs whose size follows from those of the values at the cut, and that of "
                f"{node.name}, {what}, does not; end the light path earlier with `to`, or leave light at narrow."
            )
        return known


def _constant(site: _Site, name: str, answer: Tensor, layout: Layout, learned: bool) -> fx.Node:
    """The answer, with the axis of the samples at its place: of size 1, or of a sample's entries."""
    if learned and answer.is_floating_point():
        site.root.register_parameter(name, nn.Parameter(answer))
    else:
        site.root.register_buffer(name, answer)
    held = site.graph.get_attr(name)
    if layout.axis is None:
        return held
    if layout.per_sample == 1:
        return site.call(aten.unsqueeze.default, held, layout.axis)
    return site.call(aten.movedim.int, held, 0, layout.axis)


def _pooled(site: _Site, first: Layout, channel_axis: int) -> fx.Node:
    """Mean and deviation over the free axes, (batch, 2 channels), of what Switch.features reads."""
    cut = site.inputs[0]
    shape, axis = cut.meta["val"].shape, first.axis or 0
    batch = site.call(aten.sym_size.int, cut, axis)
    if first.per_sample > 1:
        batch = site.call(operator.floordiv, batch, first.per_sample)
    others = [at for at in range(len(shape)) if at not in (axis, channel_axis)]
    ordered = site.call(aten.permute.default, cut, [axis, *others, channel_axis])
    entries = site.call(aten.reshape.default, ordered, [batch, -1, symbolic(shape[channel_axis])])
    mean = site.call(aten.mean.dim, entries, [1], True)
    away = site.call(aten.sub.Tensor, entries, mean)
    variance = site.call(aten.mean.dim, site.call(aten.mul.Tensor, away, away), [1])  # as Switch.features, and why
    above = site.call(aten.add.Scalar, variance, Switch.FLOOR**2)  # a root has no gradient at zero
    return site.call(aten.cat.default, [site.call(aten.squeeze.dim, mean, 1), site.call(aten.sqrt.default, above)], 1)


def _linear(site: _Site, name: str, answer: Tensor, layout: Layout, pooled: fx.Node, cut: Tensor, axis: int) -> fx.Node:
    """A linear layer on the pooled features, with the axis of the samples at its place. axis: the cut's channels."""
    weight = torch.zeros(answer.numel(), 2 * cut.shape[axis], dtype=cut.dtype, device=answer.device)
    site.root.register_parameter(f"{name}_weight", nn.Parameter(weight))
    site.root.register_parameter(f"{name}_bias", nn.Parameter(answer.flatten().to(cut.dtype)))
    held = (site.graph.get_attr(f"{name}_weight"), site.graph.get_attr(f"{name}_bias"))
    found = site.call(aten.linear.default, pooled, *held)
    if answer.dtype != cut.dtype:
        found = site.call(aten.to.dtype, found, answer.dtype)
    rest = answer.shape if layout.per_sample == 1 else answer.shape[1:]
    found = site.call(aten.reshape.default, found, [-1, *rest])
    return site.call(aten.movedim.int, found, 0, layout.axis) if layout.axis else found


def _repeated(site: _Site, found: fx.Node, times: Mapping[int, fx.Node | int], rank: int) -> fx.Node:
    """The answer in full size, in memory of its own, which what follows may write into. times: by axis."""
    if times:
        return site.call(aten.repeat.default, found, [times.get(axis, 1) for axis in range(rank)])
    return site.call(aten.clone.default, found, memory_format=torch.contiguous_format)


def _check_identity(cut: fx.Node, outputs: Sequence[fx.Node]) -> None:
    way = "name with `to` a module after which the shape is that of the cut again, or take another light path."
    if len(outputs) != 1 or not is_tensor(outputs[0]):
        raise CutError(f"light 'identity' needs one tensor that leaves the region, and {len(outputs)} values do; {way}")
    (entering, leaving) = cut.meta["val"], outputs[0].meta["val"]
    if [*map(symbolic, entering.shape)] != [*map(symbolic, leaving.shape)] or entering.dtype != leaving.dtype:
        raise CutError(
            f"light 'identity' needs what leaves the region to be like what enters it: {_shape(entering)} of "
            f"{entering.dtype} enters, {_shape(leaving)} of {leaving.dtype} leaves; {way}"
        )


def _shape(value: Tensor) -> str:
    return "x".join(map(str, size_words(value)))
