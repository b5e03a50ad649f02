"""Gates by what they lose: the thresholds of all gates of a network under one budget of lost positives.

A gate (GC, arXiv 2303.08970) stops a sample whose probability of a positive is under its threshold. A positive is lost
where that changes what the network decides; one that the whole network takes for a negative is not the gate's to lose,
or mislabelled data would leave nothing to stop. A single number, the place on a path, moves all thresholds together:
at a place p the gate of weight w stops samples whose odds of a positive are under w p, so with equal weights all
thresholds are the same probability. A bound on what all gates lose together (rising.py) then certifies them at once:
neither the confidence nor the data is divided among the gates, because the path is not made from what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .budget import Budget
from .capture import evaluating
from .cascade import Way, forced, parents, ways
from .errors import DataError
from .omega import omega
from .probe import Columns, Probe, scales
from .rising import Rising, rising
from .samples import Samples, show_progress
from .schedule import device_of
from .switch import DSLayer

MARGIN = 2.0**-10  # relative, of the odds: how far thresholds stay under the first sample that may not be stopped


@dataclass(frozen=True, eq=False)
class Lost:
    """What gates do to samples, and what is lost with it; n samples, of which p are positive.

    score, difference: of each gate, outermost first, (n, gates). scales: of its outputs. positive: (n,) bool. words:
    the label map. unit: of each positive, (p,). tried: the ways through the gates. losing: whether a positive is lost
    on each of them, (p, ways). place: where on the path each gate begins to stop each sample, (n, gates). weights:
    (gates,). found: what is lost along the path. outputs: of the classifier whose decision was looked at, None where
    every stopped positive counts as lost.
    """

    score: np.ndarray
    difference: np.ndarray
    scales: tuple[Tensor, ...]
    positive: np.ndarray
    words: str
    unit: np.ndarray
    tried: tuple[Way, ...]
    losing: np.ndarray
    place: np.ndarray
    weights: np.ndarray
    found: Rising
    outputs: int | None

    def allowed(self, budget: Budget) -> float:
        """The place of the highest thresholds that keep to the budget: just under where the next positive is lost."""
        at = self.found.last(budget.max_lost, budget.delta)
        begin, end = float(self.found.begins[at]), float(self.found.ends[at])
        under = end * (1 - MARGIN)
        return under if under > begin else (begin + end) / 2

    def thresholds(self, place: float) -> list[float]:
        """Of the gates at a place of the path: probabilities."""
        return [1.0 if math.isinf(odds) else odds / (1 + odds) for odds in (place * self.weights).tolist()]

    def way(self, thresholds: Sequence[float]) -> np.ndarray:
        """The number of the way of every sample, (n,)."""
        return _way(self.score < np.array(thresholds), self.tried)

    def lost(self, way: np.ndarray) -> np.ndarray:
        """Which positives are lost on these ways of all samples, (n,): (p,) bool."""
        return self.losing[np.arange(len(self.losing)), way[self.positive]]

    def share(self, marked: np.ndarray) -> float:
        """Mean over units of the share of each one's positives that is marked, (p,) bool."""
        unit, sizes = np.unique(self.unit, return_inverse=True, return_counts=True)[1:]
        return float((np.bincount(unit, marked) / sizes).mean())


def losses(net: nn.Module, samples: Samples, budget: Budget, batch_size: int, progress: bool | None) -> Lost:
    """One pass over the data: what every gate says of every sample, and what stopping costs the positives.

    Raises OptionError for a network without gates or a label map that does not fit, DataError for too few positives and
    for what is not a number.
    """
    layers, weights = budget.of_gates(net)
    known = omega(budget.positive, samples.labels)
    positive = known.positive(samples.labels)
    at = np.flatnonzero(positive)
    of = samples.originals if budget.units == "sample" else samples.sources
    unit = np.unique(np.array(of), return_inverse=True)[1][at]
    budget.enough(np.unique(unit, return_counts=True)[1])
    above = parents(layers)
    tried = ways(above)
    seen = _looked(net, layers, tried, samples, positive, batch_size, progress)
    losing = seen.decided != seen.decided[:, :1]
    with np.errstate(divide="ignore"):
        place = seen.score / (1 - seen.score) / weights
    found = rising(critical(place[positive], losing, tried), unit)
    return Lost(
        seen.score, seen.difference, seen.scales, positive, str(known), unit, tried, losing, place, weights, found,
        seen.outputs,
    )  # fmt: skip


