"""Contractions: linear, matmul, einsum, convolutions, attention, embeddings.

The equations in the comments are the rows; an axis that stands on both sides is one axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from .pointwise import broadcast
from .table import Binding, Terms, arguments, rule, shape
from .terms import Axis, product, same


def _bind(b: Binding, node: fx.Node, equation: str, *operands: Terms) -> Terms:
    """Unify the operands' axes by letters ("bi,oi->bo") and return the output's; MACs: all letters multiplied."""
    left, right = equation.split("->")
    named: dict[str, Axis] = {}
    for letters, operand in zip(left.split(","), operands, strict=True):
        for letter, axis in zip(letters, operand, strict=True):
            if letter in named:
                b.unify(node, named[letter], axis)
            else:
                named[letter] = axis
    if len(operands) > 1:
        b.count(node, *named.values())
    return tuple(named[letter] for letter in right)


@rule("linear.default")  # * i, o i, o -> * o
def linear(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, weight = b[a["input"]], b[a["weight"]]
    b.unify(node, x[-1], weight[1])
    if a["bias"] is not None:
        b.unify(node, b[a["bias"]][0], weight[0])
    b.count(node, *x, weight[0])
    return (*x[:-1], weight[0])


@rule("mm.default")
def mm(b: Binding, node: fx.Node) -> Terms:
    return _bind(b, node, "mk,kn->mn", b[node.args[0]], b[node.args[1]])


@rule("bmm.default")
def bmm(b: Binding, node: fx.Node) -> Terms:
    return _bind(b, node, "bmk,bkn->bmn", b[node.args[0]], b[node.args[1]])


@rule("addmm.default", "baddbmm.default")
def addmm(b: Binding, node: fx.Node) -> Terms:
    equation = "mk,kn->mn" if str(node.target).startswith("aten.addmm") else "bmk,bkn->bmn"
    out = _bind(b, node, equation, b[node.args[1]], b[node.args[2]])
    return broadcast(b, node, b[node.args[0]], out)


@rule("matmul.default")  # * m k, * k n -> * m n, batch axes broadcast
def matmul(b: Binding, node: fx.Node) -> Terms:
    x, y = b[node.args[0]], b[node.args[1]]
    if len(x) == 1 and len(y) == 1:
        return _bind(b, node, "k,k->", x, y)
    b.unify(node, x[-1], y[-2] if len(y) > 1 else y[0])
    batch = broadcast(b, node, x[:-2], y[:-2])
    out = (*batch, *x[-2:-1], *(y[-1:] if len(y) > 1 else ()))
    b.count(node, *out, x[-1])
    return out


@rule("einsum.default")
def einsum(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    equation = a["equation"].replace(" ", "")
    operands = [b[operand] for operand in a["tensors"]]
    if (
        "." in equation
        or "->" not in equation
        or any(len(set(part)) < len(part) for part in equation.split("->")[0].split(","))
    ):
        return b.unknown(node, "an einsum with an ellipsis or a diagonal")
    return _bind(b, node, equation, *operands)


def _convolution(b: Binding, node: fx.Node, transposed: bool) -> Terms:
    # n (g i) x, (g o) i k -> n (g o) y;  transposed: n (g i) x, (g i) o k -> n (g o) y
    a = arguments(node)
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
        if kernel[at] == 1 and plain:
            out.append(axis)
            continue
        b.freeze(node, axis, "a convolution slides along it")
        out.append(b.fixed(size, node, "a convolution slides along it"))
    return tuple(out)


def _at(value: Any, at: int) -> Any:
    if isinstance(value, (list, tuple)):
        return value[at] if len(value) > 1 else value[0]
    return {"valid": 0, "same": 0}.get(value, value) if isinstance(value, str) else value


@rule("conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding", "conv3d.padding")
def conv(b: Binding, node: fx.Node) -> Terms:
    return _convolution(b, node, transposed=False)


@rule("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def conv_transpose(b: Binding, node: fx.Node) -> Terms:
    return _convolution(b, node, transposed=True)


@rule("embedding.default")  # n d, * -> * d
def embedding(b: Binding, node: fx.Node) -> Terms:
    weight = b[node.args[0]]
    b.freeze(node, weight[0], "it is indexed")
    return (*b[node.args[1]], weight[1])


@rule("scaled_dot_product_attention.default")  # * h l d, * h s d, * h s e -> * h l e
def attention(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    query, key, value = b[a["query"]], b[a["key"]], b[a["value"]]
    b.unify(node, query[-1], key[-1])
    b.unify(node, key[-2], value[-2])
    if a["enable_gqa"] and len(query) > 2 and not same(query[-3].find().size, key[-3].find().size):
        repeat = b.neutral(query[-3].find().size // key[-3].find().size)
        b.unify(node, query[-3], product([key[-3], repeat]))
        b.unify(node, key[-3], value[-3])
        batch = (*broadcast(b, node, query[:-3], broadcast(b, node, key[:-3], value[:-3])), query[-3])
    else:
        batch = broadcast(b, node, query[:-2], broadcast(b, node, key[:-2], value[:-2]))
    if a["attn_mask"] is not None:
        broadcast(b, node, (*batch, query[-2], key[-2]), b[a["attn_mask"]])
    if a["scale"] is None:  # the default follows the head size: pin the one the weights were trained with
        original = 1 / math.sqrt(query[-1].find().hint)
        whole = query[-1].find().hint
        b.rewrite(node, "scale", lambda size: None if size(query[-1]) == whole else original)
    b.count(node, *batch, query[-2], key[-2], query[-1])
    b.count(node, *batch, query[-2], key[-2], value[-1])
    return (*batch, query[-2], value[-1])
