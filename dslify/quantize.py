"""int8 for the parts of a network in ONNX: front, light and full one by one, each only where that is good and faster.

Not the whole model, because quantizers leave the branches of an If alone. Weights get a scale for each channel,
activations one for each value, from what calibration inputs make of them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto
from torch import fx

from .clock import interleaved
from .data import open_data
from .errors import ExportError, OptionError
from .int8 import OPERATORS, Feed, folded, int8, only_for_score
from .notes import recorded_inputs
from .onnx_session import session
from .programs import ANY, example_of
from .samples import Samples

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
    float, medians of one run in ONNX Runtime with one thread on this machine. Both None where nothing was quantized.
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


def quantized(
    models: Mapping[str, ModelProto],
    feeds: Sequence[Feed],
    threshold: float = 0.0,
    least_db: float = LEAST_DB,
    seconds: float = SECONDS,
) -> tuple[dict[str, ModelProto], tuple[PartReport, ...]]:
    """The parts of models_of() with int8 in place of float where it is no slower and good enough, and a report on each.

    feeds: inputs of the front part, such as calibration_feeds() gives. Light and full are calibrated and judged on what
    the float front makes of them. threshold: of the decision; the front stays in float where more than MOST_FLIPS of
    the decisions turn round. At 0, which is not calibrated, the flips at the median of the scores are reported and bind
    nothing. The switch stays in float. least_db: quality below which a part stays in float.
    seconds: that each part is timed for. Raises ExportError for a part that ONNX Runtime cannot quantize.
    """
    if not math.isfinite(least_db):
        raise OptionError(f"The quality that quantization has to keep is a number of dB; got {least_db}.")
    if len(feeds) < 2:
        raise ExportError(f"Quantization needs at least two inputs, one to judge by; got {len(feeds)}.")
    front = session(models["front"])
    names = [out.name for out in models["front"].graph.output]
    answers = [dict(zip(names, front.run(None, dict(feed)), strict=True)) for feed in feeds]
    entering = [{name: value for name, value in answer.items() if name != "score"} for answer in answers]
    scores = np.concatenate([answer["score"] for answer in answers])
    found = {
        part: _part(
            part, models[part], feeds if part == "front" else entering, threshold or float(np.median(scores)),
            MOST_FLIPS if threshold else 1.0, least_db, seconds,
        )
        for part in ("front", "light", "full")
    }  # fmt: skip
    return {part: model for part, (model, _) in found.items()}, tuple(report for _, report in found.values())


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


def _part(
    part: str,
    model: ModelProto,
    feeds: Sequence[Feed],
    threshold: float,
    most_flips: float,
    least_db: float,
    seconds: float,
) -> tuple[ModelProto, PartReport]:
    """The part in int8 where that pays, and the report on it."""
    plain = PartReport(part, None, None, False, "", model.ByteSize())
    if any(node.op_type == "If" for node in model.graph.node):
        reason = "in float: it holds further layers, and nothing is quantized inside a branch"
        return model, replace(plain, reason=reason)
    seen = [feed for at, feed in enumerate(feeds) if at % HELD_OUT]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        ready = folded(model, path)
        switch = only_for_score(ready.graph)
        if not any(node.op_type in OPERATORS and node.name not in switch for node in ready.graph.node):
            return model, replace(plain, reason="in float: it has no convolution and no matrix product")
        made = int8(part, path, seen, switch)
    report = _judged(replace(plain, bytes_int8=made.ByteSize()), model, made, feeds, threshold, seconds)
    reason = _reason(report, most_flips, least_db)
    report = replace(report, kept=not reason, reason=reason or "int8 is faster, and good enough")
    return (made if report.kept else model), report


def _reason(report: PartReport, most_flips: float, least_db: float) -> str:
    """Why the int8 form is not taken, "" if it is."""
    quality, ratio, flips = report.quality_db or 0.0, report.latency_ratio or 0.0, report.flips or 0.0
    if quality < least_db:
        return f"in float: int8 has {quality:.1f} dB, where {least_db:g} dB are asked for"
    if flips > most_flips:
        return f"in float: int8 turns {flips:.1%} of the decisions round, where {most_flips:.0%} are allowed"
    if ratio >= 1:
        return f"in float: int8 takes {ratio:.2f} of its time here"
    return ""


def _judged(
    report: PartReport, model: ModelProto, made: ModelProto, feeds: Sequence[Feed], threshold: float, seconds: float
) -> PartReport:
    """The report with quality on what is held out, latency, and flips of the int8 form against the float model."""
    names = [out.name for out in model.graph.output]
    runners = {"float": session(model), "int8": session(made)}
    times = interleaved({name: partial(runner.run, None, feeds[0]) for name, runner in runners.items()}, seconds)
    answers = {name: [runner.run(None, feed) for feed in feeds] for name, runner in runners.items()}
    wanted, found = ([np.stack(each) for each in zip(*answers[name], strict=True)] for name in runners)
    values = [at for at, name in enumerate(names) if name != "score"]
    flips = None
    if "score" in names:
        at = names.index("score")
        flips = float(((found[at] < threshold) != (wanted[at] < threshold)).mean())
    return replace(
        report,
        quality_db=quality_db([found[at][::HELD_OUT] for at in values], [wanted[at][::HELD_OUT] for at in values]),
        latency_ratio=times["int8"].p50 / times["float"].p50,
        flips=flips,
    )
