"""compact(): the channels that a mask has set to zero are taken out of mask, switch, light path, full path and base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .cost import Cost, cost
from .errors import OptionError, VerifyError
from .functional import copied, tensors_of
from .mask import Mask
from .plan import NarrowedTensor, Plan
from .producers import narrow_cut
from .programs import example_of
from .slicing import Kept, Shapes, shapes_of
from .switch import DSLayer, Route, Switch, dsl_layers, required_layers, route
from .zero_channels import ZeroChannels

ROUNDING = 64  # smallest steps of the type, of an output's largest value: sums run in another order
SCORES = 64  # times that for a score, which sees deviations as logarithms and divided by their spread


@dataclass(frozen=True)
class Compacted:
    """What was taken out at one layer.

    layer: its number from 1. before, after: channels of the cut. macs: of "base", "switch", "light" and "full", before
    and after, per sample as cost() counts them. base: whether the operators in front of the cut make fewer channels
    now; else they are selected there. blocked: by path, the operators that still need to see the zeros.
    """

    layer: int
    before: int
    after: int
    macs: dict[str, tuple[int, int]]
    base: bool
    blocked: dict[str, tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compact(net: nn.Module) -> nn.Module:
    """The network without the channels that its masks have set to zero: the same answers, fewer MACs.

    Works on masks of weights. Returns a new module in eval mode; `net` is untouched and nothing is shared with it. The
    channels are gone for good: remove() does not bring them back. Raises OptionError where there is nothing to remove,
    VerifyError if an answer on random inputs differs.
    """
    return compacted(net)[0]


def compacted(net: nn.Module) -> tuple[nn.Module, tuple[Compacted, ...]]:
    """compact(net), and what was taken out at each layer."""
    costs = _costs(net)  # refuses what insert did not make
    small = copied(net).eval()
    done = []
    for number, layer in enumerate(dsl_layers(small), 1):
        kept = zeros_of(layer)
        if len(kept.keep) < kept.size:
            found, costs = _compact(small, number, layer, kept, costs)
            done.append(found)
    if not done:
        kinds = {layer.mask.kind for layer in required_layers(net)}
        reason = (
            "its mask holds thresholds on the activation, and those set no channel to zero for good"
            if kinds == {"activation"}
            else "no channel's weight in the mask is zero; fine-tune with a larger --beta to get there"
        )
        raise OptionError(f"Nothing can be removed from this network: {reason}.")
    for top, was in zip(_tops(small), _tops(net), strict=True):
        _check(top, was)
    return small, tuple(done)


def zeros_of(layer: DSLayer) -> Kept:
    """The channels of the cut that the mask lets through; at least one."""
    axis, mask = layer.channel_axis, layer.mask
    size = mask.weight.shape[axis]
    if mask.kind != "weight":
        return Kept(axis, tuple(range(size)), size)
    others = [at for at in range(mask.weight.dim()) if at != axis]
    alive = (mask.effective().detach() != 0).any(dim=others) if others else mask.effective() != 0
    return Kept(axis, tuple(alive.nonzero().flatten().tolist()) or (0,), size)


def smaller_mask(mask: Mask, kept: Kept) -> Mask:
    """The mask of the kept channels alone."""
    shape = list(mask.weight.shape)
    shape[kept.axis] = len(kept.keep)
    smaller = Mask(shape, mask.kind)
    smaller.weight = _entries(mask.weight, kept.axis, kept.keep)
    return smaller.eval()


def smaller_switch(switch: Switch, kept: Kept) -> Switch:
    """The switch of the kept channels alone: those of zeros have constant features, which go into the bias."""
    columns = [at + moment * kept.size for moment in range(switch.MOMENTS) for at in kept.keep]
    gone = sorted(set(range(switch.MOMENTS * kept.size)) - set(columns))
    smaller = cast(Switch, copied(switch))
    hidden = smaller.hidden
    with torch.no_grad():
        constant = switch.features(torch.zeros(1, 1, kept.size).to(switch.offset))[0]
        normal = ((constant - switch.offset) / switch.spread)[gone].double()
        bias = hidden.bias.double() + hidden.weight[:, gone].double() @ normal
        hidden.bias.copy_(bias)
    hidden.weight = _entries(hidden.weight, 1, columns)
    hidden.in_features = len(columns)
    smaller.offset, smaller.spread = switch.offset[columns], switch.spread[columns]
    return smaller


def _entries(weight: Tensor, axis: int, keep: Sequence[int]) -> nn.Parameter:
    index = torch.tensor(keep, device=weight.device)
    return nn.Parameter(weight.detach().index_select(axis, index), weight.requires_grad)


def _costs(net: nn.Module) -> dict[str, Cost]:
    return {part.name: part for part in cost(net)}


def _compact(
    net: nn.Module, number: int, layer: DSLayer, kept: Kept, before: dict[str, Cost]
) -> tuple[Compacted, dict[str, Cost]]:
    """Make one layer of the network, its paths and what lies in front of it smaller, in place; and the costs then."""
    host, call, row = _place(net, layer)
    shapes: Shapes = {}
    for top in _tops(net):
        shapes |= shapes_of(top)
    blocked = {}
    for name in ("light", "full"):
        path = getattr(layer, name)
        if not isinstance(path, fx.GraphModule):
            raise OptionError(f"The {name} path is a {type(path).__name__}; only captured graphs can be made smaller.")
        blocked[name] = tuple(ZeroChannels(path, kept, shapes).blocked)
    base = narrow_cut(host, call, kept, shapes)
    layer.mask, layer.switch = smaller_mask(layer.mask, kept), smaller_switch(layer.switch, kept)
    after = _costs(net)
    rows = {"base": row, **{name: _row(name, number) for name in ("switch", "light", "full")}}
    _note(net, host, layer, kept, {name: (before[at], after[at]) for name, at in rows.items()})
    macs = {name: (before[at].macs, after[at].macs) for name, at in rows.items()}
    return Compacted(number, kept.size, len(kept.keep), macs, base, blocked), after


def _note(
    net: nn.Module, host: fx.GraphModule, layer: DSLayer, kept: Kept, costs: dict[str, tuple[Cost, Cost]]
) -> None:
    """Bring the plan up to date, and those of the layers whose full path this one lies in."""
    saved = {
        what: {name: getattr(old, what) - getattr(new, what) for name, (old, new) in costs.items()}
        for what in ("params", "macs")
    }
    outer = host
    while (around := next((found for found in dsl_layers(net) if found.full is outer), None)) is not None:
        if around.plan is not None:
            both = {what: {"full": found["base"] + found["full"]} for what, found in saved.items()}
            around.plan = _reckoned(around.plan, both)
        outer = _place(net, around)[0]
    plan: Plan | None = layer.plan
    if plan is None:
        return
    cut = next(iter(layer.full.graph.nodes)).name  # type: ignore[union-attr, arg-type]
    shape = tuple(str(len(kept.keep)) if at == kept.axis else size for at, size in enumerate(plan.cut_shape))
    layer.plan = replace(
        _reckoned(plan, saved),
        cut_shape=shape,
        projections=tuple(
            replace(found, full_channels=len(kept.keep)) if found.entering and found.value == cut else found
            for found in plan.projections
        ),
        tensors=tuple(_resized(found, layer) for found in plan.tensors),
    )


def _reckoned(plan: Plan, saved: Mapping[str, Mapping[str, int]]) -> Plan:
    """The plan without the parameters and MACs that are saved."""
    params, macs = (
        {name: count - saved[what].get(name, 0) for name, count in getattr(plan, what).items()}
        for what in ("params", "macs")
    )
    if not plan.projections:
        macs["unprojected"] = macs["light"]
    return replace(plan, params=params, macs=macs)


def _resized(tensor: NarrowedTensor, layer: DSLayer) -> NarrowedTensor:
    shapes = [dict(_shapes_in(path)).get(tensor.name) for path in (layer.full, layer.light)]
    return replace(tensor, before=shapes[0] or tensor.before, after=shapes[1] or tensor.after)


def _shapes_in(path: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(value.shape)) for name, value in (*path.named_parameters(), *path.named_buffers()))


def _row(name: str, number: int) -> str:
    """A part of a layer as cost() names it."""
    return name if number == 1 else f"{name} {number}"


def _place(net: nn.Module, layer: DSLayer) -> tuple[fx.GraphModule, fx.Node, str]:
    """The graph that calls a layer, the call, and the row of cost() that the graph's own operators are in."""
    for host in net.modules():
        for node in host.graph.nodes if isinstance(host, fx.GraphModule) else ():
            if node.op == "call_module" and host.get_submodule(str(node.target)) is layer:
                around = [_row("full", at) for at, found in enumerate(dsl_layers(net), 1) if found.full is host]
                return cast(fx.GraphModule, host), node, (*around, "base")[0]
    raise OptionError("compact() reads networks that dslify.insert made; this one's layer was put in by hand.")


