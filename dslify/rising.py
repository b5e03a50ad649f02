"""A risk that never falls along a path, and how far the path may be followed. Arithmetic alone.

A path leads thresholds from safe to risky; a place on it is one number. A sample is lost at every place above a
critical one of its own, so the risk, the expected share of a new unit's samples that are lost, never falls. By
risk-controlling prediction sets (Bates et al., arXiv 2101.02703, theorem 1) the last place that a test at level delta
lets through keeps the risk within epsilon with probability 1 - delta. No price is paid for the number of places, or of
the thresholds that a place sets: it is enough that the one place where the risk passes epsilon is tested rightly.

The test is chosen by the units, never by their losses. Units of one sample lose it or do not: the binomial tail, which
is exact. Losses of larger units lie between 0 and 1: a bet against the risk (Waudby-Smith and Ramdas, arXiv
2010.09686), which tells many small losses from few whole ones, as Hoeffding-Bentkus does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .guarantee import GRID, binomial_tail

BOLDEST = 0.98  # of the largest bet that no loss can ruin
BETS = np.arange(1, 50) * BOLDEST / 49  # parts of it that are considered
LOST = 0.5  # part of its samples that a unit which loses any is reckoned to lose, when the bet is chosen


@dataclass(frozen=True, eq=False)
class Rising:
    """What is lost along a path, which falls into stretches that lose the same; one entry a stretch, (t,).

    begins, ends: the places above `begins`, up to and with `ends`. samples: lost there, of all units. mean: over units,
    of the share of each one's samples that is lost. units: how many. whole: every unit is one sample.
    """

    begins: np.ndarray
    ends: np.ndarray
    samples: np.ndarray
    mean: np.ndarray
    units: int
    whole: bool
    _now: np.ndarray  # lost sample by lost sample: the share of its unit that is lost with it
    _before: np.ndarray  # and before it

    def p_values(self, alpha: float, delta: float) -> np.ndarray:
        """Of "the expected loss is over alpha", on every stretch, (t,); they never fall. delta: the level they are
        meant for, which decides the bet."""
        if self.whole:
            return binomial_tail(self.samples, *np.broadcast_arrays(self.units, alpha, self.samples)[:2])
        one = bet(self.units, alpha, delta)
        taken = np.log1p(one * (alpha - self._now)) - np.log1p(one * (alpha - self._before))
        lost = np.concatenate([[0.0], np.cumsum(taken)])[self.samples]
        return np.exp(-np.maximum(0.0, self.units * math.log1p(one * alpha) + lost))

    def last(self, epsilon: float, delta: float | None) -> int:
        """The last stretch within epsilon: with confidence 1 - delta or, without a delta, on these units; -1 where
        even to lose nothing proves too little."""
        within = self.mean <= epsilon if delta is None else self.p_values(epsilon, delta) <= delta
        return int(np.count_nonzero(within)) - 1

    def upper_bound(self, delta: float) -> np.ndarray:
        """The smallest epsilon of GRID that each stretch is within with confidence 1 - delta, 1 where none is; (t,).
        Each holds by itself, for a stretch that was chosen beforehand."""
        bounds, within = np.ones(len(self.mean)), np.ones(len(self.mean), bool)
        for alpha in GRID[::-1]:
            within &= self.p_values(alpha, delta) <= delta
            bounds = np.where(within, alpha, bounds)
        return bounds


def rising(critical: np.ndarray, units: np.ndarray) -> Rising:
    """From the place above which each sample is lost, (n,), infinite where it never is, and its unit, (n,)."""
    unit, sizes = np.unique(units, return_inverse=True, return_counts=True)[1:]
    order = np.argsort(critical, kind="stable")[: np.count_nonzero(np.isfinite(critical))]
    unit = unit[order]
    grouped = np.argsort(unit, kind="stable")  # unit by unit, each by rising place
    first = np.searchsorted(unit[grouped], unit[grouped])
    rank = np.empty(len(order))
    rank[grouped] = np.arange(len(order)) - first
    places, counts = np.unique(critical[order], return_counts=True)
    samples = np.concatenate([[0], np.cumsum(counts)])
    mean = np.concatenate([[0.0], np.cumsum(1 / sizes[unit])])[samples] / len(sizes)
    begins, ends = np.concatenate([[-math.inf], places]), np.concatenate([places, [math.inf]])
    whole = bool((sizes == 1).all())
    now, before = (rank + 1) / sizes[unit], rank / sizes[unit]
    return Rising(begins, ends, samples, mean, len(sizes), whole, now, before)


@lru_cache(maxsize=1024)
def bet(units: int, alpha: float, delta: float) -> float:
    """How much to bet against the mean loss being over alpha; losses lie in [0, 1].

    The largest bet wins with the fewest units and is all but ruined by one that is lost whole; a smaller one stands
    more of these, where there are units enough. Taken is the bet that wins in spite of the most units that are lost by
    LOST. One bet, because a stake that is divided among several costs more than a better one among them gains.
    """
    bets = BETS / (1 - alpha)
    gain = np.log1p(bets * alpha)
    stands = (units * gain + math.log(delta)) / (gain - np.log1p(bets * (alpha - LOST)))
    return float(bets[np.argmax(stands)]) if stands.max() > 0 else float(bets[-1])


def needed_units(epsilon: float, delta: float, whole: bool = True) -> int:
    """Without so many units nothing can be promised: the fewest that, with nothing lost, are within epsilon with
    confidence 1 - delta. whole: every unit is one sample."""
    return math.ceil(-math.log(delta) / math.log1p(_boldest(whole) * epsilon / (1 - epsilon)))


def least_epsilon(units: int, delta: float, whole: bool = True) -> float:
    """The smallest share that so many units can promise with confidence 1 - delta, if they lose nothing."""
    gain = math.expm1(-math.log(delta) / units)
    return gain / (_boldest(whole) + gain)


def _boldest(whole: bool) -> float:
    """The largest bet in use, as a part of the one that a whole loss would ruin; the binomial tail is that bet."""
    return 1.0 if whole else BOLDEST
