"""A small keyword network: log-mel frames inside, then residual convolutions over time.

    sound (batch, 1, 16000), 16 kHz -> log-mel (batch, 40, 51) -> stem (24, 26) -> 4 blocks -> logits (batch, classes)

After TC-ResNet (arXiv 1904.03814): the mel bands are the channels and every convolution runs over time alone, so a
layer is cheap and a cut behind any block is one activation of (batch, channels, frames). Unlike there the stride is in
front and the width at the end, so that what always runs is a small part of the whole: 17 % of the MACs lie before the
first block's end, 34 % before the second's, 61 % before the third's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 16_000  # Hz
LENGTH = 16_000  # samples in one input
WINDOW, HOP, BANDS = 512, 320, 40  # samples, samples, mel bands
LOWEST, HIGHEST = 40.0, 7600.0  # Hz, of the mel bands
FLOOR = 1e-4  # of a band's power: under it there is silence, and its logarithm would be mere noise
TOGETHER = 8  # mel bands that one product computes, of the bins that these read alone


class LogMel(nn.Module):
    """Sound (batch, 1, samples) -> natural logarithms of mel band powers, (batch, BANDS, samples // HOP + 1).

    Scaled so that speech is about 0 +- 1. Neighbouring bands are computed together from the bins that they read: a
    fifth of the multiplications of one product with all of them.
    """

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW))
        filters = mel_filters()
        self.ranges = []
        for at in range(0, BANDS, TOGETHER):
            part = filters[at : at + TOGETHER]
            read = part.sum(0).nonzero().flatten()
            low, high = int(read[0]), int(read[-1]) + 1
            self.ranges.append((low, high))
            self.register_buffer(f"filters{at // TOGETHER}", part[:, low:high].clone())

    def forward(self, sound: Tensor) -> Tensor:
        spectrum = torch.stft(
            sound.squeeze(1), WINDOW, HOP, window=self.window, center=True, pad_mode="constant", return_complex=True
        )
        power = torch.view_as_real(spectrum).square().sum(-1)
        bands = [getattr(self, f"filters{at}") @ power[:, low:high] for at, (low, high) in enumerate(self.ranges)]
        return ((torch.cat(bands, 1) + FLOOR).log() + 3.0) / 4.0


def mel_filters() -> Tensor:
    """Triangular filters of equal area: (BANDS, WINDOW // 2 + 1)."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    corners = 700.0 * (10.0 ** (torch.linspace(mel(LOWEST), mel(HIGHEST), BANDS + 2) / 2595.0) - 1.0)
    bins = torch.linspace(0.0, RATE / 2, WINDOW // 2 + 1)
    low, middle, high = (corners[at : at + BANDS, None] for at in range(3))
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    return triangles / triangles.sum(1, keepdim=True)


class Block(nn.Module):
    """Two convolutions over time around a skip connection: (batch, inside, frames) -> (batch, out, frames)."""

    def __init__(self, inside: int, out: int, kernel: int = 9):
        super().__init__()
        self.first = nn.Conv1d(inside, out, kernel, padding=kernel // 2, bias=False)
        self.first_norm = nn.BatchNorm1d(out)
        self.second = nn.Conv1d(out, out, kernel, padding=kernel // 2, bias=False)
        self.second_norm = nn.BatchNorm1d(out)
        self.skip = nn.Identity() if inside == out else nn.Conv1d(inside, out, 1, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(value)))
        return F.relu(self.second_norm(self.second(inner)) + self.skip(value))


class KeywordNetwork(nn.Module):
    """Logits of one second of sound: (batch, 1, 16000) -> (batch, classes).

    channels: of the stem, then of each block. Block k of n ends at the depth (k + 1) / n.
    """

    def __init__(self, classes: int, channels: Sequence[int] = (24, 24, 32, 40, 48)):
        super().__init__()
        self.front = LogMel()
        self.stem = nn.Sequential(
            nn.Conv1d(BANDS, channels[0], 3, 2, padding=1, bias=False), nn.BatchNorm1d(channels[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Block(inside, out) for inside, out in pairwise(channels)))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(channels[-1], classes)
        self.example_input_array = torch.zeros(1, 1, LENGTH)

    def forward(self, sound: Tensor) -> Tensor:
        return self.answer(self.front(sound))

    def answer(self, frames: Tensor) -> Tensor:
        """Logits of log-mel frames, (batch, BANDS, frames)."""
        return self.stages(frames)[0]

    def stages(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits, and what every block but the last gives, (batch, frames, channels) each."""
        values = [self.stem(frames)]
        for block in self.blocks:
            values.append(block(values[-1]))
        return self.head(self.dropout(values[-1].mean(2))), [value.transpose(1, 2) for value in values[1:-1]]
