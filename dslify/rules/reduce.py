"""Reductions: the axes that are summed up vanish, the others pass."""

from __future__ import annotations

from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, dims, rule


@rule("mean.default", "mean.dim", "sum.default", "sum.dim_IntList", "nansum.default", "prod.default", "prod.dim_int",
      "amax.default", "amin.default", "std.default", "std.dim", "std.correction", "var.default", "var.dim",
      "var.correction", "var_mean.default", "var_mean.dim", "var_mean.correction", "std_mean.default", "std_mean.dim",
      "std_mean.correction", "aminmax.default", "logsumexp.default", "special_logsumexp.default", "all.default",
      "all.dim", "all.dims", "any.default", "any.dim", "any.dims", "max.default", "min.default", "median.default",
      "count_nonzero.dim_IntList", "nanmean.default")  # fmt: skip
def reduce(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    out = _without(b, b[a["self"]], a.get("dim"), a.get("keepdim", False))
    outputs = node.meta["val"]
    return tuple(out for _ in outputs) if isinstance(outputs, (tuple, list)) else out


def _without(b: Binding, x: Terms, dim: Any, keepdim: bool) -> Terms:
    gone = dims(dim, len(x))
    return tuple(b.one() if at in gone else axis for at, axis in enumerate(x) if keepdim or at not in gone)


@rule("max.dim", "min.dim", "median.dim", "nanmedian.dim", "kthvalue.default", "mode.default", "argmax.default",
      "argmin.default")  # fmt: skip
def extreme(b: Binding, node: fx.Node) -> Any:
    """The value of an extreme does not tell where it stood; an index that is used does."""
    a = arguments(node)
    x = b[a["self"]]
    outputs = node.meta["val"]
    several = isinstance(outputs, (tuple, list))
    counts = "kthvalue" in str(node.target)  # k-th of how many
    if counts or not several or any(user.args[1:] != (0,) for user in node.users):
        b.freeze(node, [x[dim] for dim in dims(a["dim"], len(x))], "an index into it is an output")
    out = _without(b, x, a["dim"], a["keepdim"])
    return tuple(out for _ in outputs) if several else out


@rule("topk.default", "sort.default", "sort.stable", "argsort.default", "argsort.stable", "msort.default")
def ranked(b: Binding, node: fx.Node) -> Any:
    """The axis that is sorted comes out as ranks."""
    a = arguments(node)
    x = b[a["self"]]
    at = (0 if "msort" in str(node.target) else a["dim"]) % max(1, len(x))
    outputs = node.meta["val"]
    several = isinstance(outputs, (tuple, list))
    size = (outputs[0] if several else outputs).shape[at]
    out = (*x[:at], b.renewed(node, x[at], size, "its entries are sorted"), *x[at + 1 :])
    return tuple(out for _ in outputs) if several else out


@rule("histc.default")
def histogram(b: Binding, node: fx.Node) -> Terms:
    return (b.fixed(node.meta["val"].shape[0], node, "it counts values"),)
