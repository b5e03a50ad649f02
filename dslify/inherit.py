"""Inherited weights, adjusted to what the narrow copy lost.

    select       the kept entries as they are
    rescale      by weights alone: each output keeps the norm of its weights, so with equally strong, uncorrelated
                 inputs the variance it had; weight_norm does so by itself
    statistics   on data: each output of a linear layer, convolution or affine norm gets the mean and deviation that the
                 full path has there, and the running statistics of BatchNorm follow what it reads
    fit          on data: each linear layer and convolution becomes the ridge regression from what the light path hands
                 it to what the full path answers there; norms as with "statistics"

The last two go from input to output, so a layer answers to what the adjusted ones before it really give, and a light
path that lacks depth learns to do without. Nothing is iterated and no gradient is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .axes import AxisMap, Kept
from .errors import OptionError
from .functional import op_name, tensor_at
from .layers import LINEAR, Layer, find_layers, patches
from .light import strongest
from .rules import Axis, arguments, indices

HOWS = ("select", "rescale", "statistics", "fit")
RIDGE = 1e-2  # of the inputs' mean power; towards the inherited weights
WIDEST = 2048  # fan-in that is fitted; beyond, statistics only
ROWS, PER_INPUT = 4096, 8  # positions of a layer that are looked at: at least, and per value of its fan-in
_EMPTY = 1e-12  # variance of a channel that is always the same
LARGEST = 10.0  # factor by which matching statistics may scale, and its inverse
_BLOCK = 1 << 22  # values of inputs that are unfolded at a time


@torch.no_grad()
def adjusted(
    light: fx.GraphModule,
    full: fx.GraphModule,
    axes: AxisMap,
    kept: Kept,
    projected: frozenset[int],
    inputs: Sequence[Sequence[Any]],
    how: str,
) -> None:
    """Adjust the parameters and buffers of a light path in place.

    light: as light.build(axes, kept, projected) made it. full: the region it stands in for; deeper than axes.region
    where the light path lacks branches. inputs: values of (cut, *crossing), one tuple for each batch; "select" and
    "rescale" do not read them. how: one of HOWS. Raises OptionError for another word, or for no inputs.
    """
    if how not in HOWS:
        raise OptionError(f"inherited weights are adjusted by one of {', '.join(HOWS)}; got {how!r}.")
    if how == "select":
        return
    if how in ("statistics", "fit") and not inputs:
        raise OptionError(f"{how!r} needs inputs of the light path to look at; got none.")
    layers = find_layers(light)
    entries = _entries(axes, kept)
    projections = {id(tensor_at(light, f"projection{at}")): at for at in projected}
    if how == "rescale":
        originals = {layer.node.name: layer for layer in find_layers(full)}
        for layer in layers:
            name = layer.node.name
            if name in originals and name in entries and id(layer.weight) not in projections:
                _rescale(layer, originals[name], entries[name][layer.axis])
        return
    targets = list(_targets(full, axes, layers, entries, projections))
    batches = [tuple(batch) for batch in inputs]
    _read(full, targets, batches)
    _answer(light, {target.layer.node: target for target in targets}, batches, how == "fit")


def _entries(axes: AxisMap, kept: Kept) -> dict[str, list[Tensor | None]]:
    """Node -> which entries of each axis of its value the light path has, None for all.

    Not of nodes where what shrinks shares an axis with something that varies, as heads folded into the batch do.
    """
    chosen = strongest(axes, kept)
    found = {}
    for node, terms in axes.binding.terms.items():
        if not all(isinstance(axis, Axis) for axis in terms):
            continue
        shrunk = [any(atom in chosen for atom in axis.atoms()) for axis in terms]
        pairs = list(zip(terms, shrunk, strict=True))
        if all(isinstance(axis.find().size, int) for axis, shrinks in pairs if shrinks):
            found[node.name] = [indices(axis, chosen.get) if shrinks else None for axis, shrinks in pairs]
    return found


def _targets(
    full: fx.GraphModule,
    axes: AxisMap,
    layers: Sequence[Layer],
    entries: dict[str, list[Tensor | None]],
    projections: dict[int, int],
) -> Iterator[_Target]:
    """What each layer should answer, where the full path says so. projections: id of a weight -> its boundary."""
    outputs = [node for node in list(full.graph.nodes)[-1].args[0] if isinstance(node.meta.get("val"), Tensor)]
    first = sum(boundary.is_input for boundary in axes.boundaries)
    nodes = {node.name: node for node in full.graph.nodes}
    for layer in layers:
        name, at = layer.node.name, projections.get(id(layer.weight))
        if at is None and name in entries and name in nodes:
            wanted = nodes[name].args[0] if layer.kind == "batch_norm" else nodes[name]
            yield _Target(layer, wanted.name, entries[name])
        elif at is not None and at >= first:  # what goes in is a selection, and exact
            boundary = axes.boundaries[at]
            moved = layer.axis == -1 and boundary.channel_axis != len(boundary.axes) - 1
            yield _Target(layer, outputs[at - first].name, [], boundary.channel_axis if moved else None)


def _rescale(layer: Layer, original: Layer, kept: Tensor | None) -> None:
    if layer.kind not in LINEAR:
        return
    before = original.matrices().norm(dim=1).flatten()
    before = before if kept is None else before[kept.to(before.device)]
    matrices = layer.matrices()
    after = matrices.norm(dim=1)
    scale = torch.where(after > 0, before.reshape(after.shape) / after, 1)
    layer.set(matrices * scale[:, None], layer.bias)


@dataclass
class _Target:
    """What a layer should answer: rows of the full path's value `name` at random positions, kept channels only. Of a
    batch_norm: what it reads, at all positions.

    entries: kept ones of each axis, None for all. moved: the channels' axis where the light path has them last.
    at: the positions, for each batch.
    """

    layer: Layer
    name: str
    entries: Sequence[Tensor | None]
    moved: int | None = None
    at: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def read(self, value: Tensor, limit: int) -> None:
        value = value if self.moved is None else value.transpose(self.moved, -1)
        for axis, kept in enumerate(self.entries):
            if kept is not None:
                value = value.index_select(axis, kept.to(value.device))
        count = value.numel() // value.shape[self.layer.axis]
        if self.layer.kind == "batch_norm":
            self.rows.append(_moments(value))
            return
        generator = torch.Generator().manual_seed(len(self.at))
        at = torch.arange(count) if count <= limit else torch.randint(count, (limit,), generator=generator)
        self.at.append(at.to(value.device))
        self.rows.append(rows(value, self.layer.axis, self.at[-1]))


def rows(value: Tensor, axis: int, at: Tensor) -> Tensor:
    """(positions, channels) of a value, where positions count through all axes but that of the channels."""
    return value.movedim(axis, -1).flatten(0, -2)[at]


def _read(full: fx.GraphModule, targets: Sequence[_Target], batches: Sequence[tuple[Any, ...]]) -> None:
    wanted: dict[str, list[_Target]] = {}
    for target in targets:
        wanted.setdefault(target.name, []).append(target)

    class Reading(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            for target in wanted.get(n.name, ()):
                fan_in = target.layer.matrices().shape[1] if target.layer.kind in LINEAR else 1
                target.read(value, math.ceil(max(ROWS, PER_INPUT * fan_in) / len(batches)))
            return value

    for batch in batches:
        Reading(full).run(*batch, enable_io_processing=False)


def _answer(
    light: fx.GraphModule, targets: dict[fx.Node, _Target], batches: Sequence[tuple[Any, ...]], fits: bool
) -> None:
    """Run the light path on all batches side by side, and set each layer when the walk comes to it."""
    walks = [fx.Interpreter(light) for _ in batches]
    for walk, batch in zip(walks, batches, strict=True):
        walk.args_iter = iter(batch)
    for node in light.graph.nodes:
        if node.op == "output":
            return
        for walk in walks:
            walk.env[node] = walk.run_node(node)
        target = targets.get(node)
        if target is not None and _set(target, walks, fits):
            for walk in walks:
                if target.layer.magnitude is not None:
                    walk.env[arguments(node)["weight"]] = target.layer.effective()
                walk.env[node] = walk.run_node(node)
        for walk in walks:
            for used in walk.user_to_last_uses.get(node, ()):
                del walk.env[used]


def _set(target: _Target, walks: Sequence[fx.Interpreter], fits: bool) -> bool:
    """Set the layer's weights; whether anything changed."""
    layer = target.layer
    inputs = [walk.env[layer.x] for walk in walks]
    answers = [walk.env[layer.node] for walk in walks]
    if layer.kind == "batch_norm":
        return _restart(target, inputs)
    if fits and layer.kind in LINEAR and layer.matrices().shape[1] <= WIDEST and inputs[0].dim() == answers[0].dim():
        return _fit(target, inputs, answers)
    if layer.bias is None and any("batch_norm" in op_name(user) for user in layer.node.users):
        return False  # its statistics follow what comes
    return _match(target, answers)


