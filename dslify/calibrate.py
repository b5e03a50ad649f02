"""Thresholds: one pass over data that training has not seen, then where to draw the line.

A sample goes light if and only if its score is under the threshold (DSL, arXiv 2404.04405, section 2.2), so a higher
threshold sends more samples down the light path. Both rules here are point estimates from the samples given.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .data import open_data
from .errors import DataError, OptionError
from .observe import Observations as Observations
from .observe import collect, only_layer, plain
from .runs import History
from .samples import Samples, expected_shape

FEWEST = 20  # samples: with fewer, one sample moves the share by more than 5 points
MARGIN = 2.0**-16  # relative: how far above the largest score a threshold lies that sends all samples light


@dataclass(frozen=True)
class Calibration:
    """A threshold and how it came about.

    threshold: in units of relative difference, as stored in the layer. how: a sentence.
    n, sources: samples used, and the recordings they were cut from. share: part of them that goes light, 0 to 1.
    mean_difference: over all samples, those on the full path counting 0.
    light_share, max_difference: what was asked for, or None. overlap: samples that training has seen too, None where
    nobody said what it was trained on. notes: what to beware of.
    """

    threshold: float
    how: str
    n: int
    sources: int
    share: float
    mean_difference: float
    light_share: float | None = None
    max_difference: float | None = None
    overlap: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return plain(asdict(self))


def calibrate(
    net: nn.Module,
    data: Any,
    light_share: float | None = None,
    max_difference: float | None = None,
    *,
    training: History | str | Path | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Calibration:
    """Set the threshold of a network's DSLayer from data that neither training nor the reported test uses.

    data: all that `open_data` takes: Samples, a folder of audio, a tensor (n, ...), a Dataset ... Give exactly one of
    light_share: part of the samples that shall go light, 0 to 1; samples of equal score stay together, so the nearest
    share that can be had is taken, the smaller of two equally near.
    max_difference: the largest threshold at which the mean relative difference over all samples, those on the full
    path counting 0, stays at or under this bound. A point estimate, not a guarantee.

    training: what finetune returned, or its run folder; samples that it has seen are counted, and a note warns of them.
    A layer whose scale fine-tuning has not measured gets the scale of this data.
    Between two neighbouring scores every threshold routes alike; the middle is taken, so that rounding tips no sample.
    Raises OptionError for a value out of range or a network without exactly one DSLayer, DataError for fewer than 20
    samples, for scores and differences that are not numbers, or for a folder that is no run.
    """
    if (light_share is None) == (max_difference is None):
        given = "neither" if light_share is None else "both"
        raise OptionError(f"Calibration takes exactly one of light_share and max_difference; got {given}.")
    if light_share is not None and not 0 <= light_share <= 1:
        raise OptionError(f"light_share is the part of the samples that goes light, 0 to 1; got {light_share:g}.")
    if max_difference is not None and not 0 < max_difference < math.inf:
        raise OptionError(
            f"max_difference is a mean relative difference above 0, such as 0.05; got {max_difference:g}."
        )
    layer = only_layer(net)
    samples = open_data(data, expected_shape(net), progress=progress)
    count = len(samples)
    if count < FEWEST:
        raise DataError(f"A threshold needs at least {FEWEST} samples to calibrate on; got {count}.")
    overlap = None if training is None else _overlap(samples, training)
    seen = collect(net, samples, batch_size=batch_size, progress=progress)
    ordered, counts = levels(seen.score)
    risk = risk_by_count(seen.score, seen.difference)
    if light_share is not None:
        k = nearest_count(counts, light_share * count)
    else:
        k = largest_count(counts, risk, float(max_difference or 0))
    tau = threshold_after(ordered, k, layer.threshold.dtype)
    layer.threshold.fill_(tau)
    layer.scale.copy_(seen.scale)
    share, mean, sources = k / count, float(risk[k]), len(set(seen.sources))
    if light_share is not None:
        how = (
            f"share: {k} of {count} samples from {sources} sources score under it "
            f"({100 * share:.1f} %, asked for {100 * light_share:.1f} %)"
        )
    else:
        how = (
            f"bounded mean difference: the largest at which the mean over all {count} samples from {sources} sources "
            f"({mean:.4g}) stays within {max_difference:g}, a point estimate without a guarantee for other data"
        )
    notes = []
    if overlap:
        notes.append(f"{overlap} of {count} samples were used in training too, so the switch looks better than it is")
    if sources < FEWEST:
        notes.append(f"the {count} samples come from {sources} sources only; samples of one source are alike")
    return Calibration(tau, how, count, sources, share, mean, light_share, max_difference, overlap, tuple(notes))


def _overlap(samples: Samples, training: History | str | Path) -> int:
    """How many of the samples training has seen, by their fingerprints."""
    if isinstance(training, History):
        known = training.fingerprints
    else:
        path = Path(training) / "data.json"
        try:
            known = frozenset(mark for part in json.loads(path.read_text()).values() for mark in part)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} does not tell what was trained on ({error}); name the folder of a run.") from error
    return sum(mark in known for mark in samples.fingerprints())


def levels(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted scores, and every number of samples that a threshold can send light (equal scores go together)."""
    ordered = np.sort(score)
    rises = np.flatnonzero(np.diff(ordered) > 0) + 1
    return ordered, np.concatenate([[0], rises, [len(ordered)]])


def nearest_count(counts: np.ndarray, wanted: float) -> int:
    """The entry of `counts` nearest to `wanted`; of two equally near, the smaller (less goes light)."""
    return int(counts[np.argmin(np.abs(counts - wanted))])


def risk_by_count(score: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Entry k: the mean difference over all n samples when the k of lowest score go light; (n + 1,).

    It never falls as k grows, because no difference is negative.
    """
    by_score = difference[np.argsort(score, kind="stable")]
    return np.concatenate([[0.0], np.cumsum(by_score)]) / len(score)


def largest_count(counts: np.ndarray, risk: np.ndarray, bound: float) -> int:
    """The largest entry of `counts` whose risk is at or under `bound`; no sample light is always within it."""
    return int(counts[risk[counts] <= bound][-1])


def threshold_after(ordered: np.ndarray, k: int, dtype: torch.dtype = torch.float32) -> float:
    """A threshold, exact in `dtype`, above the first k of the sorted scores and not above the next one."""

    def stored(value: float) -> float:
        return torch.tensor(value, dtype=dtype).item()

    if k == 0:
        return stored(min(0.0, float(ordered[0])))
    below = float(ordered[k - 1])
    if k < len(ordered):
        above = float(ordered[k])
        middle = stored((below + above) / 2)
        return middle if below < middle <= above else stored(above)
    least = torch.tensor(below, dtype=dtype).nextafter(torch.tensor(math.inf, dtype=dtype)).item()
    return max(least, stored(below + abs(below) * MARGIN))
