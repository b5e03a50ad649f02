"""A network as a folder for two processors: front, light and full as ONNX files, and a manifest for dslify.runtime."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import AttributeProto, GraphProto, ModelProto
from torch import fx

from .checked import TOLERANCE, Case, case, error, refuse
from .errors import ExportError, OptionError
from .onnx_format import ALWAYS, NEVER, thresholds_of
from .onnx_graph import with_thresholds
from .programs import Programs, example_of
from .runtime import Runner, manifest, wire
from .split_manifest import WAYS, described
from .split_stream import Streamed, streamed


@dataclass(frozen=True)
class Split:
    """What was written. errors: route -> worst difference from the network over an exact wire, the score's, and that of
    a sound that goes on."""

    files: tuple[Path, ...]
    errors: dict[str, float]
    notes: tuple[str, ...]


def write_split(
    models: Mapping[str, ModelProto],
    programs: Programs,
    graph: fx.GraphModule,
    folder: str | os.PathLike[str],
    number: str = "fp16",
    force: bool = False,
    tolerance: float | None = TOLERANCE,
) -> Split:
    """Write front.onnx, light.onnx, full.onnx and manifest.json, into a temporary folder that is then renamed; for a
    network that is routed by segments (dslify.route_every) stream.onnx too, the front part for a sound that goes on.

    models: from onnx_graph.models_of(programs). graph: the captured graph that these came from. number: how numbers go
    to the full part (wire.NUMBERS). force: replace a folder that this function wrote. tolerance: of the largest value
    of an output; None for models that differ on purpose, quantized ones.
    Raises ExportError when an answer differs or the folder is in the way, OptionError for another number.
    """
    if number not in wire.NUMBERS:
        raise OptionError(f"Numbers on the wire are one of {', '.join(wire.NUMBERS)}; got {number!r}.")
    folder = Path(folder)
    _check_free(folder, force)
    parts = {name: model if name == "front" else _without_unread(model) for name, model in models.items()}
    batch = _batch(parts["front"])
    cases = _cases(graph, batch)
    listening = streamed(programs, graph, parts["front"])
    text = described(parts, programs, graph, cases[0], batch, number, getattr(listening, "stream", None))
    if isinstance(listening, Streamed):
        parts[manifest.STREAM] = listening.model
    errors, rounded = _errors(parts, programs, text, cases)
    if isinstance(listening, Streamed):
        with tempfile.TemporaryDirectory() as temporary:
            _fill(Path(temporary), parts, text)
            errors["stream"] = listening.error(programs, graph, Runner(temporary, number="fp32"))
    for way, off in errors.items():
        if tolerance is not None and not off <= tolerance:
            raise refuse(f"The split export {folder}", way, off)
    with _whole_folder(folder) as temporary:
        names = _fill(temporary, parts, text)
    note = f"sent as {number}, the full path's answers differ by {rounded:.1g} of their largest value"
    notes = (note, listening) if isinstance(listening, str) else (note,)
    return Split(tuple(folder / name for name in names), errors, notes)


def _batch(front: ModelProto) -> int | None:
    """Samples in every call of the front part, None if it takes any."""
    sizes = [entry.type.tensor_type.shape.dim for entry in front.graph.input]
    first = [axes[0] for axes in sizes if axes]
    return first[0].dim_value if first and all(size.HasField("dim_value") for size in first) else None


def _cases(graph: fx.GraphModule, batch: int | None) -> list[Case]:
    sizes = (1, 3) if batch is None else (batch, batch)
    return [case(graph, way, example_of(graph, size, seed)) for seed, size in enumerate(sizes) for way in WAYS]


def _errors(
    parts: Mapping[str, ModelProto], programs: Programs, text: Mapping[str, Any], cases: Sequence[Case]
) -> tuple[dict[str, float], float]:
    """(worst error of each route and of the score, over an exact wire; that of full over the wire it will have)"""
    errors, rounded = dict.fromkeys((*WAYS, "score"), 0.0), 0.0
    for way in WAYS:
        with tempfile.TemporaryDirectory() as temporary:
            _fill(Path(temporary), {name: _forced(name, model, programs, way) for name, model in parts.items()}, text)
            exact, real = Runner(temporary, number="fp32"), Runner(temporary)
            for each in (each for each in cases if each.route == way):
                found = exact.run(*each.inputs, route=way)
                errors[way] = max(errors[way], error(found.outputs, each.outputs))
                with torch.no_grad():
                    score = programs.front.module(*map(torch.from_numpy, each.inputs))[1].numpy()
                errors["score"] = max(errors["score"], error((np.asarray(found.score),), (score,)))
                if way == "full":
                    rounded = max(rounded, error(real.run(*each.inputs, route=way).outputs, each.outputs))
    return errors, rounded


def _forced(name: str, model: ModelProto, programs: Programs, way: str) -> ModelProto:
    """A part in which further layers send everything one way."""
    names = (each for found in thresholds_of(programs).values() for each in found)
    inside = [each for each in names if each.endswith(f"{name}.threshold")]
    return with_thresholds(model, dict.fromkeys(inside, NEVER if way == "full" else ALWAYS)) if inside else model


def _without_unread(model: ModelProto) -> ModelProto:
    """Without the inputs that nothing in it reads: what is not read need not be sent."""
    read = _read(model.graph)
    copy = ModelProto()
    copy.CopyFrom(model)
    kept = [entry for entry in model.graph.input if entry.name in read]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    return copy


def _read(graph: GraphProto) -> set[str]:
    """Names that the nodes and outputs of a graph read, those inside branches too."""
    inner = [each.g for node in graph.node for each in node.attribute if each.type == AttributeProto.GRAPH]
    read = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    return read.union(*map(_read, inner))


def _fill(folder: Path, parts: Mapping[str, ModelProto], text: Mapping[str, Any]) -> list[str]:
    """Write the files of the parts and the manifest, which tells their hashes. Returns the names."""
    files = {}
    for part, entry in text["files"].items():
        file = folder / entry["file"]
        try:
            file.write_bytes(parts[part].SerializeToString())
        except ValueError as refusal:  # protobuf holds 2 GiB
            raise ExportError(f"The {part} part is too large for one ONNX file ({refusal}).") from None
        files[part] = {**entry, "sha256": manifest.digest(file), "bytes": file.stat().st_size}
    (folder / manifest.NAME).write_text(json.dumps({**text, "files": files}, indent=1) + "\n", encoding="utf-8")
    return [*(entry["file"] for entry in files.values()), manifest.NAME]


def _check_free(folder: Path, force: bool) -> None:
    """Raises ExportError if the folder cannot be written, or would cost the user something."""
    if not folder.parent.is_dir():
        raise ExportError(f"{folder}: there is no folder {folder.parent}; make it first.")
    if folder.exists() and not force:
        raise ExportError(f"{folder} exists; give --force to replace it, or another name.")
    if folder.exists():
        ours = {manifest.NAME, *(f"{part}.onnx" for part in (*manifest.PARTS, manifest.STREAM))}
        if not folder.is_dir() or not {each.name for each in folder.iterdir()} <= ours:
            raise ExportError(f"{folder} is no folder of parts alone, so it is not replaced; give another name.")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside it, which takes its place when the block ends without an error."""
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("tmp", "old"))
    for left in (temporary, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
