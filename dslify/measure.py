"""Is the routing worth it: full, light, mixed, random, oracle and loudness on data that nothing was tuned on.

A mixed figure alone says little: where light equals full, any routing passes. So the same share is also routed at
random, by the true difference (the oracle, a bound from below) and by loudness (the trivial switch for sound).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import fx, nn

from .calibrate import Metric, Observations, collect, only_layer, plain
from .cost import cost
from .data import expected_shape, open_data
from .errors import VerifyError
from .losses import SCORE_FLOOR

EQUAL = 0.01  # mean relative difference of light and full under which any routing passes
REPLICATES = 1000  # of the bootstrap
FEW_SOURCES = 10  # below, an interval over sources is a rough guess
COMPOSED = 1e-3  # relative: how far a routed batch may be from its samples put together one by one
ROUNDING = 1e-6  # differences and relative variations below it are rounding
CELLS = 1_000_000  # replicates times samples held at once

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """One way to route the test samples.

    difference: mean relative difference from the full output, all samples counted. share: part that goes light.
    spread: for "random", the standard deviation of `difference` over all ways to draw the same share.
    macs: mean per sample, MACs; the switch counts where each sample is decided on. metric: mean of the user's.
    """

    name: str
    difference: float
    share: float
    interval: Interval = None
    spread: float | None = None
    macs: float | None = None
    metric: float | None = None
    metric_interval: Interval = None


@dataclass(frozen=True)
class Kind:
    """How well the switch predicts, and what it does, on the samples of one label ("all": on every sample).

    score, difference: mean prediction and mean actual difference of light and full. mixed: mean difference as routed.
    pearson, pearson_log, spearman: correlation of prediction and actual difference; logarithms of value + SCORE_FLOOR.
    log_error: mean absolute difference of the natural logarithms. ratio: mean prediction over mean actual difference.
    loudness_spearman: rank correlation of plain loudness with the actual difference, which the switch has to beat.
    What cannot be computed (one sample, no variation) is NaN.
    """

    label: str
    n: int
    sources: int
    share: float
    score: float
    difference: float
    mixed: float
    pearson: float
    pearson_log: float
    spearman: float
    log_error: float
    ratio: float
    loudness_spearman: float
    share_interval: Interval = None
    pearson_log_interval: Interval = None
    spearman_interval: Interval = None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Intervals: 95 %, bootstrap over sources.

    rows: full, light, mixed, random, oracle, loudness. kinds: "all", then every label.
    saved: part of random routing's difference that the switch avoids, 1 - mixed / random. reach: how far mixed gets
    from random towards the oracle, 0 to 1. composed: the mixed difference put together from the two paths' outputs,
    to hold against the measured one. void: the comparison says nothing, `verdict` says why. notes: what to beware of.
    """

    threshold: float
    n: int
    sources: int
    rows: tuple[Row, ...]
    kinds: tuple[Kind, ...]
    saved: float
    saved_interval: Interval
    reach: float
    composed: float
    void: bool
    verdict: str
    notes: tuple[str, ...]
    seed: int

    def __getitem__(self, name: str) -> Row:
        return _row(self.rows, name)

    def to_json(self) -> dict[str, Any]:
        return plain(asdict(self))


