"""What the commands take: the options that several of them share, and words turned into numbers and names of files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from .errors import OptionError

PICTURES = (".svg", ".png", ".html")  # what --picture writes, by suffix

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="model.pt, model.pt2, timm:resnet18, torchvision:..., pkg.mod:factory")
]
File = Annotated[Path, typer.Argument(metavar="FILE.dsl", help="what dslify insert wrote")]
Data = Annotated[
    str, typer.Option("--data", metavar="FOLDER", help="of audio or pictures; or an array file, or pkg.mod:factory")
]
Input = Annotated[
    str | None,
    typer.Option("--input", metavar="SHAPE", help="example inputs: 1x1x16000, or 1x3x224x224,1x10:int64, or name=1x10"),
]
Scope = Annotated[str | None, typer.Option("--scope", metavar="MODULE", help="capture this submodule only")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="MODULE", help="module whose classes a pickle may use; repeatable"),
]
Code = Annotated[
    list[str] | None, typer.Option("--code", metavar="FILE.py", help="your file with the model's classes; repeatable")
]
Arch = Annotated[str | None, typer.Option("--arch", metavar="NAME", help="the network that weights alone belong to")]
Rate = Annotated[str | None, typer.Option("--rate", metavar="HZ", help="sampling rate of the network (16000)")]
Segment = Annotated[
    str | None, typer.Option("--segment", metavar="SECONDS", help="cut sound into pieces of this length (as inserted)")
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", metavar="FILE.csv", help="which files have which label: columns path, label, and source"),
]
Workers = Annotated[
    str,
    typer.Option("--workers", metavar="N", help="that read the data beside this process; same samples for any number"),
]
BatchSize = Annotated[str, typer.Option("--batch-size", metavar="N", help="samples at once")]
Seed = Annotated[str, typer.Option("--seed", metavar="N", help="of everything random")]
Write = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.dsl", help="write here, not to FILE.dsl")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors")]

# inspect, insert, finetune, calibrate, evaluate
At = Annotated[str, typer.Option("--at", metavar="MODULE", help="cut behind this module; auto chooses one")]
Width = Annotated[
    str | None, typer.Option("--width", metavar="SHARE", help="of the channels that the light path keeps (0.1)")
]
CostShare = Annotated[
    str | None, typer.Option("--cost", metavar="SHARE", help="of the MACs behind the cut, instead of a width")
]
LatencyShare = Annotated[
    str | None,
    typer.Option("--latency", metavar="SHARE", help="of the time behind the cut, measured; looks for width and depth"),
]
LatencyRuntime = Annotated[
    str | None, typer.Option("--runtime", metavar="NAME", help="where --latency is measured: onnxruntime or eager")
]
RouteEvery = Annotated[
    str | None,
    typer.Option("--route-every", metavar="ENTRIES", help="of the input: route long sequences in segments of these"),
]
To = Annotated[str | None, typer.Option("--to", metavar="MODULE", help="last module of the light path")]
Light = Annotated[
    str | None,
    typer.Option(
        "--light", metavar="KIND", help="narrow copy, separable, exit (a constant), head (pooled) or identity"
    ),
]
Init = Annotated[
    str, typer.Option("--init", metavar="WORD", help="first weights of a copy: inherited, or random to compare with")
]
Mode = Annotated[str, typer.Option("--mode", metavar="WORD", help="dsl, or gc: a gate that learns labels")]
MaskKind = Annotated[
    str, typer.Option("--mask", metavar="KIND", help="channel, element, or activation (thresholds instead of factors)")
]
Projection = Annotated[bool, typer.Option(help="narrow the trunk too, with learned 1x1 projections")]
Force = Annotated[bool, typer.Option("--force", help="overwrite the file if it is there")]
Explain = Annotated[bool, typer.Option("--explain", help="show what became of every tensor, and why")]
Depth = Annotated[
    str, typer.Option("--depth", metavar="SHARE", help="of the residual branches that the light path keeps")
]
Levels = Annotated[
    str | None, typer.Option("--levels", metavar="N", help="of nested modules to show (what fits a page)")
]
Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE", help="draw cost along the depth: .svg, .png or .html")
]
SwitchData = Annotated[
    str | None, typer.Option("--switch-data", metavar="FOLDER", help="for the switch (a quarter of --data)")
]
Steps = Annotated[str, typer.Option("--steps", metavar="N", help="of the light path")]
SwitchSteps = Annotated[str, typer.Option("--switch-steps", metavar="N", help="of the switch")]
LearningRate = Annotated[str, typer.Option("--lr", metavar="RATE", help="peak learning rate")]
Alpha = Annotated[str, typer.Option("--alpha", metavar="WEIGHT", help="of switch and light loss")]
Beta = Annotated[str, typer.Option("--beta", metavar="WEIGHT", help="of the mask's L1; 0 leaves the mask")]
Anchor = Annotated[str, typer.Option("--anchor", metavar="WEIGHT", help="of what holds a mask to the unmasked answer")]
Positive = Annotated[
    str | None, typer.Option("--positive", metavar="LABELS", help="for gates: 1-9, or yes,no, or !background")
]
Loss = Annotated[str, typer.Option("--loss", metavar="KIND", help="l1, mse, cosine or kl; or one per output: kl,l1")]
Weights = Annotated[
    str | None, typer.Option("--weights", metavar="W,W", help="of the outputs in the light loss (1 each)")
]
Precision = Annotated[str, typer.Option("--precision", metavar="WORD", help="32-true, bf16-mixed or 16-mixed")]
Accumulate = Annotated[
    str, typer.Option("--accumulate", metavar="N", help="batches that make one step, run one after another")
]
Patience = Annotated[
    str | None,
    typer.Option("--patience", metavar="N", help="stop a phase after N checkpoints without gain on held-out sources"),
]
JointModel = Annotated[
    str | None,
    typer.Option("--joint", metavar="MODEL", help="first train all of it together; the plain network, for its code"),
]
TaskLoss = Annotated[
    str | None,
    typer.Option(
        "--task-loss", metavar="PKG.MOD:FUNCTION", help="with --joint: (output, batch, labels) -> loss of the task"
    ),
]
JointSteps = Annotated[str, typer.Option("--joint-steps", metavar="N", help="steps of --joint")]
JointRate = Annotated[str, typer.Option("--joint-lr", metavar="RATE", help="learning rate of --joint")]
Routes = Annotated[
    str, typer.Option("--routes", metavar="WORD", help="with --joint, what follows the layer reads: full or mixed")
]
Copies = Annotated[
    str,
    typer.Option("--copies", metavar="N", help="varied copies of each sample, too: sound moved, faster, louder, noisy"),
]
Vary = Annotated[
    str | None,
    typer.Option("--vary", metavar="PKG.MOD:FUNCTION", help="--copies of no sound: (batch, generator) -> varied batch"),
]
Noise = Annotated[
    str | None,
    typer.Option("--noise", metavar="FOLDER", help="mixed into --copies (samples labelled background, or made noise)"),
]
CheckpointEvery = Annotated[str, typer.Option("--checkpoint-every", metavar="N", help="steps between checkpoints")]
Fit = Annotated[bool, typer.Option(help="start the light path from a least-squares fit")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", metavar="FOLDER", help="for checkpoints and logs (FILE.run)")]
Threads = Annotated[
    str | None,
    typer.Option("--threads", metavar="N", help="of torch on the CPU (torch decides; 1 is best for small networks)"),
]
LightShare = Annotated[
    str | None, typer.Option("--light-share", metavar="SHARE", help="of the samples that shall go light")
]
MaxDifference = Annotated[
    str | None, typer.Option("--max-difference", metavar="D", help="bound on the mean relative difference")
]
MaxMetric = Annotated[
    str | None, typer.Option("--max-metric", metavar="D", help="bound on how much the metric may rise on average")
]
MaxLost = Annotated[
    str | None,
    typer.Option("--max-lost", metavar="SHARE", help="of the positives, that all gates may lose together: 0.01"),
]
Units = Annotated[
    str | None, typer.Option("--units", metavar="WORD", help="what --max-lost counts: sample (as it is), or source")
]
GateWeights = Annotated[
    str | None,
    typer.Option("--gate-weights", metavar="W,W", help="odds at which gates stop, against each other (1 each)"),
]
Guarantee = Annotated[
    str | None,
    typer.Option("--guarantee", metavar="WORD", help="mean (of all, on average) or routed (of what goes light)"),
]
Confidence = Annotated[
    str | None,
    typer.Option("--confidence", metavar="P", help="that --max-lost, or the bound for what goes light, holds (0.95)"),
]
Bound = Annotated[str | None, typer.Option("--bound", metavar="D", help="guarantees count more as this much (1)")]
Curve = Annotated[
    Path | None, typer.Option("--curve", metavar="FILE.csv", help="write what every threshold would do: .csv or .json")
]
SeenRun = Annotated[
    Path | None, typer.Option("--run-dir", metavar="FOLDER", help="of the run that trained it (those beside the file)")
]
By = Annotated[str, typer.Option("--by", metavar="WORD", help="rows: label, source or all")]
Metric = Annotated[
    str | None,
    typer.Option("--metric", metavar="PKG.MOD:FUNCTION", help="(output, input) of a batch -> one number per sample"),
]
Accuracy = Annotated[bool, typer.Option("--accuracy", help="of a classifier whose classes are the labels")]
NewFile = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE.dsl", help="write here, not beside the model")
]

# export
ToFormat = Annotated[
    str | None, typer.Option("--to", metavar="FORMAT", help="onnx, pt2, aoti, executorch or litert (by --output, onnx)")
]
ExportFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="write here, not beside the .dsl; with --split a folder"),
]
Split = Annotated[bool, typer.Option("--split", help="front, light and full as three ONNX files, for two processors")]
Quantize = Annotated[str | None, typer.Option("--quantize", metavar="WORD", help="int8: ONNX with 8-bit numbers")]
FeedData = Annotated[
    str | None, typer.Option("--data", metavar="FOLDER", help="to set the ranges of --quantize by (random inputs)")
]
Batch = Annotated[str, typer.Option("--batch", metavar="N", help="samples in a call: a number, or any")]
Static = Annotated[
    bool, typer.Option("--static", help="fix every size, such as the length of sound, at the recorded one")
]

# run
Delivered = Annotated[
    Path, typer.Argument(metavar="MODEL", help="model.dsl, model.onnx, or a folder of dslify export --split")
]
Threshold = Annotated[
    str | None, typer.Option("--threshold", metavar="T", help="samples with a score below it go light (its own)")
]
Wire = Annotated[
    str | None,
    typer.Option("--wire", metavar="WORD", help="numbers to the full part: fp32, fp16 or int8 (as exported)"),
]
RoutesFile = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE.csv", help="write route and score of every sample")
]

# measure
Runtimes = Annotated[
    list[str] | None,
    typer.Option("--runtime", metavar="NAME", help="eager, compiled, onnxruntime, executorch, litert; repeatable"),
]
StreamShare = Annotated[
    str, typer.Option("--share", metavar="SHARE", help="of the samples of the measured stream that go light")
]
MeasuredThreads = Annotated[str, typer.Option("--threads", metavar="N", help="of every runtime")]
MeasuredData = Annotated[
    str | None, typer.Option("--data", metavar="FOLDER", help="of real samples, lowest scores light (random inputs)")
]
Profile = Annotated[
    str,
    typer.Option("--profile", metavar="FILE.toml", help="what the estimate of energy assumes; or 45nm-sram, 45nm-dram"),
]
MeasuredSeconds = Annotated[
    str, typer.Option("--seconds", metavar="S", help="of measuring, for each runtime; more are steadier")
]


def number(
    name: str,
    text: str,
    words: str,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    """`text` as a finite number with above < number < below and least <= number <= most.

    words: the range, as the message says it. Raises OptionError: "width must be above 0 and at most 1; got 1.5."
    """
    try:
        value = float(text)
    except ValueError:
        raise OptionError(f"{name} must be {words}; got {text!r}.") from None
    if not (above < value < below and least <= value <= most and math.isfinite(value)):
        raise OptionError(f"{name} must be {words}; got {text}.")
    return value


def whole(name: str, text: str, least: int = 0) -> int:
    """`text` as a whole number of at least `least`. Raises OptionError."""
    try:
        value = int(text)
    except ValueError:
        raise OptionError(f"{name} must be a whole number of at least {least}; got {text!r}.") from None
    if value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}; got {text}.")
    return value


def share(name: str, text: str) -> float:
    """`text` as a share in (0, 1]. Raises OptionError."""
    return number(name, text, "above 0 and at most 1", above=0, most=1)


def words(text: str) -> str | tuple[str, ...]:
    """One word, or several with commas between them."""
    found = tuple(word.strip() for word in text.split(","))
    return found[0] if len(found) == 1 else found


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers of 0 or above with commas between them. Raises OptionError."""
    return None if text is None else tuple(number(name, part, "0 or above", least=0) for part in text.split(","))


