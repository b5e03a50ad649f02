"""ExecuTorch: one .pte with a method for each part, which the host calls in turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx

from .attempt import quietly
from .errors import ExportError, one_line
from .int8_report import Feed, PartReport
from .programs import ANY, Program, Programs, free_axes, programs_of
from .undelegated import rewritten
from .written import Written, facts, parts_in, routed, trials, tried


def write_executorch(
    graph: fx.GraphModule, path: Path, batch: int = 1, dynamic: bool = True, feeds: Sequence[Feed] = ()
) -> Written:
    """A .pte with the methods front, light and full (full_front, full_light ... where full holds another layer).

    front gives (masked, score, *passed), light and full take (masked, *passed): XNNPACK would take nothing that is
    inside a branch of one method. Further methods answer without inputs: threshold (full_threshold ...), a number, and
    facts, JSON. ELU is rewritten. dynamic: lengths up to the recorded one, for which the memory is planned.
    feeds: inputs of the front; with them each part that gains by it computes in int8 (executorch_int8), and how far the
    answers then are from the network's is told and not bounded.

    Raises ExportError without executorch, when it refuses, or when the file differs; then nothing is written.
    """
    if batch == ANY:
        raise ExportError("A .pte plans its memory for a fixed number of samples; give it, as in --batch 1.")
    tools = _tools()
    programs = programs_of(graph, batch, dynamic)
    parts = parts_in(programs)
    constants = {**_thresholds(programs), "facts": json.dumps(facts(graph, batch))}
    with quietly():
        try:
            programs_in = {name: rewritten(part.exported)[0] for name, part in parts.items()}
            reports: tuple[PartReport, ...] = ()
            if feeds:
                from .executorch_int8 import quantized_parts

                programs_in, reports = quantized_parts(programs_in, parts, programs.layer, feeds)
            edge = tools.lower(programs_in, partitioner=[tools.partitioner()], constant_methods=constants)
            notes = tuple(_delegated(name, edge.exported_program(name), tools) for name in parts)
            written = edge.to_executorch().buffer
            methods = _methods(written, parts, tools)
        except Exception as error:
            raise ExportError(f"ExecuTorch cannot hold this network: {one_line(error)}.") from error

    def call(name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        # copies: a method's outputs lie in its own memory, which its next call overwrites
        return [value.clone() for value in methods[name].execute([value.contiguous() for value in inputs])]

    errors = tried(
        "The .pte file",
        trials(graph, batch),
        lambda trial: routed(programs, trial.inputs, call, trial.thresholds),
        exact=not any(report.kept for report in reports),
    )
    path.write_bytes(written)
    if dynamic and any(axes - {0} for axes in free_axes(graph)):
        notes += ("It takes lengths up to the recorded ones, for which its memory is planned.",)
    return Written(errors, notes, reports)


def _tools() -> SimpleNamespace:
    """The names of executorch that are used; it is no hard requirement."""
    try:
        with quietly():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.devtools.backend_debug import get_delegation_info
            from executorch.exir import to_edge_transform_and_lower
            from executorch.runtime import Runtime
    except ImportError as error:
        raise ExportError(
            "The format executorch needs executorch, built for the torch that is installed; install it with "
            f"pip install 'dslify[executorch]' ({one_line(error)})."
        ) from error
    return SimpleNamespace(
        partitioner=XnnpackPartitioner,
        delegation=get_delegation_info,
        lower=to_edge_transform_and_lower,
        runtime=Runtime,
    )


def _thresholds(programs: Programs, prefix: str = "") -> dict[str, float]:
    found = {f"{prefix}threshold": float(programs.layer.threshold)}
    for way, part in (("light", programs.light), ("full", programs.full)):
        if isinstance(part, Programs):
            found |= _thresholds(part, f"{prefix}{way}_")
    return found


def _methods(written: bytes, parts: Mapping[str, Program], tools: SimpleNamespace) -> dict[str, Any]:
    program = tools.runtime.get().load_program(written)
    methods = {name: program.load_method(name) for name in parts}
    methods["program"] = program  # which has to outlive them
    return methods


def _delegated(name: str, program: Any, tools: SimpleNamespace) -> str:
    found = tools.delegation(program.graph_module)
    kinds = [each for each in found.delegation_by_operator.values() if each.op_type != "getitem"]
    taken, left = sum(each.delegated for each in kinds), [each.op_type for each in kinds if each.non_delegated]
    whole = taken + sum(each.non_delegated for each in kinds)
    said = f"{name}: XNNPACK runs {taken} of {whole} operators, pieces: {found.num_delegated_subgraphs}"
    return said + (f"; not {', '.join(sorted(left))}." if left else ".")
