"""Multiply-accumulates of operators that really run, on real values: a path that no sample takes counts nothing.

    with executed() as counter:
        net(windows)
    counter.macs, counter.transform_macs

`macs` has the same operators as dslify.cost (matrix products, convolutions, attention, LSTM), so the two can be held
against each other. torch's counter knows no Fourier transforms; they are counted apart, N values of a real one as
2.5 N log2 N real operations and of a complex one as twice as many (Cooley and Tukey's algorithm), 2 of them a MAC.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .macs import counting

_FFT = torch.ops.aten


def _real(input: Sequence[int], dim: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return round(2.5 * math.prod(input) * math.log2(max(1, math.prod(input[axis] for axis in dim))))


def _complex(input: Sequence[int], dim: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * _real(input, dim)


def _back(input: Sequence[int], dim: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _real(out_shape, dim)


_TRANSFORMS = {_FFT._fft_r2c: _real, _FFT._fft_c2c: _complex, _FFT._fft_c2r: _back}


class Executed:
    """What has run within the block so far."""

    def __init__(self, counter: FlopCounterMode):
        self._counter = counter

    @property
    def macs(self) -> int:
        """Without Fourier transforms."""
        return self._counter.get_total_flops() // 2 - self.transform_macs

    @property
    def transform_macs(self) -> int:
        """Of Fourier transforms alone."""
        counts = self._counter.get_flop_counts()["Global"]
        return sum(counts.get(operator, 0) for operator in _TRANSFORMS) // 2


@contextmanager
def executed() -> Iterator[Executed]:
    """Count what runs within the block, of any number of calls."""
    counter = counting(_TRANSFORMS)
    with counter:
        yield Executed(counter)
