"""What routing saves in time: a stream of real segments through the exported split and through eager PyTorch.

Every stream runs in turn with all others in one measurement, on one thread: always full, always light, and mixed with
thresholds that send 80 % and 30 % of these very segments light. Beside each measured mixture stands the computed one,

    share * light + (1 - share) * full

which is all that the paper gives (Table 1, arXiv 2404.04405). All parts are on one processor: nothing is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

import dslify
from dslify.clock import streamed
from dslify.errors import DataError
from dslify.parts import Scored, parts_of
from dslify.programs import host_graph
from dslify.runtime import Runner
from dslify.runtime.listening import Paths, segments
from dslify.runtime.stream import Stream
from dslify.samples import show_progress
from dslify.split_stream import base_of
from dslify.tables import percent
from recipes.claims import Line
from recipes.soundstream.sound import Sound, find_recordings
from recipes.soundstream.work import SEGMENT, SILENCE_SHARE, SPEECH_SHARE, Work

KINDS = ("speech", "silence", "ambient")
LEAST_SEGMENTS = 400
RATE = 16_000
SIZES = (SEGMENT // 2, SEGMENT, 2 * SEGMENT)  # samples in a segment, for the table at the side
SECONDS, SIDE_SECONDS = 60.0, 20.0  # of the two measurements
CLOSE = 0.05  # how far a measured stream may be from the computed mixture
SAVED = {SILENCE_SHARE: 0.40, SPEECH_SHARE: 0.12}  # of always full, that ONNX Runtime has to show

Samples = NDArray[np.float32]


@dataclass
class Clocked:
    """One stream, as calls for dslify.clock: each takes the next segment.

    listen: begins the stream, and ends it with the last segment. inside: seconds so far inside the sessions. spent: of
    every round, by place.
    """

    listen: Callable[[], Iterator[Any]]
    count: int
    inside: Callable[[], float] = lambda: 0.0
    spent: list[list[float]] = field(default_factory=list)

    def calls(self) -> tuple[Callable[[], Any], ...]:
        self.spent = [[] for _ in range(self.count)]
        return tuple(self._at(place) for place in range(self.count))

    def _at(self, place: int) -> Callable[[], Any]:
        def call() -> None:
            if not place:
                self._going = self.listen()
            before = self.inside()
            next(self._going)
            self.spent[place].append(self.inside() - before)

        return call

    def mean_inside(self) -> float:
        """Seconds a segment, each place by its median; the first round warmed up."""
        return sum(median(times[1:]) for times in self.spent) / self.count


def run(work: Work) -> dict[str, Any]:
    """Export the main variant, measure, and write latency.json."""
    torch.set_num_threads(1)
    net = work.net()
    sound = test_sound(work.data)
    with show_progress(None) as bars:
        found = measured(net, sound, work.folder / "export", bars, SECONDS)
        found["sizes"] = by_size(work.net(), sound, work.folder / "export", bars, SIDE_SECONDS)
    found["verdict"] = [line.to_json() for line in lines(found)]
    work.write("latency.json", found)
    return found


def test_sound(data: Path) -> Samples:
    """Speech, silence and ambient sound of the test files one after the other: (1, 1, samples), whole segments of every
    size. Raises DataError for less than LEAST_SEGMENTS."""
    recordings = [one for one in find_recordings(data, "test") if one.label in KINDS]
    joined = np.concatenate([np.zeros(0, np.float32), *(samples for _, samples in Sound(recordings).usable())])
    whole = len(joined) // SIZES[-1] * SIZES[-1]
    if whole < LEAST_SEGMENTS * SEGMENT:
        raise DataError(
            f"{data} has {whole / RATE:.0f} s of test sound labelled {', '.join(KINDS)}; measuring a stream takes "
            f"{LEAST_SEGMENTS * SEGMENT / RATE:.0f} s."
        )
    return joined[None, None, :whole]


def exported(net: nn.Module, folder: Path, entries: int) -> Runner:
    """The network's split export, whose parts are all on this processor."""
    dslify.route_every(net, entries)
    folder.parent.mkdir(parents=True, exist_ok=True)
    dslify.export(net, folder, split=True, force=True, progress=False)
    return Runner(folder, number="none", lazy=False)


def measured(net: nn.Module, sound: Samples, folder: Path, bars: Progress, seconds: float) -> dict[str, Any]:
    """Both runtimes in one measurement."""
    count = sound.shape[-1] // SEGMENT
    task = bars.add_task("exporting the parts", total=1.0)
    runner = exported(net, folder, SEGMENT)
    stream = runner.manifest.stream
    if stream is None:
        raise DataError(f"{folder} cannot take a sound that goes on; export the network with dslify.route_every set.")
    eager = eager_stream(net, stream)

    def in_runtime(threshold: float) -> Iterator[Any]:
        runner.threshold = threshold
        return runner.listen([sound])

    def in_eager(threshold: float) -> Iterator[Any]:
        return eager(threshold, [sound])

    scores = [float(one.score[0]) for one in in_runtime(math.inf) if one.score is not None]
    limits = thresholds(scores)
    _, graph = host_graph(net)
    whole = torch.from_numpy(sound)
    streams: dict[tuple[str, str], Clocked] = {
        (way, name): Clocked(partial(listen, at), count, lambda: runner.seconds)
        for way, listen in (("onnx", in_runtime), ("eager", in_eager))
        for name, at in limits.items()
    }
    calls: dict[tuple[str, str], Sequence[Callable[[], Any]]] = {name: one.calls() for name, one in streams.items()}
    calls["onnx", "one call"] = (lambda: runner.run(sound, route="full"),)
    calls["eager", "one call"] = (lambda: _whole(graph, whole),)
    bars.update(task, description="streams in turn")
    times = streamed(calls, seconds, warmup=1, gone=lambda share: bars.update(task, completed=share))
    second = RATE / SEGMENT
    shares = {name: sum(score < at for score in scores) / count for name, at in limits.items()}
    inside = {name: streams["onnx", name].mean_inside() * second for name in limits}
    looped = {way: {name: times[way, name].mean * second for name in limits} for way in ("onnx", "eager")}
    length = sound.shape[-1] / RATE
    return {
        "segments": count,
        "segment_seconds": SEGMENT / RATE,
        "rounds": len(streams["onnx", "full"].spent[0]) - 1,
        "shares": shares,
        "runtimes": {
            "ONNX Runtime, inside the sessions": rows(inside, shares),
            "ONNX Runtime, with the loop in Python": rows(looped["onnx"], shares),
            "PyTorch, eager": rows(looped["eager"], shares),
        },
        "one_call_us": {way: times[way, "one call"].p50 / length * 1e6 for way in ("onnx", "eager")},
    }


