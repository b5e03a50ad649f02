"""What every exported file carries and has to answer: its facts, and the network on every way through its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from . import __version__
from .calibrate import recorded
from .checked import SEEDS, TOLERANCE, error, refuse
from .int8_report import PartReport
from .programs import ANY, Program, Programs, example_of
from .switch import DSLayer, dsl_layers

MARGIN = 1e-3  # of a score: how far from it the thresholds are that a file is tried with
GATE_ERROR = 1e-6  # of a gate's score besides: ONNX Runtime's sigmoid is off by 6e-8 and takes logits under -18 for -18


@dataclass(frozen=True)
class Written:
    """What a writer did. errors: way -> worst error, as a share of the largest value. notes: sentences for the user.
    quantized: what int8 did to each part, where it was asked for."""

    errors: dict[str, float]
    notes: tuple[str, ...] = ()
    quantized: tuple[PartReport, ...] = ()


@dataclass(frozen=True)
class Trial:
    """Inputs of a captured graph, flat, its outputs on one way, flat, and thresholds that send the inputs that way.

    way: "full", "light", or with several layers the name of the one that goes light while those around it go full.
    thresholds: just beyond the scores, so that a file whose switch is off takes another way.
    """

    way: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[np.ndarray, ...]
    thresholds: dict[DSLayer, float]


def trials(graph: fx.GraphModule, batch: int = 1) -> tuple[Trial, ...]:
    """Every way on several random inputs of the recorded shapes, with `batch` samples in each."""
    layers = dsl_layers(graph)
    names = {module: name for name, module in graph.named_modules() if isinstance(module, DSLayer)}
    ways: dict[str, Sequence[DSLayer]] = {"full": (), "light": layers}
    if len(layers) > 1:
        ways |= {names[layer]: (layer,) for layer in layers}
    return tuple(
        _trial(graph, way, light, example_of(graph, batch, seed)) for seed in SEEDS for way, light in ways.items()
    )


def _trial(graph: fx.GraphModule, way: str, light: Sequence[DSLayer], inputs: tuple[Tensor, ...]) -> Trial:
    layers = dsl_layers(graph)
    before = [layer.route for layer in layers]
    args, kwargs = pytree.tree_unflatten(list(inputs), graph._in_spec)
    for layer in layers:
        layer.route, layer.paths = ("light" if layer in light else "full"), None
    try:
        with torch.no_grad():
            answer = graph(*args, **kwargs)
        thresholds = {layer: _beyond(layer, layer in light) for layer in layers}
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.route = old
    outputs = tuple(leaf.numpy() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor))
    return Trial(way, inputs, outputs, thresholds)


def _beyond(layer: DSLayer, light: bool) -> float:
    """A threshold under which all samples of the last call go light, or not all of them."""
    if layer.paths is None:  # inside a path that did not run
        return 0.0
    highest = float(layer.paths.score.max())
    off = GATE_ERROR if layer.switch.kind == "positive" else 0.0
    if not light:
        return highest * (1 - MARGIN) - off
    return highest * (1 + MARGIN) + max(off, float(np.finfo(np.float32).tiny))


def tried(
    what: str, trials: Sequence[Trial], answer: Callable[[Trial], Sequence[Tensor]], exact: bool = True
) -> dict[str, float]:
    """The worst error of every way. answer: what the file says to a trial. Raises ExportError above TOLERANCE; if not
    `exact`, for answers that are not finite or of another shape alone."""
    worst: dict[str, float] = {}
    for trial in trials:
        found = [value.detach().numpy() for value in answer(trial)]
        off = error(found, trial.outputs) if len(found) == len(trial.outputs) else float("inf")
        if not np.isfinite(off) or (exact and not off <= TOLERANCE):
            raise refuse(what, trial.way, off)
        worst[trial.way] = max(off, worst.get(trial.way, 0.0))
    return worst


def parts_in(programs: Programs, prefix: str = "") -> dict[str, Program]:
    """front, light and full by name; full_front, full_light and full_full where full holds another layer."""
    found = {f"{prefix}front": programs.front}
    for way, part in (("light", programs.light), ("full", programs.full)):
        if isinstance(part, Programs):
            found |= parts_in(part, f"{prefix}{way}_")
        else:
            found[f"{prefix}{way}"] = part
    return found


def routed(
    programs: Programs,
    inputs: Sequence[Tensor],
    call: Callable[[str, Sequence[Tensor]], Sequence[Tensor]],
    thresholds: Mapping[DSLayer, float],
    prefix: str = "",
) -> Sequence[Tensor]:
    """The host's loop: front, then light or full, which are loops themselves where they hold further layers."""
    masked, score, *passed = call(f"{prefix}front", inputs)
    way = "light" if bool((score < thresholds[programs.layer]).all()) else "full"
    part = programs.light if way == "light" else programs.full
    if isinstance(part, Programs):
        return routed(part, (masked, *passed), call, thresholds, f"{prefix}{way}_")
    return call(f"{prefix}{way}", (masked, *passed))


def facts(graph: fx.GraphModule, batch: int = 1) -> dict[str, Any]:
    """What a file says of itself, ready for JSON. threshold, scale, switch: of the first layer, as in `layers`."""
    notes = graph.meta.get("dslify", {})
    layers = [
        {
            "name": name,
            "threshold": float(module.threshold),
            "scale": [float(each) for each in module.scale],
            "switch": module.switch.kind,
        }
        for name, module in graph.named_modules()
        if isinstance(module, DSLayer)
    ]
    return {
        "dslify": __version__,
        "torch": torch.__version__,
        "cut": notes.get("at"),
        "scope": notes.get("scope"),
        **{key: layers[0][key] for key in ("threshold", "scale", "switch")},
        "layers": layers,
        "calibration": recorded(graph),
        "batch": "any" if batch == ANY else batch,
    }
