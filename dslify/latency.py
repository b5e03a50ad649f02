"""How long a network with a layer takes on each route, and in a stream of which a given share goes light: measured."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from rich.progress import Progress
from torch import Tensor, fx, nn

from .capture import evaluating
from .checked import TOLERANCE, error
from .clock import streamed
from .cost import cost
from .data import open_data
from .device_engines import executorch, litert
from .energy import Profile, Rapl, Work, estimate, mixed, profile, rapl, work
from .engines import Engine, compiled, eager, onnxruntime
from .errors import ExportError, OptionError
from .fit_latency import threads as on_threads
from .measurement import Energy, Latency, Measurement
from .parts import parts_of
from .programs import example_of, host_graph
from .samples import show_progress

ENGINES: dict[str, Callable[[fx.GraphModule, int, bool], Engine]] = {
    "eager": eager, "compiled": compiled, "onnxruntime": onnxruntime, "executorch": executorch, "litert": litert,
}  # fmt: skip
USUAL = ("eager", "onnxruntime")
PARTS, WHOLE = ("front", "light", "full"), ("whole light", "whole full", "mixed")
LENGTHS = range(10, 31)  # samples in a stream; the least that comes nearest to the share
SEED = 0  # of random inputs, of which samples of the data are taken, and of their order
DRAWN_EVERY = 0.5  # s, at least, between two states of the progress bar: what is measured waits for it
BUSY = 2.0  # 90th percentile over median of what takes one way only; more, and the machine did other things
COUNTED = 0.5  # s, at least, that a route runs for a reading of the energy counters

Stream = list[Callable[[], Any]]


def measure(
    net: nn.Module,
    runtimes: Sequence[str] | None = None,
    *,
    threads: int = 1,
    share: float = 0.8,
    data: Any = None,
    seconds: float = 2.0,
    dynamic: bool = True,
    energy: Profile | str = "45nm-dram",
    progress: bool | None = None,
) -> Measurement:
    """Time a network with a layer, one sample at a time: its parts, each route, and a stream with samples of both.

    runtimes: of ENGINES; None takes those of USUAL that are installed and can hold the network. They are timed in turn,
    in one run of `seconds` for each. With `scope`, the captured submodule is timed.
    threads: of every runtime. share: of the stream's samples that go light, 0 to 1, as near as a stream of
    LENGTHS samples comes to it. data: all that open_data takes; those of its samples with the lowest scores go light.
    Without it the inputs are random, and so is which of them go light, by a fixed seed.
    dynamic: ONNX with the axes that the capture let vary. energy: the model for its estimate, see energy.profile.
    progress: a bar on stderr; None shows it where stderr is a terminal.

    Before it is timed, each runtime has to give the network's own answers on both routes. Raises OptionError for values
    out of range, ExportError for a runtime that cannot hold the network or answers otherwise.
    """
    if not 0 <= share <= 1:
        raise OptionError(f"share is 0 to 1; got {share}.")
    if threads < 1:
        raise OptionError(f"threads is a whole number of at least 1; got {threads}.")
    if unknown := [name for name in runtimes or () if name not in ENGINES]:
        raise OptionError(f"runtime is one of {', '.join(ENGINES)}; got {unknown[0]!r}.")
    assumed = energy if isinstance(energy, Profile) else profile(energy)
    _, graph = host_graph(net)
    length = min(LENGTHS, key=lambda count: abs(round(share * count) / count - share))
    share = round(share * length) / length
    with on_threads(threads), evaluating(net), torch.no_grad(), show_progress(progress) as bars:
        bars.live.auto_refresh = False  # its thread would take turns with what is measured
        inputs, light, routed = _stream_of(net, graph, data, length, round(share * length), progress)
        engines, notes = _engines(graph, inputs[0], runtimes, threads, dynamic, bars)
        streams = {
            (each.name, name): calls for each in engines for name, calls in _streams(each, inputs, light).items()
        }
        found = streamed(streams, seconds * len(engines), gone=_drawn(bars, "measuring"))
        counters = rapl()
        counted = None if isinstance(counters, str) else _counted(counters, streams)
        masked, _, *passed = parts_of(graph).front(*inputs[0])
    latencies = tuple(
        Latency(each.name, share, each.note, *(found[each.name, name] for name in (*PARTS, *WHOLE))) for each in engines
    )
    steady = (one for each in latencies for one in (each.front, each.light, each.full, each.whole_full))
    if any(one.p90 > BUSY * one.p50 for one in steady):
        notes.append("the machine did other things meanwhile: many calls took over twice the median; measure once more")
    front, on_light, on_full = work(net, cost(net))
    return Measurement(
        latencies,
        threads,
        share,
        length,
        routed,
        front,
        on_light,
        on_full,
        _bytes((masked, *passed)),
        _bytes(inputs[0]),
        _energy(assumed, latencies, on_light, on_full, share),
        counted,
        (*notes, counters) if isinstance(counters, str) else tuple(notes),
    )


def _stream_of(
    net: nn.Module, graph: fx.GraphModule, data: Any, length: int, count: int, progress: bool | None
) -> tuple[list[tuple[Tensor, ...]], list[bool], str]:
    """(the samples, which of them go light, how that was decided), `length` of them and `count` light."""
    order = random.Random(SEED)
    if data is None:
        light = [True] * count + [False] * (length - count)
        order.shuffle(light)
        inputs = [example_of(graph, seed=SEED + at) for at in range(length)]
        return inputs, light, "random inputs, of which a fixed seed says who goes light"
    samples = open_data(data, net, progress=progress)
    taken = [order.randrange(len(samples)) for _ in range(length)]
    if length <= len(samples):
        taken = order.sample(range(len(samples)), length)
    inputs = _entering(net, graph, [samples.batch([at]) for at in taken])
    front = parts_of(graph).front
    scores = [float(front(*each)[1].max()) for each in inputs]
    lowest = set(sorted(range(length), key=scores.__getitem__)[:count])
    return inputs, [at in lowest for at in range(length)], f"samples of {samples.report.origin}, lowest scores light"


def _entering(net: nn.Module, graph: fx.GraphModule, batches: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """What enters the captured graph, flat, for each of the network's inputs."""
    found: list[tuple[Tensor, ...]] = []

    def keep(_graph: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(tuple(leaf.clone() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

    handle = graph.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in batches:
            net(batch)
    finally:
        handle.remove()
    if len(found) != len(batches):
        raise ExportError(
            f"The captured submodule runs {len(found)} times for {len(batches)} samples; only one that runs once for "
            "each can be timed on data: leave the data out."
        )
    return found


def _engines(
    graph: fx.GraphModule,
    inputs: Sequence[Tensor],
    runtimes: Sequence[str] | None,
    threads: int,
    dynamic: bool,
    bars: Progress,
) -> tuple[list[Engine], list[str]]:
    """The runtimes, each with the network's own answers on both routes, and what there is to say of those left out."""
    names = list(dict.fromkeys(runtimes or USUAL))
    task = bars.add_task("preparing", total=len(names))
    own = eager(graph)
    made, notes = [], []
    for name in names:
        bars.update(task, description=f"preparing {name}", refresh=True)
        try:
            each = ENGINES[name](graph, threads, dynamic)
            _same(each, own, inputs)
            made.append(each)
        except ExportError as refusal:
            if runtimes is not None:
                raise
            notes.append(f"{name} is left out: {refusal}")
        bars.advance(task)
    return made, notes


def _same(one: Engine, own: Engine, inputs: Sequence[Tensor]) -> None:
    for light, way in ((True, "light"), (False, "full")):
        found, wanted = (_values(each.whole(each.arrays(inputs), light)) for each in (one, own))
        off = error(found, wanted)
        if not off <= TOLERANCE:
            raise ExportError(
                f"{one.name} answers otherwise than the network on the {way} route, by {off:.2g} of its largest value, "
                f"where at most {TOLERANCE:g} is allowed; its times would say nothing."
            )


def _values(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, (Tensor, np.ndarray))]


def _streams(one: Engine, inputs: Sequence[Sequence[Tensor]], light: Sequence[bool]) -> dict[str, Stream]:
    """The calls of every stream, by what is timed."""
    given = [one.arrays(each) for each in inputs]
    crossing = [one.front(each) for each in given]
    return {
        "front": [partial(one.front, each) for each in given],
        "light": [partial(one.light, each) for each in crossing],
        "full": [partial(one.full, each) for each in crossing],
        "whole light": [partial(one.whole, each, True) for each in given],
        "whole full": [partial(one.whole, each, False) for each in given],
        "mixed": [partial(one.whole, each, way) for each, way in zip(given, light, strict=True)],
    }


def _counted(counters: Rapl, streams: Mapping[tuple[str, str], Stream]) -> dict[str, dict[str, float]]:
    """J per sample by runtime and route, as the machine's counters have it."""
    found: dict[str, dict[str, float]] = {}
    for (runtime, name), calls in streams.items():
        if name in WHOLE:
            rounds = 0

            def run(calls: Stream = calls) -> None:
                nonlocal rounds
                end = time.perf_counter() + COUNTED
                while time.perf_counter() < end:
                    for call in calls:
                        call()
                    rounds += 1

            joules = counters.joules(run)
            found.setdefault(runtime, {})[name.removeprefix("whole ")] = joules / (rounds * len(calls))
    return found


def _energy(model: Profile, latencies: Sequence[Latency], light: Work, full: Work, share: float) -> Energy:
    """The estimate; static power is taken over the times of the runtime that is fastest on the full route."""
    fastest = min(latencies, key=lambda each: each.whole_full.mean)
    return Energy(
        model,
        fastest.runtime,
        estimate(light, model, fastest.whole_light.mean),
        estimate(full, model, fastest.whole_full.mean),
        estimate(mixed(light, full, share), model, fastest.mixed.mean),
    )


def _bytes(values: Sequence[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _drawn(bars: Progress, words: str) -> Callable[[float], None]:
    """What moves a bar, given the share that is over."""
    task, last = bars.add_task(words, total=1.0), 0.0

    def gone(share: float) -> None:
        nonlocal last
        if (now := time.perf_counter()) - last >= DRAWN_EVERY:
            last = now
            bars.update(task, completed=share, refresh=True)

    return gone