def _moments(value: Tensor) -> Tensor:
    """Of every channel the number of values, their sum and their squares': (3, channels), in float64."""
    channels = value.movedim(1, 0).flatten(1).double()
    return torch.stack([torch.ones_like(channels).sum(1), channels.sum(1), channels.square().sum(1)])


def _restart(target: _Target, inputs: Sequence[Tensor]) -> bool:
    """Running statistics moved by as much as those of these inputs differ from the full path's.

    Where the full path's are those of the same inputs, this is what a pass in training mode with momentum None gives.
    """
    moments = [torch.stack(parts).sum(0) for parts in (target.rows, [_moments(x) for x in inputs])]
    (theirs, power), (mine, found) = ((m[1] / m[0], (m[2] - m[1].square() / m[0]).clamp_min(0)) for m in moments)
    mean, variance = target.layer.weight, target.layer.bias
    mean += mine - theirs
    if variance is not None:
        variance *= torch.where((found > _EMPTY) & (power > _EMPTY), found / power, 1)
    return True


def _match(target: _Target, answers: Sequence[Tensor]) -> bool:
    """Give every channel the mean and deviation of its target; without a bias the root mean square."""
    layer = target.layer
    found = torch.cat([rows(y, layer.axis, at) for y, at in zip(answers, target.at, strict=True)]).double()
    wanted = torch.cat(target.rows).double()
    centred = layer.bias is not None
    mine, theirs = ((v.mean(0) if centred else torch.zeros_like(v[0])) for v in (found, wanted))
    power, aim = (found - mine).square().mean(0), (wanted - theirs).square().mean(0)
    scale = torch.where(power > _EMPTY, (aim / power).sqrt(), 1).clamp(1 / LARGEST, LARGEST)
    if layer.kind == "norm":
        layer.weight.mul_(scale)
    if layer.bias is not None:
        layer.bias.copy_(scale * layer.bias + theirs - scale * mine)
    if layer.kind != "norm":
        matrices = layer.matrices()
        layer.set(matrices * scale.reshape(len(matrices), 1, -1), None)
    return True


