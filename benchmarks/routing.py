"""What routing costs in eager PyTorch: a batch of 32 of which half goes light, and single inputs on either path.

    make bench-routing

Every figure is a ratio of medians from one interleaved run on one thread. The parts are measured alone, in the same
run: base, mask with switch, light path, full path.

    over the parts   network / (base + light + full) - 1       what the layer costs in all, with mask and switch
    routing          layer - (mask and switch + light + full)  who goes where, taking samples out, putting answers back

Routing is given as a share of base + light + full for the batch, and for a single input of the path that it takes, from
its first operator (base + path) and behind the cut (path alone).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dslify
from dslify.clock import Timed, interleaved
from dslify.files import written_whole
from dslify.parts import Scored, parts_of
from dslify.programs import host_graph
from tests import zoo

BATCH = 32


@dataclass(frozen=True)
class Case:
    """make: the network. shape: of one input. at, width, depth, scope: as in insert()."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    at: str
    width: float = 0.1
    depth: float = 1.0
    scope: str | None = None


def vit_tiny() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224")


CASES = {
    "codec": Case(zoo.codec, (1, 16000), zoo.codec_cut(), depth=0.01, scope="encoder"),
    "codec-early": Case(zoo.codec, (1, 16000), "encoder.stem", depth=0.01, scope="encoder"),
    "resnet18": Case(zoo.resnet18, (3, 224, 224), "layer2"),
    "vit_tiny": Case(vit_tiny, (3, 224, 224), "blocks.3"),
    "wav2vec2": Case(zoo.wav2vec2, (16000,), "encoder.transformer.layers.0"),
}


@dataclass(frozen=True)
class Result:
    """batch, batch_routing: shares of base + light + full at a batch of 32, half of it light. single: for "light" and
    "full" the routing as a share of that path, and of the base with it. parts: medians in ms."""

    name: str
    batch: float
    batch_routing: float
    single: dict[str, float]
    parts: dict[str, float]


class Passing(nn.Module):
    """Stands for mask and switch where the base is measured alone."""

    def forward(self, cut: Tensor) -> tuple[Tensor, Tensor]:
        return cut, cut


def measured(name: str, case: Case, seconds: float) -> Result:
    torch.manual_seed(0)
    inputs = torch.randn(BATCH, *case.shape)
    net = dslify.insert(
        case.make().eval(), case.at, case.width, (inputs[:1],), scope=case.scope, depth=case.depth
    )  # fmt: skip
    _, graph = host_graph(net)
    parts = parts_of(graph)
    layer, scored, base = parts.layer, Scored(parts.layer), parts.front
    base.dsl_scored = Passing()
    with torch.no_grad():
        graph(inputs)
        layer.threshold.copy_(layer.paths.score.sort().values[BATCH // 2 - 1 : BATCH // 2 + 1].mean())
        cut, _, *crossing = base(inputs)
        order = (layer.switch(layer.pooled(layer.mask(cut))) >= layer.threshold).nonzero()[:, 0]
        halves = [
            [layout.take(value, index, BATCH) for layout, value in zip(layer.inputs, (cut, *crossing), strict=True)]
            for index in (torch.arange(BATCH // 2), order)
        ]
        assert all(len(half[0]) == BATCH // 2 for half in halves)
        times = interleaved(
            {
                "network": lambda: graph(inputs),
                "base": lambda: base(inputs),
                "layer": lambda: layer(cut, *crossing),
                "mask and switch": lambda: scored(cut),
                "light": lambda: layer.light(*halves[0]),
                "full": lambda: layer.full(*halves[1]),
            },
            seconds,
        )
        single = {}
        one, _, *beside = base(inputs[:1])
        for path, threshold in (("light", float("inf")), ("full", 0.0)):
            layer.threshold.fill_(threshold)
            run = getattr(layer, path)
            alone = interleaved(
                {
                    "layer": lambda: layer(one, *beside),
                    "mask and switch": lambda: scored(one),
                    "path": lambda run=run: run(one, *beside),
                    "base": lambda: base(inputs[:1]),
                },
                seconds / 2,
            )
            extra = middle(alone, "layer") - middle(alone, "mask and switch", "path")
            single[path] = extra / middle(alone, "path")
            single[f"base and {path}"] = extra / middle(alone, "base", "path")
    ideal = middle(times, "base", "light", "full")
    routing = middle(times, "layer") - middle(times, "mask and switch", "light", "full")
    return Result(
        name,
        middle(times, "network") / ideal - 1,
        routing / ideal,
        single,
        {part: 1e3 * found.p50 for part, found in times.items()},
    )


def middle(times: dict[str, Timed], *names: str) -> float:
    """Sum of medians, in seconds."""
    return sum(times[name].p50 for name in names)


def table(results: Sequence[Result]) -> str:
    lines = [
        "| network | batch of 32: over the parts | of which routing | one input: base + light | light alone | "
        "base + full | full alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        ways = ("base and light", "light", "base and full", "full")
        shares = (found.batch, found.batch_routing, *(found.single[way] for way in ways))
        lines.append(f"| {found.name} | " + " | ".join(f"{100 * share:+.1f} %" for share in shares) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/routing.py", description="What routing costs in eager PyTorch.")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each network")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = []
    for name in options.networks:
        results.append(measured(name, CASES[name], options.seconds))
        print(name, {part: round(ms, 3) for part, ms in results[-1].parts.items()}, "ms", flush=True)
    print(table(results))
    if options.json:
        written: dict[str, Any] = {"threads": 1, "batch": BATCH, "results": [asdict(found) for found in results]}
        with written_whole(options.json) as temporary:
            temporary.write_text(json.dumps(written, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
