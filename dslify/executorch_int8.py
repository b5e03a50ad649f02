"""int8 for the parts of a network in ExecuTorch, by XNNPACK's quantizer: each only where that is good and faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attempt import quietly
from .clock import interleaved
from .errors import ExportError
from .int8_report import HELD_OUT, LEAST_DB, MOST_FLIPS, SECONDS, Feed, PartReport, quality_db, reason_for_float
from .programs import Program
from .switch import DSLayer

Exported = torch.export.ExportedProgram
Inputs = tuple[Tensor, ...]


def quantized_parts(
    exported: Mapping[str, Exported], parts: Mapping[str, Program], layer: DSLayer, feeds: Sequence[Feed]
) -> tuple[dict[str, Exported], tuple[PartReport, ...]]:
    """The programs with int8 in place of float where it is no slower and good enough, and a report on each.

    exported: to be lowered, by part. feeds: inputs of the front; light and full are calibrated and judged on what the
    float front makes of them. Parts that hold further layers stay in float. Raises ExportError for less than two feeds.
    """
    if len(feeds) < 2:
        raise ExportError(f"Quantization needs at least two inputs, one to judge by; got {len(feeds)}.")
    front = parts["front"]
    entering: list[Inputs] = [tuple(torch.from_numpy(feed[name]) for name in front.inputs) for feed in feeds]
    with torch.no_grad():
        answers = [front.module(*inputs) for inputs in entering]
    crossing: list[Inputs] = [(masked, *passed) for masked, _, *passed in answers]
    scores = torch.cat([score for _, score, *_ in answers])
    threshold = float(layer.threshold) or float(scores.median())
    found, reports = dict(exported), []
    for name in (each for each in ("front", "light", "full") if each in parts):
        inputs = entering if name == "front" else crossing
        made = _int8(exported[name], parts[name], [each for at, each in enumerate(inputs) if at % HELD_OUT])
        report = _judged(name, exported[name], made, inputs, threshold)
        reason = reason_for_float(report, MOST_FLIPS if layer.threshold else 1.0, LEAST_DB)
        reports.append(replace(report, kept=not reason, reason=reason or "int8 is faster, and good enough"))
        if not reason:
            found[name] = made
    return found, tuple(reports)


def _int8(exported: Exported, part: Program, inputs: Sequence[Inputs]) -> Exported:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with quietly(), torch.no_grad():
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(exported.module(), quantizer)
        for each in inputs:
            prepared(*each)
        return torch.export.export(convert_pt2e(prepared), part.args, dynamic_shapes=part.shapes, strict=False)


def _lowered(exported: Exported) -> tuple[bytes, Callable[..., Any], Any]:
    """(the program's bytes, how it is called, what has to outlive that)"""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    with quietly():
        written = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
        program = Runtime.get().load_program(written)
        return written, program.load_method("forward").execute, program


def _judged(name: str, plain: Exported, made: Exported, inputs: Sequence[Inputs], threshold: float) -> PartReport:
    """The report with quality on what is held out, latency, and flips of the int8 form against the float one."""
    kinds = {"float": _lowered(plain), "int8": _lowered(made)}
    given = [[value.contiguous() for value in each] for each in inputs]
    times = interleaved({kind: partial(call, given[0]) for kind, (_, call, _) in kinds.items()}, SECONDS)
    answers = {
        kind: [[value.clone().numpy() for value in call(each)] for each in given]
        for kind, (_, call, _) in kinds.items()
    }
    flips = None
    if name == "front":
        pairs = zip(*answers.values(), strict=True)
        turned = [(theirs[1] < threshold) != (mine[1] < threshold) for theirs, mine in pairs]
        flips = float(sum(each.mean() for each in turned) / len(turned))
    values = [at for at in range(len(answers["float"][0])) if name != "front" or at != 1]
    quality = min(
        quality_db([mine[at] for at in values], [theirs[at] for at in values])
        for theirs, mine in list(zip(*answers.values(), strict=True))[::HELD_OUT]
    )
    sizes = {kind: len(written) for kind, (written, _, _) in kinds.items()}
    ratio = times["int8"].p50 / times["float"].p50
    return PartReport(name, quality, ratio, False, "", sizes["float"], sizes["int8"], flips)
