"""Pointwise operators: every axis passes, broadcast axes meet."""

from __future__ import annotations

from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, dims, rule, shape, tensors
from .terms import concat

_UNARY = """
relu relu6 gelu silu elu selu celu mish sigmoid tanh hardtanh hardsigmoid hardswish leaky_relu softplus log_sigmoid
hardshrink softshrink threshold exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square sin sinc cos tan asin acos atan
sinh cosh asinh acosh atanh erf erfc erfinv lgamma digamma logit sigmoid abs neg negative positive sign sgn signbit
reciprocal floor ceil round trunc fix frac deg2rad rad2deg clamp clip clamp_min clamp_max nan_to_num isnan isinf
isfinite isposinf isneginf logical_not bitwise_not i0 special_expit special_erf clone contiguous detach alias
lift_fresh_copy dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout zeros_like ones_like
full_like empty_like real imag angle conj conj_physical _conj _conj_physical resolve_conj resolve_neg
"""
_EXACT = """
add.Tensor add.Scalar sub.Tensor sub.Scalar subtract.Tensor mul.Tensor mul.Scalar multiply.Tensor div.Tensor div.Scalar
div.Tensor_mode div.Scalar_mode divide.Tensor true_divide.Tensor rsub.Tensor rsub.Scalar
pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar float_power.Tensor_Scalar float_power.Tensor_Tensor float_power.Scalar
remainder.Scalar remainder.Tensor fmod.Scalar fmod.Tensor floor_divide.default floor_divide.Scalar xlogy.Tensor
eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar ge.Tensor
maximum.default minimum.default max.other min.other fmax.default fmin.default atan2.default hypot.default
logaddexp.default logaddexp2.default heaviside.default copysign.Tensor isclose.default
clamp.Tensor clamp_min.Tensor clamp_max.Tensor round.decimals gelu.default where.self where.ScalarOther
where.ScalarSelf where.Scalar masked_fill.Scalar masked_fill.Tensor lerp.Scalar lerp.Tensor addcmul.default
addcdiv.default fill.Scalar fill.Tensor copy.default to.dtype to.device to.dtype_layout to.other type_as.default
_to_copy.default bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_and.Scalar bitwise_or.Scalar
bitwise_xor.Scalar bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar __and__.Tensor __or__.Tensor
__xor__.Tensor __and__.Scalar __or__.Scalar __xor__.Scalar __lshift__.Scalar __rshift__.Scalar logical_and.default
logical_or.default
logical_xor.default complex.default polar.default
"""
_NAMES = list(dict.fromkeys([*_EXACT.split(), *(f"{name}.default" for name in _UNARY.split())]))
# what writes through a view stays in place in a captured graph: the written axes meet the operands' as they do outside
_IN_PLACE = """
relu relu6 elu selu celu silu mish sigmoid tanh hardtanh hardsigmoid hardswish leaky_relu threshold exp log sqrt rsqrt
square sin cos abs neg reciprocal floor ceil round clamp clamp_min clamp_max nan_to_num zero detach dropout
feature_dropout alpha_dropout logical_not
"""
_IN_PLACE_EXACT = """
add_.Tensor add_.Scalar sub_.Tensor sub_.Scalar mul_.Tensor mul_.Scalar div_.Tensor div_.Scalar pow_.Scalar pow_.Tensor
remainder_.Scalar floor_divide_.Tensor clamp_.Tensor copy_.default fill_.Scalar fill_.Tensor masked_fill_.Scalar
masked_fill_.Tensor addcmul_.default addcdiv_.default lerp_.Scalar lerp_.Tensor eq_.Scalar bitwise_and_.Tensor
bitwise_or_.Tensor logical_and_.default logical_or_.default
"""
_WRITERS = [*_IN_PLACE_EXACT.split(), *(f"{name}_.default" for name in _IN_PLACE.split())]


@rule(*_NAMES, *_WRITERS)
def pointwise(b: Binding, node: fx.Node) -> Any:
    out = b.broadcast(node, *(b[used] for used in _operands(node)))
    outputs = node.meta["val"]
    return tuple(out for _ in outputs) if isinstance(outputs, (tuple, list)) else out


def _operands(node: fx.Node) -> list[fx.Node]:
    name = str(node.target)
    if name.startswith(("aten.to.", "aten.type_as")):  # the second lends its type alone
        return [node.args[0]]  # type: ignore[list-item]
    return tensors(node)


@rule("mse_loss.default", "l1_loss.default", "smooth_l1_loss.default", "huber_loss.default", "soft_margin_loss.default",
      "binary_cross_entropy.default", "binary_cross_entropy_with_logits.default", "kl_div.default")  # fmt: skip
def loss(b: Binding, node: fx.Node) -> Terms:
    """Compares entry by entry, then reduces all or nothing."""
    out = b.broadcast(node, *(b[used] for used in tensors(node)))
    return out if shape(node) else ()


@rule("bucketize.Tensor", "isin.Tensor_Tensor")
def looked_up(b: Binding, node: fx.Node) -> Terms:
    """Every entry is looked up in a list."""
    x, entries = node.args
    b.freeze(node, b[entries], "entries are looked up in it")
    return b[x]


@rule("broadcast_tensors.default")
def broadcast_tensors(b: Binding, node: fx.Node) -> tuple[Terms, ...]:
    operands = [b[used] for used in arguments(node)["tensors"]]
    out = b.broadcast(node, *operands)
    return tuple(out for _ in operands)


@rule("prelu.default", "_prelu_kernel.default")  # n c *, c -> n c *
def prelu(b: Binding, node: fx.Node) -> Terms:
    x, weight = b[node.args[0]], b[node.args[1]]
    if len(weight) > 1:  # the kernel gets it in the rank of its input
        return b.broadcast(node, x, weight)
    if weight and not weight[0].is_one():
        b.unify(node, x[1 if len(x) > 1 else 0], weight[0])
    return x


@rule("glu.default")  # [a + a] -> a
def glu(b: Binding, node: fx.Node) -> Terms:
    x = b[node.args[0]]
    dim = arguments(node)["dim"] % len(x)
    half = b.neutral(shape(node)[dim])
    b.unify(node, x[dim], concat([half, half]))
    return (*x[:dim], half, *x[dim + 1 :])


@rule("softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default")
def softmax(b: Binding, node: fx.Node) -> Terms:
    return b[node.args[0]]


@rule("cumsum.default", "cumprod.default", "logcumsumexp.default", "cummax.default", "cummin.default", "flip.default",
      "fliplr.default", "flipud.default", "roll.default")  # fmt: skip
def ordered(b: Binding, node: fx.Node) -> Any:
    """The order of entries matters along some axes."""
    x, a, name = b[node.args[0]], arguments(node), str(node.target)
    along = [1] if "fliplr" in name else [0] if "flipud" in name else dims(a.get("dims", a.get("dim")), len(x))
    b.freeze(node, [x[dim] for dim in along], "the order of its entries matters")
    outputs = node.meta["val"]
    return tuple(x for _ in outputs) if isinstance(outputs, (tuple, list)) else x


@rule("tril.default", "triu.default", "tril_.default", "triu_.default")
def triangle(b: Binding, node: fx.Node) -> Terms:
    x = b[node.args[0]]
    b.freeze(node, x[-2:], "a triangle is cut out of it")
    return x
