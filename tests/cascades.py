"""Small networks with two Dynamic Switch Layers: one inside the other, and one behind the other."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import dslify
from dslify.data import open_data
from dslify.functional import copied
from dslify.observe import collect_all

CLASSES = 5


def _block(channels: int, filters: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(channels, filters, 3, padding=1), nn.ELU())


def classifier() -> nn.Module:
    """(batch, 1, 64) -> logits (batch, CLASSES)"""
    torch.manual_seed(0)
    blocks = [_block(1, 8), _block(8, 16), _block(16, 16), _block(16, 32)]
    head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))
    return nn.Sequential(*blocks, head).eval()


def codec() -> nn.Module:
    """(batch, 1, 64) -> (batch, 1, 64)"""
    torch.manual_seed(0)
    down = [nn.Conv1d(1, 8, 4, 2, 1), nn.ELU(), nn.Conv1d(8, 16, 4, 2, 1), nn.ELU(), nn.Conv1d(16, 8, 3, 1, 1)]
    up = [nn.ELU(), nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.ELU(), nn.ConvTranspose1d(8, 1, 4, 2, 1)]
    return nn.Sequential(*down, *up).eval()


NETWORKS = {"classifier": (classifier, ("0", None), ("2", None)), "codec": (codec, ("1", None), ("5", None)),
            "in a row": (classifier, ("0", "1"), ("2", "3"))}  # fmt: skip


def sounds(n: int = 60) -> Tensor:
    """(n, 1, 64), of levels over three orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.logspace(-2, 1, n)[torch.randperm(n, generator=generator)]
    return torch.randn(n, 1, 64, generator=generator) * levels[:, None, None]


@cache
def _built(name: str) -> nn.Module:
    make, *cuts = NETWORKS[name]
    net = make()
    for at, to in cuts:
        net = dslify.insert(net, at=at, to=to, width=0.25, example_inputs=(torch.randn(2, 1, 64),))
    seen = collect_all(net, open_data(sounds()), progress=False)
    for layer, shown, share in zip(dslify.dsl_layers(net), seen, (0.3, 0.6), strict=True):
        score = torch.as_tensor(shown.score).sort().values
        at = round(share * len(score))
        layer.threshold.fill_((score[at - 1] + score[at]) / 2)
    return net


def cascade(name: str) -> nn.Module:
    """A copy of one of NETWORKS, with thresholds that send part of the sounds light at either layer."""
    return copied(_built(name))
