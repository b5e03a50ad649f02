"""From scores to a threshold: how many samples can go light, and a number that sends exactly these light."""

from __future__ import annotations

import math

import numpy as np
import torch

MARGIN = 2.0**-16  # relative: how far above the largest score a threshold lies that sends all samples light


def levels(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted scores, and every number of samples that a threshold can send light (equal scores go together)."""
    ordered = np.sort(score)
    rises = np.flatnonzero(np.diff(ordered) > 0) + 1
    return ordered, np.concatenate([[0], rises, [len(ordered)]])


def nearest_count(counts: np.ndarray, wanted: float) -> int:
    """The entry of `counts` nearest to `wanted`; of two equally near, the smaller (less goes light)."""
    return int(counts[np.argmin(np.abs(counts - wanted))])


def risk_by_count(score: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Entry k: the mean loss over all n samples when the k of lowest score go light; (n + 1,).

    It never falls as k grows, because no loss is negative.
    """
    by_score = loss[np.argsort(score, kind="stable")]
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
