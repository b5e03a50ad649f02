"""What a way to stop clips does to a network, noted clip by clip on test data, and the figures that come of it.

A note keeps what each clip met with as a string of one character a clip, so that every figure, and its interval, can be
taken from the file alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dslify
from dslify.capture import evaluating
from dslify.omega import Omega
from dslify.resampling import Resample
from dslify.samples import Samples
from dslify.switch import route

from .data import classes

BATCH = 64
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a class, or a gate, in one character
Figure = dict[str, Any]  # {"value", "range" or "interval", "by_seed"}
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Note:
    """One way to stop clips, with one seed, on test.

    stopped: for each clip the gate that stopped it, from 1 on, 0 where none did. answer: the class it got. auc:
    probability that a keyword scores above a negative (at the first gate), None without a score. thresholds: one a
    gate. macs: of a clip, by the gate that stopped it (0 first: of one that none did), as part of the whole network's.
    zeros: share of exact zeros at the first cut, of keywords that go on; weight_zeros: of the mask's weights; values:
    numbers at that cut. calibration: what set the thresholds, in short. seconds: to train, calibrate and judge.
    """

    stopped: str
    answer: str
    auc: float | None = None
    thresholds: tuple[float, ...] = ()
    macs: tuple[float, ...] = (1.0, 0.0)
    zeros: float | None = None
    weight_zeros: float | None = None
    values: int | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """The test data with what the whole network answers to it.

    network: without gates. seed: of the bootstrap.
    """

    def __init__(self, network: nn.Module, samples: Samples, positive: Omega, seed: int = 0):
        self.network, self.samples, self.omega = network, samples, positive
        self.labels = np.array(samples.labels)
        self.positive = positive.positive(samples.labels)
        self.truth = classes(samples, positive).numpy()
        names, source = np.unique(np.array(samples.sources), return_inverse=True)
        self.draw = Resample(source, len(names), seed)

    @cached_property
    def logits(self) -> np.ndarray:
        """Of the whole network, (n, classes)."""
        return logits(self.network, self.samples)

    @cached_property
    def original(self) -> np.ndarray:
        """The class that the whole network answers, (n,)."""
        return self.logits.argmax(1)

    def gated(self, net: nn.Module, **fields: Any) -> Note:
        """Run a network with gates, one inside the other, as it routes."""
        layers = dslify.dsl_layers(net)
        values = 0
        columns: dict[str, list[Tensor]] = {"answer": [], "stopped": [], "score": [], "zeros": []}
        with evaluating(net), torch.no_grad(), route(net, "mixed"):
            for sound in batches(self.samples):
                for layer in layers:
                    layer.paths = None  # a gate that no clip of the batch reaches keeps what it saw before
                columns["answer"].append(net(sound).argmax(1))
                going = torch.arange(len(sound))
                stopped = torch.zeros(len(sound), dtype=torch.long)
                for number, layer in enumerate(layers):
                    paths = layer.paths
                    if paths is None or paths.light_taken is None:
                        break
                    if number == 0:
                        columns["score"].append(paths.score.double())
                        masked = layer.pooled(paths.masked)
                        values = masked[0].numel()
                        columns["zeros"].append((masked == 0).double().mean((1, 2)))
                    stopped[going[paths.light_taken]] = number + 1
                    going = going[~paths.light_taken]
                columns["stopped"].append(stopped)
        table = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
        on = self.positive & (table["stopped"] == 0)
        return self.note(
            table["stopped"],
            table["answer"],
            table["score"],
            thresholds=tuple(layer.threshold.item() for layer in layers),
            macs=shares(net),
            zeros=float(table["zeros"][on].mean()) if on.any() else None,
            weight_zeros=layers[0].mask.sparsity(),
            values=values,
            **fields,
        )

    def note(self, stopped: np.ndarray, answer: np.ndarray, score: np.ndarray | None = None, **fields: Any) -> Note:
        """stopped, answer, score: one entry a clip, (n,)."""
        above = None if score is None else score[self.positive][:, None] - score[~self.positive]
        auc = None if above is None else float((above > 0).mean() + (above == 0).mean() / 2)
        written = ["".join(DIGITS[one] for one in column.astype(int)) for column in (stopped, answer)]
        return Note(written[0], written[1], auc=auc, **fields)

    def columns(self, note: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What a note says of each clip, as numbers, (n,): stopped, keyword lost, accuracy lost, its MACs."""
        stopped, answer = (np.array([DIGITS.index(one) for one in note[name]]) for name in ("stopped", "answer"))
        lost = (self.original == self.truth).astype(float) - (answer == self.truth)
        return {"stopped": (stopped > 0).astype(float), "lost": lost, "macs": np.array(note["macs"])[stopped]}

    def figures(self, notes: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """Of one way with several seeds: mean, range over the seeds, and the interval of the mean over sources.

        "LABEL stopped", "negatives stopped", "keywords stopped"; "keywords lost" and "accuracy lost", shares against
        the network without gates; "auc"; "zeros"; "bytes" of dense int8, a bit a value and a byte for each that is not
        zero; "macs stopped", of a stopped clip. What a way has not is None.
        """
        tables = [self.columns(note) for note in notes]
        found = {
            f"{label} stopped": self._over(tables, "stopped", self.labels == label)
            for label in sorted({str(one) for one in self.labels[~self.positive]})
        }
        found["negatives stopped"] = self._over(tables, "stopped", ~self.positive)
        found["keywords stopped"] = self._over(tables, "stopped", self.positive)
        found["keywords lost"] = self._over(tables, "lost", self.positive)
        found["accuracy lost"] = self._over(tables, "lost", np.ones(len(self.truth), bool))
        for name in ("auc", "zeros", "weight_zeros"):
            found[name] = spread([note[name] for note in notes])
        found["bytes"] = spread([None if note["zeros"] is None else 1 / 8 + 1 - note["zeros"] for note in notes])
        found["macs stopped"] = spread(
            [float(table["macs"][table["stopped"] > 0].mean()) if table["stopped"].any() else None for table in tables]
        )
        found["threshold"] = spread([note["thresholds"][0] if note["thresholds"] else None for note in notes])
        return found

    def _over(self, tables: Sequence[Columns], name: str, within: np.ndarray) -> Figure:
        found = spread([float(table[name][within].mean()) for table in tables])
        column = np.mean([table[name] for table in tables], axis=0)
        found["interval"] = self.draw.interval(self.draw.means(column, within))
        return found


def spread(values: Sequence[float | None]) -> Figure:
    """Mean and range over seeds; None where one of them is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return {"value": None, "range": None, "by_seed": list(values)}
    return {"value": fmean(known), "range": [min(known), max(known)] if len(known) > 1 else None, "by_seed": known}


def shares(net: nn.Module) -> tuple[float, ...]:
    """MACs of a clip that no gate stops, that the first stops, the second ..., as parts of the whole network's.

    For gates one inside the other: between two of them lies what the full path of the first costs.
    """
    rows = {row.name: row.macs for row in dslify.cost(net)}
    ends = ["" if at == 0 else f" {at + 1}" for at in range(len(dslify.dsl_layers(net)))]
    whole = rows["base"] + sum(rows[f"full{end}"] for end in ends)
    spent, stopped = rows["base"], []
    for end in ends:
        spent += rows[f"switch{end}"]
        stopped.append((spent + rows[f"light{end}"]) / whole)
        spent += rows[f"full{end}"]
    return spent / whole, *stopped


def logits(network: nn.Module, samples: Samples) -> np.ndarray:
    """Of every sample, (n, classes)."""
    with evaluating(network), torch.no_grad():
        return torch.cat([network(sound) for sound in batches(samples)]).double().numpy()


def batches(samples: Samples) -> Iterator[Tensor]:
    for begin in range(0, len(samples), BATCH):
        yield samples.batch(range(begin, min(begin + BATCH, len(samples))))
