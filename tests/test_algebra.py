"""Property tests: random chains of views, layers and residual branches keep their function under permutation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dslify.light import build
from dslify.verify import PERMUTED, check_light, permutation_error
from dslify.widths import choose, decide_projections
from tests.oracles import region_behind

BATCH, TIME = 3, 5  # primes that no channel count has, so that axes cannot be mistaken for each other by size


class Chain(nn.Module):
    """A chain of steps on (batch, channel, time), each but the kind of the first drawn when the chain is made."""

    def __init__(self, draw, kind):
        super().__init__()
        self.first, self.scale = nn.Conv1d(2, 12, 1), nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList()
        self.steps = []
        channels = 12
        for at in range(draw(st.integers(1, 5))):
            channels = self.grow(draw, channels, draw(st.sampled_from(KINDS)) if at else kind)
        self.last = nn.Conv1d(channels, 4, 1)

    def layer(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def grow(self, draw, channels: int, kind: str) -> int:
        d = draw(st.sampled_from([d for d in (2, 3, 4, 6) if channels % d == 0] or [1]))
        out = d * draw(st.sampled_from((2, 4, 6))) if kind in ("conv", "linear") else channels
        at = -1
        if kind == "conv":
            at = self.layer(nn.Conv1d(channels, out, 3, padding=1, groups=d))
        elif kind == "linear":
            at = self.layer(nn.Linear(channels, out))
        elif kind == "residual":
            at = self.layer(nn.Conv1d(channels, channels, 1))
        elif kind == "norm":
            norms = (nn.GroupNorm(d, channels), nn.BatchNorm1d(channels), nn.LayerNorm(channels))
            at = self.layer(draw(st.sampled_from(norms)))
        elif kind == "weight":
            self.layers.append(nn.ParameterList([nn.Parameter(torch.randn(channels))]))
            at = len(self.layers) - 1
        elif kind == "slice":
            start = draw(st.integers(0, channels - 1))
            d, at = start, draw(st.integers(start + 1, channels))
            out = at - start
        elif kind == "unstack":
            out = channels // d
        elif kind == "double":
            out = 2 * channels
        if out > 48:
            return channels
        self.steps.append((kind, at, d, draw(st.integers(0, 3))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x * self.scale)
        for kind, at, d, variant in self.steps:
            x = STEPS[kind](self.layers[at] if kind in WITH_LAYER else at, x, d, variant)
        return self.last(x)


def shuffle(_, x, d, variant):
    b, c, t = x.shape
    spellings = (
        lambda: x.view(b, d, c // d, t).transpose(1, 2).reshape(b, c, t),
        lambda: x.unflatten(1, (d, c // d)).permute(0, 2, 1, 3).flatten(1, 2),
        lambda: torch.stack(x.chunk(d, 1), 2).flatten(1, 2),
        lambda: torch.cat(x.view(b, d, c // d, t).unbind(1)[::-1], 1),
    )
    return spellings[variant]()


def divide(_, x, d, variant):
    parts = x.chunk(d, 1) if variant % 2 else x.split(x.shape[1] // d, 1)
    return torch.cat(parts[::-1] if variant > 1 else [parts[-1] * 2, *parts[1:-1], parts[0]][: len(parts)], 1)


def pixels(_, x, d, variant):
    square = x.unsqueeze(2)
    if x.shape[1] % 4 or variant > 1:
        return torch.pixel_unshuffle(square.expand(-1, -1, 2, -1).repeat(1, 1, 1, 2), 2)[:, : x.shape[1], 0]
    return torch.pixel_unshuffle(torch.pixel_shuffle(square, 2), 2)[:, :, 0]


def norm(layer, x, d, variant):
    return layer(x.transpose(1, 2)).transpose(1, 2) if isinstance(layer, nn.LayerNorm) else layer(x)


def residual(layer, x, d, variant):
    return x + layer(x) if variant % 2 else layer(x).sigmoid() * x


STEPS = {
    "conv": lambda layer, x, d, variant: layer(x).relu(),
    "linear": lambda layer, x, d, variant: layer(x.transpose(1, 2)).transpose(1, 2),
    "residual": residual,
    "norm": norm,
    "weight": lambda weights, x, d, variant: x * weights[0].view(d, -1).flatten()[:, None],
    "shuffle": shuffle,
    "divide": divide,
    "slice": lambda end, x, start, variant: x[:, start:end],
    "unstack": lambda _, x, d, variant: (
        x.unflatten(1, (d, -1)).sum(1) if variant % 2 else sum(x.unflatten(1, (d, -1)).unbind(1))
    ),
    "double": lambda _, x, d, variant: torch.cat([x, x.tanh()], 1) if variant % 2 else x.repeat(1, 2, 1),
    "pixels": pixels,
}
KINDS = sorted(STEPS)
WITH_LAYER = {"conv", "linear", "residual", "norm", "weight"}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_chains_keep_their_function_under_permutation(kind, data):
    torch.manual_seed(0)
    chain = Chain(data.draw, kind).eval()
    region = region_behind(chain, (torch.randn(BATCH, 2, TIME),))
    axes = region.axes
    assert not axes.ledger
    assert permutation_error(axes, region.inputs) < PERMUTED
    projected = decide_projections(axes, 0.3)
    kept = choose(axes, 0.3, projected)
    light = build(axes, kept, projected)
    check_light(light, region.full, region.inputs)
    assert sum(parameter.numel() for parameter in light.parameters()) == axes.params(kept, projected)
