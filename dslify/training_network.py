"""A network with a layer as it trains: in training mode, with the layer's parts and all weights shared.

A captured graph is the network in eval mode, and flipping flags in it is wrong: DropPath and the dropout of attention
have left no trace there. So the given model is captured once more, as it trains, cut at the same place, and given the
tensors of the network with the layer: what one learns the other has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .attempt import attempt, traced_copy
from .capture import SECONDS, attempts, scope_inputs
from .cut import Partition, find_cut, partition
from .deadline import OutOfTime
from .errors import CaptureError, OptionError, TrainError, one_line
from .functional import copied, op_name, put_tensor, tensor_at
from .graft import assemble, batch_of, layout, region_module
from .segments import Stretch
from .switch import DSLayer, Layout, Paths

ROUTES = ("full", "mixed")
_BATCH_STATISTICS = 5  # position of `training` among the arguments of aten.batch_norm


class JointLayer(DSLayer):
    """A DSLayer as it trains jointly: both paths run on every sample.

    What goes on is the full answer or, with routes="mixed", the light one for the `share` of the batch, or of all its
    segments, with the lowest scores, so that what follows learns to read both. mask, switch and light are those of
    `layer`; full is its full path in training mode, which may read more values (sizes, for random numbers): `read` are
    the positions of light's own.
    """

    def __init__(self, layer: DSLayer, light: nn.Module, full: nn.Module, read: list[int], routes: str, share: float):
        super().__init__(
            layer.mask, layer.switch, light, full, layer.inputs, layer.outputs, layer.channel_axis, layer.routable,
            layer.plan,
        )  # fmt: skip
        self.threshold, self.scale, self.segments = layer.threshold, layer.scale, layer.segments
        self.unmasked = layer.unmasked
        self.read, self.routes, self.share = read, routes, share

    def forward(self, cut: Tensor, *crossing: Any) -> Any:
        masked = self.mask(cut)
        inputs = (masked, *crossing)
        reads = self.switch_input(cut, masked)
        score = self.switch(self.pooled(reads))
        light, full = self.light(*(inputs[at] for at in self.read)), self.full(*inputs)
        self.paths = Paths(masked, reads, score, light=light, full=full, segments=self._segments(masked))
        outputs = full
        if self.routes == "mixed" and (cheap := round(self.share * len(score))):
            taken = torch.zeros_like(score, dtype=torch.bool).index_fill(0, score.detach().argsort()[:cheap], True)
            self.paths = replace(self.paths, light_taken=taken)
            outputs = self._chosen_answers(light, full, taken, self.paths.segments)
        return outputs[0] if len(outputs) == 1 else outputs

    def _chosen_answers(
        self, light: tuple[Any, ...], full: tuple[Any, ...], taken: Tensor, segments: int
    ) -> tuple[Any, ...]:
        """Of each output the light answer where `taken` says so, sample by sample or segment by segment."""
        if self.segments is not None:
            by_sample, frames = taken.view(-1, segments), self.segments.frames
            return tuple(
                torch.where(_along(by_sample, theirs, place, out, frames), mine, theirs)
                for place, out, mine, theirs in zip(self.outputs, self.segments.outputs, light, full, strict=True)
            )
        at_light, at_full = taken.nonzero().squeeze(1), (~taken).nonzero().squeeze(1)
        count = len(taken)
        return tuple(
            self._merge(
                place,
                place.take(mine, at_light, count),
                place.take(theirs, at_full, count),
                at_light,
                at_full,
            )
            for place, mine, theirs in zip(self.outputs, light, full, strict=True)
        )


def _along(taken: Tensor, value: Tensor, place: Layout, stretch: Stretch, frames: int) -> Tensor:
    """Flags of segments, (batch, segments), as these lie in an output of the region; broadcasts against it.

    frames: of a segment at the cut.
    """
    axis = stretch.axis or 0
    flags = taken.repeat_interleave(stretch.at(frames), 1)[:, : value.shape[axis]]
    return flags[(...,) + (None,) * (value.dim() - 2)].movedim((0, 1), (place.axis or 0, axis))


def training_network(
    net: nn.Module,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    routes: str = "full",
    share: float = 0.5,
) -> nn.Module:
    """`net` as it trains: dropout, DropPath and batch statistics as in `model`, the tensors those of `net`.

    net: from dslify.insert(model, ...), with one layer whose region reaches to the end of the captured network (no
    `to=`). model: the plain network, for its code; its weights are not used and it is left as it was. args, kwargs:
    an example of a batch of at least two samples. routes: what follows the layer reads, see JointLayer; share: of the
    light answers with "mixed", in (0, 1).

    Run it on a batch, then add dsl_loss(it) to the task's own loss and step an optimizer over net.parameters().
    Raises OptionError for other routes, CaptureError when `model` cannot be captured in training mode, TrainError when
    that graph does not fit `net`.
    """
    if routes not in ROUTES or not 0 < share < 1:
        raise OptionError(f"routes is full or mixed and share lies between 0 and 1; got {routes!r} and {share}.")
    graph, layer = _only_layer(net)
    if routes == "mixed" and not layer.routable:
        raise TrainError(
            "routes=mixed needs a cut at which samples can be told apart; this layer routes whole batches."
        )
    inner, inner_args, inner_kwargs = scope_inputs(model, graph.meta["dslify"]["scope"], args, kwargs)
    if layer.plan.at not in dict(inner.named_modules()):
        raise TrainError(
            f"Joint training finds the cut again by a module's name, and {layer.plan.at} is none of the given model."
        )
    captured = _captured(inner, inner_args, inner_kwargs)
    parts = partition(captured.graph, find_cut(captured.graph, layer.plan.at, inner))
    full = region_module(captured, parts)
    read = _read_by_light(captured, parts, layer)
    _share(full, cast(fx.GraphModule, layer.full))
    joint = JointLayer(layer, _with_batch_statistics(cast(fx.GraphModule, layer.light)), full, read, routes, share)
    trained = assemble(captured, parts, joint)
    _share(trained, graph)
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return copied(net, {**shared, id(graph): trained}).train()


def _only_layer(net: nn.Module) -> tuple[fx.GraphModule, DSLayer]:
    """The graph with the layer, and the layer."""
    found = [
        (graph, graph.get_submodule(str(node.target)), node)
        for graph in net.modules()
        if isinstance(graph, fx.GraphModule)
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), DSLayer)
    ]
    if len(found) != 1:
        raise TrainError(f"Joint training is for networks with one Dynamic Switch Layer; this one has {len(found)}.")
    graph, layer, call = found[0]
    read = {user for user in call.users if op_name(user) or user.op == "call_module"}
    if read:
        raise TrainError(
            f"Joint training is for layers whose region reaches to the network's end; after this one comes "
            f"{next(iter(read))}. Insert it without `to`."
        )
    return graph, cast(DSLayer, layer)


def _read_by_light(captured: fx.GraphModule, parts: Partition, layer: DSLayer) -> list[int]:
    """Positions, in the training graph's (cut, *crossing), of what the light path reads: by name, else the next value
    that keeps its samples in the same place. Raises TrainError where there is none."""
    batch = batch_of(captured.graph, Layout(0))
    entering = (parts.cut, *parts.crossing)
    places = [layout(node, batch) or Layout() for node in entering]
    names = [str(node.target) for node in cast(fx.GraphModule, layer.light).graph.nodes if node.op == "placeholder"]
    read = [0]
    for name, place in list(zip(names, layer.inputs, strict=True))[1:]:
        fitting = [at for at, found in enumerate(places) if found == place and at not in read]
        fitting.sort(key=lambda at: entering[at].name != name)
        read += fitting[:1]
    leaving = [layout(node, batch) or Layout() for node in parts.outputs]
    if len(read) != len(names) or places[0] != layer.inputs[0] or leaving != list(layer.outputs):
        raise TrainError(
            f"In training mode other values cross the cut at {layer.plan.at} than in eval mode ({len(entering)} in and "
            f"{len(leaving)} out, against {len(names)} and {len(layer.outputs)}), so the light path cannot stand in "
            "for them; train with base and full path frozen instead."
        )
    return read


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The model's graph in training mode, with a batch (and a length, where it can be) that varies."""
    flags = {module: module.training for module in model.modules()}
    model.train()
    reason = "its inputs hold no batch that could vary"
    try:
        for dynamic, example in list(attempts(args, kwargs))[:-1]:
            try:
                return attempt(traced_copy(model), *example, dynamic, SECONDS / 2)
            except (Exception, OutOfTime) as error:
                reason = one_line(error)
    finally:
        for module, flag in flags.items():
            module.training = flag
    raise CaptureError(
        f"{type(model).__name__} cannot be captured in training mode: {reason}. Train with base and full path frozen "
        "instead."
    )


