"""The parts of a split network on one machine, with a real wire between them: single inputs, batches and streams."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..errors import OptionError, one_line
from . import manifest, wire
from .layout import Layout
from .listening import Paths, segments
from .result import Result, Statistics, Taken
from .session import Session
from .stream import Stream, piece

Route = Literal["light", "full"]
UNSENT = "none"  # in place of a number: nothing is encoded, all parts are on one processor


class Runner:
    """Runs a folder that `dslify export --split` wrote. front and light are the small processor's, full the big one's.

    threshold: in place of the exported one; may be set at any time. threads: of each part. on_wake, on_sleep: called in
    a stream before its first full answer and whenever the route changes. lazy: load full at its first use. number: how
    what is sent is rounded (wire.NUMBERS), in place of the exported word; "none" where full is on the same processor
    as well, and nothing is encoded or counted as sent.

    What full reads is encoded to bytes and decoded again, so its answers are those of a device; light, on the same
    processor as front, reads the exact values. Raises ExportError for a folder that is damaged or none of ours.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        threshold: float | None = None,
        threads: int = 1,
        on_wake: Callable[[], None] | None = None,
        on_sleep: Callable[[], None] | None = None,
        lazy: bool = True,
        number: str | None = None,
    ):
        self.manifest, self._files = manifest.read(Path(folder))
        self.threshold = self.manifest.threshold if threshold is None else float(threshold)
        self.number = self.manifest.number if number is None else number
        if self.number not in (*wire.NUMBERS, UNSENT):
            raise OptionError(
                f"Numbers on the wire are one of {', '.join(wire.NUMBERS)}, or {UNSENT}; got {self.number!r}."
            )
        self.on_wake, self.on_sleep = on_wake, on_sleep
        self.statistics = Statistics()
        self._threads = threads
        self._front, self._light = (Session(self._files[part], threads) for part in ("front", "light"))
        self._full: Session | None = None
        self._new: Session | None = None  # front for listen()
        if not lazy:
            self.load_full()

    @property
    def full_loaded(self) -> bool:
        return self._full is not None

    def load_full(self) -> Session:
        """The full part, loaded if it was not."""
        if self._full is None:
            self._full = Session(self._files["full"], self._threads)
        return self._full

    @property
    def seconds(self) -> float:
        """Spent inside all parts so far; the rest of what a call takes is Python's."""
        parts = (self._front, self._light, self._full, self._new)
        return sum(part.seconds for part in parts if part is not None)

    def run(self, *arrays: Any, route: Route | None = None) -> Result:
        """One call on any number of samples, which go light only if all of them may, as in the one-file model.

        arrays: the network's inputs, batch first. route: takes that path whatever the score. Raises OptionError for
        arrays that the network does not take.
        """
        values, score = self._scored(arrays)
        taken = self._taken(score, route)
        return self._answered(values, score, np.full(len(score), bool(taken.all())))

    def run_batch(self, *arrays: Any, route: Route | None = None) -> Result:
        """One call in which every sample takes its own path: gathered, each path run on its part, put back in order.

        Samples that cannot be told apart take one path, as in run(). A model of one sample per call is called for each.
        """
        batch = self._batch(arrays)
        if not self.manifest.routable or batch == 1 or (self.manifest.batch or 1) > 1:
            return self.run(*arrays, route=route)
        if self.manifest.batch is None:
            values, score = self._scored(arrays)
            return self._answered(values, score, self._taken(score, route), self.manifest.each)
        return self._one_by_one([np.asarray(array) for array in arrays], batch, route)

    def stream(self, segments: Iterable[Any], route: Route | None = None) -> Iterator[Result]:
        """run() on one segment after the other: arrays, or tuples of them for a network of several inputs.

        `statistics` counts from the start of the latest stream. The big processor sleeps when it begins, and is sent
        to sleep when it ends.
        """
        with self._waking() as woken:
            for segment in segments:
                values, score = self._scored(segment if isinstance(segment, tuple) else (segment,))
                light = bool(self._taken(score, route).all())
                woken(not light)
                result = self._answered(values, score, np.full(len(score), light))
                self.statistics = self.statistics.after(result)
                yield result

    def listen(self, chunks: Iterable[Any], route: Route | None = None) -> Iterator[Result]:
        """One sound that goes on: a result for each of its segments, the last of which may be shorter.

        chunks: arrays, pieces of the network's input of any length along the axis that goes on. The outputs, one after
        the other, are those of one call on the whole sound, but that every segment takes its own path; of several
        samples all must go the same way, as in run(). A segment is answered as soon as all is there that it depends
        on. bytes_sent counts the frames of the activation that full has not been sent yet: after a stretch of light
        segments those that it is warmed up with, too. `statistics` and the hooks are as in stream().

        Raises OptionError for a folder of a network that was not made to be routed by segments, or for chunks that do
        not fit.
        """
        stream = self.manifest.stream
        if stream is None:
            raise OptionError(
                "This network was exported to be routed by whole inputs; call dslify.route_every(net, entries) before "
                "dslify export --split, or give whole inputs to stream()."
            )
        paths = Paths(stream, self._path("light"), self._path("full"), self._sent)
        self._new = self._new or Session(self._files[manifest.STREAM], self._threads)
        with self._waking() as woken:
            for segment in segments(stream, (self._chunk(stream, chunk) for chunk in chunks), self._heard):
                light = bool(self._taken(segment.score, route).all())
                woken(not light)
                outputs, message, sent = paths.answer(segment, light)
                own = piece(segment.masked, stream.cut_axis, 0, stream.frames)
                dense = (wire.dense_bytes((message if message is not None else own,), each) for each in (4, 1))
                taken = np.full(len(segment.score), light)
                result = Result(outputs, _route(taken), segment.score, taken, sent, *dense)
                self.statistics = self.statistics.after(result, wire.dense_bytes((own,)))
                yield result

    @contextmanager
    def _waking(self) -> Iterator[Callable[[bool], None]]:
        """A new stream, in which the function it gives is told of each call whether full runs."""
        self.statistics = Statistics()
        awake = False

        def woken(full: bool) -> None:
            nonlocal awake
            if full != awake:
                awake = full
                if hook := self.on_wake if full else self.on_sleep:
                    hook()

        try:
            yield woken
        finally:
            woken(False)

    def _chunk(self, stream: Stream, given: Any) -> np.ndarray:
        """A piece of the sound, checked. Raises OptionError."""
        entry, array = self.manifest.inputs[0], np.asarray(given)
        sizes: list[int | None] = list(entry.shape)
        sizes[self.manifest.entering[0].axis or 0], sizes[stream.axis] = self.manifest.batch, None
        wanted, same = np.dtype(entry.dtype), array.ndim == len(sizes)
        same = same and all(size in (None, have) for size, have in zip(sizes, array.shape, strict=True))
        if not same or array.dtype.kind != wanted.kind:
            shape = " x ".join("any" if size is None else str(size) for size in sizes)
            got = f"{' x '.join(map(str, array.shape)) or 'a number'} of {array.dtype}"
            raise OptionError(f"A piece of the input {entry.name} is an array of {shape} {wanted} numbers; got {got}.")
        return np.asarray(array, wanted)

    def _heard(self, entries: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """front for listening.segments."""
        session = cast(Session, self._new)
        given = (entries, np.array([first]), np.array([last]))
        masked, score = _run(session, dict(zip(session.inputs, given, strict=True)))
        return masked, score

    def _path(self, name: Literal["light", "full"]) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
        def call(masked: np.ndarray) -> Sequence[np.ndarray]:
            session = self._light if name == "light" else self.load_full()
            return _run(session, {session.inputs[0]: masked})

        return call

    def _sent(self, masked: np.ndarray) -> tuple[np.ndarray, int]:
        """(what full gets of frames of the masked activation, bytes of the message)"""
        if not masked.size:
            return masked, 0
        read, size = self._crossed("full", {next(iter(self.manifest.sent)): masked})
        return next(iter(read.values())), size

    def _scored(self, arrays: tuple[Any, ...]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(masked and passed by name, score)"""
        values = dict(zip(self._front.outputs, self._front(self._front.named(arrays)), strict=True))
        return values, values.pop("score")

    def _taken(self, score: np.ndarray, route: Route | None) -> np.ndarray:
        if route not in (None, "light", "full"):
            raise OptionError(f"route is light or full, or None to let the score decide; got {route!r}.")
        if route is not None:
            return np.full(len(score), route == "light")
        return score < np.float32(self.threshold)

    def _answered(
        self, values: dict[str, np.ndarray], score: np.ndarray, taken: np.ndarray, each: tuple[str, ...] = ()
    ) -> Result:
        """The outputs, each sample by the path that `taken`, (batch,) bool, gives it.

        each: parts that get one sample at a time.
        """
        sent = 0
        parts: list[tuple[np.ndarray, Sequence[np.ndarray]]] = []
        for name, index in (("light", np.flatnonzero(taken)), ("full", np.flatnonzero(~taken))):
            for some in np.array_split(index, len(index)) if name in each and len(index) else [index]:
                if len(some):
                    read, size = self._crossed(name, self._some(values, some, len(taken)))
                    parts.append((some, (self._light if name == "light" else self.load_full())(read)))
                    sent += size
        crossing = [values[name] for name in self.manifest.sent]
        dense = (wire.dense_bytes(crossing), wire.dense_bytes(crossing, 1))
        return Result(self._joined(parts, len(taken)), _route(taken), score, taken, sent, *dense)

    def _one_by_one(self, arrays: list[np.ndarray], batch: int, route: Route | None) -> Result:
        index = [np.array([at]) for at in range(batch)]
        singles = ([place.take(value, at) for place, value in self._entering(arrays)] for at in index)
        found = [self.run(*single, route=route) for single in singles]
        parts = list(zip(index, (one.outputs for one in found), strict=True))
        taken = np.concatenate([one.light_taken for one in found if one.light_taken is not None])
        score = np.concatenate([one.score for one in found if one.score is not None])
        sums = (sum(getattr(one, name) for one in found) for name in ("bytes_sent", "bytes_dense", "bytes_int8"))
        return Result(self._joined(parts, batch), _route(taken), score, taken, *sums)

    def _joined(self, parts: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], batch: int) -> tuple[np.ndarray, ...]:
        """The outputs of all samples, out of (index, outputs of these samples)."""
        if len(parts) == 1:
            return tuple(parts[0][1])
        return tuple(
            place.join([(index, found[at]) for index, found in parts], batch)
            for at, place in enumerate(self.manifest.leaving)
        )

    def _some(self, values: dict[str, np.ndarray], index: np.ndarray, batch: int) -> dict[str, np.ndarray]:
        if len(index) == batch:
            return values
        return {
            name: place.take(value, index)
            for place, (name, value) in zip(self.manifest.crossing, values.items(), strict=True)
        }

    def _crossed(self, part: str, values: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        """(what the part reads, bytes of the message): for full it has gone over the wire."""
        if part == "light" or self.number == UNSENT:
            return values, 0
        names = self.manifest.sent
        message = wire.encode([values[name] for name in names], self.number, list(names.values()))
        return dict(zip(names, wire.decode(message), strict=True)), len(message)

    def _batch(self, arrays: tuple[Any, ...]) -> int:
        if len(arrays) == len(self.manifest.entering):
            for place, array in self._entering([np.asarray(array) for array in arrays]):
                if place.axis is not None and array.ndim > place.axis:
                    return place.count(array) or 0
        return 1

    def _entering(self, arrays: list[np.ndarray]) -> Iterable[tuple[Layout, np.ndarray]]:
        return zip(self.manifest.entering, arrays, strict=True)


def _run(session: Session, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """A call in a sound that goes on. Raises OptionError."""
    try:
        return session(values)
    except Exception as error:  # its errors have no common base
        raise OptionError(
            f"ONNX Runtime refuses a part of the sound, which may be too short for the network ({one_line(error)}); "
            "give a longer one."
        ) from None


def _route(taken: np.ndarray) -> Taken:
    return "light" if taken.all() else "mixed" if taken.any() else "full"
