"""Views and rearrangements: reshape, permute, cat, split, slice, expand, and where sizes come from."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ..functional import symbolic
from .table import Binding, Sizes, Terms, arguments, rule, shape
from .terms import Axis, concat, product, same


@rule(
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "unflatten.int",
    "flatten.using_ints",
    "reshape_as.default",
    "view_as.default",
)
def view(b: Binding, node: fx.Node) -> Terms:
    """Runs of axes with equal products are one axis, merged or cut: "b (h d) -> b h d"."""
    a = arguments(node)
    source = a.get("self", a.get("input"))
    x, sizes = list(b[source]), shape(node)
    out = [b.one() if size == 1 else b.neutral(size) for size in sizes]
    left, right = [axis for axis in x if not _is_one(axis)], [axis for axis in out if not _is_one(axis)]
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
    name = "size" if "size" in a else ("shape" if "shape" in a else "sizes")
    if name in a:
        whole = out if name != "sizes" else out[a["dim"] % len(x) : a["dim"] % len(x) + len(a["sizes"])]
        given = list(a[name])
        b.rewrite(node, name, lambda size: _sizes(given, whole, size))
    return tuple(out)


def _sizes(given: list[Any], axes: list[Axis], size: Sizes) -> list[Any]:
    """The size argument in the narrow copy: what did not change stays as written, a changed dynamic axis becomes -1."""
    return [_new_size(old, axis, size) for old, axis in zip(given, axes, strict=True)]


def _new_size(old: Any, axis: Axis, size: Sizes) -> Any:
    root = axis.find()
    if size(root) == root.hint:
        return old
    return size(root) if isinstance(root.size, int) else -1


def _is_one(axis: Axis) -> bool:
    return same(axis.find().size, 1)


def _size(axes: list[Axis]) -> Any:
    return math.prod(axis.find().size for axis in axes)


def _less(a: list[Axis], b: list[Axis]) -> bool:
    return math.prod(axis.find().hint for axis in a) < math.prod(axis.find().hint for axis in b)


@rule("permute.default")
def permute(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    return tuple(b[a["self"]][dim] for dim in a["dims"])


@rule("movedim.int", "movedim.intlist")
def movedim(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = list(b[a["self"]])
    source, target = a["source"], a["destination"]
    if not isinstance(source, int):
        return b.unknown(node, "movedim with several axes")
    moved = x.pop(source)
    x.insert(target % (len(x) + 1), moved)
    return tuple(x)


@rule("transpose.int", "swapaxes.default", "t.default", "numpy_T.default", "mT.default")
def transpose(b: Binding, node: fx.Node) -> Terms:
    x = list(b[node.args[0]])
    first, second = node.args[1:3] if len(node.args) > 2 else (-2, -1)
    if len(x) > 1:
        x[first], x[second] = x[second], x[first]  # type: ignore[index]
    return tuple(x)


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
    dims = a.get("dim")
    chosen = range(len(x)) if dims is None else ([dims] if isinstance(dims, int) else dims)
    gone = {dim % len(x) for dim in chosen if _is_one(x[dim])}
    if dims is None:
        b.freeze(node, x, "a squeeze without axes drops what has size 1")
    return tuple(axis for at, axis in enumerate(x) if at not in gone)


@rule("expand.default", "expand_as.default", "broadcast_to.default")
def expand(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, sizes = b[a["self"]], shape(node)
    new = len(sizes) - len(x)
    out = []
    for at, size in enumerate(sizes):
        old = x[at - new] if at >= new else None
        out.append(old if old is not None and (not _is_one(old) or size == 1) else b.neutral(size))
    if a.get("other") is not None:
        for axis, other in zip(out, b[a["other"]], strict=True):
            b.unify(node, axis, other)
    name = "size" if "size" in a else "shape"
    if a.get(name) is not None:
        given = list(a[name])
        b.rewrite(node, name, lambda size: _sizes(given, out, size))
    return tuple(out)


@rule("cat.default", "concat.default")
def cat(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    operands = [b[part] for part in a["tensors"] if len(shape(part)) == len(shape(node))]
    dim = a["dim"] % len(shape(node))
    out = []
    for at in range(len(shape(node))):
        if at == dim:
            out.append(concat([operand[at] for operand in operands]))
            continue
        for operand in operands[1:]:
            b.unify(node, operands[0][at], operand[at])
        out.append(operands[0][at])
    return tuple(out)


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


@rule("chunk.default", "split.Tensor", "split_with_sizes.default", "tensor_split.sections")
def split(b: Binding, node: fx.Node) -> Any:
    """[a + b + c] -> a, b, c; written as split_with_sizes in the narrow copy."""
    a = arguments(node)
    x, outputs = b[a["self"]], node.meta["val"]
    dim = a["dim"] % len(x)
    pieces = [b.neutral(value.shape[dim]) for value in outputs]
    if not all(isinstance(symbolic(value.shape[dim]), int) for value in outputs):
        b.freeze(node, x[dim], "it is split at sizes that vary")
        pieces = [b.fixed(value.shape[dim], node, "it is split at sizes that vary") for value in outputs]
    else:
        b.unify(node, x[dim], concat(pieces))
        b.rewrite(node, "split_sizes", lambda size: [size(piece) for piece in pieces])
    return tuple((*x[:dim], piece, *x[dim + 1 :]) for piece in pieces)


@rule("slice.Tensor", "narrow.default")
def slice_(b: Binding, node: fx.Node) -> Terms:
    """[before + kept + after] -> kept; bounds come from the sizes of the pieces in the narrow copy."""
    a = arguments(node)
    x = b[a["self"]]
    dim, step = a["dim"] % len(x), a.get("step", 1)
    old, new = x[dim].find(), shape(node)[dim]
    if same(old.size, symbolic(new)) and step == 1:
        if "end" in a and isinstance(a["end"], int):
            b.rewrite(node, "end", lambda _: 2**63 - 1)
        return x
    start = a["start"] or 0
    if step != 1 or not (isinstance(old.size, int) and isinstance(symbolic(new), int) and isinstance(start, int)):
        b.freeze(node, x[dim], "it is sliced at bounds that vary or with steps")
        return (*x[:dim], b.fixed(new, node, "a slice"), *x[dim + 1 :])
    start = max(0, start + old.size if start < 0 else start)
    before, kept, after = start, int(new), old.size - start - int(new)
    pieces = [b.neutral(size) if size else None for size in (before, kept, after)]
    b.unify(node, x[dim], concat([piece for piece in pieces if piece is not None]))
    first, middle = pieces[0], pieces[1]
    if middle is None:
        return b.unknown(node, "an empty slice")
    b.rewrite(node, "start", lambda size: size(first) if first is not None else 0)
    end = "end" if "end" in a else "length"
    b.rewrite(node, end, lambda size: size(middle) + (size(first) if first is not None and end == "end" else 0))
    return (*x[:dim], middle, *x[dim + 1 :])


@rule("select.int", "unbind.int")
def select(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = b[a["self"]]
    dim = a["dim"] % len(x)
    b.freeze(node, x[dim], "single entries of it are picked")
    rest = (*x[:dim], *x[dim + 1 :])
    return tuple(rest for _ in node.meta["val"]) if "unbind" in str(node.target) else rest


@rule("index.Tensor")
def index(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x, chosen = b[a["self"]], list(a["indices"])
    chosen += [None] * (len(x) - len(chosen))
    at = [dim for dim, entry in enumerate(chosen) if entry is not None]
    if at != list(range(at[0], at[-1] + 1)) or any(
        entry.meta["val"].dtype.is_floating_point or not entry.meta["val"].dtype.is_signed
        for entry in chosen
        if entry is not None
    ):
        return b.unknown(node, "an index over several separate axes, or by a mask")
    b.freeze(node, [x[dim] for dim in at], "it is indexed")
    b.freeze(node, [axis for entry in chosen if entry is not None for axis in b[entry]], "it holds an index")
    rank = len(shape(node)) - (len(x) - len(at))
    fixed = [b.fixed(size, node, "an index") for size in shape(node)[at[0] : at[0] + rank]]
    return (*x[: at[0]], *fixed, *x[at[-1] + 1 :])


@rule("index_select.default", "gather.default")
def index_select(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x, dim = b[a["self"]], a["dim"] % len(b[a["self"]])
    if "gather" in str(node.target):
        return b.unknown(node, "a gather by computed indices")
    b.freeze(node, x[dim], "it is indexed")
    return (*x[:dim], b.fixed(shape(node)[dim], node, "an index"), *x[dim + 1 :])


@rule(
    "zeros.default",
    "ones.default",
    "full.default",
    "empty.memory_format",
    "new_zeros.default",
    "new_ones.default",
    "new_full.default",
    "new_empty.default",
)
def constant(b: Binding, node: fx.Node) -> Terms:
    """Constant fills follow what they meet: their size argument is written anew."""
    given = list(arguments(node)["size"])
    out = [b.one() if size == 1 else b.neutral(size) for size in shape(node)]
    b.rewrite(node, "size", lambda size: _sizes(given, out, size))
    return tuple(out)


@rule(
    "arange.default",
    "arange.start",
    "arange.start_step",
    "scalar_tensor.default",
    "eye.default",
    "hann_window.default",
    "linspace.default",
)
def counted(b: Binding, node: fx.Node) -> Any:
    return b.fixed_outputs(node, "its entries count along it")


@rule("repeat.default")
def repeat(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x, times = b[a["self"]], list(a["repeats"])
    new = len(times) - len(x)
    out: list[Axis] = []
    for at, (factor, size) in enumerate(zip(times, shape(node), strict=True)):
        old = x[at - new] if at >= new else b.one()
        if factor == 1:
            out.append(old)
        elif _is_one(old):
            out.append(b.fixed(size, node, "a repetition"))
        elif isinstance(factor, int):
            out.append(product([b.fixed(factor, node, "a repetition"), old]))
        else:
            b.freeze(node, old, "it is repeated a varying number of times")
            out.append(b.fixed(size, node, "a repetition"))
    return tuple(out)
