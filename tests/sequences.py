"""Small networks on sequences, each with something that makes routing by segments harder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

import dslify


class Causal(nn.Module):
    """Strided and dilated convolutions that are padded on the left only, with a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 4, 2)
        self.down, self.dilated, self.out = (
            nn.Conv1d(8, 16, 4, 2),
            nn.Conv1d(16, 16, 3, dilation=4),
            nn.Conv1d(16, 6, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(functional.pad(x, (2, 0)))
        x = functional.elu(self.down(functional.pad(x, (2, 0))))
        return self.out(x + functional.elu(self.dilated(functional.pad(x, (8, 0)))))


class Symmetric(nn.Module):
    """Padding on both sides, poolings, a grouped convolution: every answer looks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 3, padding=1)
        self.wide, self.group = nn.Conv1d(8, 16, 5, padding=2), nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.norm, self.out = nn.BatchNorm1d(16), nn.Conv1d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.wide(self.stem(x)))
        x = functional.max_pool2d(x[:, :, None], (1, 3), (1, 2), (0, 1))[
            :, :, 0
        ]  # max_pool1d is captured at one length
        x = functional.avg_pool1d(self.norm(self.group(x)), 2)
        return self.out(functional.gelu(x))


class Bare(nn.Module):
    """No padding at all: fewer entries leave than a whole number of segments has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.out = nn.Conv1d(1, 8, 5), nn.Conv1d(8, 12, 5, 2), nn.Conv1d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.silu(self.middle(functional.silu(self.stem(x)))))


class Hourglass(nn.Module):
    """Down and up again, with skips across the cut at its own rate and at twice that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 12, 4, 2, 1)
        self.three, self.back = nn.Conv1d(12, 16, 4, 2, 1), nn.ConvTranspose1d(16, 12, 4, 2, 1)
        self.up, self.out = nn.ConvTranspose1d(24, 8, 4, 2, 1), nn.Conv1d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = functional.relu(self.one(x))
        two = functional.relu(self.two(one))
        three = functional.relu(self.three(two))
        back = functional.relu(self.back(three))
        return self.out(torch.cat([functional.relu(self.up(torch.cat([back, two], 1))), one], 1))


class Frames(nn.Module):
    """(batch, time, features): linear layers, a norm over features, a comparison, two answers of different rates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Linear(5, 12), nn.LayerNorm(12), nn.Conv1d(12, 12, 3, padding=1)
        self.fine, self.coarse = nn.Linear(12, 6), nn.Conv1d(12, 4, 4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(x))
        y = self.conv(x.transpose(1, 2))
        y = torch.where(y > 0.1, y, 0.3 * y)
        return {"fine": self.fine(y.transpose(1, 2)), "coarse": self.coarse(y)}


@dataclass(frozen=True)
class Sequence:
    """make: of a network with random weights. at: the cut. shape: of one input. time: its axis of time. entries: of a
    segment. odd: by which a length may exceed whole segments. before, after: what both paths read around one, at the
    cut, in whole steps."""

    make: Callable[[], nn.Module]
    at: str
    shape: tuple[int, ...]
    time: int
    entries: int
    odd: int
    before: int
    after: int

    def batch(self, length: int, size: int = 3, seed: int = 1) -> Tensor:
        shape = [size if axis == 0 else length if axis == self.time else n for axis, n in enumerate(self.shape)]
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SEQUENCES = {
    "causal": Sequence(Causal, "stem", (1, 2, 128), 2, 32, 13, 18, 0),
    "symmetric": Sequence(Symmetric, "stem", (1, 2, 128), 2, 32, 12, 12, 8),
    "bare": Sequence(Bare, "stem", (1, 1, 128), 2, 24, 13, 0, 8),
    "hourglass": Sequence(Hourglass, "three", (1, 1, 128), 2, 32, 20, 1, 1),
    "frames": Sequence(Frames, "stem", (1, 64, 5), 1, 16, 7, 4, 4),
}


@cache
def inserted(name: str, light: str = "narrow") -> nn.Module:
    """A network of the table with a layer; made once, and to be copied before it is changed."""
    one = SEQUENCES[name]
    torch.manual_seed(0)
    model = one.make().eval()
    width = {"width": 0.5} if light == "narrow" else {}
    return dslify.insert(model, one.at, example_inputs=(one.batch(one.shape[one.time], 1),), light=light, **width)