def thresholds(scores: Sequence[float]) -> dict[str, float]:
    """By the name of the stream; the mixed ones are quantiles of these scores."""
    shares = {f"mixed, {percent(share)} light": share for share in SAVED}
    quantiles = {name: float(np.quantile(scores, share)) for name, share in shares.items()}
    return {"full": -math.inf, "light": math.inf, **quantiles}


def rows(seconds: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """seconds: for a second of sound, by stream. us, saved of always full, and what the mixture comes to by reckoning;
    off: how much longer than that a stream took."""
    full, light = seconds["full"], seconds["light"]
    found = {}
    for name, took in seconds.items():
        computed = shares[name] * light + (1 - shares[name]) * full
        found[name] = {
            "us": took * 1e6,
            "saved": 1 - took / full,
            "share_light": shares[name],
            "computed_us": computed * 1e6,
            "computed_saved": 1 - computed / full,
            "off": took / computed - 1,
        }
    return found


def eager_stream(net: nn.Module, stream: Stream) -> Callable[[float, Iterable[Samples]], Iterator[Any]]:
    """The same loop over the same windows, with PyTorch's modules in place of sessions."""
    _, graph = host_graph(net)
    parts = parts_of(graph)
    base, scored = base_of(parts.front, parts.layer), Scored(parts.layer)

    @torch.inference_mode()
    def front(entries: Samples, first: int, last: int) -> tuple[NDArray[Any], NDArray[Any]]:
        masked = base(torch.from_numpy(entries))[0][..., first:last]
        return masked.numpy(), scored.score(masked[..., : stream.frames]).numpy()

    def path(module: nn.Module) -> Callable[[NDArray[Any]], list[NDArray[Any]]]:
        @torch.inference_mode()
        def call(masked: NDArray[Any]) -> list[NDArray[Any]]:
            return [value.numpy() for value in module(torch.from_numpy(masked))]

        return call

    def listen(threshold: float, chunks: Iterable[Samples]) -> Iterator[Any]:
        paths = Paths(stream, path(parts.light), path(parts.full), lambda masked: (masked, 0))
        for segment in segments(stream, chunks, front):
            yield paths.answer(segment, light=bool(segment.score[0] < threshold))

    return listen


@torch.inference_mode()
def _whole(graph: nn.Module, sound: torch.Tensor) -> None:
    with dslify.route(graph, "full"):
        graph(sound)


def by_size(net: nn.Module, sound: Samples, folder: Path, bars: Progress, seconds: float) -> dict[str, Any]:
    """Inside ONNX Runtime's sessions, for segments of other lengths."""
    task = bars.add_task("segments of other lengths", total=1.0)
    streams: dict[tuple[int, str], Clocked] = {}
    for size in SIZES:
        place = folder if size == SEGMENT else folder.with_name(f"{folder.name}-{size}")
        runner = exported(net, place, size)

        def listen(threshold: float, runner: Runner = runner) -> Iterator[Any]:
            runner.threshold = threshold
            return runner.listen([sound])

        scores = [float(one.score[0]) for one in listen(math.inf) if one.score is not None]
        for name, at in thresholds(scores).items():
            inside = partial(getattr, runner, "seconds")
            streams[size, name] = Clocked(partial(listen, at), sound.shape[-1] // size, inside)
    calls = {name: one.calls() for name, one in streams.items()}
    streamed(calls, seconds, warmup=1, gone=lambda share: bars.update(task, completed=share))
    found: dict[str, Any] = {}
    for size in SIZES:
        took = {name: one.mean_inside() * RATE / size for (of, name), one in streams.items() if of == size}
        row = {name: {"us": each * 1e6, "saved": 1 - each / took["full"]} for name, each in took.items()}
        found[f"{size / RATE:g} s"] = row
    return found


def lines(found: Mapping[str, Any]) -> list[Line]:
    """What ONNX Runtime has to show, by the time inside its sessions."""
    inside, looped, _ = found["runtimes"].values()
    verdict = []
    for name, least in zip((name for name in inside if name.startswith("mixed")), SAVED.values(), strict=True):
        said = f"{percent(looped[name]['saved'])} with the loop in Python"
        verdict += [
            Line(f"saved, {name}", {"value": inside[name]["saved"]}, ">=", least, said),
            Line(f"measured against computed, {name}", {"value": abs(inside[name]["off"])}, "<=", CLOSE),
        ]
    return verdict
