"""One pass of both paths over data: what the switch said, how far the answers really were apart, how loud it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .capture import evaluating
from .cascade import Way, parents, ways
from .errors import DataError, OptionError
from .probe import MIXED, Columns, Judge, Probe, scales
from .samples import Samples, show_progress
from .segmented import counted, each, loudness, segments_in
from .switch import DSLayer, required_layers

Metric = Callable[[Any, Any], Any]  # (network output, model input) of a batch -> one number per sample


@dataclass(frozen=True, eq=False)
class Observations:
    """What one pass over the data showed of one layer; arrays with one entry per sample, in the data's order. Where the
    layer routes segments, each of them is a sample here: (n * segments,), sample by sample.

    score: the switch's prediction. difference: the relative difference of light and full, which it predicts.
    loudness: dB of the sample's root mean square, 0 dB at 1.0.
    labels, sources: what kind of sample it is, and which recording it was cut from.
    taken, mixed: of a really routed run: which samples went light, and their difference from the full output, where the
    last layer ends; empty without one.
    scale: mean absolute full output, (outputs,), that the differences are relative to. metric: the user's, per sample,
    for "full", "light" and "mixed"; the network's output is judged whole, so all segments of a sample have its value.
    reached: of a routed run: which samples came to the layer; a layer inside a full path is not reached by all.
    segments: of each sample of the data. zeros, entries: of a gate, the share of exact zeros in the masked activation
    of each sample, and its values; empty for other layers.
    """

    score: np.ndarray
    difference: np.ndarray
    loudness: np.ndarray
    labels: tuple[str, ...]
    sources: tuple[str, ...]
    scale: Tensor
    taken: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    mixed: np.ndarray = field(default_factory=lambda: np.zeros(0))
    metric: dict[str, np.ndarray] = field(default_factory=dict)
    reached: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    segments: int = 1
    zeros: np.ndarray = field(default_factory=lambda: np.zeros(0))
    entries: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What comes of every way through the layers, and of really routing; n samples.

    parents: see cascade. difference: from the full output where the last layer ends, (n, ways), ways as cascade orders
    them. judged: by name of the judgement, (n, ways). mixed, judged_mixed: the same of the routed run, (n,). Where
    segments are routed, n counts these, and a judgement of a sample stands at each of its segments.
    """

    parents: tuple[int | None, ...]
    difference: np.ndarray
    judged: dict[str, np.ndarray]
    mixed: np.ndarray
    judged_mixed: dict[str, np.ndarray]


def collect(
    net: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 32,
    routed: bool = False,
    metric: Metric | None = None,
    progress: bool | None = None,
) -> Observations:
    """Run both paths of a network's one DSLayer over the samples; note score, difference and loudness of each sample,
    or of each segment where the layer routes these.

    routed: run every batch a second time with route "mixed" and note what really came out.
    metric: called with (network output, model input) of a batch, returns one number per sample.
    progress: a bar on stderr; None shows one where stderr is a terminal.
    Raises OptionError without exactly one DSLayer, DataError for unusable samples, scores or differences, or samples
    that are not made of whole segments.
    """
    only_layer(net)
    if not routed and metric is None:
        return collect_all(net, samples, batch_size=batch_size, progress=progress)[0]
    judges: dict[str, Judge] = {} if metric is None else {"metric": lambda output, inputs, _: metric(output, inputs)}
    return collect_routed(net, samples, judges, batch_size=batch_size, progress=progress)[0][0]


def collect_all(
    net: nn.Module, samples: Samples, *, batch_size: int = 32, progress: bool | None = None
) -> tuple[Observations, ...]:
    """As `collect`, for every DSLayer of a network, outermost first: every sample takes every path of every layer.

    A layer inside a full path sees what the full path gives it, and a layer behind another one what comes of the
    other's full path; each difference is taken where its own layer ends.
    Raises OptionError without a DSLayer, DataError for unusable samples, scores or differences.
    """
    return _observed(*_looked(net, samples, {}, (), batch_size, progress), samples, _entries(net))


