"""Where a value keeps its samples and its time, and how to take some samples out and put them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where a value keeps its samples.

    axis: the batch axis, or None when all samples share the value.
    per_sample: consecutive entries of that axis that belong to one sample (windows or heads merged into the batch).
    scales: for integers, the value is a multiple of the batch size.
    """

    axis: int | None = None
    per_sample: int = 1
    scales: bool = False

    def take(self, value: Any, index: Tensor, batch: int) -> Any:
        """The part of `value` that belongs to the samples in `index`, out of `batch` samples."""
        if self.scales:
            return value // batch * len(index)
        if self.axis is None or not isinstance(value, Tensor):
            return value
        return value.index_select(self.axis, self._entries(index))

    def put(self, whole: Tensor, part: Tensor, index: Tensor) -> Tensor:
        """`whole` with the samples in `index` replaced by `part`, in place."""
        if self.axis is None:
            return part
        return whole.index_copy_(self.axis, self._entries(index), part)

    def rows(self, value: Tensor) -> Tensor:
        """One row a sample: (batch, everything else). The value must have a batch axis."""
        first = value.movedim(self.axis or 0, 0)
        return first.reshape(first.shape[0] // self.per_sample, -1)

    def _entries(self, index: Tensor) -> Tensor:
        if self.per_sample == 1:
            return index
        steps = torch.arange(self.per_sample, device=index.device)
        return (index[:, None] * self.per_sample + steps).flatten()


@dataclass(frozen=True)
class Stretch:
    """How a value of a region runs along the time of its cut.

    axis: of the value; None if it does not run with time, or is a number. times, per: it has `times` entries (or is
    larger by `times`) for every `per` entries of the cut; times is 0 for what does not depend on the length. extra: so
    many more than that it has, or fewer.
    """

    axis: int | None = None
    times: int = 0
    per: int = 1
    extra: int = 0

    def at(self, entry: int) -> int:
        """Its entry at which the cut's entry `entry` begins; exact at multiples of `per`."""
        return entry * self.times // self.per

    def size(self, length: int) -> int:
        """Its entries, or its value, for `length` entries of the cut, a multiple of `per`."""
        return self.at(length) + self.extra
