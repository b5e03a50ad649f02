"""Views and rearrangements: reshape, permute, expand, repeat, cat, split."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ..functional import symbolic
from .table import Binding, Terms, arguments, dims, new_sizes, rule, shape, size_of
from .terms import Axis, concat, product, same


@rule("view.default", "reshape.default", "_unsafe_view.default", "unflatten.int", "flatten.using_ints", "ravel.default",
      "reshape_as.default", "view_as.default")  # fmt: skip
def view(b: Binding, node: fx.Node) -> Terms:
    """Runs of axes with equal products are one axis, merged or cut: "b (h d) -> b h d"."""
    a = arguments(node)
    source = a.get("self", a.get("input"))
    x, sizes = list(b[source]), shape(node)
    out = [b.fresh(size) for size in sizes]
    left, right = [axis for axis in x if not axis.is_one()], [axis for axis in out if not axis.is_one()]
    while left or right:
        mine, theirs = [left.pop(0)] if left else [], [right.pop(0)] if right else []
        while not same(_size(mine), _size(theirs)):
            if _less(mine, theirs) and left:
                mine.append(left.pop(0))
            elif right:
                theirs.append(right.pop(0))
            elif left:
                mine.append(left.pop(0))
            else:
                break
        b.unify(node, product(mine) if len(mine) != 1 else mine[0], product(theirs) if len(theirs) != 1 else theirs[0])
    if "other" in a:
        for axis, other in zip(out, b[a["other"]], strict=True):
            b.unify(node, axis, other)
    name = "size" if "size" in a else ("shape" if "shape" in a else "sizes")
    if name in a:
        whole = out if name != "sizes" else out[a["dim"] % len(x) : a["dim"] % len(x) + len(a["sizes"])]
        given = list(a[name])
        b.rewrite(node, name, lambda size: new_sizes(given, whole, size))
    return tuple(out)


def _size(axes: list[Axis]) -> Any:
    return math.prod(axis.find().size for axis in axes)


def _less(a: list[Axis], b: list[Axis]) -> bool:
    return math.prod(axis.find().hint for axis in a) < math.prod(axis.find().hint for axis in b)


@rule("permute.default")
def permute(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    return tuple(b[a["self"]][dim] for dim in a["dims"])


@rule("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist")
def movedim(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    sources, targets = ([dim % len(x) for dim in ([given] if isinstance(given, int) else given)]
                        for given in (a["source"], a["destination"]))  # fmt: skip
    moved = dict(zip(targets, sources, strict=True))
    others = iter(at for at in range(len(x)) if at not in sources)
    return tuple(x[moved[at] if at in moved else next(others)] for at in range(len(x)))


@rule("transpose.int", "swapaxes.default", "swapdims.default", "t.default", "mT.default", "mH.default",
      "adjoint.default")  # fmt: skip
def transpose(b: Binding, node: fx.Node) -> Terms:
    x = list(b[node.args[0]])
    a = arguments(node)
    first, second = a.get("dim0", a.get("axis0", -2)), a.get("dim1", a.get("axis1", -1))
    if len(x) > 1:
        x[first], x[second] = x[second], x[first]
    return tuple(x)


@rule("numpy_T.default")
def reverse(b: Binding, node: fx.Node) -> Terms:
    return tuple(reversed(b[node.args[0]]))


@rule("unsqueeze.default")
def unsqueeze(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = list(b[a["self"]])
    x.insert(a["dim"] % (len(x) + 1), b.one())
    return tuple(x)


@rule("squeeze.dim", "squeeze.dims", "squeeze.default")
def squeeze(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    chosen = dims(a.get("dim"), len(x))
    if isinstance(a.get("dim"), list):
        b.rewrite(node, "dim", lambda _: [dim for dim in chosen if x[dim].is_one()])
    else:
        b.freeze(node, [x[dim] for dim in chosen if not x[dim].is_one()], "it would vanish at size 1")
    return tuple(axis for at, axis in enumerate(x) if at not in chosen or not axis.is_one())


@rule("expand.default", "expand_as.default", "broadcast_to.default")
def expand(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, sizes = b[a["self"]], shape(node)
    new = len(sizes) - len(x)
    out = []
    for at, size in enumerate(sizes):
        old = x[at - new] if at >= new else None
        out.append(old if old is not None and not old.is_one() else b.given(size, node))
    if a.get("other") is not None:
        for axis, other in zip(out, b[a["other"]], strict=True):
            b.unify(node, axis, other)
    name = "size" if "size" in a else "shape"
    if a.get(name) is not None:
        given = list(a[name])
        b.rewrite(node, name, lambda size: new_sizes(given, out, size))
    return tuple(out)


@rule("hstack.default", "vstack.default")
def stack_flat(b: Binding, node: fx.Node) -> Terms:
    """cat along the second axis (the only one of vectors), or along the first (vectors are rows)."""
    operands = [b[part] for part in arguments(node)["tensors"]]
    vertical = "vstack" in str(node.target)
    if vertical:
        operands = [operand if len(operand) > 1 else (b.one(), *operand) for operand in operands]
    return _joined(b, node, operands, 0 if vertical or len(operands[0]) == 1 else 1)


@rule("cat.default", "concat.default")
def cat(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    operands = [b[part] for part in a["tensors"] if len(shape(part)) == len(shape(node))]
    return _joined(b, node, operands, a["dim"] % len(shape(node)))


def _joined(b: Binding, node: fx.Node, operands: list[Terms], dim: int) -> Terms:
    for operand in operands[1:]:
        for at, (mine, theirs) in enumerate(zip(operands[0], operand, strict=True)):
            if at != dim:
                b.unify(node, mine, theirs)
    joined = concat([operand[dim] for operand in operands])
    return (*operands[0][:dim], joined, *operands[0][dim + 1 :])


@rule("stack.default")
def stack(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    operands = [b[part] for part in a["tensors"]]
    for operand in operands[1:]:
        for mine, theirs in zip(operands[0], operand, strict=True):
            b.unify(node, mine, theirs)
    out = list(operands[0])
    out.insert(a["dim"] % (len(out) + 1), b.fixed(len(operands), node, "values are stacked along it"))
    return tuple(out)


@rule("chunk.default", "split.Tensor", "split.sizes", "split_with_sizes.default", "tensor_split.sections",
      "tensor_split.indices", "unsafe_chunk.default", "unsafe_split.Tensor",
      "unsafe_split_with_sizes.default")  # fmt: skip
def split(b: Binding, node: fx.Node) -> Any:
    """[a + b + c] -> a, b, c; written as split_with_sizes in the narrow copy."""
    a = arguments(node)
    x, outputs = b[a["self"]], node.meta["val"]
    dim = a["dim"] % len(x)
    if not all(isinstance(symbolic(value.shape[dim]), int) for value in outputs):
        pieces = [b.renewed(node, x[dim], value.shape[dim], "it is split at sizes that vary") for value in outputs]
    else:
        pieces = [b.neutral(value.shape[dim]) for value in outputs]
        b.unify(node, x[dim], concat(pieces))
        b.rewrite(node, "split_sizes", lambda size: [size(piece) for piece in pieces])
    return tuple((*x[:dim], piece, *x[dim + 1 :]) for piece in pieces)


@rule("repeat.default", "tile.default")  # * -> * (factor n), where the factor is not 1
def repeat(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    name = "repeats" if "repeats" in a else "dims"
    given, x, sizes = list(a[name]), b[a["self"]], shape(node)
    x = (*(b.one() for _ in range(len(sizes) - len(x))), *x)
    factors = [1] * (len(sizes) - len(given)) + given
    out = tuple(_repeated(b, node, *entry, outer=True) for entry in zip(x, factors, sizes, strict=True))
    b.rewrite(node, name, lambda size: [
        size(new) if old.is_one() and isinstance(factor, int) else factor
        for old, new, factor in zip(x, out, factors, strict=True)
    ][-len(given) :])  # fmt: skip
    return out


@rule("repeat_interleave.self_int")  # * n -> * (n factor)
def repeat_interleave(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, factor = b[a["self"]], a["repeats"]
    if a["dim"] is None:
        return (_repeated(b, node, product(x), factor, shape(node)[0], outer=False),)
    dim = a["dim"] % len(x)
    out = _repeated(b, node, x[dim], factor, shape(node)[dim], outer=False)
    if x[dim].is_one() and isinstance(factor, int):
        b.rewrite(node, "repeats", size_of(out))
    if isinstance(a["output_size"], int):
        b.rewrite(node, "output_size", size_of(out))
    return (*x[:dim], out, *x[dim + 1 :])


def _repeated(b: Binding, node: fx.Node, axis: Axis, factor: Any, size: Any, outer: bool) -> Axis:
    """An axis of size 1 follows what it meets, as if it had been expanded; another one gets a fixed factor."""
    if isinstance(factor, int) and factor == 1:
        return axis
    if axis.is_one():
        return b.given(size, node)
    if not isinstance(factor, int):
        return b.renewed(node, axis, size, "it is repeated a varying number of times")
    times = b.fixed(factor, node, "a repetition")
    return product([times, axis] if outer else [axis, times])


@rule("repeat_interleave.self_Tensor")
def repeat_interleave_each(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x, dim = b[a["self"]], a["dim"]
    if dim is None:
        return b.unknown(node, "a flattened tensor is repeated entry by entry")
    b.freeze(node, b[a["repeats"]], "it counts repetitions")
    return (*x[: dim % len(x)], b.renewed(node, x[dim], shape(node)[dim], "it is repeated entry by entry"),
            *x[dim % len(x) + 1 :])  # fmt: skip


@rule("meshgrid.default", "meshgrid.indexing")  # i, j -> i j, i j
def meshgrid(b: Binding, node: fx.Node) -> tuple[Terms, ...]:
    a = arguments(node)
    out = [axis for part in a["tensors"] for axis in (b[part] or (b.one(),))]
    if a.get("indexing") == "xy" and len(out) > 1:
        out[0], out[1] = out[1], out[0]
    return tuple(tuple(out) for _ in node.meta["val"])
