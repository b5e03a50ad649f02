"""Normalisations and reparametrised weights.

The native_ overloads are what a network holds that was decomposed to core ATen before it came here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from .table import Binding, Terms, arguments, dims, rule, shape
from .terms import product


@rule("batch_norm.default", "instance_norm.default", "native_batch_norm.default",
      "_native_batch_norm_legit_no_training.default")  # n c *, c -> n c *  # fmt: skip
def batch_norm(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = b[a["input"]]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a[name] is not None:
            b.unify(node, x[1], b[a[name]][0])
    outputs = node.meta["val"]
    # the native ones answer the batch's statistics too, empty in eval mode
    return x if isinstance(outputs, Tensor) else (x, *b.fixed_outputs(node, "it is empty")[1:])


@rule("layer_norm.default", "rms_norm.default", "native_layer_norm.default", "_fused_rms_norm.default")  # * n, n -> * n
def layer_norm(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = b[a["input"]]
    rank = len(x) - len(a["normalized_shape"])
    outer, normal = x[:rank], x[rank:]
    for name in ("weight", "bias"):
        if a.get(name) is not None:
            for mine, theirs in zip(normal, b[a[name]], strict=True):
                b.unify(node, mine, theirs)
    b.rewrite(node, "normalized_shape", lambda size: [size(axis) for axis in normal])
    outputs = node.meta["val"]
    # the native ones answer mean and deviation too
    return x if isinstance(outputs, Tensor) else (x, *((*outer, *(b.one() for _ in normal)) for _ in outputs[1:]))


@rule("group_norm.default", "native_group_norm.default")  # n (g c) *, (g c) -> n (g c) *
def group_norm(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x, name = b[a["input"]], "num_groups" if "num_groups" in a else "group"
    groups = a[name]
    group = b.neutral(groups) if groups > 1 else b.one()
    if groups > 1:
        inner = b.neutral(shape(a["input"])[1] // groups)
        b.unify(node, x[1], product([group, inner]))
        b.rewrite(node, name, lambda size: size(group))
    for weight in ("weight", "bias"):
        if a[weight] is not None:
            b.unify(node, x[1], b[a[weight]][0])
    if name == "num_groups":
        return x
    b.rewrite(node, "C", lambda size: size(x[1]))
    b.freeze(node, [x[0], *x[2:]], "its size is an argument")
    return x, (x[0], group), (x[0], group)  # mean and deviation too


@rule("_weight_norm.default", "_weight_norm_interface.default")  # v, g (size 1 except dim) -> v
def weight_norm(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    v, g = b[a["v"]], b[a["g"]]
    b.broadcast(node, v, g)
    return (v, g) if "interface" in str(node.target) else v


@rule("linalg_vector_norm.default", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype", "norm.Scalar",
      "linalg_norm.default", "frobenius_norm.dim")  # fmt: skip
def vector_norm(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    gone, keep = dims(a.get("dim"), len(x)), a.get("keepdim", False)
    return tuple(b.one() if at in gone else axis for at, axis in enumerate(x) if keep or at not in gone)


@rule("cosine_similarity.default", "pairwise_distance.default")
def similarity(b: Binding, node: fx.Node) -> Terms:
    """Entries of two tensors are compared along one axis, which vanishes."""
    a = arguments(node)
    x = b.broadcast(node, b[a["x1"]], b[a["x2"]])
    dim = a.get("dim", -1) % len(x)
    return (*x[:dim], *((b.one(),) if a.get("keepdim") else ()), *x[dim + 1 :])