def collect_routed(
    net: nn.Module,
    samples: Samples,
    judges: dict[str, Judge],
    *,
    batch_size: int = 32,
    progress: bool | None = None,
) -> tuple[tuple[Observations, ...], Outcomes]:
    """As `collect_all`, and every batch once more really routed, and once on every way through the layers.

    judges: by name. One named "metric" is noted with a single layer's observations too.
    Raises OptionError for more ways than cascade.MOST_WAYS, and for a judgement of another shape.
    """
    above = parents(required_layers(net))
    tried = ways(above)
    table, known = _looked(net, samples, judges, tried, batch_size, progress)
    seen = _observed(table, known, samples, _entries(net))

    def by_way(name: str) -> np.ndarray:
        return np.stack([table[name, number] for number in range(len(tried))], axis=1)

    judged = {name: by_way(name) for name in judges}
    after = {name: table[name, MIXED] for name in judges}
    if len(seen) == 1 and "metric" in judges:
        ours = judged["metric"]
        seen = (replace(seen[0], metric={"full": ours[:, 0], "light": ours[:, -1], "mixed": after["metric"]}),)
    return seen, Outcomes(above, by_way("way"), judged, table["mixed", MIXED], after)


def _looked(
    net: nn.Module,
    samples: Samples,
    judges: dict[str, Judge],
    tried: Sequence[Way],
    batch_size: int,
    progress: bool | None,
) -> tuple[Columns, list[Tensor]]:
    """One pass over the data: its columns, and the scale of every layer."""
    layers = required_layers(net)
    if not all(layer.routable for layer in layers):  # samples can only be routed one by one
        batch_size = 1
    device = layers[0].threshold.device
    segments_in(net, samples.batch([0]).to(device))
    batches = [range(at, min(at + batch_size, len(samples))) for at in range(0, len(samples), batch_size)]
    columns: list[Columns] = []
    with evaluating(net), torch.no_grad(), show_progress(progress) as bars:
        bar = bars.add_task("measuring both paths", total=len(samples))
        known = scales(net, layers, (samples.batch(batch).to(device) for batch in batches))
        probe = Probe(net, layers, known, judges, tried)
        for batch in batches:
            columns.append(probe.columns(samples.batch(batch).to(device), batch))
            bars.advance(bar, len(batch))
    return {key: np.concatenate([column[key] for column in columns]) for key in columns[0]}, known


def _observed(table: Columns, known: list[Tensor], samples: Samples, entries: int) -> tuple[Observations, ...]:
    """The columns by layer. entries: of a sample in a segment. Raises DataError for scores and differences that are not
    numbers."""
    count = len(table["score", 0]) // len(samples)
    for (name, _), column in table.items():
        bad = np.count_nonzero(~np.isfinite(column)) if name in ("score", "difference") else 0
        if bad:
            raise DataError(
                f"The {name} of {bad} of {len(column)} {counted(count)} is not a finite number; "
                "look for NaN in the data and in the network's weights."
            )
    loud, nothing = loudness(samples, count, entries), np.zeros(0)
    labels, sources = each(samples.labels, count), each(samples.sources, count)
    return tuple(
        Observations(
            table["score", at],
            table["difference", at],
            loud,
            labels,
            sources,
            scale,
            taken=table.get(("taken", at), nothing).astype(bool),
            mixed=table.get(("mixed", MIXED), nothing),
            reached=table.get(("reached", at), nothing).astype(bool),
            segments=count,
            zeros=table.get(("zeros", at), nothing),
            entries=table.get(("entries", at), nothing).astype(int),
        )
        for at, scale in enumerate(known)
    )


def _entries(net: nn.Module) -> int:
    """Of the network's input in one segment, 0 where whole samples are routed."""
    return next((layer.segments.entries for layer in required_layers(net) if layer.segments is not None), 0)


def only_layer(net: nn.Module) -> DSLayer:
    """The one DSLayer of a network. Raises OptionError for none or several."""
    layers = required_layers(net)
    if len(layers) == 1:
        return layers[0]
    raise OptionError(f"This network holds {len(layers)} Dynamic Switch Layers; only one can be measured at a time.")


def plain(value: Any) -> Any:
    """A result as JSON can hold it: numpy numbers become Python's, and what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
