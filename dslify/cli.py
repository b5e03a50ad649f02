"""The commands: each reads its words, calls a room, prints what came out and what to run next.

Nothing here imports torch before a command runs, so that `dslify --help` stays fast.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, deploying, learning
from . import options as o
from .console import (
    Door,
    Output,
    dslified,
    network_and_inputs,
    show_cuts,
    show_layer,
    size_of,
)
from .errors import OptionError, StoreError
from .options import (
    beside,
    drawable,
    number,
    share,
    whole,
)

app = typer.Typer(
    cls=Door,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(invoke_without_command=True, epilog="Start with: dslify demo")
def top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    """Retrofit a Dynamic Switch Layer into a trained PyTorch network: easy inputs take a light path, hard ones the full
    one.

    The usual order is inspect, insert, finetune, calibrate, evaluate; each command says what to run next.
    """
    if version:
        print(f"dslify {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    short_help="where a network can be cut, and what that saves",
    epilog="Example: dslify inspect model.pt --input 1x1x16000",
)
def inspect(
    model: o.Model,
    input: o.Input = None,
    scope: o.Scope = None,
    width: o.Width = None,
    projection: o.Projection = True,
    levels: o.Levels = None,
    picture: o.Picture = None,
    force: o.Force = False,
    trust: o.Trust = None,
    code: o.Code = None,
    arch: o.Arch = None,
    explain: o.Explain = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show where a network can be cut, what lies before and behind each cut, and what a light path would cost there.

    Of a .dsl file: what is in it, with --explain in full.
    """
    depth = None if levels is None else whole("levels", levels, least=1)
    kept = share("width", width or "0.1")
    file = None if picture is None else drawable(picture, force)
    with Output(as_json, quiet) as out:
        if Path(model).suffix == ".dsl":
            if levels or width or picture:
                raise OptionError(f"--levels, --width and --picture are for networks, and {model} is cut already.")
            show_layer(out, Path(model), dslified(Path(model)), explain)
            return
        if explain:
            raise OptionError(f"--explain tells what insert did; {model} is no .dsl file.")
        with out.working(f"looking for cut points in {model}"):
            from .capture import capture, scope_inputs
            from .survey import Survey

            network, example = network_and_inputs(model, input, trust, code, arch)
            inner, args, kwargs = scope_inputs(network, scope, example.args, example.kwargs)
            found = Survey(capture(inner, args, kwargs), kept, projection, f"{scope}." if scope else "")
        count = sum(parameter.numel() for parameter in network.parameters())
        kind = type(network).__name__
        out.document = {"model": model, "class": kind, "parameters": count, "input": example.words}
        best = show_cuts(out, found, model, depth, file)
        if best:
            words = ["insert", model, "--at", best, "--width", width or "0.1"]
            out.next(*words, *(("--scope", scope) if scope else ()), *(("--input", input) if input else ()))


@app.command(
    short_help="put a Dynamic Switch Layer into a network",
    epilog="Example: dslify insert model.pt --at encoder.block3 --width 0.1",
)
def insert(
    model: o.Model,
    at: o.At,
    light: o.Light = None,
    mode: o.Mode = "dsl",
    init: o.Init = "inherited",
    width: o.Width = None,
    cost: o.CostShare = None,
    depth: o.Depth = "1",
    latency: o.LatencyShare = None,
    runtime: o.LatencyRuntime = None,
    route_every: o.RouteEvery = None,
    scope: o.Scope = None,
    to: o.To = None,
    input: o.Input = None,
    mask: o.MaskKind = "channel",
    projection: o.Projection = True,
    seed: o.Seed = "0",
    output: o.NewFile = None,
    force: o.Force = False,
    trust: o.Trust = None,
    code: o.Code = None,
    arch: o.Arch = None,
    explain: o.Explain = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Cut a network, put a Dynamic Switch Layer there and write it as a .dsl file. The given file stays as it is."""
    if width is not None and cost is not None:
        raise OptionError(f"width and cost exclude each other; got width {width} and cost {cost}: give one of them.")
    if at == "auto" and to is not None:
        raise OptionError("--at auto weighs all that follows a cut; with --to, name the cut as well.")
    options: dict[str, Any] = {
        "width": None if width is None else share("width", width),
        "cost": None if cost is None else number("cost", cost, "above 0 and below 1", above=0, below=1),
        "depth": share("depth", depth),
        "latency": None if latency is None else number("latency", latency, "above 0 and below 1", above=0, below=1),
        "runtime": runtime,
        "route_every": None if route_every is None else whole("route-every", route_every, least=1),
        "seed": whole("seed", seed),
    }
    with Output(as_json, quiet) as out:
        target = output or beside(model)
        if target.exists() and not force:
            raise StoreError(f"{target} exists already; give another name with -o, or --force to overwrite it.")
        words = f"cutting {model}, deriving the light path and checking it"
        with out.working(words) if latency is None else nullcontext():  # the search shows its own progress
            from . import insert as surgery
            from . import save

            network, example = network_and_inputs(model, input, trust, code, arch)
            inputs: dict[str, Any] = {"example_inputs": example.args, "example_kwargs": example.kwargs}
            parts: dict[str, Any] = {"mask": mask, "light": light, "mode": mode, "init": init, "projection": projection}
            net = surgery(network, at, scope=scope, to=to, progress=out.progress, **parts, **inputs, **options)
        written = save(net, target, force=force)
        out.show(f"{model}: {type(network).__name__}, {example.words}")
        show_layer(out, written, net, explain)
        out.document = {**out.document, "model": model, "input": example.words}
        out.show("", f"wrote {written} ({size_of(written)})")
        labels = ("--positive", "LABELS") if mode == "gc" else ()
        out.next("finetune", str(written), "--data", "FOLDER", *labels)


app.command(
    short_help="train light path and switch",
    epilog="Example: dslify finetune model.dsl --data sound/train --switch-data sound/valid",
)(learning.finetune)
app.command(
    short_help="set the threshold",
    epilog="Example: dslify calibrate model.dsl --data sound/calibration --max-difference 0.05 --guarantee mean",
)(learning.calibrate)
app.command(
    short_help="hold the routing against its rivals",
    epilog="Example: dslify evaluate model.dsl --data sound/test --by label",
)(learning.evaluate)
app.command(
    short_help="write it for where it runs: ONNX, torch.export, ExecuTorch, LiteRT",
    epilog="Example: dslify export model.dsl --to onnx -o model.onnx",
)(deploying.export)
app.command(
    short_help="run samples through an exported model: routes, and bytes between the processors",
    epilog="Example: dslify run model.onnx --data sound/test --output routes.csv",
)(deploying.run)
app.command(
    short_help="time parts, routes and a mixed stream",
    epilog="Example: dslify measure model.dsl --share 0.8 --threads 1",
)(deploying.measure)
app.command(
    short_help="remove the channels that the mask has set to zero",
    epilog="Example: dslify compact model.dsl -o small.dsl",
)(deploying.compact)


@app.command(short_help="all of it on a codec that comes with dslify", epilog="Example: dslify demo --output demo-out")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="where its files go; those of an earlier demo go")
    ] = Path("demo-out"),
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Do it all on a trained audio codec and sound that come with dslify: cut, fine-tune, calibrate, evaluate, save."""
    with Output(as_json, quiet) as out:
        from .demo import run

        out.document = run(output, out).to_json()


def main() -> None:
    """The console script."""
    app(prog_name="dslify")
