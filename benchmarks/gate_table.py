"""What a gate does to a network, counted on test data, and the table of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import dslify
from benchmarks.keywords import classes
from dslify import report
from dslify.capture import evaluating
from dslify.omega import Omega
from dslify.resampling import Interval, Resample
from dslify.samples import Samples
from dslify.switch import DSLayer, route

BYTES = 2  # of a value at the cut: float16, and one bit more a value for where the zeros are
BATCH = 64


@dataclass(frozen=True)
class Seen:
    """One pass over samples at one threshold; arrays with an entry a sample.

    score: of the gate. stopped: went light. mixed: class that the network answers as routed. zeros: share of exact
    zeros in the masked activation.
    """

    score: np.ndarray
    stopped: np.ndarray
    mixed: np.ndarray
    zeros: np.ndarray


@dataclass(frozen=True)
class Result:
    """One way to stop negatives, on test; shares from 0 to 1.

    stopped: of each negative label, and of all negatives. recall_lost, accuracy_lost: of the keywords and of all clips,
    the given network's share that is right minus this one's. weight_zeros, zeros: of the mask's weights and of the
    activation behind it. dense, sent: bytes of one activation, as it is and as sent by a clip that goes on. macs: of a
    stopped clip, against the whole network's. auc: probability that a keyword scores above a negative.
    """

    depth: str
    mask: str
    beta: float | None
    threshold: float
    auc: float
    stopped: dict[str, float]
    stopped_interval: Interval
    recall_lost: float
    recall_lost_interval: Interval
    accuracy_lost: float
    weight_zeros: float | None = None
    zeros: float | None = None
    dense: float | None = None
    sent: float | None = None
    macs: float | None = None
    seconds: float = 0.0


def look(net: nn.Module, samples: Samples) -> Seen:
    """Run a network with one gate as it routes."""
    (layer,) = dslify.dsl_layers(net)
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in Seen.__dataclass_fields__}
    with evaluating(net), torch.no_grad(), route(net, "mixed"):
        for sound in _batches(samples):
            columns["mixed"].append(net(sound).argmax(1))
            paths = layer.paths
            columns["score"].append(paths.score.double())
            columns["stopped"].append(paths.light_taken)
            columns["zeros"].append((layer.pooled(paths.masked) == 0).double().mean((1, 2)))
    return Seen(**{name: torch.cat(parts).numpy() for name, parts in columns.items()})


def logits(network: nn.Module, samples: Samples) -> np.ndarray:
    """Logits of the given network, (n, classes)."""
    with torch.no_grad():
        return torch.cat([network(sound) for sound in _batches(samples)]).double().numpy()


class Judge:
    """The test data, and what is counted on it."""

    def __init__(self, samples: Samples, positive: Omega, seed: int):
        self.samples, self.omega = samples, positive
        self.positive = positive.positive(samples.labels)
        self.truth = classes(samples, positive).numpy()
        names, source = np.unique(np.array(samples.sources), return_inverse=True)
        self.draw = Resample(source, len(names), seed)

    def gate(self, net: nn.Module, original: np.ndarray, depth: str, mask: str, beta: float, begun: float) -> Result:
        layer: DSLayer = dslify.dsl_layers(net)[0]
        seen = look(net, self.samples)
        macs = {row.name: row.macs for row in dslify.cost(net)}
        values = int(np.prod(layer.pooled(layer.paths.masked).shape[1:]))
        on = self.positive & ~seen.stopped
        zeros = float(seen.zeros[on].mean()) if on.any() else None
        sent = None if zeros is None else values / 8 + BYTES * values * (1 - zeros)
        return self.result(
            seen.score, seen.stopped, seen.mixed, original,
            depth=depth, mask=mask, beta=beta, threshold=layer.threshold.item(), weight_zeros=layer.mask.sparsity(),
            zeros=zeros, dense=float(BYTES * values), sent=sent,
            macs=(macs["base"] + macs["switch"]) / (macs["base"] + macs["full"]), seconds=time.perf_counter() - begun,
        )  # fmt: skip

    def result(
        self, score: np.ndarray, stopped: np.ndarray, mixed: np.ndarray, original: np.ndarray, **fields: Any
    ) -> Result:
        labels = np.array(self.samples.labels)
        shares = {label: float(stopped[labels == label].mean()) for label in sorted(set(labels[~self.positive]))}
        shares["all negatives"] = float(stopped[~self.positive].mean())
        lost = (original == self.truth).astype(float) - (mixed == self.truth)
        above = score[self.positive][:, None] - score[~self.positive]
        return Result(
            auc=float((above > 0).mean() + (above == 0).mean() / 2),
            stopped=shares,
            stopped_interval=self.draw.interval(self.draw.means(stopped.astype(float), ~self.positive)),
            recall_lost=float(lost[self.positive].mean()),
            recall_lost_interval=self.draw.interval(self.draw.means(lost, self.positive)),
            accuracy_lost=float(lost.mean()),
            **fields,
        )


def table(results: Sequence[Result], notes: Sequence[str]) -> str:
    """The figures as Markdown."""
    labels = list(results[0].stopped)
    heads = (
        "depth", "mask", "beta", *(f"{label} stopped" for label in labels), "keyword recall lost", "accuracy lost",
        "area under curve", "weights at zero", "activation at zero", "bytes", "sent", "MACs of a stopped clip",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += map(row, results)
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def row(one: Result) -> str:
    """One line of the table."""
    *shares, every = one.stopped.values()
    cells = (
        one.depth, one.mask, "" if one.beta is None else f"{one.beta:g}", *map(percent, shares),
        report.with_interval(every, one.stopped_interval, percent),
        report.with_interval(one.recall_lost, one.recall_lost_interval, percent), percent(one.accuracy_lost),
        f"{one.auc:.3f}", percent(one.weight_zeros), percent(one.zeros), report.human(one.dense),
        report.human(one.sent), report.percent(one.macs),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def percent(share: float | None) -> str:
    """0.0123 -> "1.2 %"; "-" for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def _batches(samples: Samples) -> Iterator[torch.Tensor]:
    for begin in range(0, len(samples), BATCH):
        yield samples.batch(range(begin, min(begin + BATCH, len(samples))))
