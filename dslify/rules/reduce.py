"""Reductions, pooling, padding and resizing."""

from __future__ import annotations

from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, rule, shape
from .terms import same


@rule("mean.dim", "sum.dim_IntList", "amax.default", "amin.default", "std.dim", "var.dim", "std.correction",
      "var.correction", "logsumexp.default", "all.dim", "any.dim", "prod.dim_int", "mean.default",
      "sum.default")  # fmt: skip
def reduce(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    dims = a.get("dim")
    if dims is None or dims == []:
        return tuple(b.one() for _ in shape(node))
    gone = {dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims)}
    return tuple(b.one() if at in gone else axis for at, axis in enumerate(x) if a["keepdim"] or at not in gone)


@rule("max.dim", "min.dim", "argmax.default", "argmin.default", "topk.default", "sort.default", "median.dim")
def pick(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = b[a["self"]]
    dim = a["dim"]
    b.freeze(node, x if dim is None else x[dim], "an index into it is an output")
    outputs = node.meta["val"]

    def terms(value: Any) -> Terms:
        if dim is None:
            return ()
        at = dim % len(x)
        if len(value.shape) < len(x):
            return (*x[:at], *x[at + 1 :])
        return tuple(b.fixed(value.shape[at], node, "a selection") if i == at else axis for i, axis in enumerate(x))

    return tuple(terms(value) for value in outputs) if isinstance(outputs, (tuple, list)) else terms(outputs)


@rule("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", "avg_pool1d.default", "avg_pool2d.default",
      "avg_pool3d.default", "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default",
      "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec", "upsample_linear1d.vec",
      "upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "upsample_nearest1d.default", "upsample_nearest2d.default",
      "upsample_bilinear2d.default", "constant_pad_nd.default", "reflection_pad1d.default", "reflection_pad2d.default",
      "replication_pad1d.default", "replication_pad2d.default", "pad.default")  # fmt: skip
def resize(b: Binding, node: fx.Node) -> Terms:
    """Axes whose size stays pass (padding by nothing, pooling leaves channels); the others are fixed on both sides."""
    a = arguments(node)
    x = b[a.get("self", a.get("input"))]
    name = str(node.target)
    moving = len(a["pad" if "pad" in a else "padding"]) // 2 if "pad" in name and "pool" not in name else _rank(name)
    out = []
    for at, (axis, size) in enumerate(zip(x, shape(node), strict=True)):
        still = at < len(x) - moving or _unpadded(a, len(x) - 1 - at)
        if still and same(axis.find().size, getattr(getattr(size, "node", None), "expr", size)):
            out.append(axis)
            continue
        b.freeze(node, axis, "it is resized, pooled or padded")
        out.append(b.fixed(size, node, "it is resized, pooled or padded"))
    return tuple(out)


def _rank(name: str) -> int:
    return next((int(digit) for digit in name.split(".")[1] if digit in "123"), 2)


def _unpadded(a: dict[str, Any], from_right: int) -> bool:
    pad = a.get("pad")
    return pad is not None and (2 * from_right >= len(pad) or list(pad[2 * from_right : 2 * from_right + 2]) == [0, 0])
