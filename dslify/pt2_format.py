"""One torch.export program with torch.cond inside: as it is (.pt2), or compiled ahead of time by inductor (AOTI)."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .attempt import quietly
from .conditional import INSTEAD, asked, conditional_program
from .errors import ExportError, one_line
from .functional import symbolic
from .programs import ANY
from .switch import DSLayer
from .written import Trial, Written, facts, trials, tried

FACTS = "dslify.json"  # among the extra files of the archive
TRIED_BATCH = 3  # samples, where any number may come


def write_pt2(graph: fx.GraphModule, path: Path, batch: int = 1, dynamic: bool = True) -> Written:
    """A program for torch.export.load; its facts are the extra file FACTS, its thresholds buffers.

    Raises ExportError when torch.export refuses, or when the file differs from the network; then nothing is written.
    """
    program, thresholds = conditional_program(graph, batch, dynamic)
    archive = io.BytesIO()
    with quietly():
        try:
            torch.export.save(program, archive, extra_files={FACTS: json.dumps(facts(graph, batch))})
            archive.seek(0)
            module = torch.export.load(archive).module()
        except Exception as error:
            raise ExportError(f"torch.export cannot store this network: {one_line(error)}. {INSTEAD}") from error

        def forced(values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                module.get_buffer(name).copy_(value)

        errors = _errors("The .pt2 file", graph, batch, thresholds, module, forced)
    path.write_bytes(archive.getvalue())
    return Written(errors, _fixed(program, graph, batch, dynamic) + _together(batch))


def write_aoti(graph: fx.GraphModule, path: Path, batch: int = 1, dynamic: bool = True) -> Written:
    """A package for torch._inductor.aoti_load_package, compiled for this processor; its facts are its metadata.

    A threshold changes with load_constants({"dsl.threshold": ...}, check_full_update=False). Raises ExportError as
    write_pt2() does, and without a C++ compiler.
    """
    program, thresholds = conditional_program(graph, batch, dynamic)
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts(graph, batch).items()}
    # without the second one a threshold would be a number in the code
    options = {"aot_inductor.metadata": said, "always_keep_tensor_constants": True}
    with tempfile.TemporaryDirectory() as folder, quietly():
        compiled = str(Path(folder, "network.pt2"))  # inductor insists on the suffix
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=compiled, inductor_configs=options)
        except Exception as error:
            raise _not_compiled(error) from error
        module = torch._inductor.aoti_load_package(compiled)

        def forced(values: dict[str, Tensor]) -> None:
            module.load_constants(values, check_full_update=False)

        errors = _errors("The compiled package", graph, batch, thresholds, module, forced)
        shutil.copyfile(compiled, path)
    notes = ("It is compiled for this processor and this version of torch.", *_fixed(program, graph, batch, dynamic))
    return Written(errors, notes + _together(batch))


def _not_compiled(error: Exception) -> ExportError:
    if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
        return ExportError(
            "AOTInductor needs a C++ compiler, and none was found; install g++, name one in the variable CXX, or write "
            "the program itself with --to pt2."
        )
    return ExportError(f"AOTInductor cannot compile this network: {one_line(error)}. Try --to pt2, or --to onnx.")


def _fixed(program: torch.export.ExportedProgram, graph: fx.GraphModule, batch: int, dynamic: bool) -> tuple[str, ...]:
    """Axes that the capture let vary and the program does not, such as the length behind an unrolled LSTM."""
    names = program.graph_signature.user_inputs
    shapes = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.name in names}
    return tuple(
        f"Axis {axis} of {name} is fixed to {shapes[name][axis]}."
        for name, axes in zip(names, asked(graph, batch, dynamic), strict=True)
        for axis in sorted(axes)
        if isinstance(symbolic(shapes[name][axis]), int)
    )


def _together(batch: int) -> tuple[str, ...]:
    return ("All samples of a call go light, or none.",) if batch != 1 else ()


def _errors(
    what: str,
    graph: fx.GraphModule,
    batch: int,
    thresholds: dict[str, str],
    module: Callable[..., Any],
    forced: Callable[[dict[str, Tensor]], None],
) -> dict[str, float]:
    """forced: sets thresholds of the program by name."""
    layers = {name: layer for name, layer in graph.named_modules() if isinstance(layer, DSLayer)}

    def answer(trial: Trial) -> list[Tensor]:
        forced({thresholds[name]: torch.tensor(trial.thresholds[layer]) for name, layer in layers.items()})
        args, kwargs = pytree.tree_unflatten(list(trial.inputs), graph._in_spec)
        with torch.no_grad():
            return [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]

    return tried(what, trials(graph, TRIED_BATCH if batch == ANY else batch), answer)
