"""Statistics of weighted samples, and the bootstrap over sources."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

REPLICATES = 1000  # of the bootstrap
ROUNDING = 1e-6  # differences and relative variations below it are rounding
CELLS = 1_000_000  # replicates times samples held at once

Interval = tuple[float, float] | None


def quietest(values: np.ndarray, count: float, capacity: np.ndarray | None = None) -> np.ndarray:
    """Weights 0 to 1 that give `count` to the smallest values; equal values at the border share what is left evenly.

    capacity: how much each entry can hold, 1 where not given; then the sum of weights times capacity is `count`.
    """
    capacity = np.ones(len(values)) if capacity is None else capacity
    if count <= 0:
        return np.zeros(len(values))
    order = np.argsort(values, kind="stable")
    before = int(np.count_nonzero(capacity[order].cumsum() < count - ROUNDING))  # sums of parts are not exact
    border = values[order[min(before, len(values) - 1)]]
    sure, tied = values < border, values == border
    return sure + tied * np.clip((count - capacity[sure].sum()) / capacity[tied].sum(), 0, 1)


def random_spread(outcomes: np.ndarray, counts: np.ndarray) -> float:
    """Standard deviation of the mean outcome over all ways to deal `counts` samples to each of several choices.

    outcomes: of every sample with every choice, (n, choices). counts: (choices,), of sum n. Dealing is drawing without
    replacement:  var(sum) = sum_nc counts_c e_nc^2 / (n - 1),  e the outcomes without the means of their row and of
    their column (W. Hoeffding, A combinatorial central limit theorem, 1951, with equal columns put together).
    """
    n = len(outcomes)
    if n < 2:
        return 0.0
    rows, columns = outcomes @ counts / n, outcomes.mean(0)
    rest = outcomes - rows[:, None] - columns + columns @ counts / n
    return math.sqrt((rest**2 @ counts).sum() / (n - 1)) / n


def correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's under each row of weights (b, n); x, y: (n,) or (b, n). NaN where one of them does not vary."""
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        dx = x - (weights * x).sum(1, keepdims=True) / total
        dy = y - (weights * y).sum(1, keepdims=True) / total
        spread = (weights * dx**2).sum(1) * (weights * dy**2).sum(1)
        floor = (total[:, 0] * ROUNDING) ** 2 * np.abs(x).max() ** 2 * np.abs(y).max() ** 2
        return np.where(spread > floor, (weights * dx * dy).sum(1) / np.sqrt(spread), np.nan)


def ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks (b, n) of values (n,), each counted as often as its weight says; equal values share their mean rank."""
    order = np.argsort(values, kind="stable")
    _, starts, sizes = np.unique(values[order], return_index=True, return_counts=True)
    grouped = np.add.reduceat(weights[:, order], starts, axis=1)
    middle = np.cumsum(grouped, axis=1) - grouped + (grouped + 1) / 2
    found = np.empty(weights.shape)
    found[:, order] = np.repeat(middle, sizes, axis=1)
    return found


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank correlation under each row of weights (b, n)."""
    return correlation(ranks(x, weights), ranks(y, weights), weights)


class Resample:
    """Bootstrap over sources: each replicate draws as many sources as there are, with replacement."""

    def __init__(self, source: np.ndarray, sources: int, seed: int):
        self.source, self.sources = source, sources
        even = np.full(sources, 1 / sources)
        self.counts = np.random.default_rng(seed).multinomial(sources, even, size=REPLICATES).astype(float)

    def means(self, column: np.ndarray, within: np.ndarray | None = None) -> np.ndarray:
        """Mean of a column (n,) in every replicate, over the samples marked in `within`; (replicates,)."""
        inside = np.ones(len(column)) if within is None else within.astype(float)
        sums = np.bincount(self.source, column * inside, self.sources)
        sizes = np.bincount(self.source, inside, self.sources)
        with np.errstate(invalid="ignore"):
            return (self.counts @ sums) / (self.counts @ sizes)

    def each(self, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A statistic of sample weights (b, n) -> (b,) in every replicate; (replicates,)."""
        step = max(1, CELLS // len(self.source))
        blocks = [self.counts[at : at + step][:, self.source] for at in range(0, REPLICATES, step)]
        return np.concatenate([statistic(block) for block in blocks])

    def interval(self, values: np.ndarray) -> Interval:
        """The middle 95 % of the replicates; None from one source, or where most replicates have no value."""
        known = values[np.isfinite(values)]
        if self.sources < 2 or len(known) < REPLICATES / 2:
            return None
        low, high = np.percentile(known, [2.5, 97.5])
        return float(low), float(high)