def hertz(rate: str | None) -> int | None:
    return None if rate is None else whole("rate", rate, least=1)


def seconds(segment: str | None) -> float | None:
    """The --segment option."""
    return None if segment is None else number("segment", segment, "above 0 seconds", above=0)


def drawable(path: Path, force: bool) -> Path:
    """`path`, if a picture can be written there: told before the work and not after it. Raises OptionError."""
    if path.suffix.lower() not in PICTURES:
        raise OptionError(f"--picture {path}: the name has to end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}.")
    if not path.parent.is_dir():
        raise OptionError(f"--picture {path}: {path.parent} is no folder; make it first, or name another.")
    if not os.access(path.parent, os.W_OK):
        raise OptionError(f"--picture {path}: nothing can be written into {path.parent}; name another folder.")
    if path.is_dir() or (path.exists() and not force):
        raise OptionError(f"--picture {path}: it exists already; give another name, or --force to overwrite it.")
    return path


def beside(model: str) -> Path:
    """Where the dslified form of a model goes: beside its file, or for a name into the working folder."""
    path = Path(model)
    if ":" in model and not path.exists():
        return Path(f"{model.partition('?')[0].rpartition(':')[2]}.dsl")
    return path.parent / f"{path.stem or 'model'}.dsl"


def run_folder(file: Path, resume: bool) -> Path:
    """FILE.run, FILE.run2 ...: the last one that is there to resume, or the first that is free."""
    names = [file.with_suffix(".run")]
    while names[-1].exists():
        names.append(file.with_suffix(f".run{len(names) + 1}"))
    return names[max(0, len(names) - 2)] if resume else names[-1]


def runs_beside(file: Path) -> tuple[Path, ...]:
    """The run folders of a file that tell what they trained on: FILE.run, FILE.run2 ..."""
    found = [file.with_suffix(".run")]
    while found[-1].exists():
        found.append(file.with_suffix(f".run{len(found) + 1}"))
    return tuple(folder for folder in found[:-1] if (folder / "data.json").is_file())
