"""What a light path saves where the network runs: one ONNX model with a branch, a sample at a time, one thread.

    make bench-latency

Of every network: the light path against the full one, and a stream of which 80 % goes light against always full, as
measured and as the two routes promise it. All times of a network are taken in turn in one run, so ratios are what can
be compared. The networks but the codec have random weights and no light path here was fine-tuned: these are times, and
how good the answers are is what `dslify evaluate` is for.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import dslify
from dslify.errors import DslifyError
from dslify.files import written_whole
from dslify.latency import measure
from dslify.measured import in_unit, measurement
from dslify.measurement import Latency, Measurement
from dslify.tables import percent

SHARE = 0.8
RUNTIME = "onnxruntime"
LEAST_RATIO, LEAST_SAVED, MOST_OFF = 6.0, 0.45, 0.05  # of the codec: light against full, 80 % light, computed


@dataclass(frozen=True)
class Row:
    """A network and how it is cut; options of dslify.insert. codec: held against the limits."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    at: str
    options: dict[str, Any]
    codec: bool = False


def soundstream() -> nn.Module:
    from recipes.soundstream.model import pretrained

    return pretrained()


def keywords() -> nn.Module:
    from recipes.keyword_spotting.network import KeywordNetwork

    return KeywordNetwork(12)


def timm_model(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name)

    return make


SOUND, PICTURE = (1, 1, 16000), (1, 3, 224, 224)
SHALLOW: dict[str, Any] = {"width": 0.1, "depth": 0.01}  # every residual branch that can go is left out
ROWS = (
    Row("codec encoder", soundstream, SOUND, "encoder.block1", {**SHALLOW, "scope": "encoder"}, codec=True),
    Row("codec encoder", soundstream, SOUND, "encoder.stem", {**SHALLOW, "scope": "encoder"}, codec=True),
    Row("keyword network", keywords, SOUND, "stem", {"width": 0.1}),
    Row("resnet18", timm_model("resnet18"), PICTURE, "layer1", SHALLOW),
    Row("vit_tiny", timm_model("vit_tiny_patch16_224"), PICTURE, "blocks.2", SHALLOW),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/latency.py", description="Times of light, full and a mixed stream."
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, for each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--only", default="", metavar="WORD", help="networks whose name begins so")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if row.name.startswith(options.only)]
    console, begin = Console(), time.perf_counter()
    found: list[tuple[Row, Measurement]] = []
    try:
        for row in rows:
            found.append((row, one(row, options.seconds, options.threads)))
            console.print(f"{row.name}, cut behind {row.at}", measurement(found[-1][1]), "", sep="\n")
        shown = "\n".join(table(found, options.threads)) + "\n"
        verdicts = [verdict(row, result.latencies[0]) for row, result in found if row.codec]
        for path, text in ((options.markdown, shown), (options.json, document(found, options.seconds))):
            if path is not None:
                with written_whole(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    except (DslifyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shown)
    for _, words in verdicts:
        print(words)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0 if all(met for met, _ in verdicts) else 1


def one(row: Row, seconds: float, threads: int) -> Measurement:
    torch.manual_seed(0)
    example: Tensor = torch.zeros(row.shape)
    net = dslify.insert(row.make().eval(), at=row.at, example_inputs=(example,), **row.options)
    return measure(net, (RUNTIME,), threads=threads, share=SHARE, seconds=seconds)


def table(found: Sequence[tuple[Row, Measurement]], threads: int) -> Iterator[str]:
    """The figures as Markdown."""
    yield (
        "| network, cut behind | light path | light, full path alone | fewer MACs | always full | 80 % light "
        "| computed | time saved | MACs saved |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row, result in found:
        each = result.latencies[0]
        cells = (
            f"{row.name}, {row.at}",
            f"{each.ratio:.1f}x faster",
            f"{in_unit(each.light.p50, 's')}, {in_unit(each.full.p50, 's')}",
            f"{result.macs_ratio:.0f}x" if result.macs_ratio else "-",
            in_unit(each.whole_full.mean, "s"),
            in_unit(each.mixed.mean, "s"),
            f"{in_unit(each.computed, 's')} ({100 * each.off:+.1f} %)",
            percent(each.saved),
            percent(result.macs_saved),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    first = found[0][1]
    yield (
        f"ONNX Runtime, batch 1, {threads} thread{'s' * (threads != 1)}, streams of {first.samples} samples; paths "
        "alone: medians, streams: means a sample; computed: from the two routes, with how far the stream is above it"
    )


def verdict(row: Row, found: Latency) -> tuple[bool, str]:
    """Whether a codec's figures are within the limits, in words."""
    met = found.ratio >= LEAST_RATIO and found.saved >= LEAST_SAVED and abs(found.off) <= MOST_OFF
    return met, (
        f"{row.name}, {row.at}: {'within' if met else 'NOT within'} the limits: light path {found.ratio:.1f}x faster "
        f"(at least {LEAST_RATIO:g}x), stream {percent(found.saved, 1)} faster (at least {percent(LEAST_SAVED)}), "
        f"computed {100 * abs(found.off):.1f} % off (at most {percent(MOST_OFF)})"
    )


def document(found: Sequence[tuple[Row, Measurement]], seconds: float) -> str:
    """All figures as JSON."""
    import onnxruntime

    versions = {
        "python": platform.python_version(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__,
        "dslify": dslify.__version__, "machine": platform.machine(),
    }  # fmt: skip
    rows = [{"network": row.name, "at": row.at, "options": row.options, **each.to_json()} for row, each in found]
    return json.dumps({"versions": versions, "seconds": seconds, "rows": rows}, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