def _tops(net: nn.Module) -> list[fx.GraphModule]:
    """The captured graphs that are in no other one."""
    return [module for module in net.modules() if isinstance(module, fx.GraphModule) and "dslify" in module.meta]


def _check(small: fx.GraphModule, whole: fx.GraphModule) -> None:
    """Raise VerifyError unless both give the same answers, and the same scores, on random inputs."""
    inputs = example_of(whole)
    for way in cast(tuple[Route, ...], ("full", "light")):
        outputs, scores = zip(_answers(small, inputs, way), _answers(whole, inputs, way), strict=True)
        for what, tolerance, (mine, theirs) in (("outputs", 1.0, outputs), ("scores", SCORES, scores)):
            for found, wanted in zip(mine, theirs, strict=True):
                allowed = tolerance * ROUNDING * torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0.0
                off = _relative(found.double(), wanted.double())
                if not off <= allowed and wanted.isfinite().all():
                    raise VerifyError(
                        f"Without its zero channels the network's {what} differ on the {way} route by {off:.2g} of the "
                        f"largest value, where {allowed:.2g} is allowed; nothing was changed."
                    )


def _answers(net: fx.GraphModule, inputs: tuple[Tensor, ...], way: Route) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs on one route, and the scores of the layers that saw the inputs."""
    args, kwargs = pytree.tree_unflatten(list(inputs), net._in_spec)
    layers = dsl_layers(net)
    for layer in layers:
        layer.paths = None
    with torch.no_grad(), route(net, way):
        outputs = tensors_of(net(*args, **kwargs))
    return outputs, [layer.paths.score for layer in layers if layer.paths is not None]


def _relative(found: Tensor, wanted: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
