"""One sound that goes on, through the parts of a split network: a decision for each segment, exact at every border.

The base runs on what is new and as much before it as it looks back; of the masked activation the newest frames are
kept, and a path that takes over is given those that it looks back on. What is dropped of its answer is what the other
path has answered already. At the very start there is nothing before, and what the network pads with is all that the
parts get: zeros in place of the missing sound would be something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .stream import Held, Stream, piece

Front = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
Path = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Segment:
    """What the base makes of a segment.

    masked: its frames of the masked activation, and those that light and full see behind it; begin: the place of the
    first, place: that of the segment among all. last: nothing comes after it.
    """

    place: int
    begin: int
    masked: np.ndarray
    score: np.ndarray
    last: bool


def segments(stream: Stream, chunks: Iterable[np.ndarray], front: Front) -> Iterator[Segment]:
    """The segments of a sound that comes in pieces of any length, each as soon as all is there that it depends on.

    front: (entries, first, last) -> (frames `first` to `last` of what the base makes of them, score (batch,) of the
    first `stream.frames` of these).
    """
    sound, place = Held(stream.axis), 0
    for chunk in chunks:
        sound.put(sound.end, chunk)
        while sound.end >= (place + 1) * stream.entries + stream.delay:
            yield _segment(stream, sound, place, front, None)
            place += 1
            sound.forget(place * stream.entries - stream.lookback)
    if sound.end > place * stream.entries:
        yield from _rest(stream, sound, place, front)


def _rest(stream: Stream, sound: Held, place: int, front: Front) -> Iterator[Segment]:
    """The segments that the end of the sound completes, the last of them shorter. How many frames the sound has is only
    known to the base, which may pad at its end."""
    begin = max(0, place * stream.entries - stream.lookback)
    all_of_it = front(sound.since(begin), 0, np.iinfo(np.int64).max)[0].shape[stream.cut_axis]
    count = stream.frames_of(begin) + all_of_it
    while place * stream.frames < count:
        yield _segment(stream, sound, place, front, count)
        place += 1


def _segment(stream: Stream, sound: Held, place: int, front: Front, count: int | None) -> Segment:
    """count: frames of the whole sound, None while it goes on."""
    begin = max(0, place * stream.entries - stream.context)
    skipped = place * stream.frames - stream.frames_of(begin)
    window = sound.since(begin, (place + 1) * stream.entries + stream.delay)
    masked, score = front(window, skipped, skipped + stream.frames + stream.cut_after)
    last = count is not None and (place + 1) * stream.frames >= count
    return Segment(place, place * stream.frames, masked, score, last)


class Paths:
    """Light, on the processor that makes the masked activation, and full, on one that has of it what it was sent.

    light, full: frames of the masked activation -> outputs. send: frames -> (these as full gets them, bytes of the
    message).
    """

    def __init__(self, stream: Stream, light: Path, full: Path, send: Callable[[np.ndarray], tuple[np.ndarray, int]]):
        self._stream, self._light, self._full, self._send = stream, light, full, send
        self._near, self._far = Held(stream.cut_axis), Held(stream.cut_axis)

    def answer(self, segment: Segment, light: bool) -> tuple[tuple[np.ndarray, ...], np.ndarray | None, int]:
        """(outputs for a segment, the frames that were sent for it, bytes of the message)"""
        stream = self._stream
        kept = max(0, segment.begin - stream.cut_lookback)
        whole = segment.masked.shape[stream.cut_axis] == stream.frames + stream.cut_after
        begin = max(0, segment.begin - stream.warmup) if whole else kept
        self._near.forget(kept)
        self._near.put(segment.begin, segment.masked)
        if light:
            return self._own(segment, begin, self._light(self._near.since(begin))), None, 0
        missing = self._near.since(self._far.end if self._far.begin <= begin <= self._far.end else begin)
        read, size = self._send(missing)
        self._far.put(self._near.end - missing.shape[stream.cut_axis], read)
        self._far.forget(kept)
        return self._own(segment, begin, self._full(self._far.since(begin))), missing, size

    def _own(self, segment: Segment, begin: int, outputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """The segment's part of what a path makes of the frames from `begin` on."""
        stream = self._stream
        warm, own = (frames // stream.cut_step for frames in (segment.begin - begin, stream.frames))
        return tuple(
            piece(value, axis, warm * each, None if segment.last else (warm + own) * each)
            for (axis, each), value in zip(stream.outputs, outputs, strict=True)
        )