def evaluate(
    net: nn.Module,
    data: Any,
    metric: Metric | None = None,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Run a network's DSLayer at its threshold over test data, and hold the outcome against other ways to route.

    data: all that `open_data` takes; its labels and sources are used. metric: (network output, model input) of a batch
    -> one number per sample, larger or smaller is better as you like. seed: of the bootstrap.
    Raises OptionError for a network without exactly one DSLayer or a metric of another shape, DataError for no usable
    data or values that are not numbers.
    """
    layer = only_layer(net)
    samples = open_data(data, expected_shape(net), progress=progress)
    seen = collect(net, samples, batch_size=batch_size, routed=True, metric=metric, progress=progress)
    captured = any(isinstance(module, fx.GraphModule) for module in net.modules())  # what cost() can read
    macs = {row.name: float(row.macs) for row in cost(net)} if captured else {}
    return judge(seen, layer.threshold.item(), macs, seed=seed)


def judge(seen: Observations, threshold: float, macs: dict[str, float] | None = None, *, seed: int = 0) -> Evaluation:
    """The evaluation of one routed pass; pure arithmetic. macs: of base, switch, light and full, per sample."""
    if not len(seen.taken) == len(seen.mixed) == len(seen):
        raise VerifyError("These observations are not of a routed run; collect them with routed=True.")
    names, source = np.unique(np.array(seen.sources), return_inverse=True)
    draw = _Resample(source, len(names), seed)
    rows = _rows(seen, macs or {}, draw)
    labels = sorted(set(seen.labels))
    if len(labels) == 1 and labels[0] in ("", "all"):
        labels = []
    kinds = [_kind("all", seen, draw, np.ones(len(seen), bool))]
    kinds += [_kind(label, seen, draw, np.array(seen.labels) == label) for label in labels]
    mixed, random, oracle = (_row(rows, name).difference for name in ("mixed", "random", "oracle"))
    composed = float(np.where(seen.taken, seen.difference, 0.0).mean())
    saved, saved_interval = _saved(seen, draw)
    void, verdict = _verdict(seen, saved, saved_interval)
    return Evaluation(
        threshold=threshold,
        n=len(seen),
        sources=len(names),
        rows=rows,
        kinds=tuple(kinds),
        saved=saved,
        saved_interval=saved_interval,
        reach=(random - mixed) / (random - oracle) if random - oracle > ROUNDING else math.nan,
        composed=composed,
        void=void,
        verdict=verdict,
        notes=tuple(_notes(seen, draw, mixed, composed)),
        seed=seed,
    )


def quietest(values: np.ndarray, count: int) -> np.ndarray:
    """Weights 0 to 1 of sum `count` on the smallest values; equal values at the border share what is left evenly."""
    if count == 0:
        return np.zeros(len(values))
    border = np.sort(values)[count - 1]
    sure, tied = values < border, values == border
    return sure + tied * (count - sure.sum()) / tied.sum()


def random_spread(difference: np.ndarray, count: int) -> float:
    """Standard deviation of the mean difference when `count` of the samples go light, over all ways to choose them.

    Drawing without replacement: var(sum) = k (1 - k / n) S^2, S^2 the variance with n - 1.
    """
    n = len(difference)
    return math.sqrt(count * (1 - count / n) * difference.var(ddof=1)) / n if n > 1 else 0.0


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


class _Resample:
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


def _rows(seen: Observations, macs: dict[str, float], draw: _Resample) -> tuple[Row, ...]:
    taken = seen.taken
    count, n = int(taken.sum()), len(seen)
    share, nothing = count / n, np.zeros(n)
    chances = {
        "full": nothing,
        "light": nothing + 1,
        "mixed": taken.astype(float),
        "random": nothing + share,
        "oracle": quietest(seen.difference, count),
        "loudness": quietest(seen.loudness, count),
    }
    rows = []
    for name, chance in chances.items():
        column = seen.mixed if name == "mixed" else chance * seen.difference
        replicates = draw.means(column)
        judged, judged_interval = None, None
        if seen.metric:
            quality = (1 - chance) * seen.metric["full"] + chance * seen.metric["light"]
            quality = seen.metric["mixed"] if name == "mixed" else quality
            judged, judged_interval = float(quality.mean()), draw.interval(draw.means(quality))
        if name == "random":  # the share is the switch's own, also in a replicate
            replicates = draw.means(taken.astype(float)) * draw.means(seen.difference)
        rows.append(
            Row(
                name,
                difference=float(column.mean()),
                share=float(chance.mean()),
                interval=draw.interval(replicates),
                spread=random_spread(seen.difference, count) if name == "random" else None,
                macs=_macs(macs, name, share),
                metric=judged,
                metric_interval=judged_interval,
            )
        )
    return tuple(rows)


def _macs(macs: dict[str, float], name: str, share: float) -> float | None:
    """Mean MACs of a sample; full and light alone need no switch."""
    if not macs:
        return None
    if name in ("full", "light"):
        return macs["base"] + macs[name]
    return macs["base"] + macs["switch"] + share * macs["light"] + (1 - share) * macs["full"]


def _kind(label: str, seen: Observations, draw: _Resample, inside: np.ndarray) -> Kind:
    score, actual, loud = seen.score[inside], seen.difference[inside], seen.loudness[inside]
    log_score, log_actual = np.log(score.clip(0) + SCORE_FLOOR), np.log(actual + SCORE_FLOOR)
    once = np.ones((1, len(score)))

    def interval(statistic: Callable[..., np.ndarray], x: np.ndarray, y: np.ndarray) -> Interval:
        return draw.interval(draw.each(lambda weights: statistic(x, y, weights[:, inside])))

    return Kind(
        label,
        n=len(score),
        sources=len(set(draw.source[inside])),
        share=float(seen.taken[inside].mean()),
        score=float(score.mean()),
        difference=float(actual.mean()),
        mixed=float(seen.mixed[inside].mean()),
        pearson=float(correlation(score, actual, once)[0]),
        pearson_log=float(correlation(log_score, log_actual, once)[0]),
        spearman=float(spearman(score, actual, once)[0]),
        log_error=float(np.abs(log_score - log_actual).mean()),
        ratio=float(score.mean() / actual.mean()) if actual.mean() > 0 else math.nan,
        loudness_spearman=float(spearman(loud, actual, once)[0]),
        share_interval=draw.interval(draw.means(seen.taken.astype(float), inside)),
        pearson_log_interval=interval(correlation, log_score, log_actual),
        spearman_interval=interval(spearman, score, actual),
    )


def _saved(seen: Observations, draw: _Resample) -> tuple[float, Interval]:
    """1 - mixed / random at the same share, and its interval; NaN where nothing went light."""
    taken = seen.taken.astype(float)
    random = float(taken.mean() * seen.difference.mean())
    if random <= ROUNDING:
        return math.nan, None
    with np.errstate(invalid="ignore", divide="ignore"):
        replicates = 1 - draw.means(seen.mixed) / (draw.means(taken) * draw.means(seen.difference))
    return 1 - float(seen.mixed.mean()) / random, draw.interval(replicates)


def _verdict(seen: Observations, saved: float, interval: Interval) -> tuple[bool, str]:
    light, share = float(seen.difference.mean()), float(seen.taken.mean())
    if light < EQUAL:
        return True, f"void: light differs from full by {100 * light:.2f} % on average, so any routing would do as well"
    if share in (0.0, 1.0):
        return True, f"void: {'no' if share == 0 else 'every'} sample went light, so nothing was decided"
    if interval is None:
        return False, f"mixed avoids {100 * saved:.0f} % of random routing's difference; one source gives no interval"
    low, high = interval
    avoided = f"mixed avoids {100 * saved:.0f} % ({100 * low:.0f} to {100 * high:.0f} %) of random routing's difference"
    if low <= 0:
        return False, f"random routing is as good within the interval: {avoided}"
    return False, f"{avoided} at the same share"


def _notes(seen: Observations, draw: _Resample, mixed: float, composed: float) -> Iterator[str]:
    if abs(composed - mixed) > COMPOSED * composed + ROUNDING:
        yield f"routed batches differ from full by {mixed:.4g}, the same samples put together by {composed:.4g}"
    if draw.sources < FEW_SOURCES:
        yield f"intervals come from {draw.sources} sources only and are rough"
    if seen.metric:
        apart = draw.interval(draw.means(seen.metric["light"] - seen.metric["full"]))
        if apart is None or apart[0] <= 0 <= apart[1]:
            yield "the metric does not tell light from full within the interval, so its mixed value says nothing"


def _row(rows: tuple[Row, ...], name: str) -> Row:
    return next(row for row in rows if row.name == name)
