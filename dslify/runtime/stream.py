"""How a network takes a sound that goes on: the "stream" of a manifest, and the windows that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stream:
    """Segments of one long input, each on a path of its own, with what the parts have to see around them.

    axis, entries: the input's axis that goes on, and its entries for one segment. step, before, after: the base makes
    whole frames of `step` entries at a time, and sees `before` entries ahead of them and `after` behind. cut_axis,
    frames, cut_step, cut_before, cut_after: the same of the activation at the cut, for light and full. outputs: axis of
    each output, and its entries for `cut_step` frames.
    """

    axis: int
    entries: int
    step: int
    before: int
    after: int
    cut_axis: int
    frames: int
    cut_step: int
    cut_before: int
    cut_after: int
    outputs: tuple[tuple[int, int], ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stream:
        own = {name: int(data[name]) for name in ("axis", "entries", "step", "before", "after")}
        cut = {name: int(data["cut"][name]) for name in ("axis", "frames", "step", "before", "after")}
        return cls(
            **own,
            cut_axis=cut["axis"],
            frames=cut["frames"],
            cut_step=cut["step"],
            cut_before=cut["before"],
            cut_after=cut["after"],
            outputs=tuple((int(each["axis"]), int(each["entries"])) for each in data["outputs"]),
        )

    def to_json(self) -> dict[str, Any]:
        cut = {"axis": self.cut_axis, "frames": self.frames, "step": self.cut_step}
        return {
            "axis": self.axis,
            "entries": self.entries,
            "step": self.step,
            "before": self.before,
            "after": self.after,
            "cut": cut | {"before": self.cut_before, "after": self.cut_after},
            "outputs": [{"axis": axis, "entries": entries} for axis, entries in self.outputs],
        }

    @property
    def context(self) -> int:
        """Entries ahead of a segment that the base is given: whole steps, so that its frames stay where they are."""
        return -(-self.before // self.step) * self.step

    @property
    def warmup(self) -> int:
        """Frames ahead of a segment that light and full are given, in whole steps too."""
        return -(-self.cut_before // self.cut_step) * self.cut_step

    @property
    def delay(self) -> int:
        """Entries after the end of a segment that have to be there before it can be answered."""
        each = self.frames_of(self.step)
        return -(-self.cut_after // each) * self.step + self.after

    @property
    def lookback(self) -> int:
        """Entries ahead of a segment that are kept: with as many as these, the base makes a frame of any end."""
        return self.context + (-(-self.delay // self.step) + 1) * self.step

    @property
    def cut_lookback(self) -> int:
        """The same of frames: at the end there may be fewer than a path reads at once."""
        return self.warmup + (-(-self.cut_after // self.cut_step) + 1) * self.cut_step

    def frames_of(self, entries: int) -> int:
        return entries * self.frames // self.entries


def piece(value: np.ndarray, axis: int, begin: int, end: int | None = None) -> np.ndarray:
    """Entries `begin` to `end` of an axis, as a view."""
    return value[(slice(None),) * axis + (slice(begin, end),)]


class Held:
    """The latest entries of an array that goes on along an axis, without a gap, under their places in all of it."""

    def __init__(self, axis: int):
        self.axis, self.begin, self.end = axis, 0, 0
        self._pieces: list[np.ndarray] = []

    def put(self, begin: int, value: np.ndarray) -> None:
        """Entries from `begin` on. Those that were there already are replaced; behind a gap, and from before what is
        held, all is begun anew."""
        if begin > self.end or begin <= self.begin or not self._pieces:
            self._pieces, self.begin = [value], begin
        elif begin < self.end:
            self._pieces = [piece(self._whole(), self.axis, 0, begin - self.begin), value]
        else:
            self._pieces.append(value)
        self.end = begin + value.shape[self.axis]

    def since(self, begin: int, end: int | None = None) -> np.ndarray:
        """Entries `begin` to `end`, which have to be there."""
        return piece(self._whole(), self.axis, begin - self.begin, None if end is None else end - self.begin)

    def forget(self, begin: int) -> None:
        """What lies before `begin` is not needed any more."""
        if begin > self.begin and self._pieces:
            self._pieces = [piece(self._whole(), self.axis, begin - self.begin)]
            self.begin = begin

    def _whole(self) -> np.ndarray:
        if len(self._pieces) > 1:
            self._pieces = [np.concatenate(self._pieces, self.axis)]
        return self._pieces[0]
