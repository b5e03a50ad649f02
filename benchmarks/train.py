"""Time of a step of retrofit training against what it cannot do without, side by side in one run.

    make bench-train

A step of `finetune` needs base, switch and full path forward, and the light path forward and backward. Those alone, on
batches that lie ready, are the measure; "step" is finetune with all it does besides: drawing samples, losses, clipping,
AdamW, the log. Rounds of both alternate, so that other work on the machine slows both; the ratio is the median of the
rounds'. "live" runs the whole network at every step (cache_bytes=0), which is the fair case; "cached" is finetune's
normal way, with everything that is frozen computed once beforehand.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dslify
from dslify.data import open_data
from dslify.files import written_whole
from dslify.samples import Samples
from dslify.switch import DSLayer, route
from recipes.soundstream import CUT, pretrained

TARGET = 1.15
SAMPLES = 64


@dataclass(frozen=True)
class Case:
    """What is trained. batch: samples in a step; steps: in a round."""

    name: str
    net: nn.Module
    samples: Samples
    batch: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """Milliseconds a step, medians over the rounds; ratio: median of the rounds' step / alone."""

    case: str
    way: str
    alone: float
    step: float
    ratio: float
    rounds: tuple[float, ...]


def codec(batch: int, steps: int) -> Case:
    net = dslify.insert(pretrained(), CUT.removeprefix("encoder."), 0.1, (torch.zeros(2, 1, 16000),), scope="encoder")
    return Case("codec", net, open_data(torch.randn(SAMPLES, 1, 16000) * 0.1), batch, steps)


def resnet(batch: int, steps: int) -> Case:
    model = timm.create_model("resnet18").eval()
    net = dslify.insert(model, "layer2", 0.1, (torch.zeros(2, 3, 96, 96),))
    return Case("timm resnet18, 96x96", net, open_data(torch.randn(SAMPLES, 3, 96, 96)), batch, steps)


def step_seconds(case: Case, cache_bytes: int) -> float:
    """Of one step, the mean of a short run."""
    history = dslify.finetune(
        case.net, case.samples, steps=case.steps, switch_steps=0, batch_size=case.batch, fit=False,
        cache_bytes=cache_bytes, threads=torch.get_num_threads(), progress=False, lr=1e-6,
    )  # fmt: skip
    assert history.cached == bool(cache_bytes)
    return history.phases[0].seconds / case.steps


def alone_seconds(case: Case, layer: DSLayer, full: bool) -> float:
    """Base, switch and full path forward (if `full`) and the light path forward and backward, a mean over as many."""
    seen: list[tuple[Tensor, ...]] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    after = layer.register_forward_hook(_stop)
    parameters = list(layer.light.parameters())
    batches = [case.samples.batch(range(at, at + case.batch)) for at in range(0, SAMPLES - case.batch + 1, case.batch)]
    forward = _until_the_layer(case.net)
    try:
        with torch.no_grad(), route(case.net, "full"):
            for batch in batches:  # what the light path reads, for the cached way
                forward(batch)
        held, seconds = list(seen), 0.0
        for at in range(case.steps):
            batch = batches[at % len(batches)]
            begin = time.perf_counter()
            if full:
                with torch.no_grad(), route(case.net, "full"):
                    forward(batch)
            outputs = layer.light(*held[at % len(batches)])
            torch.autograd.grad([outputs[0].sum()], parameters, allow_unused=True)
            seconds += time.perf_counter() - begin
            seen.clear()
    finally:
        hook.remove()
        after.remove()
    return seconds / case.steps


class _Done(BaseException):
    """The layer has run; what lies behind it (a codec's decoder) is part of neither side."""


def _stop(*_: object) -> None:
    raise _Done


def _until_the_layer(net: nn.Module) -> Callable[[Tensor], None]:
    def run(batch: Tensor) -> None:
        try:
            net(batch)
        except _Done:
            return

    return run


def measure(case: Case, way: str, rounds: int) -> Measured:
    (layer,) = dslify.dsl_layers(case.net)
    case.net.eval()
    live = way == "live"
    pairs = []
    for at in range(rounds + 1):
        pair = (alone_seconds(case, layer, live), step_seconds(case, 0 if live else 1 << 30))
        if at:  # the first round warms up
            pairs.append(pair)
    ratios = tuple(step / alone for alone, step in pairs)
    alone, step = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    return Measured(case.name, way, alone, step, statistics.median(ratios), ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="of each side")
    parser.add_argument("--steps", type=int, default=30, help="in a round")
    parser.add_argument("--batch", type=int, default=16, help="samples in a step")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = []
    table = Table("network", "way", "alone, ms", "step, ms", "step / alone", "quarter to three quarters")
    for build in (codec, resnet):
        case = build(options.batch, options.steps)
        for way in ("live", "cached"):
            row = measure(case, way, options.rounds)
            low, _, high = (f"{quarter:.2f}" for quarter in statistics.quantiles(row.rounds))
            table.add_row(row.case, way, f"{row.alone:.2f}", f"{row.step:.2f}", f"{row.ratio:.3f}", f"{low}-{high}")
            found.append(row)
    Console(width=110).print(
        table,
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} threads, batch "
        f"{options.batch}, medians of {options.rounds} rounds of {options.steps} steps",
    )
    if options.json:
        with written_whole(options.json) as temporary:
            temporary.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    slow = [row for row in found if row.way == "live" and row.ratio > TARGET]
    if slow:
        sys.exit(f"more than {TARGET} times: {', '.join(row.case for row in slow)}")


if __name__ == "__main__":
    main()
