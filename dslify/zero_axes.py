"""Values of which some channels are zero, and the operators that move the channels' axis or work along other ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from .rules import set_argument
from .slicing import Kept
from .zeros import Outcome, Rule, Zeros, packet, rule

AXES: dict[str, Rule] = {}
_REDUCING = ("mean", "sum", "amax", "amin", "var", "std")  # over other axes: zero for zeros
_POOLING = ("max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest", "upsample_linear", "upsample_bilinear",
            "upsample_bicubic", "upsample_trilinear", "reflection_pad", "replication_pad")  # fmt: skip


def moved(rank: int, name: str, given: dict[str, Any]) -> Sequence[int] | None:
    """Which axis of the operand each axis of a transposition's result is; None for other operators."""
    order = list(range(rank))
    if name == "permute":
        return [int(axis) % rank for axis in given["dims"]]
    if name in ("transpose", "t"):
        one, other = (given["dim0"] % rank, given["dim1"] % rank) if name == "transpose" else (0, rank - 1)
        order[one], order[other] = order[other], order[one]
        return order
    return None


@rule(AXES, "permute", "transpose", "t")
def _moved(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left[given["self"]]
    order = moved(zeros.rank(given["self"]), packet(node), given) or ()
    return kept.at(order.index(kept.axis))


@rule(AXES, "unsqueeze", "squeeze")
def _size_one(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept, dims = zeros.left[given["self"]], given.get("dim")
    if dims is None:
        return "which axes go depends on their sizes"
    if packet(node) == "unsqueeze":
        return kept.at(kept.axis + (zeros.axis(node, dims) <= kept.axis))
    gone = {zeros.axis(given["self"], dim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    gone = {axis for axis in gone if zeros.shapes[given["self"]][axis] == 1}
    return kept.at(kept.axis - sum(axis < kept.axis for axis in gone)) if kept.axis not in gone else "its axis goes"


@rule(AXES, "flatten", "view", "reshape", "_unsafe_view", "unflatten")
def _viewed(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left[given["self"]]
    if "dtype" in given:
        return "it reads their bits as another type"
    old, new = zeros.shapes[given["self"]], zeros.shapes[node]
    ahead = math.prod(old[: kept.axis])
    for axis, size in enumerate(new):
        before = math.prod(new[:axis])
        outer = ahead // max(1, before)  # entries of the new axis are (outer, channel, inner)
        inner = size // (outer * kept.size) if outer else 0
        if before * outer != ahead or outer * kept.size * inner != size or not inner:
            continue
        entries = [
            (o * kept.size + channel) * inner + i for o in range(outer) for channel in kept.keep for i in range(inner)
        ]
        name = "size" if "size" in given else "shape" if "shape" in given else "sizes"
        if name in given:
            at = axis - (zeros.axis(given["self"], given["dim"]) if name == "sizes" else 0)
            sizes = list(given[name])
            if isinstance(sizes[at], fx.Node):
                return "its size varies"
            sizes[at] = len(entries)
            set_argument(node, name, sizes)
        return Kept(axis, tuple(entries), size)
    return "it takes the axis apart"


@rule(AXES, "expand")
def _expanded(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left[given["self"]]
    sizes, axis = list(given["size"]), kept.axis + len(given["size"]) - zeros.rank(given["self"])
    sizes[axis] = -1
    set_argument(node, "size", sizes)
    return kept.at(axis)


@rule(AXES, *(f"{name}{n}d" for name in _POOLING for n in (1, 2, 3)))
def _windows(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left[node.args[0]]  # type: ignore[index]
    spatial = int(packet(node)[-2])
    return kept if kept.axis < zeros.rank(node.args[0]) - spatial else "it works along their axis"


@rule(AXES, "pad", "constant_pad_nd")
def _padded(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left[given["self"]]
    if given.get("mode", "constant") == "constant" and given.get("value"):
        return "it pads with another value than zero"
    return kept if kept.axis < zeros.rank(given["self"]) - len(given["pad"]) // 2 else "it pads their axis"


@rule(AXES, *_REDUCING)
def _reduced(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    value, dims = given["self"], given.get("dim")
    kept = zeros.left[value]
    if dims is None or dims == []:
        return "it works along their axis"
    over = {zeros.axis(value, dim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if kept.axis in over:
        return "it works along their axis"
    return kept if given.get("keepdim") else kept.at(kept.axis - sum(axis < kept.axis for axis in over))


@rule(AXES, "select", "unbind", "slice", "flip", "roll", "chunk", "split", "split_with_sizes", "cumsum")
def _other_axes(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    value = given["self"]
    kept, dims = zeros.left[value], given.get("dim", given.get("dims"))
    over = {zeros.axis(value, dim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if kept.axis in over or not over:
        return "it works along their axis"
    return kept.at(kept.axis - (min(over) < kept.axis)) if packet(node) in ("select", "unbind") else kept


@rule(AXES, "getitem")
def _item(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    return zeros.left[node.args[0]]  # type: ignore[index]


@rule(AXES, "cat")
def _joined(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    values = given["tensors"]
    found = {zeros.left.get(value) for value in values}
    if len(found) == 1 and (kept := zeros.left.get(values[0])) and zeros.axis(node, given["dim"]) != kept.axis:
        return kept
    return "it joins them with other values"
