"""What makes a run repeatable: which samples and rate belong to a step, and what a checkpoint holds of a layer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .samples import raw_bytes
from .switch import DSLayer

WARMUP = 0.05  # share of a phase over which the learning rate rises
LAST_RATE = 0.01  # of the learning rate, at the end of the cosine
TRAINED = ("light", "mask", "switch")  # the parts of a layer that a run may change, besides its two buffers


def positions(count: int, batch: int, step: int, seed: int, phase: str) -> Tensor:
    """Which samples step `step` takes: (batch,), from permutations by epoch laid end to end."""
    begin = step * batch
    first, last = begin // count, (begin + batch - 1) // count
    line = torch.cat([_permutation(count, f"{seed}/{phase}/{epoch}") for epoch in range(first, last + 1)])
    return line[begin - first * count :][:batch]


@lru_cache(maxsize=4)
def _permutation(count: int, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def rate_share(at: int, steps: int) -> float:
    """Share of the learning rate at step `at`: linear warm-up, then a cosine down to LAST_RATE."""
    warm = WARMUP * steps
    if at < warm:
        return (at + 1) / (warm + 1)
    gone = (at - warm) / max(1.0, steps - warm)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * gone))


@contextmanager
def frozen(net: nn.Module, layers: Sequence[DSLayer]) -> Iterator[None]:
    """Nothing requires a gradient and everything is in eval mode; at the end gradients are required as before."""
    before = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    net.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for layer in layers:
            layer.paths = None  # holds graphs, which can neither be copied nor saved


@contextmanager
def reproducible(net: nn.Module, seed: int, threads: int | None) -> Iterator[None]:
    """Random numbers from the seed and that many threads; the caller's state comes back at the end."""
    before = torch.get_num_threads()
    device = device_of(net)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def device_of(net: nn.Module) -> torch.device:
    return next((value.device for value in chain(net.parameters(), net.buffers())), torch.device("cpu"))


def trained_state(layer: DSLayer) -> dict[str, Any]:
    parts = {name: getattr(layer, name).state_dict() for name in TRAINED}
    return {**parts, "threshold": layer.threshold, "scale": layer.scale}


def load_trained_state(layer: DSLayer, saved: dict[str, Any]) -> None:
    for name in TRAINED:
        getattr(layer, name).load_state_dict(saved[name])
    layer.threshold.copy_(saved["threshold"])
    layer.scale.copy_(saved["scale"])


def frozen_digest(net: nn.Module, layers: Sequence[DSLayer], joint: bool = False) -> str:
    """A hash of all that training leaves alone and of the shapes of the rest: of the network, however far trained.

    joint: nothing is left alone.
    """
    trained = {id(value) for layer in layers for value in (layer.threshold, layer.scale)}
    for layer in layers:
        for name in TRAINED:
            trained.update(map(id, getattr(layer, name).state_dict(keep_vars=True).values()))
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(net.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if not joint and id(value) not in trained:
            digest.update(raw_bytes(value))
    return digest.hexdigest()
