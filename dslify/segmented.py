"""Samples as a layer sees them that routes their segments one by one: every segment is a sample of its own then.

What is learned and what is counted goes by segment: score, difference, loudness, where it went. Labels and sources are
the sample's, repeated; a source stays what is exchangeable with sources to come, however many segments it has. What
follows the layer reads whole samples, so the network's output is judged by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .capture import evaluating
from .errors import DataError, OptionError
from .samples import Samples, level
from .switch import dsl_layers, route

_Any = TypeVar("_Any")


def segments_in(
    net: nn.Module, sample: Tensor, rate: int | None = None, read: Callable[[Tensor], Any] | None = None
) -> int:
    """How many segments of a sample the network's layers route one by one; 1 where they route whole samples.

    sample: (1, *shape); its values do not matter. rate: of the sample in Hz, if the sentence shall name seconds. read:
    what runs the network, where that is to be told in other words than its own if it fails.
    Raises DataError for a sample that is not made of whole segments, OptionError for layers that divide it differently.
    """
    layers = dsl_layers(net)
    if all(layer.segments is None for layer in layers):
        return 1
    with evaluating(net), torch.no_grad(), route(net, "full"):
        (read or net)(sample)
    counts = set()
    for layer in layers:
        if layer.paths is not None:
            counts.add(layer.paths.segments)
            if layer.segments is not None and layer.segments.remainder(layer.paths.masked):
                raise DataError(_unfitting(layer.segments.entries, layer.paths.segments, sample.shape[-1], rate))
    if len(counts) > 1:
        raise OptionError(
            f"The layers of this network divide a sample into {' and '.join(map(str, sorted(counts)))} segments, and "
            "what they do can only be held together segment by segment; give all of them the same segments, or none."
        )
    return counts.pop() if counts else 1


def _unfitting(entries: int, count: int, length: int, rate: int | None) -> str:
    """What is wrong with samples of `length`, whose last of `count` segments is too short, and which would do."""
    lengths = [(count - 1) * entries, count * entries]
    seconds = "" if rate is None else f" (--segment {' or '.join(f'{one / rate:g}' for one in lengths)})"
    return (
        f"Samples of {length} entries are no whole number of segments of {entries}, which this network routes one by "
        f"one; give samples of {' or '.join(map(str, lengths))} entries{seconds}, or turn segments off with "
        "route_every(net, None)."
    )


def counted(segments: int) -> str:
    """The word for what is routed one by one, of samples that have so many segments."""
    return "samples" if segments == 1 else "segments"


def each(values: Sequence[_Any], count: int) -> tuple[_Any, ...]:
    """What is known of every sample, for each of its `count` segments."""
    return tuple(value for value in values for _ in range(count))


def segment_positions(positions: Tensor, count: int) -> Tensor:
    """Positions of the samples' segments among all segments, sample-major: (n,) -> (n * count,)."""
    return (positions[:, None] * count + torch.arange(count, device=positions.device)).flatten()


def loudness(samples: Samples, count: int, entries: int = 0) -> np.ndarray:
    """Level of every segment in dB, (n * count,), each from its own part of the sample; see Samples.rms_db.

    entries: of the sample in a segment, along the axis that has so many.
    """
    if count == 1:
        return samples.rms_db.double().numpy()
    axes = [axis for axis, size in enumerate(samples.shape) if entries and -(-size // entries) == count]
    values = (samples[at] for at in range(len(samples)))
    parts = (one.split(entries, axes[-1]) if axes else one.tensor_split(count, -1) for one in values)
    return np.array([level(part) for one in parts for part in one])
