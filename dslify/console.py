"""What all commands share: numbers out of words, a result as text or as one JSON document, an error as one sentence."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typer import Exit, TyperException
from typer.core import TyperGroup

from .errors import CutError, DslifyError, OptionError
from .options import whole

if TYPE_CHECKING:
    from torch import nn

    from .example_inputs import Example
    from .samples import DataReport, Samples
    from .survey import Survey

SKIPPED_SHOWN = 10
USER_ERROR, INTERRUPTED = 2, 130  # exit codes; the second is the shell's for Ctrl-C
COLUMNS = 100  # of a table that goes to a file or a pipe


class Door(TyperGroup):
    """The group of commands. What a user can cause leaves here as one line on stderr and an exit code of 2, Ctrl-C as
    one line and 130; everything else is a fault of dslify and keeps its traceback.
    """

    def main(self, args: Any = None, prog_name: Any = None, *rest: Any, **extra: Any) -> Any:
        """As in typer, but errors are told in our words. Ends the process: `standalone_mode` has no effect."""
        try:
            code = super().main(args, prog_name, *rest[:1], **{**extra, "standalone_mode": False})
        except DslifyError as error:
            code = _fail(str(error))
        except TyperException as error:
            code = _fail(_usage(error))
        except OSError as error:
            if error.filename is None:
                raise
            code = _fail(f"{error.filename}: {error.strerror}; dslify cannot go on without it.")
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        """As in typer; Ctrl-C is told here, because the parser would drop what it says."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            print(f"interrupted; {stop or 'no file was changed'}", file=sys.stderr)
            raise Exit(INTERRUPTED) from None


class Output:
    """Where a command's result goes: text, or with `as_json` one JSON document on stdout, or with `quiet` nothing.

    Used as a context: with `as_json` whatever the work inside prints goes to stderr, and the document is printed at the
    end if the work succeeded.
    """

    def __init__(self, as_json: bool, quiet: bool):
        self.as_json, self.quiet = as_json, quiet
        self.document: dict[str, Any] = {}
        self.read: list[dict[str, Any]] = []  # reports on the data, added to the document as "read"
        self._stdout = sys.stdout

    @property
    def progress(self) -> bool | None:
        """What the rooms take as `progress`: None (a bar if stderr is a terminal), or False."""
        return False if self.quiet or self.as_json else None

    def __enter__(self) -> Output:
        self._stdout = sys.stdout
        if self.as_json:
            sys.stdout = sys.stderr
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        sys.stdout = self._stdout
        if kind is None and self.as_json:
            document = {**self.document, "read": self.read} if self.read else self.document
            print(json.dumps(document, indent=2, allow_nan=False))

    def show(self, *parts: Any) -> None:
        """Print rich renderables, and lines of text unchanged and unbroken."""
        if self.as_json or self.quiet:
            return
        from rich.console import Console  # late: `dslify --help` has no use for it

        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(file=sys.stdout, width=None if known else COLUMNS)
        for part in parts:
            if isinstance(part, str):
                print(part, flush=True)
            else:
                console.print(part)

    def working(self, words: str) -> AbstractContextManager[Any]:
        """A sign of life on stderr while the block runs, if that is a terminal."""
        if self.as_json or self.quiet or not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console

        return Console(stderr=True).status(words)

    def next(self, *words: str) -> None:
        """The command to run next."""
        self.show(f"next: dslify {shlex.join(words)}")


def network_and_inputs(
    model: str, spec: str | None, trust: list[str] | None, code: list[str] | None, arch: str | None
) -> tuple[nn.Module, Example]:
    """The network that MODEL means, and inputs for it."""
    from .example_inputs import example_for
    from .load import load_model

    dsl = Path(model).suffix == ".dsl"  # gets another layer
    network = dslified(Path(model)) if dsl else load_model(model, trust=trust or (), code=code or (), arch=arch)
    return network, example_for(network, spec)


def dslified(file: Path, into: nn.Module | None = None) -> nn.Module:
    """The network of a .dsl file; where that holds a scope of `into`, the whole of it."""
    from . import load
    from .notes import noted

    net = load(file)
    return net if into is None or noted(net, "scope") is None else load(file, into=into)


def read_data(
    net: nn.Module,
    source: str,
    rate: int | None,
    segment: float | None,
    out: Output,
    labels: Path | None = None,
    workers: str = "0",
) -> Samples:
    """The data as the network takes it, in pieces of `segment` seconds or as inserted; what was skipped is said.

    labels: a CSV table. workers: as written on the command line. The report also goes to `out.read`.
    """
    count = whole("workers", workers)
    import torch

    from . import open_data
    from .data import DEFAULT_RATE
    from .samples import expected_classes, expected_shape, shaped
    from .segmented import segments_in

    shape = expected_shape(net)
    if segment is not None and shape:
        if len(shape) > 2:
            raise OptionError(
                f"--segment is for sound, and the network reads {shaped(shape)} per sample; leave it out."
            )
        shape = (*shape[:-1], max(1, round(segment * (rate or DEFAULT_RATE))))
    if shape and Path(source).is_dir():  # what will be cut to this shape; told before anything is read
        segments_in(net, torch.zeros(1, *shape), rate or DEFAULT_RATE)
    known: dict[str, Any] = {"labels": labels, "classes": expected_classes(net), "workers": count}
    samples = open_data(source, net if segment is None else shape, rate=rate, progress=out.progress, **known)
    out.read.append(samples.report.to_json())
    out.show(*_data_lines(samples.report))
    return samples


