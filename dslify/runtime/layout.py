"""Where an array keeps its samples: taking some of them out, and putting answers back in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """As dslify.switch.Layout, for arrays.

    axis: the batch axis, None when all samples share the value. per_sample: consecutive entries of one sample on it.
    """

    axis: int | None = None
    per_sample: int = 1

    def take(self, value: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The part of `value` that belongs to the samples in `index`."""
        return value if self.axis is None else value.take(self._entries(index), self.axis)

    def join(self, parts: Sequence[tuple[np.ndarray, np.ndarray]], batch: int) -> np.ndarray:
        """One array of `batch` samples out of (index, value of these samples); a shared value is that of the last."""
        last = parts[-1][1]
        if self.axis is None:
            return last
        shape = list(last.shape)
        shape[self.axis] = batch * self.per_sample
        whole = np.empty(shape, last.dtype)
        by_sample = np.moveaxis(whole, self.axis, 0)
        for index, value in parts:
            by_sample[self._entries(index)] = np.moveaxis(value, self.axis, 0)
        return whole

    def count(self, value: np.ndarray) -> int | None:
        """Samples in a value, None if it does not tell."""
        return None if self.axis is None else value.shape[self.axis] // self.per_sample

    def _entries(self, index: np.ndarray) -> np.ndarray:
        return (index[:, None] * self.per_sample + np.arange(self.per_sample)).ravel()