def critical(place: np.ndarray, losing: np.ndarray, tried: Sequence[Way]) -> np.ndarray:
    """Above which place each sample is lost, infinite for never; (n,).

    place: where each gate begins to stop it, (n, gates). losing: whether it is lost on each way, (n, ways). A sample
    that a gate would lose and an earlier one stops without loss at higher places counts as lost there too, so that what
    is lost never falls along the path.
    """
    worst = np.full(len(place), math.inf)
    for own in place.T:
        lost = losing[np.arange(len(place)), _way(place <= own[:, None], tried)]
        worst = np.where(lost, np.minimum(worst, own), worst)
    return worst


def _way(stops: np.ndarray, tried: Sequence[Way]) -> np.ndarray:
    """The number of the way of samples, from which gates would stop them, (n, gates) bool; (n,)."""
    found = np.zeros(len(stops), np.int64)
    for number, way in enumerate(tried):
        known = [at for at, entry in enumerate(way) if entry is not None]
        found[(stops[:, known] == [way[at] for at in known]).all(1)] = number
    return found


@dataclass(frozen=True, eq=False)
class _Looked:
    """What one pass showed. score, difference: (n, gates). decided: what the network answers to every positive on every
    way, (p, ways): its class, or without logits whether it was stopped. outputs: as in Lost."""

    score: np.ndarray
    difference: np.ndarray
    scales: tuple[Tensor, ...]
    decided: np.ndarray
    outputs: int | None


def _looked(
    net: nn.Module,
    layers: Sequence[DSLayer],
    tried: Sequence[Way],
    samples: Samples,
    positive: np.ndarray,
    batch_size: int,
    progress: bool | None,
) -> _Looked:
    """One pass: every sample past every gate, and the positives on every way. Each sample is read once, because varied
    copies are made when they are read."""
    device = device_of(net)
    batches = [range(at, min(at + batch_size, len(samples))) for at in range(0, len(samples), batch_size)]
    columns: list[Columns] = []
    decided: list[np.ndarray] = []
    outputs: int | None = None
    with evaluating(net), torch.no_grad(), show_progress(progress) as bars:
        bar = bars.add_task("stopping the positives", total=len(samples))
        known = scales(net, layers, (samples.batch(batch).to(device) for batch in batches))
        probe = Probe(net, layers, known, {})
        for batch in batches:
            inputs = samples.batch(batch).to(device)
            columns.append(probe.columns(inputs, batch))
            inside = positive[batch.start : batch.stop]
            if inside.any():
                found, outputs = _decided(net, layers, tried, inputs[torch.from_numpy(inside).to(device)])
                decided.append(found)
            bars.advance(bar, len(batch))
    score, difference = (
        np.stack([np.concatenate([column[name, at] for column in columns]) for at in range(len(layers))], 1)
        for name in ("score", "difference")
    )
    bad = int((~np.isfinite(score + difference)).any(1).sum())
    if bad:
        raise DataError(
            f"The score or difference of {bad} of {len(samples)} samples is not a finite number; look for NaN in the "
            "data and in the network's weights."
        )
    return _Looked(score, difference, tuple(known), np.concatenate(decided), outputs)


def _decided(
    net: nn.Module, layers: Sequence[DSLayer], tried: Sequence[Way], inputs: Tensor
) -> tuple[np.ndarray, int | None]:
    """What the network decides on a batch on every way, (batch, ways), and among how many outputs."""
    columns, outputs = [], None
    for way in tried:
        with forced(layers, way):
            logits = _logits(net(inputs), len(inputs))
        if logits is None:
            return np.tile([any(way) for way in tried], (len(inputs), 1)), None
        outputs = logits.shape[1]
        columns.append(logits.argmax(1).cpu().numpy())
    return np.stack(columns, 1), outputs


def _logits(output: Any, samples: int) -> Tensor | None:
    """The first output if it is logits of two classes or more, (samples, classes). Raises DataError for NaN in it."""
    first = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), torch.zeros(0))
    if not first.is_floating_point() or first.dim() != 2 or len(first) != samples or first.shape[1] < 2:
        return None
    if not first.isfinite().all():
        raise DataError("The network's output is not finite; look for NaN in the data and in the network's weights.")
    return first
