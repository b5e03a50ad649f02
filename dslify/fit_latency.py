"""Width and depth of a light path from a measured latency: the most work that still keeps within a share of the time.

Small networks are bound by the number of their operators and not by MACs, so the share is measured and not reckoned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .axes import analyse
from .clock import interleaved
from .depth import shallower
from .derive import derive
from .errors import OptionError
from .functional import empty_graph_module
from .onnx_session import require_onnx, session
from .plan import Candidate, LatencyFit
from .samples import show_progress
from .widths import decide

WIDTHS = tuple(round(2 ** (-at / 4), 4) for at in reversed(range(25)))  # from 1/64 to 1, four to an octave
DEPTHS = (0.01, 0.5, 1.0)  # no residual branch, every other one, all: the fastest first, which leaves least to time
SECONDS = 0.5  # that light and full are timed for with a candidate
CONFIRMED = 4  # times as long for the one to be taken

Call = Callable[[], Any]
Measured = Callable[[Candidate, float], float]  # (candidate, seconds) -> light's share of the full region's latency


def fit_latency(
    full: fx.GraphModule,
    inputs: Sequence[Any],
    target: float,
    runtime: str = "onnxruntime",
    projection: bool = True,
    seed: int = 0,
    samples: int = 1,
    progress: bool | None = False,
) -> LatencyFit:
    """The width and depth whose light path has the most MACs of those that take at most `target` of the full region's
    latency, each measured with it in one run, on one thread, at the size of `inputs` (values of cut and crossing).

    runtime: "onnxruntime" or "eager". projection, seed, samples: as in derive(). progress: as in finetune. Raises
    OptionError when no light path is fast enough, with the least share there is; ExportError where ONNX Runtime is
    missing or cannot hold the region.
    """
    calls = _CALLS[runtime]
    with threads(1), show_progress(progress) as bar:
        task = bar.add_task("timing the full region", total=None)
        reference = calls(full, inputs, "full")

        @cache
        def light(width: float, depth: float) -> Call:
            made = derive(full, inputs, width, None, depth, projection, seed, samples).light
            return calls(made, inputs, "light")

        def measured(candidate: Candidate, seconds: float) -> float:
            bar.update(task, description=f"timing width {candidate.width:g}, depth {candidate.depth:g}")
            times = interleaved({"full": reference, "light": light(candidate.width, candidate.depth)}, seconds)
            return times["light"].p50 / times["full"].p50

        return search(candidates(full, projection, samples), target, runtime, measured)


def candidates(full: fx.GraphModule, projection: bool = True, samples: int = 1) -> tuple[tuple[Candidate, ...], ...]:
    """For each depth that leaves out other branches, the light paths of each width that differ, by rising MACs."""
    whole = max(1, analyse(full, samples=samples).macs())
    found: dict[tuple[str, ...], tuple[Candidate, ...]] = {}
    for depth in DEPTHS:
        region, dropped = shallower(full, depth)
        if dropped in found:
            continue
        axes = analyse(region, samples=samples)
        sized: dict[int, Candidate] = {}
        for width in WIDTHS:
            macs = axes.macs(*decide(axes, width, projection))
            sized.setdefault(macs, Candidate(width, depth if dropped else 1.0, macs / whole))
        found[dropped] = tuple(sized[macs] for macs in sorted(sized))
    return tuple(found.values())


def search(ladders: Sequence[Sequence[Candidate]], target: float, runtime: str, measured: Measured) -> LatencyFit:
    """The candidate of most MACs with at most `target`, by bisection in each ladder, which rises in MACs and latency.

    In each ladder only what has more MACs than the best so far is looked at. What is taken has kept within the target
    twice, the second time timed for longer. Raises OptionError when none does.
    """
    tried: list[Candidate] = []

    def within(candidate: Candidate) -> bool:
        tried.append(candidate.timed(measured(candidate, SECONDS)))
        return tried[-1].share <= target

    best = 0.0
    for ladder in ladders:
        wider = [candidate for candidate in ladder if candidate.macs > best]
        if not wider or not within(wider[0]):
            continue
        low, high = 0, len(wider)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(wider[middle]) else (low, middle)
        best = wider[low].macs
    fast = [candidate for candidate in tried if candidate.share <= target]
    for candidate in sorted(fast, key=lambda each: -each.macs):
        again = candidate.timed(measured(candidate, CONFIRMED * SECONDS))
        tried[tried.index(candidate)] = again
        if again.share <= target:
            return LatencyFit(target, runtime, again, tuple(tried))
    least = min(tried, key=lambda each: each.share)
    raise OptionError(
        f"latency {target:g} cannot be reached in {runtime}: the fastest light path found (width {least.width:g}, "
        f"depth {least.depth:g}) takes {least.share:.3f} of the full region's time; ask for more than that, cut "
        "earlier, or take light 'exit' or 'head'."
    )


def _on_tensors(region: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The region with tensors as inputs only: the numbers among them are those of the example."""
    own, graph = empty_graph_module("Region"), fx.Graph()
    own.add_module("region", region)
    given = [
        graph.placeholder(f"input_{at}") if isinstance(value, Tensor) else value for at, value in enumerate(inputs)
    ]
    graph.output(graph.call_module("region", tuple(given)))
    own.graph = graph
    return own


def _eager(region: nn.Module, inputs: Sequence[Any], name: str) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return region(*inputs)

    return call


def _onnxruntime(region: fx.GraphModule, inputs: Sequence[Any], name: str) -> Call:
    require_onnx("latency in onnxruntime")
    from .onnx_graph import part_model
    from .programs import exported_part as exported

    tensors = tuple(value for value in inputs if isinstance(value, Tensor))
    names = tuple(f"input_{at}" for at in range(len(tensors)))
    outputs = tuple(f"output_{at}" for at in range(len(list(region.graph.nodes)[-1].args[0])))
    program = exported(_on_tensors(region, inputs), tensors, tuple({} for _ in tensors), names, outputs, name)
    runner = session(part_model(program, name))
    feed = {name: value.numpy() for name, value in zip(names, tensors, strict=True)}
    return partial(runner.run, None, feed)


_CALLS: dict[str, Callable[[fx.GraphModule, Sequence[Any], str], Call]] = {
    "onnxruntime": _onnxruntime,
    "eager": _eager,
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
