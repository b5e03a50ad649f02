"""A network with layers as a file for where it runs: ONNX, a torch.export program, AOTInductor, ExecuTorch, LiteRT."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import fx, nn

from .capture import evaluating
from .checked import TOLERANCE
from .errors import ExportError, OptionError
from .files import written_whole
from .functional import copied
from .notes import recorded_inputs
from .onnx_session import require_onnx
from .programs import ANY, free_axes, host_graph, programs_of
from .samples import show_progress
from .schedule import device_of
from .store import load

if TYPE_CHECKING:
    from .int8_report import PartReport
    from .onnx_format import PartSize

Format = Literal["onnx", "pt2", "aoti", "executorch", "litert"]
SUFFIXES: dict[str, str] = {
    "onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2", "executorch": ".pte", "litert": ".tflite",
}  # fmt: skip
_WRITERS = {  # format -> room, function
    "pt2": ("pt2_format", "write_pt2"),
    "aoti": ("pt2_format", "write_aoti"),
    "executorch": ("executorch_format", "write_executorch"),
    "litert": ("litert_format", "write_litert"),
}


@dataclass(frozen=True)
class Exported:
    """What export() wrote.

    errors: way through the layers -> the worst difference from the network, as a share of an output's largest value.
    notes: sentences for the user. parts: sizes of front, light and full, in ONNX. quantized: a report on each of them.
    """

    files: tuple[Path, ...]
    format: str
    errors: dict[str, float]
    notes: tuple[str, ...] = ()
    parts: tuple[PartSize, ...] = ()
    quantized: tuple[PartReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [str(file) for file in self.files],
            "format": self.format,
            "errors": self.errors,
            "notes": list(self.notes),
            "parts": [part.to_json() for part in self.parts],
            "quantized": [report.to_json() for report in self.quantized],
        }


def export(
    net: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: Format | None = None,
    split: bool = False,
    quantize: str | None = None,
    data: Any = None,
    batch: int | Literal["any"] = 1,
    dynamic: bool = True,
    force: bool = False,
    progress: bool | None = None,
) -> Exported:
    """Write a network from insert(), or the one in a .dsl file, so that only the path that is taken computes.

    Nothing is written before its answers equal the network's on every route, to 1e-4 of an output's largest value.

    path: .onnx, .pt2, .pte or .tflite says the format; with `split` a folder for front.onnx, light.onnx, full.onnx and
    their manifest (dslify.runtime runs it). One ONNX file branches by itself; with several samples in a call it goes
    light only if all of them may. format: where the suffix leaves it open, such as "aoti". quantize: "int8", for ONNX
    and ExecuTorch, for each part where that is good and faster, with ranges from `data` (a folder or Samples; random
    inputs without); how far its answers then are from the network's is told and not bounded. batch: samples in every
    call, or "any". dynamic: keep axes such as the length of sound free, where the capture let them vary. force: replace
    what is there.

    Raises ExportError when the network or the place cannot be written, OptionError for another format, number or word.
    """
    path = Path(path)
    kind = chosen_format(path, format, split)
    if quantize not in (None, "int8"):
        raise OptionError(f"quantize is int8, or left out; got {quantize!r}.")
    if quantize and kind not in ("onnx", "executorch"):
        raise OptionError(f"Only ONNX and ExecuTorch parts are quantized; leave quantize out for {kind}.")
    if data is not None and not quantize:
        raise OptionError("data set the ranges of numbers for quantize='int8'; give both, or neither.")
    samples = _samples(batch)
    _check_place(path, split, force)
    if kind == "onnx":
        require_onnx("Writing ONNX")
    network = net if isinstance(net, nn.Module) else load(net)
    _, graph = host_graph(network)
    if device_of(graph).type != "cpu":
        graph = cast(fx.GraphModule, copied(graph).cpu())
    _check_batch(graph, samples)
    with evaluating(graph):
        if kind == "onnx":
            return _as_onnx(graph, path, split, bool(quantize), data, samples, dynamic, force, progress)
        more: dict[str, Any] = {}
        if quantize:
            from .int8_report import calibration_feeds
            from .parts import parts_of

            feeds = calibration_feeds(graph, parts_of(graph).inputs, data, samples, progress=False)
            more = {"feeds": feeds.feeds}
        return _as_other(graph, path, kind, samples, dynamic, feeds.notes if quantize else (), more)


def chosen_format(path: Path, format: str | None, split: bool) -> str:
    """The format that a path and a word mean together. Raises OptionError."""
    if format is not None and format not in SUFFIXES:
        raise OptionError(f"The format is one of {', '.join(SUFFIXES)}; got {format!r}.")
    if split:
        if format not in (None, "onnx"):
            raise OptionError(f"A split export is ONNX; got {format}. Files for {format} hold front, light and full.")
        return "onnx"
    if format is None:
        found = next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), None)
        if found is None:
            raise OptionError(f"{path}: the name has to end in {', '.join(dict.fromkeys(SUFFIXES.values()))}.")
        return found
    if path.suffix != SUFFIXES[format]:
        raise OptionError(f"{path}: the name of a file for {format} has to end in {SUFFIXES[format]}.")
    return format


def _samples(batch: Any) -> int:
    if batch == "any":
        return ANY
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise OptionError(f"batch is a whole number of at least 1, or any; got {batch!r}.")
    return batch


def _check_place(path: Path, split: bool, force: bool) -> None:
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it first.")
    if path.is_dir() and not split:
        raise ExportError(f"{path} is a folder; give the name of a file, or --split.")
    if path.exists() and not force:
        raise ExportError(f"{path} exists already; give another name, or --force to replace it.")


def _check_batch(graph: fx.GraphModule, samples: int) -> None:
    recorded = [value.shape[0] for value in recorded_inputs(graph) if value.dim()]
    fixed = not any(0 in axes for axes in free_axes(graph))
    if fixed and recorded and samples != recorded[0]:
        asked = "any number" if samples == ANY else str(samples)
        raise ExportError(
            f"The network was captured for {recorded[0]} samples in a call, and cannot be exported for {asked}; "
            f"export it with --batch {recorded[0]}."
        )


def _as_onnx(
    graph: fx.GraphModule,
    path: Path,
    split: bool,
    int8: bool,
    data: Any,
    batch: int,
    dynamic: bool,
    force: bool,
    progress: bool | None,
) -> Exported:
    from .int8_report import calibration_feeds
    from .onnx_format import check, part_size, whole_model, write_onnx
    from .onnx_graph import models_of
    from .quantize import quantized

    reports: tuple[PartReport, ...] = ()
    notes: tuple[str, ...] = ()
    with show_progress(progress) as bars:
        task = bars.add_task("tracing front, light and full", total=3 + int8)
        programs = programs_of(graph, batch, dynamic)
        bars.update(task, advance=1, description="writing them as ONNX")
        models = models_of(programs)
        if int8:
            bars.update(task, advance=1, description="quantizing each")
            feeds = calibration_feeds(graph, programs.inputs, data, batch, progress=False)
            models, reports = quantized(models, feeds.feeds, programs.layer.threshold.item())
            notes = feeds.notes
        bars.update(task, advance=1, description="holding every route against the network")
        parts = tuple(part_size(name, model) for name, model in models.items())
        exact = not any(report.kept for report in reports)
        if split:
            from .split import write_split

            done = write_split(models, programs, graph, path, force=force, tolerance=TOLERANCE if exact else None)
            return Exported(done.files, "onnx", done.errors, notes + done.notes, parts, reports)
        model = whole_model(programs, models, graph, batch)
        written = check(model, programs, graph, batch, dynamic, exact)
        with written_whole(path) as temporary:
            write_onnx(model, temporary)
    return Exported((path,), "onnx", written.errors, notes + written.notes, parts, reports)


def _as_other(
    graph: fx.GraphModule,
    path: Path,
    kind: str,
    batch: int,
    dynamic: bool,
    notes: tuple[str, ...],
    more: dict[str, Any],
) -> Exported:
    room, function = _WRITERS[kind]
    write = getattr(import_module(f".{room}", __package__), function)
    with tempfile.TemporaryDirectory() as folder, written_whole(path) as temporary:
        made = Path(folder, path.name)  # the writers' libraries want the suffix
        written = write(graph, made, batch, dynamic, **more)
        shutil.copyfile(made, temporary)
    return Exported((path,), kind, written.errors, notes + tuple(written.notes), quantized=written.quantized)
