"""Other ways to send as many samples light as the switches do: at random, by the true difference, by loudness.

Pure arithmetic on what every way through the layers gives (observe.Outcomes). A routing is a table of chances,
(n, ways): how likely each sample is to take each way; its outcome is the mean of the ways' outcomes under it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cascade import Way, ways
from .observe import Observations, Outcomes
from .resampling import Interval, Resample, quietest, random_spread


@dataclass(frozen=True)
class Row:
    """One way to route the test samples.

    difference: mean relative difference from the full output, all samples counted. share: part that goes light, at
    whichever layer. spread: for "random", the standard deviation of `difference` over all ways to draw the same shares
    (with layers in a row, as if each way were taken as often as on average).
    macs: mean per sample, MACs; the switch counts where each sample is decided on. metric: mean of the user's.
    accuracy: part of the samples whose largest logit is that of their label. Where segments are routed, shares and
    differences are over these, and metric and accuracy, which are of whole samples, None for the routings that were not
    run: what they would make of a sample is no mean of what its two paths do.
    """

    name: str
    difference: float
    share: float
    interval: Interval = None
    spread: float | None = None
    macs: float | None = None
    metric: float | None = None
    metric_interval: Interval = None
    accuracy: float | None = None
    accuracy_interval: Interval = None


class Rivals:
    """The routings to hold against each other, for one routed run.

    seen: one Observations a layer, with `taken` and `reached`. outcomes: of the same run. draw: over its sources.
    """

    def __init__(self, seen: Sequence[Observations], outcomes: Outcomes, draw: Resample):
        self.seen, self.outcomes, self.draw = seen, outcomes, draw
        self.ways = ways(outcomes.parents)
        self.chances = {
            "full": self._always(0),
            "light": self._always(len(self.ways) - 1),
            "mixed": self._by(lambda layer, _: layer.taken.astype(float)),
            "random": self._by(lambda layer, _: np.full(len(layer), layer.taken.sum() / max(1, layer.reached.sum()))),
            "oracle": self._by(lambda layer, reach: quietest(layer.difference, layer.taken.sum(), reach)),
            "loudness": self._by(lambda layer, reach: quietest(layer.loudness, layer.taken.sum(), reach)),
        }

    def replicates(self, name: str, column: np.ndarray | None = None) -> np.ndarray:
        """The mean difference of a routing in every replicate of the bootstrap; (replicates,).

        column: instead of the difference, another outcome of the ways, (n, ways).
        """
        outcome = self.outcomes.difference if column is None else column
        if name != "random":
            return self.draw.means((self.chances[name] * outcome).sum(1))
        # the shares are the switches' own, also in a replicate
        chances = _through(self.ways, self._drawn_shares())
        return (chances * np.stack([self.draw.means(column) for column in outcome.T], axis=1)).sum(1)

    def rows(self, macs: dict[str, float]) -> tuple[Row, ...]:
        """One row a routing; macs: by the names that cost() gives, or nothing."""
        return tuple(self._row(name, macs) for name in self.chances)

    def _row(self, name: str, macs: dict[str, float]) -> Row:
        outcomes, chances, draw = self.outcomes, self.chances[name], self.draw
        light = [any(way) for way in self.ways]
        measured = name == "mixed"
        found: dict[str, Any] = {}
        run = name in ("full", "light", "mixed")
        for word, outcome in outcomes.judged.items() if run or self.seen[0].segments == 1 else ():
            column = outcomes.judged_mixed[word] if measured else (chances * outcome).sum(1)
            replicates = draw.means(column) if measured else self.replicates(name, outcome)
            found |= {word: float(column.mean()), f"{word}_interval": draw.interval(replicates)}
        column = outcomes.mixed if measured else (chances * outcomes.difference).sum(1)
        replicates = draw.means(column) if measured else self.replicates(name)
        return Row(
            name,
            difference=float(column.mean()),
            share=float(chances[:, light].sum(1).mean()),
            interval=draw.interval(replicates),
            spread=random_spread(outcomes.difference, chances.sum(0)) if name == "random" else None,
            macs=self._macs(name, macs) if macs else None,
            **found,
        )

    def _macs(self, name: str, macs: dict[str, float]) -> float:
        """Mean MACs of a sample; full and light alone need no switch."""
        alone = name in ("full", "light")
        costs = np.full(len(self.ways), macs["base"])
        for number, way in enumerate(self.ways):
            for at, light in enumerate(way):
                label = f" {at + 1}" if at else ""
                if light is not None:
                    costs[number] += macs[("light" if light else "full") + label]
                    costs[number] += 0 if alone else macs["switch" + label]
        return float(self.chances[name].mean(0) @ costs)

    def _always(self, number: int) -> np.ndarray:
        chances = np.zeros((len(self.seen[0]), len(self.ways)))
        chances[:, number] = 1
        return chances

    def _by(self, decide: Callable[[Observations, np.ndarray], np.ndarray]) -> np.ndarray:
        """decide: (a layer's observations, chance of each sample to reach it) -> chance to go light if it does."""
        lights: list[np.ndarray] = []
        reaches: list[np.ndarray] = []
        for layer, parent in zip(self.seen, self.outcomes.parents, strict=True):
            reaches.append(np.ones(len(layer)) if parent is None else reaches[parent] * (1 - lights[parent]))
            lights.append(decide(layer, reaches[-1]))
        return _through(self.ways, lights)

    def _drawn_shares(self) -> list[np.ndarray]:
        """Of every layer, the share that goes light of what reaches it, in every replicate."""
        shares = []
        for layer in self.seen:
            reached, taken = (self.draw.means(column.astype(float)) for column in (layer.reached, layer.taken))
            shares.append(np.divide(taken, reached, out=np.zeros_like(taken), where=reached > 0))
        return shares


def _through(ways: Sequence[Way], lights: Sequence[np.ndarray]) -> np.ndarray:
    """Chance of every way, (n, ways), from the chance to go light at each layer that is reached, (n,) each."""
    chances = np.ones((len(lights[0]), len(ways)))
    for number, way in enumerate(ways):
        for light, chance in zip(way, lights, strict=True):
            if light is not None:
                chances[:, number] *= chance if light else 1 - chance
    return chances
