"""What int8 is judged by in every format, and the inputs that it is calibrated with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import fx

from .data import open_data
from .errors import ExportError
from .notes import recorded_inputs
from .programs import ANY, example_of
from .samples import Samples

Feed = Mapping[str, np.ndarray]  # inputs by name
LEAST_DB = 20.0  # of a part's int8 answers against its float ones
MOST_FLIPS = 0.05  # share of the decisions that a quantized front may turn round
SAMPLES = 64  # inputs for calibration, a quarter of them held out to judge by
HELD_OUT = 4  # every fourth
SECONDS = 1.0  # that a part is timed for
LOSSLESS_DB = 200.0  # what equal answers count as: JSON has no infinity


@dataclass(frozen=True)
class PartReport:
    """What int8 does to one part, on inputs that it was not calibrated with.

    quality_db: signal to noise of the int8 answers against the float ones, of the worst output. latency_ratio: int8 to
    float, medians of one run in the runtime with one thread on this machine. Both None where nothing was quantized.
    kept: whether the int8 form is the part now; reason: why, or why not. bytes_float, bytes_int8: of the model.
    flips: of the front, share of all inputs that change sides; None for the paths.
    """

    part: str
    quality_db: float | None
    latency_ratio: float | None
    kept: bool
    reason: str
    bytes_float: int
    bytes_int8: int | None = None
    flips: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Feeds:
    """Inputs of the front part, by name, and remarks on where they come from."""

    feeds: tuple[Feed, ...]
    notes: tuple[str, ...] = ()


def calibration_feeds(
    graph: fx.GraphModule,
    names: Sequence[str],
    data: Any = None,
    batch: int = 1,
    count: int = SAMPLES,
    progress: bool | None = None,
) -> Feeds:
    """Inputs to calibrate with, for a captured graph whose front part calls its inputs `names`.

    data: Samples, or what open_data takes (a folder ...); without it random numbers, and a remark that says so. batch:
    samples in every call, ANY counts as 1. count: calls. Raises ExportError for data and a network with several inputs.
    """
    batch = 1 if batch == ANY else batch
    if data is None:
        drawn = (example_of(graph, batch, seed) for seed in range(count))
        made = (dict(zip(names, (value.numpy() for value in values), strict=True)) for values in drawn)
        return Feeds(tuple(made), ("calibrated with random numbers; give --data, or int8 may fit real inputs badly",))
    if len(names) != 1:
        raise ExportError(
            f"Calibration data are for networks with one input, and this one reads {len(names)} "
            f"({', '.join(names)}); quantize it without data, from random inputs."
        )
    samples = data if isinstance(data, Samples) else open_data(data, graph, progress=progress)
    calls = min(count, len(samples) // batch)
    if calls < 2:
        raise ExportError(
            f"{samples.report.origin} has {len(samples)} samples, and calibration needs at least {2 * batch}."
        )
    (example,) = recorded_inputs(graph)
    starts = [at * (len(samples) // batch) // calls * batch for at in range(calls)]  # spread over all of them
    rows = (samples.batch(range(start, start + batch)).to(example.dtype).numpy() for start in starts)
    return Feeds(tuple({names[0]: row} for row in rows))


def quality_db(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Signal to noise in dB of the worst output; LOSSLESS_DB at most, and minus that for no numbers or other shapes."""
    worst = LOSSLESS_DB
    for mine, theirs in zip(found, wanted, strict=True):
        if mine.shape != theirs.shape or not np.isfinite(mine.astype(np.float64)).all():
            return -LOSSLESS_DB
        signal = np.square(theirs.astype(np.float64)).sum()
        noise = np.square(mine.astype(np.float64) - theirs.astype(np.float64)).sum()
        if noise > 0:
            worst = min(worst, 10 * math.log10(signal / noise) if signal > 0 else -LOSSLESS_DB)
    return float(max(worst, -LOSSLESS_DB))


def reason_for_float(report: PartReport, most_flips: float, least_db: float) -> str:
    """Why the int8 form is not taken, "" if it is."""
    quality, ratio, flips = report.quality_db or 0.0, report.latency_ratio or 0.0, report.flips or 0.0
    if quality < least_db:
        return f"in float: int8 has {quality:.1f} dB, where {least_db:g} dB are asked for"
    if flips > most_flips:
        return f"in float: int8 turns {flips:.1%} of the decisions round, where {most_flips:.0%} are allowed"
    if ratio >= 1:
        return f"in float: int8 takes {ratio:.2f} of its time here"
    return ""
