"""What inherited weights are worth: the light path distilled from several starts, and from random weights.

    make bench-inherit DATA=folder      # train/speech and test/speech of sound, as for bench-codec

Two networks: the pretrained codec on real speech, and a residual CNN that is first trained here, on pictures that are
drawn here. For each, the light path learns to answer like the full one, with the schedule of `finetune`; only its first
weights differ. Losses are of held-out inputs. "steps to it": when a start reaches what random weights end at.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table as Shown
from torch import Tensor, fx, nn

import dslify
from benchmarks.shapes import CLASSES, pictures
from dslify.axes import analyse
from dslify.data import open_data
from dslify.depth import shallower
from dslify.errors import DslifyError, OptionError
from dslify.files import written_whole
from dslify.gather import Table, gather
from dslify.inherit import HOWS, adjusted
from dslify.layers import LINEAR, find_layers
from dslify.light import build
from dslify.losses import light_loss
from dslify.samples import Samples
from dslify.schedule import positions, rate_share
from dslify.stepper import CLIP, WEIGHT_DECAY
from dslify.switch import DSLayer, dsl_layers
from dslify.widths import decide
from recipes.soundstream import CUT, pretrained

BATCH = 16
LR = 3e-3  # finetune's
SEEN = 64  # training samples that "statistics" and "fit" look at, in batches of BATCH
LOOKS = 40  # evaluations in one run
STARTS = ("random", *HOWS)


@dataclass(frozen=True)
class Case:
    """A network with a layer in it, and what its light path learns from and is judged by."""

    name: str
    layer: DSLayer
    train: Table
    test: Table
    width: float
    depth: float
    steps: int


@dataclass(frozen=True)
class Run:
    """Held-out losses of one training, at `at` steps (0 is the start). seconds: to make the start."""

    case: str
    start: str
    seed: int
    at: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: float

    def reaches(self, loss: float) -> int | None:
        return next((step for step, found in zip(self.at, self.losses, strict=True) if found <= loss), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/inherit.py", description="The light path's first weights.")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/speech and test/speech")
    parser.add_argument("--width", type=float, default=0.22, help="of the codec's light path")
    parser.add_argument("--steps", type=count, default=400, help="for the codec; the CNN takes three quarters of them")
    parser.add_argument("--seeds", type=count, default=3, help="how many; of the batches and of random weights")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console, started, runs = Console(), time.perf_counter(), []
    try:
        if options.json is not None and not options.json.parent.is_dir():
            raise OptionError(f"{options.json} cannot be written, there is no such folder; name another file.")
        for case in (*codecs(options), *vision(options)):
            found = [run(case, start, seed) for start in STARTS for seed in range(options.seeds)]
            console.print(table(case, found), "")
            runs += found
        if options.json is not None:
            with written_whole(options.json) as temporary:
                temporary.write_text(json.dumps(document(runs, options), indent=1) + "\n")
    except DslifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"{time.perf_counter() - started:.0f} s in all, on one thread")
    return 0


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def codecs(options: argparse.Namespace) -> Iterator[Case]:
    """The codec's light path at full depth and at half of it."""
    codec = pretrained()
    shape, rate = tuple(codec.example_input_array.shape[1:]), codec.config.sample_rate
    folders = [options.data / part / "speech" for part in ("train", "test")]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise OptionError(f"there is no folder {missing[0]}; expected train/speech and test/speech.")
    train, test = (open_data(folder, shape, rate=rate, progress=False) for folder in folders)
    net = dslify.insert(codec, CUT, options.width, (codec.example_input_array,), scope="encoder")
    layer, answers, held_out = tables(net, train, test)
    for depth in (1.0, 0.5):
        name = f"codec, width {options.width:g}, depth {depth:g}"
        yield Case(name, layer, answers, held_out, options.width, depth, options.steps)


def vision(options: argparse.Namespace) -> Iterator[Case]:
    """A residual CNN on drawn pictures, cut behind its first stage."""
    net, accuracy = trained_cnn()
    train, test = (open_data(pictures(count, seed)[0], progress=False) for count, seed in ((4096, 1), (512, 2)))
    inserted = dslify.insert(net, "stage1", 0.25, (test.batch([0]),))
    layer, answers, held_out = tables(inserted, train, test)
    name, steps = f"CNN ({accuracy:.1%} correct), width 0.25", 3 * options.steps // 4
    yield Case(name, layer, answers, held_out, 0.25, 1.0, steps)


