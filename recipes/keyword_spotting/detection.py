"""From a window's probabilities to words that are said to be there, and how many of them were.

Posterior handling after Chen, Parada and Heigold (ICASSP 2014): probabilities are averaged over neighbouring windows, a
keyword fires when its mean is the largest and reaches a threshold, and then nothing fires for a refractory time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .network import LENGTH, RATE
from .soundscape import Soundscape, Word

SECOND = LENGTH / RATE
REFRACTORY = 1.0  # s
TOLERANCE = 0.75  # s between a word's middle and that of the windows that fired
THRESHOLDS = tuple(np.arange(0.20, 1.0, 0.02).round(2).tolist())


@dataclass(frozen=True)
class Detection:
    """time: s, the middle of the windows whose mean fired. label: of the keyword. probability: that mean."""

    time: float
    label: str
    probability: float


@dataclass(frozen=True)
class Score:
    """What detections were worth. found: of each keyword in the sound, whether it was. right: of each detection."""

    words: tuple[Word, ...]
    found: tuple[bool, ...]
    right: tuple[bool, ...]
    hours: float

    @property
    def misses(self) -> float:
        """Share of the keywords that were not found."""
        return self.found.count(False) / len(self.found)

    @property
    def false_alarms(self) -> int:
        """Detections where that keyword was not said; one of the wrong keyword is such and leaves a miss besides."""
        return len(self.right) - sum(self.right)

    @property
    def alarms_per_hour(self) -> float:
        return self.false_alarms / self.hours

    @property
    def f1(self) -> float:
        """Harmonic mean of the share of keywords that were found and the share of detections that were right."""
        return 2 * sum(self.found) / (len(self.found) + len(self.right))

    def by_label(self) -> dict[str, list[int]]:
        """label -> [missed, said]"""
        said = Counter(word.label for word in self.words)
        found = Counter(word.label for word, one in zip(self.words, self.found, strict=True) if one)
        return {label: [said[label] - found[label], said[label]] for label in sorted(said)}


def smoothed(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Mean of each window's probabilities and those of the count - 1 before it, (windows, classes)."""
    padded = np.concatenate([np.repeat(probabilities[:1], count - 1, axis=0), probabilities])
    sums = np.cumsum(np.concatenate([np.zeros_like(padded[:1]), padded]), axis=0)
    return (sums[count:] - sums[:-count]) / count


def detections(
    means: np.ndarray, labels: Sequence[str], threshold: float, hop: float, count: int
) -> tuple[Detection, ...]:
    """What fires. means: from `smoothed` over `count` windows, one every `hop` s; class 0 never fires.

    labels: of the classes from 1 on.
    """
    found: list[Detection] = []
    top = means[:, 1:].argmax(1)
    fires = (means[:, 1:].max(1) >= threshold) & (means.argmax(1) > 0)
    for at in np.flatnonzero(fires):
        time = (at - (count - 1) / 2) * hop + SECOND / 2
        if not found or time - found[-1].time >= REFRACTORY:
            found.append(Detection(float(time), labels[top[at]], float(means[at, 1 + top[at]])))
    return tuple(found)


def scored(found: Sequence[Detection], scape: Soundscape) -> Score:
    """Each keyword is found by the first detection of its label within TOLERANCE that found no other."""
    keywords = scape.keywords
    used = [False] * len(found)
    heard = []
    for word in keywords:
        near = (
            at
            for at, one in enumerate(found)
            if not used[at] and one.label == word.label and abs(one.time - word.middle) <= TOLERANCE
        )
        at = next(near, None)
        heard.append(at is not None)
        if at is not None:
            used[at] = True
    return Score(keywords, tuple(heard), tuple(used), scape.hours)


def best_threshold(means: np.ndarray, labels: Sequence[str], scape: Soundscape, hop: float, count: int) -> float:
    """Of THRESHOLDS the one with the largest F1 of the detections; the highest of several."""
    scores = [scored(detections(means, labels, threshold, hop, count), scape).f1 for threshold in THRESHOLDS]
    return THRESHOLDS[max(range(len(scores)), key=lambda at: (scores[at], at))]
