"""Convolutions: (group, channels) on both sides, spatial axes fixed unless the kernel has size 1.

The equations in the comments are the rows; an axis that stands on both sides is one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, rule, shape
from .terms import Axis, product


@rule("conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding", "conv3d.padding",
      "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input",
      "convolution.default")  # fmt: skip
def convolution(b: Binding, node: fx.Node) -> Terms:
    # n (g i) x, (g o) i k -> n (g o) y;  transposed: n (g i) x, (g i) o k -> n (g o) y
    a = arguments(node)
    transposed = a.get("transposed", "transpose" in str(node.target))
    x, weight, groups = b[a["input"]], b[a["weight"]], a["groups"]
    unbatched = len(x) == len(weight) - 1
    channels, spatial = (x[0], x[1:]) if unbatched else (x[1], x[2:])
    group = b.neutral(groups) if groups > 1 else b.one()
    outer = b.neutral(shape(a["weight"])[0] // groups)
    grouped = product([group, outer]) if groups > 1 else outer
    b.unify(node, weight[0], grouped)
    if transposed:
        b.unify(node, channels, grouped)
        out = product([group, weight[1]]) if groups > 1 else weight[1]
    else:
        b.unify(node, channels, product([group, weight[1]]) if groups > 1 else weight[1])
        out = weight[0]
    if groups > 1:
        b.rewrite(node, "groups", lambda size: size(group))
    if a["bias"] is not None:
        b.unify(node, b[a["bias"]][0], out)
    spatial_out = _window(b, node, spatial, a)
    b.freeze(node, weight[2:], "it is a kernel axis")
    batch = () if unbatched else x[:1]
    if transposed:  # one multiplication per input position
        b.count(node, *batch, channels, *spatial, *weight[1:])
    else:
        b.count(node, *batch, weight[0], *spatial_out, *weight[1:])
    return (out, *spatial_out) if unbatched else (x[0], out, *spatial_out)


def _window(b: Binding, node: fx.Node, spatial: Sequence[Axis], a: dict[str, Any]) -> tuple[Axis, ...]:
    """Output axes of a sliding window: a kernel of size 1 lets its axis pass, others fix input and output."""
    kernel = shape(a["weight"])[2:]
    sizes = shape(node)[len(shape(node)) - len(spatial) :]
    out = []
    for at, (axis, size) in enumerate(zip(spatial, sizes, strict=True)):
        plain = all(
            _at(a.get(name, default), at) == default
            for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0))
        )
        passes = kernel[at] == 1 and plain
        out.append(axis if passes else b.renewed(node, axis, size, "a convolution slides along it"))
    return tuple(out)


def _at(value: Any, at: int) -> Any:
    if isinstance(value, (list, tuple)):
        return value[at] if len(value) > 1 else value[0]
    return {"valid": 0, "same": 0}.get(value, value) if isinstance(value, str) else value
