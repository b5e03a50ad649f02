"""Samples one by one through a model as it is delivered: the route of each, and the bytes between the processors."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ExportError, OptionError, one_line
from .files import written_whole
from .notes import noted
from .parts import parts_of
from .programs import host_graph
from .runtime import Result, Runner, Single, Statistics, wire
from .runtime.single import LIGHT, SCORE
from .samples import Samples, show_progress
from .store import load
from .tables import human, percent, plain_table, shape_words

KINDS = "a .dsl file, an .onnx file of dslify export, or a folder of dslify export --split"
NOTES = ("example", "pixels", "classes")  # what data for a network looks like
METADATA = "dslify.notes"  # of a one-file model: those, as JSON
INPUT_BYTES = 2  # a number, as sound and most sensors give it


class Streams(Protocol):
    """What all kinds of models have."""

    statistics: Statistics

    def stream(self, segments: Iterable[Any]) -> Iterator[Result]:
        """One result for each segment."""


@dataclass(frozen=True)
class Row:
    """One sample. route, score: None where the model does not tell. sent: bytes. answer: the class, "" for none."""

    name: str
    label: str
    source: str
    route: str | None
    score: float | None
    sent: int
    answer: str


@dataclass(frozen=True)
class Routed:
    """What came of all samples. sent: whether the model has a wire. given: bytes of a sample at two a number."""

    rows: tuple[Row, ...]
    statistics: Statistics
    outputs: tuple[tuple[int, ...], ...]
    sent: bool
    given: int

    @property
    def known(self) -> bool:
        """Whether the model tells its routes."""
        return all(row.route is not None for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        told = {"calls": self.statistics.calls} if not self.known else self.statistics.to_json()
        return {**told, "outputs": [list(shape) for shape in self.outputs], "input_bytes": self.given}


class Delivered(nn.Module):
    """A model of any kind, with the notes that open_data() reads from a network.

    kind: "dsl", "onnx" or "split". runner: runs it. number: on the wire.
    """

    def __init__(self, kind: str, runner: Streams, notes: Mapping[str, Any], number: str):
        super().__init__()
        self.kind, self.runner, self.number = kind, runner, number
        self.meta = {"dslify": dict(notes)}


class Eager:
    """A dslified network in PyTorch, called like the runner. What full reads is encoded to count its bytes only."""

    def __init__(self, net: nn.Module, number: str, threshold: float | None = None):
        self._parts, self._number = parts_of(host_graph(net)[1]), number
        self._read = [bool(node.users) for node in self._parts.full.graph.nodes if node.op == "placeholder"]
        if threshold is not None:
            self._parts.layer.threshold.fill_(threshold)
        self.statistics = Statistics()

    def run(self, *arrays: Any) -> Result:
        """One call on any number of samples, which go light only if all of them may."""
        layer = self._parts.layer
        with torch.no_grad():
            masked, score, *passed = self._parts.front(*map(torch.as_tensor, arrays))
            taken = (score < layer.threshold).all().expand_as(score)
            light = bool(taken.all())
            answer = (self._parts.light if light else self._parts.full)(masked, *passed)
        given = zip((masked, *passed), self._read, strict=True)
        crossing = [value.numpy() for value, read in given if read and isinstance(value, Tensor)]
        axes = {layer.inputs[0].axis or 0, layer.channel_axis}
        return Result(
            tuple(value.numpy() for value in answer if isinstance(value, Tensor)),
            "light" if light else "full",
            score.numpy(),
            taken.numpy(),
            0 if light else len(wire.encode(crossing, self._number, [sorted(axes)])),
            wire.dense_bytes(crossing),
            wire.dense_bytes(crossing, 1),
        )

    def stream(self, segments: Iterable[Any]) -> Iterator[Result]:
        """As Runner.stream, without callbacks."""
        self.statistics = Statistics()
        for segment in segments:
            result = self.run(*(segment if isinstance(segment, tuple) else (segment,)))
            self.statistics = self.statistics.after(result)
            yield result


def delivered(path: Path, threshold: float | None = None, threads: int = 1, number: str | None = None) -> Delivered:
    """Open a model of any of KINDS. threshold: of its outermost layer, in place of its own. number: on the wire.

    Raises ExportError or StoreError for what is none, OptionError for a network of several inputs.
    """
    found = _opened(path, threshold, threads, number)
    count = len(found.meta["dslify"].get("example") or ())
    if count != 1:
        raise OptionError(f"{path} takes {count} inputs, and a folder gives one; call it with dslify.runtime.")
    return found


def _opened(path: Path, threshold: float | None, threads: int, number: str | None) -> Delivered:
    if path.is_dir():
        runner = Runner(path, threshold, threads, number=number)
        return Delivered("split", runner, runner.manifest.notes, runner.number)
    if path.suffix == ".dsl":
        net = load(path)
        notes = {name: noted(net, name) for name in NOTES}
        return Delivered("dsl", Eager(net, number or "fp16", threshold), notes, number or "fp16")
    if path.suffix != ".onnx" or not path.is_file():
        raise ExportError(f"There is no model to run at {path}; give {KINDS}.")
    if number is not None:
        raise OptionError(f"{path} is one file, and nothing is sent inside it; leave --wire out.")
    return _one_file(path, threshold, threads)


def _one_file(path: Path, threshold: float | None, threads: int) -> Delivered:
    try:
        import onnx
    except ImportError:
        raise ExportError("Running ONNX needs onnx; install it with pip install 'dslify[onnx]'.") from None
    from .onnx_graph import with_thresholds

    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's errors have no common base
        raise ExportError(f"{path} is no ONNX model ({one_line(error)}); write one with dslify export.") from None
    computed = {name for node in model.graph.node for name in node.output}
    if {SCORE, LIGHT} <= computed:
        make = onnx.helper.make_tensor_value_info
        model.graph.output.append(make(SCORE, onnx.TensorProto.FLOAT, [None]))
        model.graph.output.append(make(LIGHT, onnx.TensorProto.BOOL, []))
    if threshold is not None:
        model = with_thresholds(model, {"threshold": threshold})
    single = Single(model.SerializeToString(), threads)
    told = {entry.key: entry.value for entry in model.metadata_props}
    notes = json.loads(told[METADATA]) if METADATA in told else {"example": _sizes(path, single)}
    return Delivered("onnx", single, notes, "")


def _sizes(path: Path, single: Single) -> list[Any]:
    """Inputs as their model gives them, where it does not tell what it was exported with."""
    for shape in single.shapes:
        if not all(isinstance(size, int) for size in shape[1:]):
            sizes = " x ".join(map(str, shape))
            raise ExportError(f"{path} takes {sizes} and does not say how much that is; export it again with dslify.")
    return [[[1, *shape[1:]], "float32"] for shape in single.shapes]


def routed(model: Delivered, samples: Samples, progress: bool | None = None) -> Routed:
    """Every sample in its order, one by one, as a stream."""
    rows: list[Row] = []
    shapes: tuple[tuple[int, ...], ...] = ()
    with show_progress(progress) as bars:
        bar = bars.add_task("running", total=len(samples))
        stream = model.runner.stream(samples.batch([at]).numpy() for at in range(len(samples)))
        for at, result in enumerate(stream):
            first, *_ = result.outputs
            shapes = tuple(value.shape for value in result.outputs)
            chosen = samples.classes[int(first.argmax())] if first.size == len(samples.classes) > 1 else ""
            score = None if result.score is None else float(result.score[0])
            about = (samples.names[at], samples.labels[at], samples.sources[at])
            rows.append(Row(*about, result.route, score, result.bytes_sent, chosen))
            bars.advance(bar)
    given = INPUT_BYTES * int(np.prod(samples.shape))
    return Routed(tuple(rows), model.runner.statistics, shapes, model.kind != "onnx", given)


def write_rows(found: Routed, path: Path) -> None:
    """As CSV, a line a sample, whole or not at all. Raises ExportError."""
    try:
        with written_whole(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(each.name for each in fields(Row))
            writer.writerows(astuple(row) for row in found.rows)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}.") from None


def shown(found: Routed, number: str) -> list[Any]:
    """Lines and a table for the terminal. number: on the wire."""
    counted = found.statistics
    outputs = ", ".join(shape_words(shape) for shape in found.outputs)
    lines: list[Any] = [f"{len(found.rows)} samples, one at a time; outputs of {outputs}"]
    if not found.known:
        return [*lines, "this file does not show its routes: it was not written by dslify export, or by an older one"]
    light = f"{percent(counted.light_share, 1)} went light ({counted.light} of {counted.calls})"
    lines.append(f"{light}, the full part was woken {counted.wakes} time{'s' * (counted.wakes != 1)}")
    full = counted.calls - counted.light
    if not found.sent or not full:
        return lines
    table = plain_table("from front to full", "per full answer", f"all {counted.calls} samples")
    for name, amount in (
        (f"sent: what is not zero, {number}", counted.bytes_sent),
        ("the same values dense, fp32", counted.bytes_dense),
        ("the same values dense, int8", counted.bytes_int8),
    ):
        table.add_row(name, human(amount / full, "B"), human(amount, "B"))
    table.add_row("without a switch: always, dense, fp32", "", human(counted.bytes_always, "B"))
    lines.append(table)
    if counted.bytes_sent > full * found.given:
        each = human(found.given, "B")
        lines.append(f"note: the input itself takes {each} at {INPUT_BYTES} bytes a number, less than what is sent")
    return lines
