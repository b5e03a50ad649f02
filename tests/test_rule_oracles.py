"""Oracles for the rows of pointwise operators and reductions: many operators in one network, added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import Case, call, check, conv, region_of, total

A = torch.ops.aten


def inside(x: Tensor) -> Tensor:
    """Where all the elementary functions are defined: (0.2, 0.7)."""
    return x.sigmoid() / 2 + 0.2


UNARY = """
relu relu6 gelu silu elu selu celu mish sigmoid tanh hardtanh hardsigmoid hardswish leaky_relu softplus log_sigmoid
hardshrink softshrink exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square sin sinc cos tan asin acos atan sinh cosh
asinh atanh erf erfc erfinv lgamma digamma logit abs neg negative positive sign sgn signbit reciprocal floor ceil round
trunc fix frac deg2rad rad2deg nan_to_num isnan isinf isfinite isposinf isneginf logical_not i0 special_expit
special_erf clone contiguous detach alias lift_fresh_copy zeros_like ones_like
"""
WITH_ARGUMENTS = {
    "threshold": (0.4, 0.1), "clamp": (0.3, 0.6), "clip": (0.3, 0.6), "clamp_min": (0.3,), "clamp_max": (0.4,),
    "dropout": (0.5, False), "feature_dropout": (0.5, False), "alpha_dropout": (0.5, False),
    "feature_alpha_dropout": (0.5, False), "native_dropout": (0.5, False), "full_like": (2.0,),
    "pow.Tensor_Scalar": (2,),
    "float_power.Tensor_Scalar": (2,), "fill.Scalar": (1.0,), "masked_fill.Scalar": None, "to.dtype": (torch.float64,),
    "to.device": (torch.device("cpu"), torch.float64), "_to_copy": (),
}  # fmt: skip
COMPLEX = "real imag angle abs conj conj_physical _conj _conj_physical resolve_conj resolve_neg sgn"
SCALAR = """
add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar remainder.Scalar fmod.Scalar floor_divide.Scalar eq.Scalar
ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar
"""
BINARY = """
add.Tensor sub.Tensor subtract.Tensor mul.Tensor multiply.Tensor div.Tensor divide.Tensor true_divide.Tensor rsub.Tensor
pow.Tensor_Tensor float_power.Tensor_Tensor remainder.Tensor fmod.Tensor xlogy.Tensor eq.Tensor ne.Tensor
lt.Tensor le.Tensor gt.Tensor ge.Tensor maximum minimum max.other min.other fmax fmin atan2 hypot logaddexp logaddexp2
copysign.Tensor isclose clamp.Tensor clamp_min.Tensor clamp_max.Tensor logical_and logical_or logical_xor
type_as to.other
"""
BITS = "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__"
SHIFTS = "bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar __lshift__.Scalar __rshift__.Scalar"
IN_PLACE = """
relu relu6 elu selu celu silu mish sigmoid tanh hardtanh hardsigmoid hardswish leaky_relu exp sqrt rsqrt square sin cos
abs neg reciprocal floor ceil round nan_to_num
"""


def unary(m, x):
    x = inside(x)
    given = [(name, operands) for name, operands in WITH_ARGUMENTS.items() if operands is not None]
    return total([
        *(call(name, x) for name in UNARY.split()), *(call(name, x, *operands) for name, operands in given),
        A.acosh(x + 1), A.fill.Scalar(A.empty_like(x), 2.0), A.bitwise_not((x * 9).to(torch.int64)),
        A.to.dtype_layout(x, dtype=torch.float64, layout=torch.strided), A.round.decimals(x, decimals=1),
    ])  # fmt: skip


def complex_(m, x):
    z = torch.polar(inside(x), x)
    return total([*(call(name, z) for name in COMPLEX.split()), torch.complex(x, x * 2),
                  torch.view_as_complex(torch.stack([x, x.square()], -1))])  # fmt: skip


def binary(m, x):
    x, y = inside(x), inside(m.w)[:, None]  # y: one value per channel
    n, k = (x * 9).to(torch.int64), (y * 9).to(torch.int64)
    mask = x > y
    return total([
        *(call(name, x.detach(), 0.3) for name in SCALAR.split()), *(call(name, x, y) for name in BINARY.split()),
        *(call(f"{name}.Tensor", n, k) for name in BITS.split()), *(call(f"{name}.Scalar", n,
        3) for name in BITS.split()),
        *(call(name, n, 1) for name in SHIFTS.split()), A.pow.Scalar(2.0, x), A.float_power.Scalar(2.0, x),
        A.div.Tensor_mode(x, y, rounding_mode="floor"), A.div.Scalar_mode(x, 0.2, rounding_mode="trunc"),
        A.where.self(mask, x, y), A.where.ScalarOther(mask, x, 1.0), A.where.ScalarSelf(mask, 1.0, y),
        A.where.Scalar(mask, 1.0, 2.0), A.masked_fill.Scalar(x, y > 0.4, 1.0), A.masked_fill.Tensor(x, mask, x.sum()),
        A.lerp.Scalar(x, y.expand_as(x), 0.3), A.lerp.Tensor(x, y, x), A.addcmul(x, y, x), A.addcdiv(x, y, x),
        A.fill.Tensor(x, y.sum()), A.copy(x.detach(), y.detach()),
        A.heaviside(x.detach(), y.detach()), A.floor_divide(x.detach(), y.detach()),
    ])  # fmt: skip


def in_place(m, x):
    """Writes through a slice stay in place in the graph. Detached: most of them would spoil what a gradient needs."""
    live, x, half = x * m.w[:, None], inside(x.detach()), inside(m.w.detach())[:12, None]
    y = x.clone()
    part = y[:, :12]  # [12 + 12]
    mask = part > 0.4
    for name in IN_PLACE.split():
        part.mul_(0.5).abs_().add_(0.1)  # stays in the domain
        call(f"{name}_", part)
        part.copy_(part.sigmoid())
    for name, operands in {
        "threshold_": (0.4, 0.1), "clamp_": (0.1, 0.9), "clamp_min_": (0.2,), "clamp_max_": (0.8,), "log_": (),
        "exp_": (),
        "dropout_": (0.5, False), "feature_dropout_": (0.5, False), "alpha_dropout_": (0.5, False),
        "add_.Tensor": (half,), "sub_.Tensor": (half,), "mul_.Tensor": (half,), "div_.Tensor": (half,),
        "add_.Scalar": (1.0,), "sub_.Scalar": (0.5,), "mul_.Scalar": (0.5,), "div_.Scalar": (2.0,), "pow_.Scalar": (2,),
        "clamp_.Tensor": (half,), "pow_.Tensor": (half,), "remainder_.Scalar": (3.0,), "masked_fill_.Scalar": (mask,
        0.7),
        "masked_fill_.Tensor": (mask, half.sum()), "addcmul_": (half, half), "addcdiv_": (half, half),
        "lerp_.Scalar": (half.expand_as(part), 0.3), "lerp_.Tensor": (half.expand_as(part), half),
        "copy_": (part + half,),
    }.items():  # fmt: skip
        call(name, part, *operands)
    last = y[:, 12:]
    A.floor_divide_.Tensor(last, half)
    A.eq_.Scalar(last, 1.0)
    for name in ("zero_", "logical_not_"):
        call(name, last[:, :, :3])
    A.fill_.Scalar(last[:, :, 3:5], 2.0)
    A.fill_.Tensor(last[:, :, 5:6], half.sum())
    flags = (y > 0.4).clone()
    some = flags[:, :12]
    some.bitwise_and_(mask).bitwise_or_(half > 0.5)
    A.logical_and_(some, mask)
    A.logical_or_(some, half > 0.6)
    untouched = x.clone()
    first = untouched[:, :12]
    untouched.detach_()  # stays, because `first` is read under its own name
    return live + y + flags + torch.cat([first, first], 1)


def losses(m, x):
    p, y = inside(x), m.w[:, None].expand_as(x).detach()
    q = inside(y)
    return total([
        F.mse_loss(x, y, reduction="none"), F.l1_loss(x, y), F.smooth_l1_loss(x, y), F.huber_loss(x, y),
        F.soft_margin_loss(x, y), F.binary_cross_entropy(p, q), F.binary_cross_entropy_with_logits(x, q),
        F.kl_div(x, q, reduction="none"),
    ])  # fmt: skip


def ordered(m, x):  # along time, which is fixed anyway
    values = [call(name, x, 2) for name in ("cumsum", "cumprod", "logcumsumexp")]
    values += [A.cummax(x, 2)[0], A.cummin(x, 2)[0], A.flip(x, [2]), A.roll(x, [1], [2]), A.softmax.int(x, 1),
               A.log_softmax.int(x, 1), A._softmax(x, 2, False), A._log_softmax(x, 2, False)]  # fmt: skip
    values += [A.fliplr(x.permute(1, 2, 0)).permute(2, 0, 1), A.flipud(x.permute(2, 0, 1)).permute(1, 2, 0)]
    values += [A.tril(x[:, :, None].expand(-1, -1, 40, -1)).sum(2), A.triu(x[:, :, None].expand(-1, -1, 40, -1)).sum(2)]
    square = x[:, :, None].repeat(1, 1, 40, 1)
    A.tril_(square[:, :12])
    A.triu_(square[:, 12:])
    return total([*values, square.mean(2)])


def looked_up(m, x):
    return total([A.bucketize.Tensor(x, m.grid), A.isin.Tensor_Tensor(x.round(), m.grid), A._prelu_kernel(x, m.w[:,
        None]),
                  *torch.broadcast_tensors(x, m.w[:, None]), x])  # fmt: skip


def reductions(m, x):  # along channels and time
    values = []
    for overload, dims in (("mean.dim", [1]), ("sum.dim_IntList", [1, 2]), ("amax", [1]), ("amin", [2]), ("std.dim",
        [1]),
                           ("std.correction", [1]), ("var.dim", [2]), ("var.correction", [1]), ("var_mean.dim", [1]),
                           ("var_mean.correction", [2]), ("std_mean.dim", [1]), ("std_mean.correction", [1]),
                           ("logsumexp", [1]), ("special_logsumexp", [2]), ("all.dims", [1]), ("any.dims", [1]),
                           ("prod.dim_int", 2), ("all.dim", 1), ("any.dim", 2)):  # fmt: skip
        values.append(call(overload, x, dims, keepdim=True))
    values += [A.nansum(x, [1], True), A.nanmean(x, [1], True), A.count_nonzero.dim_IntList(x, [1])[:, None]]
    values += [A.aminmax(x, dim=1, keepdim=True)[1], A.frobenius_norm.dim(x, [1], True), A.norm.Scalar(x)]
    values += [call(name, x) for name in ("mean", "sum", "std", "var", "var_mean", "std_mean", "max", "min", "median")]
    values += [call(name, x > 0) for name in ("all", "any")]
    values += [A.prod(1 + x / 1000), A.linalg_vector_norm(x, 2, [1], True), A.norm.ScalarOpt_dim(x, 2, [1], True),
               A.norm.ScalarOpt_dim_dtype(x, 2, [2], True, dtype=torch.float64), A.linalg_norm(x, None, [1], True),
               A.cosine_similarity(x, m.w[:, None], 1)[:, None],
               A.pairwise_distance(x.transpose(1, 2), m.w)[:, None]]  # fmt: skip
    return x + total(values)


def extremes(m, x):  # values without their indices let the channels shrink
    values = [call(f"{name}.dim", x, 1, True)[0] for name in ("max", "min", "median", "nanmedian")]
    return x + total([*values, A.mode(x.round(), 2, True)[0], A.kthvalue(x, 3, 2, True)[0], x.argmax(2, True),
                      x.argmin(2, True), x.max(2, True)[1]])  # fmt: skip


def ranked(m, x):  # along time
    return total([x.topk(40, 2)[0], x.sort(2)[0], A.sort.stable(x, stable=True, dim=2)[0], x.argsort(2),
                  A.argsort.stable(x, stable=True, dim=2), A.msort(x.permute(2, 0, 1)).permute(1, 2, 0),
                  x])  # fmt: skip


def weight(size: int = 24) -> nn.Parameter:
    return nn.Parameter(torch.randn(size))


def between(operator, free: int = 1, **parts) -> Case:
    """24 channels of sound that meet a weight of 24 values."""
    return Case("sound", operator, conv(6, 24), conv(24, 4), free, {"w": weight(), **parts})


CASES = {
    "unary": lambda: between(unary),
    "complex": lambda: between(complex_),
    "binary": lambda: between(binary),
    "in place": lambda: between(in_place),
    "losses": lambda: between(losses),
    "ordered": lambda: between(ordered, 2),
    "looked up": lambda: between(looked_up, grid=torch.linspace(-2, 2, 24)),
    "reductions": lambda: between(reductions),
    "extremes": lambda: between(extremes),
    "ranked": lambda: between(ranked),
}


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name):
    region = region_of(CASES[name])
    check(region, CASES[name]().free)
