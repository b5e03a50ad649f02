"""Contractions: linear, matmul, einsum, attention, and products of vectors.

The equations in the comments are the rows; an axis that stands on both sides is one axis.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, rule
from .terms import Axis, product, same


def contract(b: Binding, node: fx.Node, equation: str, *operands: Terms) -> Terms:
    """Unify the operands' axes by letters ("bi,oi->bo") and return the output's; MACs: all letters multiplied.

    Read as torch.einsum reads it: "..." broadcasts, a letter twice in one operand is a diagonal, and without "->" the
    letters that occur once come out, sorted.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    dots = [len(operand) - len(part.replace("...", "")) for part, operand in zip(parts, operands, strict=True)]
    letters = [_letters(part, count) for part, count in zip(parts, dots, strict=True)]
    named: dict[str, Axis] = {}
    for part, operand in zip(letters, operands, strict=True):
        for letter, axis in zip(part, operand, strict=True):
            if letter not in named or named[letter].is_one():
                named[letter] = axis
            elif not axis.is_one():
                b.unify(node, named[letter], axis)
    if len(operands) > 1:
        b.count(node, *named.values())
    once = "".join(sorted(letter for letter in left if letter.isalpha() and left.count(letter) == 1))
    return tuple(named[letter] for letter in _letters(right if arrow else "..." + once, max(dots)))


def _letters(part: str, dots: int) -> list[str]:
    """One name per axis; those that "..." stands for are numbered from the right, as they broadcast."""
    before, ellipsis, after = part.partition("...")
    return [*before, *(f".{at}" for at in range(dots if ellipsis else 0, 0, -1)), *after]


@rule("linear.default")  # * i, o i, o -> * o
def linear(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, weight = b[a["input"]], b[a["weight"]]
    b.unify(node, x[-1], weight[-1])
    if a["bias"] is not None:
        b.broadcast(node, b[a["bias"]], weight[:-1])
    b.count(node, *x, *weight[:-1])
    return (*x[:-1], *weight[:-1])


@rule("einsum.default")
def einsum(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    return contract(b, node, a["equation"], *(b[operand] for operand in a["tensors"]))


_EQUATIONS = {
    "mm.default": "mk,kn->mn",
    "bmm.default": "bmk,bkn->bmn",
    "mv.default": "mk,k->m",
    "dot.default": "k,k->",
    "vdot.default": "k,k->",
    "outer.default": "m,n->mn",
    "ger.default": "m,n->mn",
    "inner.default": "...k,k->...",
}


@rule(*_EQUATIONS)
def multiply(b: Binding, node: fx.Node) -> Any:
    x, y = b[node.args[0]], b[node.args[1]]
    name = str(node.target).removeprefix("aten.")
    if name == "inner.default" and len(y) != 1:
        return b.unknown(node, "an inner product of matrices")
    return contract(b, node, _EQUATIONS[name], x, y)


_SUMS = {"addmm.default": "mk,kn->mn", "baddbmm.default": "bmk,bkn->bmn", "addmv.default": "mk,k->m",
         "addr.default": "m,n->mn", "addbmm.default": "bmk,bkn->mn"}  # fmt: skip


@rule(*_SUMS)  # the first operand is added to the product of the others
def multiply_and_add(b: Binding, node: fx.Node) -> Terms:
    added, x, y = (b[operand] for operand in node.args[:3])
    return b.broadcast(node, contract(b, node, _SUMS[str(node.target).removeprefix("aten.")], x, y), added)


@rule("matmul.default", "linalg_matmul.default")  # * m k, * k n -> * m n, batch axes broadcast
def matmul(b: Binding, node: fx.Node) -> Terms:
    x, y = b[node.args[0]], b[node.args[1]]
    rows, columns = "m" if len(x) > 1 else "", "n" if len(y) > 1 else ""
    return contract(b, node, f"...{rows}k,...k{columns}->...{rows}{columns}", x, y)


@rule("linalg_vecdot.default")
def vecdot(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    out = b.broadcast(node, b[a["x"]], b[a["y"]])
    dim = a["dim"] % len(out)
    return (*out[:dim], *out[dim + 1 :])


@rule("linalg_cross.default")
def cross(b: Binding, node: fx.Node) -> Terms:
    out = b.broadcast(node, b[node.args[0]], b[node.args[1]])
    b.freeze(node, out[arguments(node)["dim"]], "it is a vector of space")
    return out


@rule("tensordot.default")
def tensordot(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, y = b[a["self"]], b[a["other"]]
    left, right = ([dim % len(terms) for dim in a[name]] for terms, name in ((x, "dims_self"), (y, "dims_other")))
    for mine, theirs in zip(left, right, strict=True):
        b.unify(node, x[mine], y[theirs])
    out = (*(axis for at, axis in enumerate(x) if at not in left),
           *(axis for at, axis in enumerate(y) if at not in right))  # fmt: skip
    b.count(node, *out, *(x[dim] for dim in left))
    return out


@rule("bilinear.default")  # * i, * j, o i j, o -> * o
def bilinear(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, y, weight = b[a["input1"]], b[a["input2"]], b[a["weight"]]
    out = contract(b, node, "...i,...j,oij->...o", x, y, weight)
    if a["bias"] is not None:
        b.unify(node, b[a["bias"]][0], out[-1])
    return out


@rule("transformers.grouped_mm_fallback.default")  # m k, e k n -> m n: each run of rows has its own matrix
def grouped(b: Binding, node: fx.Node) -> Terms:
    x, weight, ends = (b[operand] for operand in node.args[:3])
    b.freeze(node, [x[0], weight[0], *ends], "its rows belong to groups")
    b.unify(node, x[1], weight[1])
    b.count(node, *x, weight[2])
    return (x[0], weight[2])


@rule("cdist.default", "_cdist_forward.default")  # * p m, * r m -> * p r
def cdist(b: Binding, node: fx.Node) -> Terms:
    return contract(b, node, "...pm,...rm->...pr", b[node.args[0]], b[node.args[1]])


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
        batch = (*b.broadcast(node, query[:-3], key[:-3], value[:-3]), query[-3])
    else:
        batch = b.broadcast(node, query[:-2], key[:-2], value[:-2])
    if a["attn_mask"] is not None:
        b.broadcast(node, (*batch, query[-2], key[-2]), b[a["attn_mask"]])
    if a["is_causal"]:
        b.freeze(node, [query[-2], key[-2]], "the order of its entries matters")
    if a["scale"] is None:  # the default follows the head size: pin the one the weights were trained with
        whole = query[-1].find().hint
        b.rewrite(node, "scale", lambda size: None if size(query[-1]) == whole else 1 / math.sqrt(whole))
    b.count(node, *batch, query[-2], key[-2], query[-1])
    b.count(node, *batch, query[-2], key[-2], value[-1])
    return (*batch, query[-2], value[-1])
