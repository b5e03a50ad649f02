"""Normalisations and reparametrised weights."""

from __future__ import annotations

from typing import Any

from torch import fx

from .pointwise import broadcast
from .table import Binding, Terms, arguments, rule, shape
from .terms import product, same


@rule("batch_norm.default", "instance_norm.default")  # n c *, c -> n c *
def batch_norm(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["input"]]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a[name] is not None:
            b.unify(node, x[1], b[a[name]][0])
    return x


@rule("layer_norm.default", "rms_norm.default")  # * n, n -> * n
def layer_norm(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["input"]]
    normal = x[len(x) - len(a["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if a.get(name) is not None:
            for mine, theirs in zip(normal, b[a[name]], strict=True):
                b.unify(node, mine, theirs)
    b.rewrite(node, "normalized_shape", lambda size: [size(axis) for axis in normal])
    return x


@rule("group_norm.default")  # n (g c) *, (g c) -> n (g c) *
def group_norm(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, groups = b[a["input"]], a["num_groups"]
    if groups > 1:
        group, inner = b.neutral(groups), b.neutral(shape(a["input"])[1] // groups)
        b.unify(node, x[1], product([group, inner]))
        b.rewrite(node, "num_groups", lambda size: size(group))
    for name in ("weight", "bias"):
        if a[name] is not None:
            b.unify(node, x[1], b[a[name]][0])
    return x


@rule("_weight_norm.default", "_weight_norm_interface.default")  # v, g (size 1 except dim) -> v
def weight_norm(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    v, g, dim = b[a["v"]], b[a["g"]], a["dim"]
    if not same(g[dim].find().size, 1):
        b.unify(node, v[dim], g[dim])
    broadcast(b, node, v, g)
    return (v, g) if "interface" in str(node.target) else v


@rule("linalg_vector_norm.default", "norm.ScalarOpt_dim", "norm.Scalar")
def vector_norm(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = b[a["self"]]
    dims = a.get("dim")
    if not dims:
        return ()
    dims = {dim % len(x) for dim in dims}
    return tuple(b.one() if at in dims else axis for at, axis in enumerate(x) if a["keepdim"] or at not in dims)
