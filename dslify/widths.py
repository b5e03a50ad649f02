"""The sizes that a width gives the free axes of a region, and the boundaries at which a projection pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch.utils._pytree as pytree
from torch import Tensor, fx

from .axes import KINDS, AxisMap, sizes
from .functional import symbolic
from .rules import Axis, kept_size

FREE = 0.02  # share of the light path's MACs and parameters that rounding to multiples of 4 may add, in all
LESS = 0.1  # share of an axis' entries that rounding down to a multiple of 4 may take
WIDE = 16  # entries of an axis from which multiples of 4 matter
PAYS = 0.1  # share of the light path's MACs that projections have to save


def decide(axes: AxisMap, width: float, projection: bool = True) -> tuple[dict[Axis, int], frozenset[int]]:
    """What a light path of this width is: the kept size of every atom that shrinks, and the boundaries with a
    projection (none if `projection` is off)."""
    if width >= 1:
        return {}, frozenset()
    sizes_with = cache(lambda projected: choose(axes, width, projected))
    projected = _projections(axes, sizes_with) if projection else frozenset()
    return sizes_with(projected), projected


def choose(axes: AxisMap, width: float, projected: frozenset[int] = frozenset()) -> dict[Axis, int]:
    """Kept size of every atom that shrinks at `width`: heads before head size, groups before their members."""
    shares: dict[Axis, float] = {}
    free = dict.fromkeys(atom for atom in axes.atoms() if axes.shrinks(atom, projected))  # in order: ties must not vary
    for term in _products(axes):
        share = width
        for part in term.parts:
            for atom in part.atoms():
                if atom not in free:
                    continue
                settled = shares.setdefault(atom, share)  # by the first product that holds it
                if part.find() is atom:  # what this factor could not give up, the next one has to
                    share = min(1.0, share * atom.hint / rounded(atom.hint, settled))
    for atom in free:
        shares.setdefault(atom, width)
    return _in_fours(axes, {atom: rounded(atom.hint, share) for atom, share in shares.items()}, projected)


def _in_fours(axes: AxisMap, kept: dict[Axis, int], projected: frozenset[int]) -> dict[Axis, int]:
    """Round to multiples of 4: down where that takes little, else up where that is all but free, the cheapest first.

    Kernels like multiples of 4, and a narrow layer is a bottleneck for all that follows.
    """
    for atom, count in kept.items():
        four = 4 * (count // 4)
        if atom.hint >= WIDE and count - four <= LESS * count:
            kept[atom] = four
    sums = list(axes.work(projected))
    inside: dict[Axis, list[int]] = {}
    for at, (_, _, factors) in enumerate(sums):
        for atom in {atom for axis in factors for atom in axis.atoms()}:
            inside.setdefault(atom, []).append(at)

    def worth(at: int, size: Callable[[Axis], int]) -> int:
        _, constant, factors = sums[at]
        return constant * math.prod(map(size, factors))

    size = sizes(kept)
    now = [worth(at, size) for at in range(len(sums))]
    whole = {kind: max(1, sum(work for (k, _, _), work in zip(sums, now, strict=True) if k == kind)) for kind in KINDS}
    prices = []
    for atom, count in kept.items():
        four = 4 * -(-count // 4)
        if four != count and WIDE <= atom.hint >= four:
            added = dict.fromkeys(KINDS, 0)
            size = _with(kept, atom, four)
            for at in inside.get(atom, ()):
                added[sums[at][0]] += worth(at, size) - now[at]
            prices.append((max(added[kind] / whole[kind] for kind in KINDS), four, atom))
    spent = 0.0
    for price, four, atom in sorted(prices, key=lambda entry: entry[:2]):
        spent += price
        if spent > FREE:
            break
        kept[atom] = four
    return kept


def _with(kept: dict[Axis, int], changed: Axis, count: int) -> Callable[[Axis], int]:
    """Sizes of terms when one atom keeps another number of entries."""
    return lambda axis: kept_size(axis, lambda atom: count if atom is changed else kept.get(atom, atom.hint))


def _products(axes: AxisMap) -> Iterator[Axis]:
    seen: set[int] = set()

    def walk(axis: Axis) -> Iterator[Axis]:
        root = axis.find()
        if id(root) in seen:
            return
        seen.add(id(root))
        if root.form == "product":
            yield root
        for part in root.parts:
            yield from walk(part)

    for terms in axes.parameters.values():
        for axis in terms:
            yield from walk(axis)


def rounded(size: int, share: float) -> int:
    """The whole number of entries that is nearest to this share of `size`, at least 1."""
    return max(1, round(size * share))


def decide_projections(axes: AxisMap, width: float) -> frozenset[int]:
    """The boundaries at which a learned 1x1 projection saves MACs, by descent from all of them; empty if none pays.

    A projection is a bottleneck as well, so the set has to save at least PAYS of the light path's MACs.
    """
    return decide(axes, width)[1]


def _projections(axes: AxisMap, sizes_with: Callable[[frozenset[int]], dict[Axis, int]]) -> frozenset[int]:
    """As decide_projections; sizes_with: what choose() gives with these projections."""
    candidates = [at for at, boundary in enumerate(axes.boundaries) if _projectable(axes, at)]

    @cache
    def cost(chosen: frozenset[int]) -> tuple[int, int]:
        kept = sizes_with(chosen)
        return axes.macs(kept, chosen), axes.params(kept, chosen)

    if not candidates:
        return frozenset()
    chosen = frozenset(candidates)
    best = cost(chosen)
    for at in candidates:
        without = chosen - {at}
        if (price := cost(without)) <= best:
            chosen, best = without, price
    return chosen if best[0] <= (1 - PAYS) * cost(frozenset())[0] else frozenset()


def _projectable(axes: AxisMap, at: int) -> bool:
    boundary = axes.boundaries[at]
    if boundary.channel_axis is None or not boundary.node.meta["val"].dtype.is_floating_point:
        return False
    everything = frozenset(range(len(axes.boundaries)))
    fixed = isinstance(symbolic(boundary.channels.size), int)
    if boundary.is_input and not _differentiable(boundary.node):
        return False
    return fixed and any(axes.shrinks(atom, everything) for atom in boundary.channels.atoms())


def _differentiable(node: fx.Node) -> bool:
    """Whether a gradient can come back from an output: not through the whole numbers that a quantizer chooses."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            values = pytree.tree_leaves(user.meta.get("val"))
            if user not in seen and any(
                isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in values
            ):
                seen.add(user)
                waiting.append(user)
    return False
