"""A region and a width (or a cost) and a depth -> a light path that has passed its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .axes import AxisMap, Kept, analyse, sizes
from .depth import residual_branches, shallower
from .errors import OptionError, VerifyError
from .isolate import in_child
from .light import build
from .macs import count
from .separable import separate
from .verify import PERMUTED, check_light, misfit, misunderstood, permutation_error
from .widths import decide

ATTEMPTS = 8  # operators that may turn out to be misunderstood before it is given up


@dataclass(frozen=True)
class Derived:
    """A light path and what it was made from.

    region: the full region, or with `depth` a copy without the branches named in `dropped`. axes: of that region.
    distrusted: nodes whose rule did not hold on this network, and why; they stayed at full width. separated: weights
    whose convolutions became depthwise and pointwise.
    """

    region: fx.GraphModule
    axes: AxisMap
    width: float
    kept: Kept
    projected: frozenset[int]
    light: fx.GraphModule
    dropped: tuple[str, ...]
    distrusted: dict[str, str]
    separated: tuple[str, ...] = ()


def derive(
    full: fx.GraphModule,
    inputs: Sequence[Any],
    width: float,
    cost: float | None = None,
    depth: float = 1.0,
    projection: bool = True,
    seed: int = 0,
    samples: int = 1,
    separable: bool = False,
) -> Derived:
    """The light path of the region `full`, verified on `inputs` (values of cut and crossing).

    An operator whose rule fails the permutation test, or whose narrow copy does not run, is treated as unknown: what it
    touches stays at full width, and the next attempt begins. samples: as in axes.analyse(). separable: make its
    convolutions depthwise and pointwise (separable.separate). Raises VerifyError when that does not help, OptionError
    for a cost that narrowing cannot reach, or a depth where no branch can be left out.
    """
    region, dropped = shallower(full, depth)
    if depth < 1 and not residual_branches(full):
        raise OptionError(
            f"depth {depth} has nothing to leave out: no residual branch behind this cut can go without changing a "
            "shape; leave depth at 1, or cut earlier."
        )
    distrusted: dict[str, str] = {}
    while True:
        axes = analyse(region, distrusted, samples)
        if not permutation_error(axes, inputs, seed) < PERMUTED:
            _distrust(distrusted, misunderstood(axes, inputs, seed), "its rule does not hold here", None)
            continue
        reached = width if cost is None else width_for(axes, cost, projection, inputs if separable else None)
        kept, projected = decide(axes, reached, projection)
        light = build(axes, kept, projected)
        separated = separate(light) if separable else ()
        try:
            in_child(lambda light=light: check_light(light, full, inputs))  # type: ignore[misc]
        except VerifyError as error:
            _distrust(distrusted, misfit(light, axes, inputs, sizes(kept)), "its narrow copy does not run", error)
            continue
        return Derived(region, axes, reached, kept, projected, light, dropped, distrusted, separated)


def _distrust(distrusted: dict[str, str], node: str | None, why: str, error: VerifyError | None) -> None:
    """Add a node to those that stay at full width, or give up."""
    if node is None or node in distrusted or len(distrusted) >= ATTEMPTS:
        raise error or VerifyError(
            "The light path cannot be trusted: permuting its channels changes the answer, and no single operator is "
            "to blame; choose another cut."
        )
    distrusted[node] = why


def width_for(axes: AxisMap, cost: float, projection: bool, separable: Sequence[Any] | None = None) -> float:
    """The largest width whose light path has at most `cost` of the region's MACs, by bisection.

    separable: the region's inputs, if the light path's convolutions become depthwise and pointwise.
    """
    whole = axes.macs() if separable is None else count(axes.region, *separable)[0]

    def share(width: float) -> float:
        kept, projected = decide(axes, width, projection)
        if separable is None:
            return axes.macs(kept, projected) / max(1, whole)
        light = build(axes, kept, projected)
        separate(light)
        return count(light, *separable)[0] / max(1, whole)

    low, high = 1e-3, 1.0
    if share(low) > cost:
        raise OptionError(
            f"cost {cost} cannot be reached by narrowing: the narrowest light path has {share(low):.3f} of the MACs "
            "behind the cut."
        )
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= cost else (low, middle)
    return math.floor(low * 1e4) / 1e4
