"""The sizes that a width gives the free axes of a region, and the boundaries at which a projection pays."""

from __future__ import annotations

from collections.abc import Iterator

from .axes import AxisMap
from .functional import symbolic
from .rules import Axis

FREE = 0.1  # of the entries asked for, that rounding to a multiple of 4 may add or take
PAYS = 0.25  # share of the light path's MACs that projections have to save


def choose(axes: AxisMap, width: float, projected: frozenset[int] = frozenset()) -> dict[Axis, int]:
    """Kept size of every atom that shrinks at `width`: heads before head size, groups before their members."""
    shares: dict[Axis, float] = {}
    free = {atom for atom in axes.atoms() if axes.shrinks(atom, projected)}
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
    return {atom: rounded(atom.hint, share) for atom, share in shares.items()}


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
    """Entries to keep of `size`: of wide axes the nearest multiple of 4, which kernels like, if that is within FREE of
    what was asked for; else the nearest number."""
    exact = size * share
    if share >= 1:
        return size
    four = 4 * round(exact / 4)
    return min(size, four) if size >= 32 and abs(four - exact) <= FREE * exact else max(1, round(exact))


def decide_projections(axes: AxisMap, width: float) -> frozenset[int]:
    """The boundaries at which a learned 1x1 projection saves MACs, by descent from all of them; empty if none pays.

    A projection is a bottleneck as well, so the set has to save at least PAYS of the light path's MACs.
    """
    candidates = [at for at, boundary in enumerate(axes.boundaries) if _projectable(axes, at)]

    def cost(chosen: frozenset[int]) -> tuple[int, int]:
        kept = choose(axes, width, chosen)
        return axes.macs(kept, chosen), axes.params(kept, chosen)

    if width >= 1 or not candidates:
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
    return fixed and any(axes.shrinks(atom, everything) for atom in boundary.channels.atoms())
