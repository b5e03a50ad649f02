"""A network in the runtimes for small devices: the file is written and read again, and Python calls light or full."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from .engines import Engine
from .errors import ExportError
from .executorch_format import write_executorch
from .litert_format import write_litert
from .parts import parts_of
from .switch import dsl_layers
from .written import Written

NOTE = "Python calls light or full by the score"


def executorch(graph: fx.GraphModule, threads: int, dynamic: bool) -> Engine:
    """The .pte that dslify.export writes."""
    content, written = _file("executorch", graph, lambda path: write_executorch(graph, path, dynamic=dynamic))
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(content)
    methods = {name: program.load_method(name).execute for name in ("front", "light", "full")}

    def whole(inputs: Sequence[Tensor], go_light: bool, _program: Any = program) -> Any:  # which has to outlive them
        masked, score, *passed = methods["front"](inputs)
        taken = score.item() < (math.inf if go_light else -math.inf)
        return methods["light" if taken else "full"]((masked, *passed))

    return Engine(
        "executorch",
        lambda inputs: [value.contiguous() for value in inputs],
        methods["front"],
        lambda crossing: methods["light"]((crossing[0], *crossing[2:])),
        lambda crossing: methods["full"]((crossing[0], *crossing[2:])),
        whole,
        ". ".join((NOTE, *written.notes)),
    )


def litert(graph: fx.GraphModule, threads: int, _dynamic: bool) -> Engine:
    """The .tflite that dslify.export writes."""
    content, written = _file("litert", graph, lambda path: write_litert(graph, path, dynamic=False))
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=threads)
    parts = parts_of(graph)
    front = interpreter.get_signature_runner("front")

    def path(name: str) -> Callable[[Any], Any]:
        runner = interpreter.get_signature_runner(name)
        read = tuple(runner.get_input_details())

        def run(values: Any) -> list[Any]:
            found = runner(**{each: values[each] for each in read})
            return [found[each] for each in parts.outputs]

        return run

    to_light, to_full = path("light"), path("full")

    def whole(inputs: Any, go_light: bool) -> Any:
        values = front(**inputs)
        return (to_light if values["score"].item() < (math.inf if go_light else -math.inf) else to_full)(values)

    return Engine(
        "litert",
        lambda inputs: {name: value.numpy() for name, value in zip(parts.inputs, inputs, strict=True)},
        lambda inputs: front(**inputs),
        to_light,
        to_full,
        whole,
        ". ".join((NOTE, *written.notes)),
    )


def _file(name: str, graph: fx.GraphModule, write: Callable[[Path], Written]) -> tuple[bytes, Written]:
    if len(dsl_layers(graph)) > 1:
        raise ExportError(f"In {name}, networks with one layer are timed; this one holds {len(dsl_layers(graph))}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        written = write(path)
        return path.read_bytes(), written
