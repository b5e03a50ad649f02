"""Thresholds that carry a promise for new data, by conformal risk control and by learn-then-test. Arithmetic alone.

A sample goes light when its score is under the threshold, and then costs a loss in [0, bound]. What is promised rests
on units that are exchangeable with those to come: recordings, and not the segments cut from them, which are alike. A
unit's loss is the mean over its samples, so many segments of one recording say no more than one.

Conformal risk control (Angelopoulos et al., arXiv 2208.02814): the loss over all samples never falls as the threshold
grows, so the largest threshold of small enough empirical risk keeps the expected risk of a new unit within epsilon.
Learn then test (Angelopoulos et al., arXiv 2110.01052): the risk among what goes light has no such order; thresholds
are tested one after another from safe to risky, and with probability 1 - delta none is let through whose risk is over
epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FIRST_PART = 0.75  # of delta, for the walk of learn-then-test that begins low; the rest is for "all light"
FIRST_RANK = 4  # times the units that a test cannot do without: where the low walk begins, but at most half of all
COIN_SHARE = 0.25  # of a test's level for Hoeffding-Bentkus, best for losses of 0 and 1; the rest is for betting
BOLDEST = 0.95  # of the largest bet that no loss can ruin
SMALLEST_TERM = 1e-12  # of a binomial tail, relative to what is summed already
GRID = np.geomspace(1e-3, 1, 150, endpoint=False)  # where bounds are looked for: 5 % from one to the next


@dataclass(frozen=True, eq=False)
class Profile:
    """What each threshold that routes differently does, from none light to all; one entry a threshold, (t,).

    light: samples that go light. mean: mean over units of each unit's mean loss, samples on the full path counting 0.
    units: units of which anything goes light, of `total`. routed: mean over these of each one's mean loss over what
    goes light; 0 where nothing does.
    """

    light: np.ndarray
    mean: np.ndarray
    units: np.ndarray
    total: int
    _now: np.ndarray  # sample by sample in the order of scores: its unit's mean loss so far
    _before: np.ndarray  # the same without this sample, NaN for the first of its unit

    @property
    def routed(self) -> np.ndarray:
        return self.over_units(lambda mean: mean) / np.maximum(self.units, 1)

    def over_units(self, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """At each threshold, the sum over its units of a function of the unit's mean loss over what goes light; (t,)"""
        gain = of(self._now) - np.where(np.isnan(self._before), 0.0, of(np.nan_to_num(self._before)))
        return np.concatenate([[0.0], np.cumsum(gain)])[self.light]


def profile(losses: np.ndarray, scores: np.ndarray, units: np.ndarray | None = None) -> Profile:
    """The risks at every threshold, from losses and scores (n,), and the unit of each sample, (n,).

    Without units every sample is its own. Samples of equal score go together.
    """
    n = len(scores)
    unit = np.arange(n) if units is None else np.unique(units, return_inverse=True)[1]
    sizes = np.bincount(unit)
    order = np.argsort(scores, kind="stable")
    loss, unit = np.asarray(losses, float)[order], unit[order]
    grouped = np.argsort(unit, kind="stable")  # unit by unit, each by rising score
    begins = np.repeat(np.cumsum(sizes) - sizes, sizes)
    sums = np.concatenate([[0.0], np.cumsum(loss[grouped])])
    means = (sums[1:] - sums[begins]) / (np.arange(n) - begins + 1)
    now, before = np.empty(n), np.empty(n)
    now[grouped] = means.clip(min=0)  # a difference of two sums can be a hair under 0
    before[grouped] = np.where(np.arange(n) == begins, np.nan, np.concatenate([[0.0], now[grouped][:-1]]))
    rises = np.flatnonzero(np.diff(scores[order]) > 0) + 1
    light = np.concatenate([[0], rises, [n]])
    mean = np.concatenate([[0.0], np.cumsum(loss / sizes[unit])])[light] / len(sizes)
    count = np.concatenate([[0], np.cumsum(np.isnan(before))])[light]
    return Profile(light, mean, count, len(sizes), now, before)


