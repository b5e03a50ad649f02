"""Routing a long sequence segment by segment, exactly: each path sees a segment and as much around it as it reads.

A path that takes over in the middle of a sequence must know what came before, or its first answers are those of a
sequence that starts there. So it runs on a window, the masked activation of the segment with `before` entries in front
and `after` behind (dslify.receptive reckons both from the graph), and only what it answers for the segment is kept.
That is the answer it gives there on the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import OptionError
from .layout import Layout, Stretch


class Window(NamedTuple):
    """One segment, in entries of the cut: the path sees begin ... end, and start ... stop of its answer is kept.

    last: of the sequence, whose answer is kept to its end. edge: whether the path sees the end of the sequence.
    """

    begin: int
    start: int
    stop: int
    end: int
    last: bool
    edge: bool

    @property
    def shape(self) -> tuple[int, int, int, bool, bool]:
        """Alike for windows that can run as one batch."""
        return (self.end - self.begin, self.start - self.begin, self.stop - self.start, self.last, self.edge)


@dataclass(frozen=True)
class Segments:
    """How a layer cuts sequences into segments that it routes one by one. Everything but `entries` is in entries of the
    cut's value along its time axis.

    entries: of the network's input in one segment. frames: the same segment at the cut. axis: of time, in the cut.
    before, after: what either path reads around a segment, multiples of step. step: where a path may begin; it divides
    frames. inputs, outputs: of (cut, *crossing), and of what leaves the region. Raises OptionError for what cannot be.
    """

    entries: int
    frames: int
    axis: int
    before: int
    after: int
    step: int
    inputs: tuple[Stretch, ...]
    outputs: tuple[Stretch, ...]

    def __post_init__(self) -> None:
        least = {"entries": 1, "frames": 1, "axis": 0, "before": 0, "after": 0, "step": 1}
        for name, lowest in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < lowest:
                raise OptionError(f"{name} of a segment must be at least {lowest}; got {getattr(self, name)!r}.")
        for name in ("frames", "before", "after"):
            if getattr(self, name) % self.step:
                raise OptionError(
                    f"{name} of a segment must be a multiple of the step, {self.step}; got {getattr(self, name)}."
                )
        if any(self.step * out.times % out.per or out.axis is None or not out.times for out in self.outputs):
            raise OptionError("Every output of a region that is routed by segments has to run with the cut's time.")

    @property
    def words(self) -> str:
        """As a sentence says it."""
        return (
            f"by segments of {self.entries} entries of the input, {self.frames} at the cut; a path also sees "
            f"{self.before} before and {self.after} after"
        )

    def count(self, value: Tensor) -> int:
        """Segments in each sample of the cut's value; a sequence shorter than a segment is one."""
        return max(1, -(-value.shape[self.axis] // self.frames))

    def remainder(self, value: Tensor) -> int:
        """Entries of a last segment that is shorter than the others, 0 where none is."""
        length = value.shape[self.axis]
        return length % self.frames if length > self.frames else 0

    def whole(self, value: Tensor) -> int:
        """count(value). Raises OptionError where the last segment is shorter than the others."""
        if odd := self.remainder(value):
            raise OptionError(
                f"Training, calibrating and measuring take whole segments of {self.entries} entries of the network's "
                f"input; this one ends in {odd} of the {self.frames} entries that a segment has at the cut. Give "
                f"inputs of a multiple of {self.entries}, or turn segments off with route_every(net, None)."
            )
        return self.count(value)

    def windows(self, length: int) -> tuple[Window, ...]:
        """Those of a sequence of `length` entries."""
        found = []
        for start in range(0, max(length, 1), self.frames):
            stop, last = min(start + self.frames, length), start + self.frames >= length
            begin, end = max(0, start - self.before), length if last else min(length, stop + self.after)
            found.append(Window(begin, start, stop, end, last, end == length))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Segments:
        """The inverse of to_json."""
        stretches = {name: tuple(Stretch(**each) for each in data[name]) for name in ("inputs", "outputs")}
        return cls(**{**data, **stretches})


Path = Callable[..., tuple[Any, ...]]
Rows = list[tuple[int, Window]]  # (sample, window)


def routed(
    segments: Segments,
    paths: tuple[Path, Path],
    inputs: Sequence[Any],
    chosen: Sequence[bool],
    entering: Sequence[Layout],
    leaving: Sequence[Layout],
) -> tuple[Tensor, ...]:
    """What leaves the region when every segment takes its own path.

    paths: full and light. inputs: (masked cut, *crossing). chosen: of every segment whether it goes light, those of a
    sample one after the other. entering, leaving: where inputs and outputs keep their samples. Windows of one shape on
    one path run as one batch.
    """
    windows = segments.windows(inputs[0].shape[segments.axis])
    batch = len(chosen) // len(windows)
    groups: dict[tuple[bool, Any], Rows] = {}
    for at, light in enumerate(chosen):
        window = windows[at % len(windows)]
        groups.setdefault((light, window.shape), []).append((at // len(windows), window))
    found: list[tuple[Rows, list[Tensor]]] = []
    for (light, _), rows in sorted(groups.items(), key=lambda group: group[0]):  # full answers set the type
        given = [_taken(*each, rows, batch) for each in zip(inputs, entering, segments.inputs, strict=True)]
        answers = zip(paths[light](*given), segments.outputs, strict=True)
        found.append((rows, [_kept(answer, out, rows[0][1]) for answer, out in answers]))
    return tuple(
        _joined([(rows, pieces[at]) for rows, pieces in found], batch, layout.axis or 0, out)
        for at, (layout, out) in enumerate(zip(leaving, segments.outputs, strict=True))
    )


def _taken(value: Any, layout: Layout, stretch: Stretch, rows: Rows, batch: int) -> Any:
    """An input of the region as the windows `rows`, which are of one shape, see it: one row of the batch for each."""
    window = rows[0][1]
    size = stretch.size(window.end - window.begin)
    if not isinstance(value, Tensor):
        if layout.scales:
            return value // batch * len(rows)
        if not stretch.times:
            return value
        return value - stretch.at(window.begin) if window.edge else size
    if layout.axis is None:
        return value
    if stretch.axis is None:
        return value.index_select(layout.axis, _samples(rows, value.device))
    if window.edge:
        size = value.shape[stretch.axis] - stretch.at(window.begin)
    places = _places([stretch.at(each.begin) for _, each in rows], size, value.device)
    picked = value.movedim((layout.axis, stretch.axis), (0, 1))[_samples(rows, value.device)[:, None], places]
    return picked.movedim((0, 1), (layout.axis, stretch.axis)).contiguous()


def _kept(answer: Tensor, out: Stretch, window: Window) -> Tensor:
    """Of a window's answer what belongs to its segment."""
    axis, first = out.axis or 0, out.at(window.start) - out.at(window.begin)
    stop = answer.shape[axis] if window.last else out.at(window.stop) - out.at(window.begin)
    return answer.narrow(axis, first, stop - first)


def _joined(pieces: list[tuple[Rows, Tensor]], batch: int, batch_axis: int, out: Stretch) -> Tensor:
    """An output of the region: its pieces, each put where its segment lies."""
    axis, shape = out.axis or 0, list(pieces[0][1].shape)
    ends = (out.at(rows[0][1].start) + piece.shape[axis] for rows, piece in pieces if rows[0][1].last)
    shape[batch_axis], shape[axis] = batch, max(ends)
    whole = pieces[0][1].new_empty(shape)
    by_time = whole.movedim((batch_axis, axis), (0, 1))
    for rows, piece in pieces:
        places = _places([out.at(each.start) for _, each in rows], piece.shape[axis], piece.device)
        moved = piece.movedim((batch_axis, axis), (0, 1)).to(whole.dtype)
        by_time[_samples(rows, piece.device)[:, None], places] = moved
    return whole


def _samples(rows: Rows, device: torch.device) -> Tensor:
    return torch.tensor([sample for sample, _ in rows], device=device)


def _places(first: Sequence[int], size: int, device: torch.device) -> Tensor:
    """`size` entries from each of the first ones on, (rows, size)."""
    return torch.tensor(first, device=device)[:, None] + torch.arange(size, device=device)


class Routed(Protocol):
    """What by_segment reads of a layer."""

    segments: Segments | None
    outputs: tuple[Layout, ...]


def by_segment(layer: Routed, values: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs of a layer's region with one row per segment, (batch * segments, ...), those of a sample one after
    the other; the axes stay where they are.

    values: one per output, of the whole sequence. Without segments they come back as they are. Raises OptionError
    where a sequence is no whole number of segments.
    """
    segments = layer.segments
    if segments is None:
        return tuple(values)
    found = []
    for value, layout, out in zip(values, layer.outputs, segments.outputs, strict=True):
        batch_axis, axis = layout.axis or 0, out.axis or 0
        size, length = out.at(segments.frames), value.shape[axis]
        if length > size and length % size:
            raise OptionError(
                f"An answer of {length} entries is no whole number of segments, which have {size}; give inputs of a "
                f"multiple of {segments.entries} entries, or turn segments off with route_every(net, None)."
            )
        moved = value.movedim((batch_axis, axis), (0, 1))
        rows = moved.reshape(-1, min(size, length), *moved.shape[2:])
        found.append(rows.movedim((0, 1), (batch_axis, axis)))
    return tuple(found)