def _fit(target: _Target, inputs: Sequence[Tensor], answers: Sequence[Tensor]) -> bool:
    """Ridge regression of the target on the layer's inputs, towards the weights it has."""
    layer = target.layer
    start = layer.matrices().double()
    groups, fan_in, _ = start.shape
    gram = start.new_zeros(groups, fan_in, fan_in)
    cross, total, aim, count = (
        torch.zeros_like(start),
        start.new_zeros(groups, fan_in),
        torch.zeros_like(start[:, 0]),
        0,
    )
    for x, y, at, wanted in zip(inputs, answers, target.at, target.rows, strict=True):
        for part in range(0, len(at), step := max(1, _BLOCK // (groups * fan_in))):
            seen = patches(layer, x, y, at[part : part + step]).double().transpose(0, 1)
            goal = wanted[part : part + step].double().unflatten(1, (groups, -1)).transpose(0, 1)
            gram += seen.mT @ seen
            cross += seen.mT @ goal
            total += seen.sum(1)
            aim += goal.sum(1)
            count += seen.shape[1]
    rounding = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1).max()
    if layer.bias is not None:
        gram -= total[:, :, None] * total[:, None] / count
        cross -= total[:, :, None] * aim[:, None] / count
    power = gram.diagonal(dim1=1, dim2=2).mean(1)
    if not power.max() > rounding:
        return False  # the inputs never change
    ridge = (RIDGE * power.clamp_min(RIDGE * power.max()))[:, None, None]
    solved = torch.linalg.solve(
        gram + ridge * torch.eye(fan_in, dtype=gram.dtype, device=gram.device), cross + ridge * start
    )
    bias = None if layer.bias is None else ((aim - (total[:, None] @ solved)[:, 0]) / count).flatten()
    layer.set(solved, bias)
    return True
