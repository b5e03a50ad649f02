"""What an exported file has to answer, the network itself on both routes, and how far another runtime is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .errors import DslifyError, ExportError
from .programs import example_of, free_axes
from .switch import Route, route

TOLERANCE = 1e-4  # of the largest value of an output
SEEDS = (0, 1)  # of the inputs that are tried
STRETCHES = (1.37, 0.5, 2.0)  # of lengths; the first that the network takes is tried


@dataclass(frozen=True)
class Case:
    """Inputs of a captured graph, flat, and what it answers with every layer on one route: its tensors, flat."""

    route: Route
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]


def cases(graph: fx.GraphModule, batch: int = 1) -> tuple[Case, ...]:
    """Both routes on several random inputs of the recorded shapes."""
    return tuple(case(graph, way, example_of(graph, batch, seed)) for seed in SEEDS for way in ("full", "light"))


def stretched(graph: fx.GraphModule, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...] | None:
    """Random inputs of another length than recorded, flat; None where the network takes no other."""
    if not any(axes - {0} for axes in free_axes(graph)):
        return None
    for stretch in STRETCHES:
        inputs = example_of(graph, batch, seed, stretch)
        try:
            case(graph, "full", inputs)
        except (DslifyError, RuntimeError):
            continue
        return inputs
    return None


def case(graph: fx.GraphModule, way: Route, inputs: Sequence[Tensor]) -> Case:
    """One route on given inputs, flat."""
    spec = graph._in_spec
    args, kwargs = pytree.tree_unflatten(list(inputs), spec)
    with torch.no_grad(), route(graph, way):
        answer = graph(*args, **kwargs)
    outputs = tuple(leaf.numpy() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor))
    return Case(way, tuple(value.numpy() for value in inputs), outputs)


def error(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The largest difference of any output, as a share of that output's largest value; inf for another shape."""
    worst = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        if mine.shape != theirs.shape:
            return float("inf")
        if theirs.size:
            scale = max(float(np.abs(theirs.astype(np.float64)).max()), np.finfo(np.float32).tiny)
            off = np.abs(mine.astype(np.float64) - theirs.astype(np.float64)).max() / scale
            worst = max(worst, float(off) if np.isfinite(off) else float("inf"))
    return worst


def refuse(what: str, way: str, off: float) -> ExportError:
    """The error for a file that differs."""
    return ExportError(
        f"{what} differs from the network on the {way} route by {off:.2g} of its largest value, where at most "
        f"{TOLERANCE:g} is allowed; nothing was written."
    )
