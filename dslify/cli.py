"""The commands: each reads its words, calls a room, prints what came out and what to run next.

Nothing here imports torch before a command runs, so that `dslify --help` stays fast.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .console import Door, Output, number, size_of, whole
from .errors import OptionError, StoreError

if TYPE_CHECKING:
    from torch import nn

    from .data import Samples
    from .plan import Plan

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="model.pt, model.pt2, timm:resnet18, torchvision:..., pkg.mod:factory")
]
File = Annotated[Path, typer.Argument(metavar="FILE.dsl", help="what dslify insert wrote")]
Data = Annotated[str, typer.Option("--data", metavar="FOLDER", help="folder of audio, array file, or pkg.mod:factory")]
Input = Annotated[
    str | None, typer.Option("--input", metavar="SHAPE", help="example inputs: 1x1x16000, or 1x3x224x224,1x10:int64")
]
Scope = Annotated[str | None, typer.Option("--scope", metavar="MODULE", help="capture this submodule only")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust", metavar="MODULE", help="module whose classes a pickle may use; repeatable")
]
Code = Annotated[
    list[str] | None, typer.Option("--code", metavar="FILE.py", help="your file with the model's classes; repeatable")
]
Arch = Annotated[str | None, typer.Option("--arch", metavar="NAME", help="the network that weights alone belong to")]
Rate = Annotated[str | None, typer.Option("--rate", metavar="HZ", help="sampling rate of the network (16000)")]
BatchSize = Annotated[str, typer.Option("--batch-size", metavar="N", help="samples at once")]
Seed = Annotated[str, typer.Option("--seed", metavar="N", help="of everything random")]
Write = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.dsl", help="write here, not to FILE.dsl")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors")]

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


@app.command(epilog="Example: dslify inspect model.pt --input 1x1x16000")
def inspect(
    model: Model,
    input: Input = None,
    scope: Scope = None,
    depth: Annotated[str | None, typer.Option("--depth", metavar="N", help="leave out deeper modules")] = None,
    trust: Trust = None,
    code: Code = None,
    arch: Arch = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where a network can be cut and what lies before and behind each cut. Of a .dsl file: what is in it."""
    levels = None if depth is None else whole("depth", depth, least=1)
    with Output(as_json, quiet) as out:
        from . import report

        if Path(model).suffix == ".dsl":
            _show_layer(out, Path(model), _load(Path(model)))
            return
        from .cut import cut_points
        from .load import example_inputs_for, load_model

        network = load_model(model, trust=trust or (), code=code or (), arch=arch)
        example, assumed = example_inputs_for(network, input)
        points = cut_points(network, example, scope=scope)
        out.document = {
            "model": model,
            "class": type(network).__name__,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "input": assumed,
            "cut_points": [asdict(point) for point in points],
        }
        head = f"{model}: {type(network).__name__}, {report.human(out.document['parameters'])} parameters"
        out.show(head, f"input: {assumed}", report.cut_tree(points, levels))
        usable = [point.path for point in points if not point.reason]
        if usable:
            words = ["dslify insert", model, "--at", usable[len(usable) // 2], "--width 0.1"]
            out.next(*words, *(("--scope", scope) if scope else ()), *(("--input", input) if input else ()))


@app.command(epilog="Example: dslify insert model.pt --at encoder.block3 --width 0.1")
def insert(
    model: Model,
    at: Annotated[str, typer.Option("--at", metavar="MODULE", help="cut behind this module")],
    width: Annotated[
        str | None, typer.Option("--width", metavar="SHARE", help="of the channels that the light path keeps (0.1)")
    ] = None,
    cost: Annotated[
        str | None, typer.Option("--cost", metavar="SHARE", help="of the MACs behind the cut, instead of a width")
    ] = None,
    scope: Scope = None,
    to: Annotated[str | None, typer.Option("--to", metavar="MODULE", help="last module of the light path")] = None,
    input: Input = None,
    mask: Annotated[str, typer.Option("--mask", metavar="KIND", help="channel or element")] = "channel",
    projection: Annotated[bool, typer.Option(help="narrow the trunk too, with learned 1x1 projections")] = True,
    seed: Seed = "0",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.dsl", help="write here, not beside the model")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file if it is there")] = False,
    trust: Trust = None,
    code: Code = None,
    arch: Arch = None,
    explain: Annotated[bool, typer.Option("--explain", help="show every tensor of the light path, and why")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut a network, put a Dynamic Switch Layer there and write it as a .dsl file. The given file stays as it is."""
    if width is not None and cost is not None:
        raise OptionError(f"width and cost exclude each other; got width {width} and cost {cost}: give one of them.")
    share = number("width", width or "0.1", "above 0 and at most 1", above=0, most=1)
    costs = None if cost is None else number("cost", cost, "above 0 and below 1", above=0, below=1)
    first = whole("seed", seed)
    with Output(as_json, quiet) as out:
        target = output or _beside(model)
        if target.exists() and not force:
            raise StoreError(f"{target} exists already; give another name with -o, or --force to overwrite it.")
        from . import insert as surgery
        from . import save
        from .load import example_inputs_for, load_model

        network = load_model(model, trust=trust or (), code=code or (), arch=arch)
        example, assumed = example_inputs_for(network, input)
        net = surgery(
            network,
            at,
            share,
            example,
            scope=scope,
            to=to,
            mask=mask,
            projection=projection,
            cost=costs,
            seed=first,
        )
        written = save(net, target, force=force)
        out.show(f"{model}: {type(network).__name__}, input {assumed}")
        _show_layer(out, written, net, explain)
        out.document = {**out.document, "model": model, "input": assumed}
        out.show("", f"wrote {written} ({size_of(written)})")
        out.next("dslify finetune", str(written), "--data FOLDER")


@app.command(epilog="Example: dslify finetune model.dsl --data sound/train --switch-data sound/valid")
def finetune(
    file: File,
    data: Data,
    switch_data: Annotated[
        str | None, typer.Option("--switch-data", metavar="FOLDER", help="for the switch (a quarter of --data)")
    ] = None,
    steps: Annotated[str, typer.Option("--steps", metavar="N", help="of the light path")] = "800",
    switch_steps: Annotated[str, typer.Option("--switch-steps", metavar="N", help="of the switch")] = "400",
    batch_size: BatchSize = "16",
    lr: Annotated[str, typer.Option("--lr", metavar="RATE", help="peak learning rate")] = "0.003",
    alpha: Annotated[str, typer.Option("--alpha", metavar="WEIGHT", help="of switch and light loss")] = "1",
    beta: Annotated[str, typer.Option("--beta", metavar="WEIGHT", help="of the mask's L1; 0 leaves the mask")] = "0",
    rate: Rate = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="FOLDER", help="for checkpoints and logs (FILE.run)")
    ] = None,
    seed: Seed = "0",
    threads: Annotated[str | None, typer.Option("--threads", metavar="N", help="of torch on the CPU")] = None,
    output: Write = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the light path to answer like the full one, and the switch to predict how far off it is."""
    options: dict[str, Any] = {
        "steps": whole("steps", steps),
        "switch_steps": whole("switch-steps", switch_steps),
        "batch_size": whole("batch-size", batch_size, least=1),
        "lr": number("lr", lr, "above 0", above=0),
        "alpha": number("alpha", alpha, "above 0", above=0),
        "beta": number("beta", beta, "0 or above", least=0),
        "seed": whole("seed", seed),
        "threads": None if threads is None else whole("threads", threads, least=1),
    }
    hertz = _hertz(rate)
    with Output(as_json, quiet) as out:
        net = _load(file)
        from . import finetune as train
        from . import report, save

        folder = run_dir or _run_folder(file, resume)
        samples = _read(net, data, hertz, out)
        others = None if switch_data is None else _read(net, switch_data, hertz, out)
        again = f"interrupted; go on with the same command and --resume --run-dir {folder}"
        with out.interrupted(again, lambda: (folder / "config.json").exists()):
            history = train(
                net, samples, switch_data=others, run_dir=folder, resume=resume, progress=out.progress, **options
            )
        written = save(net, output or file, force=True)
        out.document = {"file": str(written), "run_dir": str(folder), **history.to_json()}
        out.show(report.training(history), "", f"wrote {written} ({size_of(written)}) and {folder}/ (logs, checkpoints)")
        out.next("dslify calibrate", str(written), "--data OTHER_FOLDER --light-share 0.5")


@app.command(epilog="Example: dslify calibrate model.dsl --data sound/calibration --max-difference 0.05")
def calibrate(
    file: File,
    data: Data,
    light_share: Annotated[
        str | None, typer.Option("--light-share", metavar="SHARE", help="of the samples that shall go light")
    ] = None,
    max_difference: Annotated[
        str | None, typer.Option("--max-difference", metavar="D", help="bound on the mean relative difference")
    ] = None,
    rate: Rate = None,
    batch_size: BatchSize = "32",
    output: Write = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set the threshold, on data that neither training nor the final test uses."""
    if (light_share is None) == (max_difference is None):
        given = "neither" if light_share is None else "both"
        raise OptionError(f"calibrate takes either --light-share or --max-difference; got {given}.")
    share = None if light_share is None else number("light-share", light_share, "0 to 1", least=0, most=1)
    bound = None if max_difference is None else number("max-difference", max_difference, "above 0", above=0)
    batch, hertz = whole("batch-size", batch_size, least=1), _hertz(rate)
    with Output(as_json, quiet) as out:
        net = _load(file)
        from . import calibrate as set_threshold
        from . import report, save

        samples = _read(net, data, hertz, out)
        result = set_threshold(net, samples, share, bound, batch_size=batch, progress=out.progress)
        written = save(net, output or file, force=True)
        out.document = {"file": str(written), **result.to_json()}
        out.show(report.calibration(result), "", f"wrote {written} ({size_of(written)})")
        out.next("dslify evaluate", str(written), "--data TEST_FOLDER")


@app.command(epilog="Example: dslify evaluate model.dsl --data sound/test --by label")
def evaluate(
    file: File,
    data: Data,
    by: Annotated[str, typer.Option("--by", metavar="WORD", help="rows: label, source or all")] = "label",
    rate: Rate = None,
    batch_size: BatchSize = "32",
    seed: Seed = "0",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold the routing against full, light, random, an oracle and plain loudness on test data."""
    if by not in ("label", "source", "all"):
        raise OptionError(f"by is one of label, source, all; got {by!r}.")
    batch, first, hertz = whole("batch-size", batch_size, least=1), whole("seed", seed), _hertz(rate)
    with Output(as_json, quiet) as out:
        net = _load(file)
        from . import evaluate as judge
        from . import report

        samples = _grouped(_read(net, data, hertz, out), by)
        result = judge(net, samples, batch_size=batch, seed=first, progress=out.progress)
        out.document = {"file": str(file), **result.to_json()}
        out.show(report.evaluation(result))


@app.command(epilog="Example: dslify demo --output demo-out")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="where its files go; those of an earlier demo go")
    ] = Path("demo-out"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do it all on a trained audio codec and sound that come with dslify: cut, fine-tune, calibrate, evaluate, save."""
    with Output(as_json, quiet) as out:
        from .demo import run

        out.document = run(output, out).to_json()


def main() -> None:
    """The console script."""
    app(prog_name="dslify")


def _beside(model: str) -> Path:
    """Where the dslified form of a model goes: beside its file, or for a name into the working folder."""
    path = Path(model)
    if path.exists() or path.suffix or ":" not in model:
        return path.with_suffix(".dsl")
    return Path(model.partition("?")[0].replace(":", ".").rpartition(".")[2] + ".dsl")


def _load(file: Path) -> nn.Module:
    from . import load

    return load(file)


def _hertz(rate: str | None) -> int | None:
    return None if rate is None else whole("rate", rate, least=1)


def _read(net: nn.Module, source: str, rate: int | None, out: Output) -> Samples:
    """The data as the network takes it; what was skipped is said."""
    from . import open_data, report
    from .data import expected_shape

    samples = open_data(source, expected_shape(net), rate=rate, progress=out.progress)
    out.show(report.data(samples.report))
    return samples


def _grouped(samples: Samples, by: str) -> Samples:
    """Labels for the rows of a table."""
    from dataclasses import replace

    if by == "label":
        return samples
    return replace(samples, labels=samples.sources if by == "source" else ("",) * len(samples))


def _run_folder(file: Path, resume: bool) -> Path:
    """FILE.run, FILE.run2 ...: the last one that is there to resume, or the first that is free."""
    names = [file.with_suffix(".run")]
    while names[-1].exists():
        names.append(file.with_suffix(f".run{len(names) + 1}"))
    return names[max(0, len(names) - 2)] if resume else names[-1]


def _show_layer(out: Output, file: Path, net: nn.Module, explain: bool = False) -> None:
    """What was cut and where, with costs."""
    from . import report
    from .cost import cost
    from .switch import dsl_layers

    layer = dsl_layers(net)[0]
    rows = cost(net)
    out.document = {
        "file": str(file),
        "threshold": layer.threshold.item(),
        "plan": layer.plan.to_json(),
        "cost": [row.to_json() for row in rows],
    }
    out.show(report.surgery(rows, layer.plan))
    if explain:
        out.show(*_explained(layer.plan))


def _explained(plan: Plan) -> list[str]:
    """One line a tensor of the light path: its shape before and after, and why an axis stayed."""
    lines = []
    for tensor in plan.tensors:
        sizes = ["x".join(map(str, shape)) or "scalar" for shape in (tensor.before, tensor.after)]
        why = "; ".join(dict.fromkeys(reason for reason in tensor.why if reason))
        lines.append(f"{tensor.name}: {' -> '.join(dict.fromkeys(sizes))}" + (f" ({why})" if why else ""))
    return lines