class Block(nn.Module):
    """x + bn(conv(relu(bn(conv(x))))), then ReLU; (batch, channels, height, width) in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class CNN(nn.Module):
    """(batch, 1, 32, 32) -> logits (batch, 10): three stages of residual blocks, 16, 32 and 64 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(self.down(1, 16), Block(16))
        self.stage2 = nn.Sequential(self.down(16, 32), *(Block(32) for _ in range(3)))
        self.stage3 = nn.Sequential(self.down(32, 64), *(Block(64) for _ in range(3)))
        self.head = nn.Linear(64, len(CLASSES))

    @staticmethod
    def down(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


def trained_cnn(steps: int = 600, batch: int = 64) -> tuple[CNN, float]:
    """The network in eval mode, and its accuracy on pictures it has not seen."""
    torch.manual_seed(0)
    net = CNN()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * rate_share(step, steps)
        x, classes = pictures(batch, 1000 + step)
        loss = nn.functional.cross_entropy(net(x), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    x, classes = pictures(2000, 3)
    with torch.no_grad():
        return net, (net(x).argmax(1) == classes).double().mean().item()


def tables(net: nn.Module, train: Samples, test: Samples) -> tuple[DSLayer, Table, Table]:
    """The layer, with its output scale set, and what the full path answers for each set."""
    layers = dsl_layers(net)

    def batches(samples: Samples, _: str) -> Iterator[tuple[int, Tensor]]:
        for begin in range(0, len(samples), BATCH):
            yield begin, samples.batch(range(begin, min(begin + BATCH, len(samples))))

    answers = []
    for samples in (train, test):
        scales, found = gather(net, layers, batches, samples, 1 << 33, False)
        if found is None:
            raise OptionError("the data is too long for this benchmark; give it a shorter folder.")
        answers += found
        if samples is train:
            layers[0].scale.copy_(scales[0])
    return layers[0], answers[0], answers[1]


def run(case: Case, start: str, seed: int) -> Run:
    """One distillation."""
    began = time.perf_counter()
    light = first_weights(case, start, seed)
    seconds = time.perf_counter() - began
    layer, table = case.layer, case.train
    parameters = [parameter for parameter in light.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    at, losses, looks = [], [], {look(case, n) for n in range(LOOKS + 1)}
    for step in range(case.steps + 1):
        if step in looks:
            at.append(step)
            losses.append(held_out(case, light))
        if step == case.steps:
            break
        optimizer.param_groups[0]["lr"] = LR * rate_share(step, case.steps)
        inputs, answers = table.take(positions(table.count, BATCH, step, seed, "light"))
        loss = light_loss(light(*inputs), answers, layer.scale, layer.outputs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    return Run(case.name, start, seed, tuple(at), tuple(losses), seconds)


def look(case: Case, n: int) -> int:
    """The step of the n-th evaluation."""
    return round(case.steps * n / LOOKS)


def first_weights(case: Case, start: str, seed: int) -> fx.GraphModule:
    """The light path before training."""
    full = cast(fx.GraphModule, case.layer.full)
    region, _ = shallower(full, case.depth)
    axes = analyse(region)
    kept, projected = decide(axes, case.width)
    light = build(axes, kept, projected)
    seen = positions(case.train.count, SEEN, 0, seed, "light").split(BATCH)
    inputs = [case.train.take(part)[0] for part in seen]
    if start == "random":
        randomised(light, inputs, seed)
    else:
        adjusted(light, full, axes, kept, projected, inputs, start)
    return light


@torch.no_grad()
def randomised(light: fx.GraphModule, inputs: Sequence[Sequence[Any]], seed: int) -> None:
    """Weights as torch scales them, no biases, BatchNorm's statistics from the inputs.

    With weights that keep the variance behind a ReLU (6 times that variance) the codec, which has no norm, starts at
    7 times the loss and ends at twice of it: a baseline that anything beats.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in find_layers(light):
        if layer.kind in LINEAR:
            std = math.sqrt(1 / (3 * layer.matrices().shape[1]))
            layer.weight.copy_(std * torch.randn(layer.weight.shape, generator=generator))
        elif layer.kind == "norm":
            layer.weight.fill_(1)
        if layer.bias is not None and layer.kind != "batch_norm":
            layer.bias.zero_()
    for node in light.graph.nodes:  # gamma and beta
        if "batch_norm" in str(node.target) and node.op == "call_function":
            for used, value in zip(node.args[1:3], (1.0, 0.0), strict=True):
                light.get_parameter(used.target).fill_(value)
    restart_batch_norm(light, inputs)


def restart_batch_norm(light: fx.GraphModule, inputs: Sequence[Sequence[Any]]) -> None:
    """One pass in training mode."""
    nodes = [node for node in light.graph.nodes if "batch_norm" in str(node.target)]
    for training in (True, False):
        for node in nodes:
            node.args = (*node.args[:5], training, 1.0, *node.args[7:])
        light.recompile()
        if training and nodes:
            light(*(torch.cat(parts) for parts in zip(*inputs, strict=True)))


@torch.no_grad()
def held_out(case: Case, light: nn.Module) -> float:
    inputs, answers = case.test.take(torch.arange(case.test.count))
    return light_loss(light(*inputs), answers, case.layer.scale, case.layer.outputs).item()


def table(case: Case, runs: Sequence[Run]) -> Shown:
    """One row for each start: mean over the seeds, and the range."""
    shown = Shown(title=case.name)
    early = look(case, LOOKS // 10)
    for column in (
        "start",
        "loss at once",
        f"after {early}",
        f"after {case.steps} steps",
        "of random's",
        "steps to it",
    ):
        shown.add_column(column, justify="left" if column == "start" else "right")
    random = statistics.mean(one.losses[-1] for one in runs if one.start == "random")
    for start in STARTS:
        mine = [one for one in runs if one.start == start]
        last = statistics.mean(one.losses[-1] for one in mine)
        reached = [one.reaches(random) for one in mine]
        steps = "not by all" if None in reached else spread([step for step in reached if step is not None], "{:.0f}")
        shown.add_row(
            start,
            spread([one.losses[0] for one in mine]),
            spread([one.losses[one.at.index(early)] for one in mine]),
            spread([one.losses[-1] for one in mine]),
            f"{last / random:.2f}",
            str(case.steps) if start == "random" else steps,
        )
    return shown


def spread(values: Sequence[float], form: str = "{:.4f}") -> str:
    mean, least, most = (form.format(value) for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def document(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    """All figures as JSON."""
    return {
        "options": {name: getattr(options, name) for name in ("width", "steps", "seeds")},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "dslify": dslify.__version__},
        "runs": [asdict(one) for one in runs],
    }


if __name__ == "__main__":
    raise SystemExit(main())