def show_layer(out: Output, file: Path, net: nn.Module, explain: bool = False) -> None:
    """What was cut and where, with costs."""
    from . import report
    from .calibrate import recorded
    from .cost import cost, planned
    from .explained import explanation
    from .sparsity import mask_words
    from .switch import dsl_layers

    layers, rows = dsl_layers(net), cost(net)
    several = len(layers) > 1
    documents = [
        {
            "threshold": layer.threshold.item(),
            "plan": layer.plan.to_json(),
            "segments": layer.segments.to_json() if layer.segments is not None else None,
            "mask": mask_words(layer),
        }
        for layer in layers
    ]
    out.document = {"file": str(file), **documents[0], "cost": [row.to_json() for row in rows]}
    if several:
        out.document["layers"] = documents
        out.show(f"{len(layers)} Dynamic Switch Layers, the outermost first", report.surgery(rows))
        out.show("a full path is counted without the layers inside it")
    for layer in layers:
        out.show(*[""] * several, report.surgery(planned(layer.plan) if several else rows, layer.plan))
        if layer.plan.latency is not None:
            out.show("", report.latency_fit(layer.plan.latency))
        out.show(f"mask: {mask_words(layer)}")
        if layer.segments is not None:
            out.show(f"routes {layer.segments.words}")
        if explain:
            out.show(explanation(layer.plan))
    if kept := recorded(net):
        out.document["calibration"] = kept
        for one in [kept] if kept.get("max_lost") is not None else kept["layers"] or [kept]:
            promise = [f"promise: {one['promise']}"] if one["promise"] else []
            out.show(f"threshold {report.figure(one['threshold'])} set by {one['how']}", *promise)


def show_cuts(out: Output, found: Survey, name: str, levels: int | None, picture: Path | None) -> str:
    """The tree of cut points, the cut that auto takes ("" for none, also returned), and the picture if one is wanted.

    out.document: what is known of the network, with "class", "parameters" and "input".
    """
    from dataclasses import asdict

    from rich.text import Text

    from . import report
    from .cut_tree import CutTree, shown_paths

    try:
        chosen, why = found.auto()
        best = chosen.path
    except CutError as error:
        best, why = "", str(error)
    shown = shown_paths(found.points, levels, best)
    points = found.priced(None if out.as_json or picture else shown, out.progress)
    known = out.document
    out.document = {
        **known,
        "width": found.width,
        "auto": {"at": best or None, "why": why},
        "cut_points": [asdict(point) for point in points],
    }
    macs = max((point.base_macs + point.region_macs for point in points), default=0)
    size = f"{report.human(known['parameters'])} parameters, {report.human(macs)} MACs"
    head = f"{name}: {known['class']}, {size}"
    out.show(head, known["input"], CutTree(points, shown, best, found.width))
    out.show(Text(f"* {'--at auto: ' * bool(best)}{why}", overflow="fold"))
    if picture is not None:
        from .picture import draw, write_picture

        write_picture(draw(points, head, found.width, best), picture, points)
        out.document["picture"] = str(picture)
        out.show(f"wrote {picture} ({size_of(picture)})")
    return best


def size_of(path: Path) -> str:
    """ "275 kB", of a file."""
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"


def _data_lines(found: DataReport) -> list[str]:
    """What was read from where, each file that was skipped with its reason, and remarks."""
    sound = f", {found.seconds:.0f} s" if found.seconds else ""
    lines = [f"{found.origin}: {found.samples} samples from {found.read} file{'s' * (found.read != 1)}{sound}"]
    if found.skipped:
        lines.append(f"  skipped {len(found.skipped)}:")
        lines += [f"    {name}: {reason}" for name, reason in found.skipped[:SKIPPED_SHOWN]]
    if len(found.skipped) > SKIPPED_SHOWN:
        lines.append(f"    and {len(found.skipped) - SKIPPED_SHOWN} more (all of them with --json)")
    return [*lines, *(f"  note: {note}" for note in found.notes)]


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return USER_ERROR


def _usage(error: TyperException) -> str:
    """The parser's complaint as one sentence that ends in the way out."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dslify"
    said = " ".join(error.format_message().split()).rstrip(".")
    said = said[:1].lower() + said[1:]
    return f"{said} See {command} --help." if said.endswith("?") else f"{said}; see {command} --help."
