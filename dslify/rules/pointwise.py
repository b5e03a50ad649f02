"""Pointwise operators: every axis passes, broadcast axes meet."""

from __future__ import annotations

from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, rule, shape
from .terms import Axis, concat, same


def broadcast(b: Binding, node: fx.Node, *operands: Terms) -> Terms:
    """Unify operands axis by axis from the right, size-1 axes give way; returns the axes of the result."""
    rank = max(len(operand) for operand in operands)
    out: list[Axis] = []
    for back in range(rank, 0, -1):
        meeting = [operand[-back] for operand in operands if len(operand) >= back]
        wide = [axis for axis in meeting if not same(axis.find().size, 1)]
        for axis in wide[1:]:
            b.unify(node, wide[0], axis)
        out.append(wide[0] if wide else meeting[0])
    return tuple(out)


_UNARY = """
relu relu6 gelu silu elu selu celu mish sigmoid tanh hardtanh hardsigmoid hardswish leaky_relu softplus softsign
log_sigmoid hardshrink softshrink threshold exp expm1 log log1p log2 log10 sqrt rsqrt square sin cos tan asin acos
atan sinh cosh asinh acosh atanh erf abs neg sign reciprocal floor ceil round trunc frac clamp clamp_min clamp_max
nan_to_num isnan isinf logical_not bitwise_not clone contiguous detach alias dropout feature_dropout alpha_dropout
lift_fresh_copy zeros_like ones_like full_like empty_like rand_like positive real imag isfinite
"""
_EXACT = """
add.Scalar sub.Scalar mul.Scalar div.Scalar div.Tensor_mode div.Scalar_mode pow.Tensor_Scalar pow.Tensor_Tensor
pow.Scalar rsub.Scalar eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar eq.Tensor ne.Tensor lt.Tensor
le.Tensor gt.Tensor ge.Tensor remainder.Scalar fmod.Scalar floor_divide.Scalar max.other min.other clamp.Tensor
clamp_min.Tensor clamp_max.Tensor to.dtype to.device to.dtype_layout to.other type_as.default masked_fill.Scalar
masked_fill.Tensor where.self where.ScalarOther where.ScalarSelf where.Scalar lerp.Scalar lerp.Tensor
addcmul.default addcdiv.default fill.Scalar fill.Tensor _to_copy.default add.Tensor sub.Tensor mul.Tensor div.Tensor
rsub.Tensor remainder.Tensor fmod.Tensor floor_divide.default bitwise_and.Tensor bitwise_or.Tensor
bitwise_xor.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor maximum.default minimum.default atan2.default
logical_and.default logical_or.default logical_xor.default
"""


@rule(*_EXACT.split(), *(f"{name}.default" for name in _UNARY.split()))
def pointwise(b: Binding, node: fx.Node) -> Terms:
    operands = [b[used] for used in _tensors(node)]
    return broadcast(b, node, *operands)


def _tensors(node: fx.Node) -> list[fx.Node]:
    shaped = [used for used in node.args if isinstance(used, fx.Node) and hasattr(used.meta.get("val"), "shape")]
    unused = arguments(node).get("other") if str(node.target).startswith(("aten.to.", "aten.type_as")) else None
    return [used for used in shaped if used is not unused]


@rule("prelu.default")  # n c *, c -> n c *
def prelu(b: Binding, node: fx.Node) -> Terms:
    x, weight = b[node.args[0]], b[node.args[1]]
    if not same(weight[0].find().size, 1):
        b.unify(node, x[1], weight[0])
    return x


@rule("glu.default")  # [a + a] -> a
def glu(b: Binding, node: fx.Node) -> Terms:
    x, dim = b[node.args[0]], arguments(node)["dim"]
    half = b.neutral(shape(node)[dim])
    b.unify(node, x[dim], concat([half, half]))
    return tuple(half if axis is x[dim] else axis for axis in x)


@rule(
    "softmax.int",
    "log_softmax.int",
    "_softmax.default",
    "_log_softmax.default",
    "cumsum.default",
    "flip.default",
    "roll.default",
)
def along(b: Binding, node: fx.Node) -> Any:
    """softmax lets its axis pass; operators for which the order of entries matters fix it."""
    a = arguments(node)
    x = b[a["self"]]
    if "softmax" not in str(node.target):
        dims = a.get("dims", a.get("dim"))
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        b.freeze(node, [x[dim] for dim in dims] if dims else x, "the order of its entries matters")
    return x
