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

from .cost import cost
from .data import open_data
from .errors import VerifyError
from .losses import SCORE_FLOOR
from .observe import Metric, Observations, collect, only_layer, plain
from .resampling import ROUNDING, Interval, Resample, correlation, quietest, random_spread, spearman
from .samples import expected_shape

EQUAL = 0.01  # mean relative difference of light and full under which any routing passes
FEW_SOURCES = 10  # below, an interval over sources is a rough guess
COMPOSED = 1e-3  # relative: how far a routed batch may be from its samples put together one by one


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
    saved: part of random routing's difference that the switch avoids, 1 - mixed / random; saved_loudness: the same
    against loudness. reach: how far mixed gets from random towards the oracle, 0 to 1. composed: the mixed difference
    put together from the two paths' outputs, to hold against the measured one. void: the comparison says nothing,
    `verdict` says why. notes: what to beware of.
    """

    threshold: float
    n: int
    sources: int
    rows: tuple[Row, ...]
    kinds: tuple[Kind, ...]
    saved: float
    saved_interval: Interval
    saved_loudness: float
    saved_loudness_interval: Interval
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
    draw = Resample(source, len(names), seed)
    rows = _rows(seen, macs or {}, draw)
    labels = sorted(set(seen.labels))
    if len(labels) == 1 and labels[0] in ("", "all"):
        labels = []
    kinds = [_kind("all", seen, draw, np.ones(len(seen), bool))]
    kinds += [_kind(label, seen, draw, np.array(seen.labels) == label) for label in labels]
    mixed, random, oracle = (_row(rows, name).difference for name in ("mixed", "random", "oracle"))
    composed = float(np.where(seen.taken, seen.difference, 0.0).mean())
    light, taken, quiet = seen.difference, seen.taken.astype(float), quietest(seen.loudness, int(seen.taken.sum()))
    saved, saved_interval = _saved(draw, mixed, random, draw.means(seen.mixed), draw.means(taken) * draw.means(light))
    saved_loudness, saved_loudness_interval = _saved(
        draw, mixed, _row(rows, "loudness").difference, draw.means(seen.mixed), draw.means(quiet * light)
    )
    void, verdict = _verdict(seen, saved, saved_interval)
    return Evaluation(
        threshold=threshold,
        n=len(seen),
        sources=len(names),
        rows=rows,
        kinds=tuple(kinds),
        saved=saved,
        saved_interval=saved_interval,
        saved_loudness=saved_loudness,
        saved_loudness_interval=saved_loudness_interval,
        reach=(random - mixed) / (random - oracle) if random - oracle > ROUNDING else math.nan,
        composed=composed,
        void=void,
        verdict=verdict,
        notes=tuple(_notes(seen, draw, mixed, composed)),
        seed=seed,
    )


def _rows(seen: Observations, macs: dict[str, float], draw: Resample) -> tuple[Row, ...]:
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


def _kind(label: str, seen: Observations, draw: Resample, inside: np.ndarray) -> Kind:
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


def _saved(
    draw: Resample, mixed: float, other: float, mixed_replicates: np.ndarray, other_replicates: np.ndarray
) -> tuple[float, Interval]:
    """1 - mixed / other and its interval; NaN where the other way to route makes no difference."""
    if other <= ROUNDING:
        return math.nan, None
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - mixed / other, draw.interval(1 - mixed_replicates / other_replicates)


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


def _notes(seen: Observations, draw: Resample, mixed: float, composed: float) -> Iterator[str]:
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
