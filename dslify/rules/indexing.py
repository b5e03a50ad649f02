"""Picking and writing entries: slices follow their axis, indexed axes are fixed, the index's own axes pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..functional import symbolic
from .table import Binding, Terms, arguments, rule, shape
from .terms import Axis, concat, product, same

_INDEXED = "it is indexed"


@rule("slice.Tensor", "narrow.default")
def slice_(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, dim = b[a["self"]], a["dim"] % len(b[a["self"]])
    return (*x[:dim], _sliced(b, node, x[dim], shape(node)[dim]), *x[dim + 1 :])


@rule("slice_scatter.default")
def slice_scatter(b: Binding, node: fx.Node) -> Terms:
    """The tensor with another one written into a slice."""
    a = arguments(node)
    x, written = b[a["self"]], b[a["src"]]
    dim = a["dim"] % len(x)
    into = (*x[:dim], _sliced(b, node, x[dim], shape(a["src"])[dim]), *x[dim + 1 :])
    for mine, theirs in zip(into, written, strict=True):
        b.unify(node, mine, theirs)
    return x


def _sliced(b: Binding, node: fx.Node, axis: Axis, new: Any) -> Axis:
    """[before + kept + after] -> kept; bounds come from the sizes of the pieces in the narrow copy."""
    a = arguments(node)
    step, start, old = a.get("step", 1), a["start"] or 0, axis.find()
    size = symbolic(new)
    bounded = isinstance(old.size, int) and isinstance(size, int) and isinstance(start, int)
    if same(old.size, size) and step == 1:
        if isinstance(a.get("end"), int):
            b.rewrite(node, "end", lambda _: 2**63 - 1)
        return axis
    if bounded and isinstance(step, int) and step > 1:
        start = start % old.size
        if old.size % step == 0 and start < step and size == old.size // step:  # (kept s) -> kept
            kept = b.neutral(size)
            b.unify(node, axis, product([kept, b.fixed(step, node, "it is sliced in steps")]))
            b.rewrite(node, "end", lambda _: 2**63 - 1)
            return kept
    if not bounded or step != 1 or size == 0:
        return b.renewed(node, axis, new, "it is sliced at bounds that vary or in steps")
    start = max(0, start + old.size if start < 0 else start)
    before, kept, after = (b.neutral(length) for length in (start, size, old.size - start - size))
    b.unify(node, axis, concat([before, kept, after]))
    b.rewrite(node, "start", lambda size: size(before) if start else 0)
    if "end" in a:
        b.rewrite(node, "end", lambda size: size(kept) + (size(before) if start else 0))
    else:
        b.rewrite(node, "length", lambda size: size(kept))
    return kept


@rule("select.int", "unbind.int")
def select(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = b[a["self"]]
    dim = a["dim"] % len(x)
    b.freeze(node, x[dim], "single entries of it are picked")
    rest = (*x[:dim], *x[dim + 1 :])
    return tuple(rest for _ in node.meta["val"]) if "unbind" in str(node.target) else rest


@rule("select_scatter.default")
def select_scatter(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, written = b[a["self"]], b[a["src"]]
    dim = a["dim"] % len(x)
    b.freeze(node, x[dim], "single entries of it are written")
    for mine, theirs in zip((*x[:dim], *x[dim + 1 :]), written, strict=True):
        b.unify(node, mine, theirs)
    return x


@rule("index.Tensor")
def index(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    if any(map(_is_mask, a["indices"])):
        return b.unknown(node, "an index by a mask")
    return _indexed(b, node, b[a["self"]], a["indices"])


@rule("index_put.default", "index_put_.default")
def index_put(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x, values, chosen = b[a["self"]], b[a["values"]], a["indices"]
    if not any(map(_is_mask, chosen)):
        b.broadcast(node, _indexed(b, node, x, chosen), values)
        return x
    covered = len(b[chosen[0]]) if len(chosen) == 1 else 0
    if not covered or len(values) > len(x) - covered:
        return b.unknown(node, "an index by a mask")
    for mine, theirs in zip(x, b[chosen[0]], strict=False):  # one value wherever the mask is set
        b.unify(node, mine, theirs)
    b.broadcast(node, x[covered:], values)
    return x


def _is_mask(entry: fx.Node | None) -> bool:
    return entry is not None and entry.meta["val"].dtype in (torch.bool, torch.uint8)


def _indexed(b: Binding, node: fx.Node, x: Terms, indices: Sequence[fx.Node | None]) -> Terms:
    """Axes of x[indices]: what the indices broadcast to stands where the indexed axes stood, in front if they were
    apart. An index keeps its own axes: its entries move along with them."""
    places = [at for at, entry in enumerate(indices) if entry is not None]
    b.freeze(node, [x[at] for at in places], _INDEXED)
    picked = b.broadcast(node, *(b[entry] for entry in indices if entry is not None))
    rest = [axis for at, axis in enumerate(x) if at not in places]
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    return (*rest[:first], *picked, *rest[first:])


@rule("index_select.default", "embedding.default")  # x[.. i ..]; n d, * -> * d
def index_select(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, chosen = (b[a["weight"]], b[a["indices"]]) if "weight" in a else (b[a["self"]], b[a["index"]])
    dim = a.get("dim", 0) % len(x)
    b.freeze(node, x[dim], _INDEXED)
    return (*x[:dim], *chosen, *x[dim + 1 :])


@rule("embedding_bag.padding_idx", "embedding_bag.default")  # n d -> bags d
def embedding_bag(b: Binding, node: fx.Node) -> tuple[Terms, ...]:
    a = arguments(node)
    weight = b[a["weight"]]
    for used in node.all_input_nodes:
        b.freeze(node, b[used] if used is not a["weight"] else weight[0], _INDEXED)
    fixed = b.fixed_outputs(node, "it counts bags")
    return ((fixed[0][0], weight[1]), *fixed[1:3], (fixed[3][0], weight[1]) if len(fixed[3]) == 2 else fixed[3])


@rule("gather.default")  # the index's axes, which are the tensor's but for one
def gather(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, chosen = b[a["self"]], b[a["index"]]
    _along(b, node, x, chosen, a["dim"] % max(1, len(x)))
    return chosen


@rule("take_along_dim.default")  # as gather, but broadcast
def take_along_dim(b: Binding, node: fx.Node) -> Any:
    a = arguments(node)
    x = b[a["self"]]
    if a["dim"] is None:
        return b.unknown(node, "an index into the flattened tensor")
    dim = a["dim"] % len(x)
    b.freeze(node, x[dim], _INDEXED)
    return b.broadcast(node, b[a["indices"]], (*x[:dim], b.one(), *x[dim + 1 :]))


@rule("scatter.src", "scatter.value", "scatter.reduce", "scatter.value_reduce", "scatter_add.default",
      "scatter_reduce.two", "scatter_.src", "scatter_.value", "scatter_add_.default")  # fmt: skip
def scatter(b: Binding, node: fx.Node) -> Terms:
    """The tensor with entries written where an index says, along one axis."""
    a = arguments(node)
    x, chosen, dim = b[a["self"]], b[a["index"]], a["dim"] % len(b[a["self"]])
    _along(b, node, x, chosen, dim)
    if a.get("src") is not None:
        for mine, theirs in zip(chosen, b[a["src"]], strict=True):
            b.unify(node, mine, theirs)
    return x


def _along(b: Binding, node: fx.Node, x: Terms, chosen: Terms, dim: int) -> None:
    for at, (mine, theirs) in enumerate(zip(x, chosen, strict=True)):
        if at == dim:
            b.freeze(node, mine, _INDEXED)
        elif not (theirs.is_one() and not mine.is_one()):
            b.unify(node, mine, theirs)
        else:  # an index may be shorter: only the first entries are read
            b.freeze(node, mine, _INDEXED)


@rule("index_add.default", "index_copy.default", "index_fill.int_Scalar", "index_fill.int_Tensor",
      "index_add_.default", "index_copy_.default", "index_fill_.int_Scalar")  # fmt: skip
def index_write(b: Binding, node: fx.Node) -> Terms:
    """Whole slices written where an index says, along one axis."""
    a = arguments(node)
    x, dim = b[a["self"]], a["dim"] % len(b[a["self"]])
    b.freeze(node, x[dim], _INDEXED)
    if a.get("source") is not None:
        b.freeze(node, b[a["index"]], "it holds an index")
        for at, (mine, theirs) in enumerate(zip(x, b[a["source"]], strict=True)):
            b.freeze(node, theirs, _INDEXED) if at == dim else b.unify(node, mine, theirs)
    return x


@rule("searchsorted.Tensor", "searchsorted.Scalar")
def searchsorted(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    ordered = b[a["sorted_sequence"]]
    b.freeze(node, ordered[-1], "the order of its entries matters")
    if not isinstance(a["self"], fx.Node):
        return ()
    x = b[a["self"]]
    if len(ordered) > 1:
        for mine, theirs in zip(ordered[:-1], x, strict=False):
            b.unify(node, mine, theirs)
    return x


@rule("diagonal.default", "diag.default", "trace.default")
def diagonal(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    first, second = a.get("dim1", 0) % len(x), a.get("dim2", len(x) - 1) % len(x)
    b.freeze(node, [x[first], x[second]], "its diagonal is read")
    rest = tuple(axis for at, axis in enumerate(x) if at not in (first, second))
    if len(x) == 1:  # diag of a vector is a matrix
        return b.fixed_outputs(node, "it holds a diagonal")  # type: ignore[no-any-return]
    return rest if "trace" in str(node.target) else (*rest, b.fixed(shape(node)[-1], node, "its diagonal is read"))


@rule("diag_embed.default")  # * n -> * n n
def diag_embed(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, rank = b[a["self"]], len(shape(node))
    places = [a["dim1"] % rank, a["dim2"] % rank]
    if a["offset"]:
        b.freeze(node, x[-1], "it becomes a diagonal beside the middle")
    rest = iter(x[:-1])
    return tuple(
        (b.fixed(size, node, "it holds a diagonal") if a["offset"] else x[-1]) if at in places else next(rest)
        for at, size in enumerate(shape(node))
    )
