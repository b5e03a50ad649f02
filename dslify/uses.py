"""What each layer's switch does and how well it predicts, by kind of sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .losses import SCORE_FLOOR
from .observe import Observations
from .resampling import Interval, Resample, correlation, spearman
from .sparsity import int8_bytes


@dataclass(frozen=True)
class Kind:
    """How well the switch predicts, and what it does, on the samples of one label ("all": on every sample).

    Of a layer inside a full path, the samples are those that reach it.
    score, difference: mean prediction and mean actual difference of light and full. mixed: mean difference as routed.
    pearson, pearson_log, spearman: correlation of prediction and actual difference; logarithms of value + SCORE_FLOOR.
    log_error: mean absolute difference of the natural logarithms. ratio: mean prediction over mean actual difference.
    loudness_spearman: rank correlation of plain loudness with the actual difference, which the switch has to beat.
    What cannot be computed (one sample, no variation, a gate, which predicts no difference) is NaN.
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
class Gating:
    """What gates make of labels. recall: part of the positives that go on. stopped: part of the negatives that do not.

    Of one gate, and a positive that goes on there: zeros: activation sparsity, the mean share of exact zeros in what
    crosses the cut. dense, sent: bytes of that as int8, as it is, and with a bit a value that says which are zero.
    NaN where there are none.
    """

    recall: float
    stopped: float
    recall_interval: Interval = None
    stopped_interval: Interval = None
    zeros: float = math.nan
    dense: float = math.nan
    sent: float = math.nan


@dataclass(frozen=True)
class Use:
    """What one layer does. layer: its number, outermost first. switch: "difference", or "positive" for a gate. mask:
    which one is in use, in words.

    reached: part of all samples that come to the layer. share: part of those that goes light there; of_all: the same of
    all samples. kinds: "all", then every label; empty when no sample reaches the layer. gating: of a gate, of what
    reaches it, where it was said what is positive.
    """

    layer: int
    switch: str
    threshold: float
    reached: float
    share: float
    of_all: float
    share_interval: Interval
    of_all_interval: Interval
    kinds: tuple[Kind, ...]
    gating: Gating | None = None
    mask: str = ""


def use(
    layer: int, switch: str, threshold: float, seen: Observations, draw: Resample, positive: np.ndarray | None = None
) -> Use:
    """What layer number `layer` did in a routed run. positive: which samples are, (n,) bool."""
    labels = sorted(set(seen.labels))
    if len(labels) == 1 and labels[0] in ("", "all"):
        labels = []
    within = {"all": seen.reached} | {label: seen.reached & (np.array(seen.labels) == label) for label in labels}
    kinds = [_kind(label, seen, draw, inside, switch) for label, inside in within.items() if inside.any()]
    taken, reached = seen.taken.astype(float), seen.reached
    return Use(
        layer=layer,
        switch=switch,
        threshold=threshold,
        reached=float(reached.mean()),
        share=_mean(taken, reached),
        of_all=float(taken.mean()),
        share_interval=draw.interval(draw.means(taken, reached)),
        of_all_interval=draw.interval(draw.means(taken)),
        kinds=tuple(kinds),
        gating=_gating(seen, positive, draw) if switch == "positive" and positive is not None else None,
    )


def _gating(seen: Observations, positive: np.ndarray, draw: Resample) -> Gating:
    """Of one gate: what it makes of what reaches it, and what a positive sends that goes on."""
    found, on = gating(seen.taken, seen.reached, positive, draw), seen.reached & positive & ~seen.taken
    if not on.any() or not len(seen.zeros):
        return found
    sent = [int8_bytes(int(count), share) for count, share in zip(seen.entries[on], seen.zeros[on], strict=True)]
    return replace(found, zeros=_mean(seen.zeros, on), dense=_mean(seen.entries, on), sent=float(np.mean(sent)))


def gating(stopped: np.ndarray, reached: np.ndarray, positive: np.ndarray, draw: Resample) -> Gating:
    """Recall and share stopped among the samples marked in `reached`; all (n,) bool."""
    passed, ended = 1 - stopped.astype(float), stopped.astype(float)
    positives, negatives = reached & positive, reached & ~positive
    return Gating(
        recall=_mean(passed, positives),
        stopped=_mean(ended, negatives),
        recall_interval=draw.interval(draw.means(passed, positives)),
        stopped_interval=draw.interval(draw.means(ended, negatives)),
    )


def _mean(column: np.ndarray, inside: np.ndarray) -> float:
    return float(column[inside].mean()) if inside.any() else math.nan


def _kind(label: str, seen: Observations, draw: Resample, inside: np.ndarray, switch: str) -> Kind:
    score, actual, loud = seen.score[inside], seen.difference[inside], seen.loudness[inside]
    predicted = score if switch == "difference" else np.full(len(score), math.nan)  # a probability predicts none
    log_score, log_actual = np.log(predicted.clip(0) + SCORE_FLOOR), np.log(actual + SCORE_FLOOR)
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
        pearson=float(correlation(predicted, actual, once)[0]),
        pearson_log=float(correlation(log_score, log_actual, once)[0]),
        spearman=float(spearman(predicted, actual, once)[0]),
        log_error=float(np.abs(log_score - log_actual).mean()),
        ratio=float(predicted.mean() / actual.mean()) if actual.mean() > 0 else math.nan,
        loudness_spearman=float(spearman(loud, actual, once)[0]),
        share_interval=draw.interval(draw.means(seen.taken.astype(float), inside)),
        pearson_log_interval=interval(correlation, log_score, log_actual),
        spearman_interval=interval(spearman, predicted, actual),
    )
