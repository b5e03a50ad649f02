"""The thresholds of gates from what they may lose, the record of it, and the curve of every place on the path."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from .budget import Budget
from .calibration import Calibration
from .lost import Lost, losses
from .samples import Samples
from .tradeoff import ROWS


@dataclass(frozen=True)
class LostPoint:
    """One gate at one place of the path that all gates' thresholds take together.

    layer: from 1, outermost first. threshold: its own. stopped: share of the negatives that any gate stops there, 0 to
    1. lost: over units, the mean share of positives that all gates lose together. lost_bound: what is promised for
    `lost` with the confidence asked for (0.95), each place by itself.
    """

    layer: int
    threshold: float
    stopped: float
    lost: float
    lost_bound: float


def by_lost(
    net: nn.Module, samples: Samples, budget: Budget, batch_size: int, progress: bool | None
) -> tuple[Calibration, Lost]:
    """The record of all gates together, with each one's in its layers, and what was seen; nothing is set.

    Raises OptionError and DataError as `losses` does.
    """
    layers, _ = budget.of_gates(net)
    lost = losses(net, samples, budget, batch_size, progress)
    exact = lost.thresholds(lost.allowed(budget))
    thresholds = [_at_most(tau, layer.threshold.dtype) for tau, layer in zip(exact, layers, strict=True)]
    way = lost.way(thresholds)
    entries = np.array([[math.nan if entry is None else float(entry) for entry in one] for one in lost.tried])[way]
    gone, sources, labels = lost.lost(way), np.array(samples.sources), np.array(samples.labels)
    how, promise = _how(lost, budget, len(layers), int(gone.sum())), _promise(lost, budget, len(layers))
    records = []
    for at, threshold in enumerate(thresholds):
        here, reached = entries[:, at] == 1, ~np.isnan(entries[:, at])
        n = int(reached.sum())
        of_all, of_kinds = _stopped(lost, labels, here)
        records.append(
            Calibration(
                threshold,
                how,
                n,
                len(np.unique(sources[reached])),
                share=float(here.sum() / max(n, 1)),
                mean_difference=float(lost.difference[here, at].sum() / max(n, 1)),
                delta=budget.delta,
                units=lost.found.units,
                promise=promise,
                kind="positive",
                positive=lost.words,
                max_lost=budget.max_lost,
                lost=lost.share(gone & here[lost.positive]),
                unit=budget.units,
                negatives_stopped=of_all,
                stopped=of_kinds,
            )
        )
    anywhere = (entries == 1).any(1)
    of_all, of_kinds = _stopped(lost, labels, anywhere)
    together = replace(
        records[0],
        layers=tuple(records) if len(records) > 1 else (),
        lost=lost.share(gone),
        notes=tuple(_notes(lost, budget, sources, anywhere)),
        negatives_stopped=of_all,
        stopped=of_kinds,
    )
    return together, lost


def curve(lost: Lost, delta: float) -> tuple[LostPoint, ...]:
    """At most ROWS places, from nothing stopped to everything, at even shares of the samples stopped."""
    first = np.sort(lost.place.min(1))
    ranks = np.unique(np.linspace(0, len(first) - 1, ROWS).astype(np.int64))
    places = np.unique(np.concatenate([first[ranks], [math.inf]]))
    bounds = lost.found.upper_bound(delta)
    rows = []
    for place in places.tolist():
        taus = lost.thresholds(place)
        at = int(np.searchsorted(lost.found.ends, place))
        stopped = float((lost.place < place).any(1)[~lost.positive].mean())
        rows += [
            LostPoint(layer, tau, stopped, float(lost.found.mean[at]), float(bounds[at]))
            for layer, tau in enumerate(taus, 1)
        ]
    return tuple(rows)


def _stopped(lost: Lost, labels: np.ndarray, marked: np.ndarray) -> tuple[float, dict[str, float]]:
    """What part of the negatives is among the marked samples, (n,) bool, and of each of their labels."""
    negative = ~lost.positive
    kinds = {str(label): float(marked[labels == label].mean()) for label in np.unique(labels[negative])}
    return float(marked[negative].mean()), kinds


def _units(lost: Lost, budget: Budget) -> str:
    """How many, in words: "432 and 8 varied copies of each"."""
    units = lost.found.units
    if budget.units == "source" or lost.found.whole:
        return f"{units}"
    copies = len(lost.unit) / units - 1
    return f"{units} and {copies:g} varied copies of each" if copies % 1 == 0 else f"{units} and their varied copies"


def _how(lost: Lost, budget: Budget, gates: int, gone: int) -> str:
    percent = f"{100 * budget.max_lost:g} %"
    sure = "" if budget.delta is None else f" with {100 * (1 - budget.delta):.4g} % confidence"
    several = f" by all {gates} gates together" if gates > 1 else ""
    counted = (
        "every positive that is stopped"
        if lost.outputs is None
        else f"a positive whose largest of {lost.outputs} outputs becomes another one"
    )
    estimate = "" if budget.delta is not None else ", a point estimate without a guarantee for other data"
    return (
        f"lost positives ({lost.words}): the highest at which at most {percent} are lost{several}{sure}; {gone} of "
        f"{len(lost.unit)} are, counting {counted}{estimate}"
    )


def _promise(lost: Lost, budget: Budget, gates: int) -> str | None:
    if budget.delta is None:
        return None
    sure, share, units = f"{100 * (1 - budget.delta):.4g} %", f"{100 * budget.max_lost:g} %", _units(lost, budget)
    together = f", by all {gates} gates together" if gates > 1 else ""
    if budget.units == "source":
        new = f"new sources like these {units} lose on average at most {share} of their positives"
    else:
        new = f"at most {share} of new positives like these {units} are lost"
    return f"with {sure} confidence {new}{together}"


def _notes(lost: Lost, budget: Budget, sources: np.ndarray, stopped: np.ndarray) -> list[str]:
    notes = []
    if not stopped[~lost.positive].any():
        notes.append("no negative is stopped at what may be lost; give more data, let more be lost, or cut deeper")
    p = len(lost.unit)
    safe = int((~lost.losing[:, [any(way) for way in lost.tried]]).all(1).sum())
    if safe:
        notes.append(f"{safe} of {p} positives are answered the same when they are stopped, so they cannot be lost")
    heard = len(np.unique(sources[lost.positive]))
    if budget.units == "sample" and heard < lost.found.units:
        notes.append(
            f"the {lost.found.units} positives come from {heard} sources, and those of one source are alike; "
            "units='source' (--units source) counts each source once"
        )
    return notes


def _at_most(value: float, dtype: torch.dtype) -> float:
    """The largest number of a type that is not above `value`."""
    stored = torch.tensor(value, dtype=dtype)
    if stored.double().item() > value:
        stored = stored.nextafter(torch.tensor(-math.inf, dtype=dtype))
    return stored.item()
