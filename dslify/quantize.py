"""int8 for the parts of a network in ONNX: front, light and full one by one, each only where that is good and faster.

Not the whole model, because quantizers leave the branches of an If alone. Weights get a scale for each channel,
activations one for each value, from what calibration inputs make of them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto

from .clock import interleaved
from .errors import ExportError, OptionError
from .int8 import OPERATORS, folded, int8, only_for_score
from .int8_report import (
    HELD_OUT,
    LEAST_DB,
    MOST_FLIPS,
    SECONDS,
    Feed,
    PartReport,
    quality_db,
    reason_for_float,
)
from .onnx_session import session


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
    reason = reason_for_float(report, most_flips, least_db)
    report = replace(report, kept=not reason, reason=reason or "int8 is faster, and good enough")
    return (made if report.kept else model), report


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
