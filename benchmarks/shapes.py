"""Ten classes of pictures drawn by formulas, turned, scaled, sheared, shaded and noisy; nothing is downloaded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLASSES = (
    "disc", "ring", "square", "frame", "triangle", "cross", "stripes", "checks", "crescent", "two discs",
)  # fmt: skip
SIZE = 32
NOISE = 0.15


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 1, 32, 32) and their classes, (count,): a function of the two arguments."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator))[:, None, None]

    classes = torch.randint(len(CLASSES), (count,), generator=generator)
    line = torch.linspace(-1, 1, SIZE)
    y, x = line[None, :, None] - uniform(-0.25, 0.25), line[None, None, :] - uniform(-0.25, 0.25)
    angle, shear, size = uniform(0, 2 * math.pi), uniform(-0.3, 0.3), uniform(0.45, 0.8)
    u = (angle.cos() * x + angle.sin() * y) / size
    v = (angle.cos() * y - angle.sin() * x) / size + shear * u
    ink = _drawn(u, v)[classes, torch.arange(count)]
    contrast = uniform(0.5, 1.0) * torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shading = uniform(-0.4, 0.4) * x + uniform(-0.4, 0.4) * y
    noise = NOISE * torch.randn(count, SIZE, SIZE, generator=generator)
    return (contrast * ink + shading + noise)[:, None], classes


def _drawn(u: Tensor, v: Tensor) -> Tensor:
    """(class, picture, height, width): 1 where there is ink."""
    radius, edge = (u.square() + v.square()).sqrt(), torch.maximum(u.abs(), v.abs())
    arms = torch.minimum(u.abs(), v.abs())
    inside = edge < 1
    forms = [
        radius < 1,
        (radius < 1) & (radius > 0.6),
        edge < 0.85,
        (edge < 0.9) & (edge > 0.55),
        (v > -0.6) & (v + 1.8 * u.abs() < 1),
        inside & (arms < 0.25),
        inside & ((4 * u).remainder(2) < 1),
        inside & (((3 * u).floor() + (3 * v).floor()).remainder(2) < 1),
        (radius < 1) & (((u - 0.45).square() + v.square()).sqrt() > 0.8),
        torch.minimum((u - 0.6).square() + v.square(), (u + 0.6).square() + v.square()) < 0.2,
    ]
    return torch.stack(forms).float()
