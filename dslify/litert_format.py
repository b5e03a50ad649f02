"""LiteRT: one .tflite with a signature for each part, which the host calls in turn."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from .attempt import quietly
from .errors import ExportError, one_line
from .programs import ANY, Program, free_axes, programs_of
from .spectra import real_spectra
from .undelegated import rewritten
from .written import Written, facts, parts_in, routed, trials, tried

FACTS = "dslify"  # name of the metadata entry
IDENTIFIER = b"TFL3"


def write_litert(graph: fx.GraphModule, path: Path, batch: int = 1, dynamic: bool = True) -> Written:
    """A .tflite with the signatures front, light and full (full_front, full_light ... where full holds another layer).

    front gives masked, score and what else passes, light and full take masked and the same; inputs and outputs have the
    parts' names. Its facts, JSON with the threshold, are the metadata entry FACTS. ELU is rewritten, and Fourier
    transforms become convolutions. All shapes are the recorded ones, whatever `dynamic` says.

    Raises ExportError without litert-torch, when it refuses, or when the file differs; then nothing is written.
    """
    if batch == ANY:
        raise ExportError("A .tflite is converted for a fixed number of samples; give it, as in --batch 1.")
    tools = _tools()
    programs = programs_of(graph, batch, dynamic=False)
    parts = parts_in(programs)
    with quietly(), redirect_stdout(io.StringIO()):
        try:
            converter: Any = tools.torch
            for name, part in parts.items():
                module = rewritten(part.exported)[0].module()
                real_spectra(module)
                converter = converter.signature(name, module, part.args)
            written = _described(converter.convert().model_content(), parts, facts(graph, batch), tools)
            interpreter = tools.interpreter(model_content=written)
            runners = {name: interpreter.get_signature_runner(name) for name in parts}
        except Exception as error:
            raise ExportError(f"LiteRT cannot hold this network: {one_line(error)}.") from error

    def call(name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given = {own: value.numpy() for own, value in zip(parts[name].inputs, inputs, strict=True)}
        found = runners[name](**given)
        return [torch.from_numpy(found[own]) for own in parts[name].outputs]

    errors = tried(
        "The .tflite file",
        trials(graph, batch),
        lambda trial: routed(programs, trial.inputs, call, trial.thresholds),
    )
    path.write_bytes(written)
    notes = (
        ("Its lengths are fixed to the recorded ones.",)
        if dynamic and any(axes - {0} for axes in free_axes(graph))
        else ()
    )
    return Written(errors, notes)


def _tools() -> SimpleNamespace:
    """The packages of LiteRT that are used; they are no hard requirement."""
    try:
        with quietly(), redirect_stdout(io.StringIO()):
            import flatbuffers
            import litert_torch
            from ai_edge_litert import schema_py_generated as schema
            from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ExportError(
            "The format litert needs litert-torch and ai-edge-litert, built for the torch that is installed; install "
            f"them with pip install 'dslify[litert]' ({one_line(error)})."
        ) from error
    return SimpleNamespace(torch=litert_torch, interpreter=Interpreter, schema=schema, flatbuffers=flatbuffers)


def _described(content: bytes, parts: Mapping[str, Program], said: Mapping[str, Any], tools: SimpleNamespace) -> bytes:
    """The model with its facts as metadata, and with the parts' names in place of args_0, output_0 ..."""
    model = tools.schema.ModelT.InitFromPackedBuf(content, 0)
    for signature in model.signatureDefs:
        part = parts[signature.signatureKey.decode()]
        for maps, names in ((signature.inputs, part.inputs), (signature.outputs, part.outputs)):
            for each in maps:
                each.name = names[int(each.name.decode().rpartition("_")[2])]
    buffer, entry = tools.schema.BufferT(), tools.schema.MetadataT()
    buffer.data = list(json.dumps(said).encode())
    entry.name, entry.buffer = FACTS, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or ()), entry]
    builder = tools.flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())