def _share(module: fx.GraphModule, source: fx.GraphModule) -> None:
    """Give the graph `module` the tensors that `source` holds under the same names; it keeps its own constants."""
    for node in module.graph.nodes:
        if node.op != "get_attr" or not isinstance(own := tensor_at(module, str(node.target)), Tensor):
            continue
        try:
            other = tensor_at(source, str(node.target))
        except (AttributeError, KeyError):
            other = None
        if isinstance(other, Tensor) and (other.shape, other.dtype) == (own.shape, own.dtype):
            put_tensor(module, str(node.target), other)
        elif isinstance(own, nn.Parameter):
            raise TrainError(
                f"The model has a parameter {node.target} of shape {tuple(own.shape)} that the network with the layer "
                "does not have; give the model that the network was made from."
            )


def _with_batch_statistics(light: fx.GraphModule) -> fx.GraphModule:
    """The light path on the same tensors, its BatchNorms as in training: the narrow copy of an eval graph has no other
    trace of training."""
    shared = {id(tensor): tensor for tensor in (*light.parameters(), *light.buffers())}
    own = cast(fx.GraphModule, copied(light, dict(shared)))
    for node in own.graph.nodes:
        if op_name(node) == "aten.batch_norm.default":
            node.update_arg(_BATCH_STATISTICS, True)
    own.recompile()
    return own