def hoeffding_bentkus(risk: np.ndarray | float, n: np.ndarray | int, alpha: np.ndarray | float) -> np.ndarray:
    """P-value of "the expected loss is over alpha", after a mean loss `risk` in [0, 1] of n units (2110.01052, eq. 5).

    The smaller of Hoeffding's exp(-n h(min(risk, alpha), alpha)), h the divergence of two coins, and Bentkus's
    e P(Bin(n, alpha) <= ceil(n risk)). 1 without units. alpha lies within (0, 1); the three broadcast.
    """
    risk, n, alpha = np.broadcast_arrays(np.asarray(risk, float), np.asarray(n, np.int64), np.asarray(alpha, float))
    low = np.minimum(risk, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(low > 0, low * np.log(low / alpha), 0.0)
        divergence = divergence + np.where(low < 1, (1 - low) * np.log((1 - low) / (1 - alpha)), 0.0)
    bentkus = math.e * binomial_tail(np.ceil(n * risk - SMALLEST_TERM), n, alpha)
    return np.where(n > 0, np.minimum(np.exp(-n * divergence), np.minimum(bentkus, 1.0)), 1.0)


def binomial_tail(k: np.ndarray, n: np.ndarray, p: np.ndarray) -> np.ndarray:
    """P(Bin(n, p) <= k) where k is below the mean n p, and 1 elsewhere: there Bentkus's bound says nothing."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(n.max(initial=0)) + 1)))])  # of factorials
    low = np.flatnonzero((k < n * p).ravel())
    kk, nn, pp = (array.ravel()[low] for array in (k.astype(np.int64), n, p))
    total, term, at = np.ones(len(low)), np.ones(len(low)), kk.copy()
    while (term > SMALLEST_TERM * total).any():  # from k down to 0: each term is the one before times this ratio
        term = term * at * (1 - pp) / ((nn - at + 1) * pp)
        total += term
        at = np.maximum(at - 1, 0)
    highest = np.exp(logs[nn] - logs[kk] - logs[nn - kk] + kk * np.log(pp) + (nn - kk) * np.log1p(-pp))
    tail = np.ones(k.size)
    tail[low] = highest * total
    return tail.reshape(k.shape)


def betting(found: Profile, alpha: float) -> np.ndarray:
    """P-values of "the expected loss among what goes light is over alpha", at each threshold; losses in [0, 1]; (t,).

    One over the wealth of a gambler who stakes 1 and bets against it on every unit, multiplying the wealth by
    1 + bet (alpha - loss): were it so, nobody could expect a gain (Waudby-Smith and Ramdas, arXiv 2010.09686; bets are
    fixed here and the stake is spread over some of them, so that the order of the units does not matter). Losses that
    vary little are told from alpha by far fewer units than Hoeffding-Bentkus needs, which reckons with coins.
    """
    bold = BOLDEST / (1 - alpha)
    bets = [bold]
    while bets[-1] / 2 > 5 / math.sqrt(found.total):  # about the best bet on coins, whose variance is the largest
        bets.append(bets[-1] / 2)
    stakes = np.log([2.0**-at for at in range(len(bets))]) - math.log(2 - 2.0 ** (1 - len(bets)))
    logs = np.stack(
        [
            stake + found.over_units(lambda loss, bet=bet: np.log1p(bet * (alpha - loss)))  # type: ignore[misc]
            for bet, stake in zip(bets, stakes, strict=True)
        ]
    )
    return np.minimum(1.0, np.exp(-np.logaddexp.reduce(logs)))


def p_values(found: Profile, alpha: float, at: np.ndarray | None = None) -> np.ndarray:
    """Of both tests together, each on its part of the level, at all thresholds or at some positions; (t,) or (a,)."""
    where = np.arange(len(found.light)) if at is None else at
    coins = hoeffding_bentkus(found.routed[where], found.units[where], alpha) / COIN_SHARE
    return np.minimum(1.0, np.minimum(coins, betting(found, alpha)[where] / (1 - COIN_SHARE)))


def learn_then_test(p: np.ndarray, delta: float, starts: Sequence[tuple[int, float]] = ((0, 1.0),)) -> int:
    """The last hypothesis that is certified, of a sequence from safe to risky with these p-values; -1 if none is.

    starts: where a walk begins, rising, and its part of delta; the parts sum to 1. A walk goes on while p <= its level
    and stops at the first p above; one that reaches the next start adds its level to that start's (the fallback
    procedure of Wiens, 2003). What fails, and what comes after it before the next start, is not certified.
    """
    level, last = 0.0, -1
    ends = [start for start, _ in starts[1:]] + [len(p)]
    for (start, part), end in zip(starts, ends, strict=True):
        level += part * delta
        failed = np.flatnonzero(p[start:end] > level)
        stop = start + int(failed[0]) if len(failed) else end
        if stop > start:
            last = stop - 1
        if stop < end:
            level = 0.0
    return last


def starts(found: Profile, eps: float, delta: float) -> tuple[tuple[int, float], ...]:
    """Where learn-then-test begins to walk: positions in the profile and parts of delta; losses in [0, 1].

    A walk that began at "almost nobody light" would end at once: few units, large p. So it begins where so many units
    have something light that a mean well below epsilon passes, and every threshold from there on is tested. A second
    walk, with a small part of delta, is "all light": it serves where the scores say nothing and yet all may go light.
    Nothing about the losses is looked at to choose them. Ranks keep the test valid although thresholds are made from
    scores: below the k-th unit (a unit counts from its lowest score on) the others are independent draws of "a unit
    with something light", with the risk that is tested; "all light" depends on nothing. And on the way up from a start,
    the first threshold that may not be let through is where the risk passes epsilon, a fixed number, however many units
    lie below it. (Exact where the risk passes epsilon once; where it falls below again and rises once more, only
    nearly.)
    """
    least = needed(eps, 1.0, FIRST_PART * delta)
    rank = min(FIRST_RANK * least, found.total // 2)
    everything = len(found.light) - 1
    if rank < least:
        return ((everything, 1.0),)
    low = int(np.searchsorted(found.units, rank, side="right")) - 1
    return (low, FIRST_PART), (everything, 1 - FIRST_PART)


def certified(
    losses: np.ndarray, scores: np.ndarray, eps: float, delta: float, bound: float, units: np.ndarray | None = None
) -> int:
    """How many samples of lowest score may go light, by learn-then-test: with probability 1 - delta the expected loss
    among what goes light of a new unit, if anything does, is then at most eps.

    losses: (samples,) within [0, bound].
    """
    found = profile(np.asarray(losses) / bound, scores, units)
    last = learn_then_test(p_values(found, eps / bound), delta, starts(found, eps / bound, delta))
    return int(found.light[max(last, 0)])


def conformal_risk_control(
    losses: np.ndarray, scores: np.ndarray, eps: float, bound: float, units: np.ndarray | None = None
) -> int:
    """How many samples of lowest score may go light: the most with mean risk <= ((n + 1) eps - bound) / n, n units.

    losses: (samples,) within [0, bound]. A new unit's expected risk is then at most eps.
    """
    found = profile(losses, scores, units)
    within = np.flatnonzero(found.mean <= ((found.total + 1) * eps - bound) / found.total)
    return int(found.light[within[-1]]) if len(within) else 0


def expected_bound(found: Profile, bound: float) -> np.ndarray:
    """The smallest epsilon for which conformal risk control lets each threshold through; losses in [0, bound]; (t,)."""
    return (found.total * found.mean + bound) / (found.total + 1)


def upper_bound(found: Profile, at: np.ndarray, delta: float) -> np.ndarray:
    """The smallest epsilon of GRID that the tests let through at level delta, 1 where they let none; losses in [0, 1].

    at: positions of thresholds in the profile, (a,). Each bound holds with probability 1 - delta for a threshold that
    was chosen beforehand, not for the best of many.
    """
    bounds = np.ones(len(at))
    for alpha in GRID[::-1]:
        bounds = np.where(p_values(found, alpha, at) <= delta, alpha, bounds)
    return bounds


@lru_cache(maxsize=64)
def needed(eps: float, bound: float, delta: float | None = None) -> int:
    """Units without which nothing can be promised; eps is below bound.

    Conformal risk control (no delta): the least n with (n + 1) eps >= bound. Learn then test: the least n at which
    losses of zero have a p-value of at most delta.
    """
    n = max(1, math.ceil(bound / eps - 1))
    if delta is None:
        return n + ((n + 1) * eps < bound)
    high = 1
    while _zero_loss(high, eps / bound) > delta:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _zero_loss(middle, eps / bound) > delta else (low, middle)
    return high


def _zero_loss(n: int, eps: float) -> float:
    """The p-value of n units without any loss."""
    return float(p_values(profile(np.zeros(n), np.zeros(n)), eps)[-1])
