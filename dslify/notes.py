"""What the surgery, and after it the training, noted of a network: `meta["dslify"]` of its graph, kept by save()."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


def noted(net: nn.Module, what: str) -> Any:
    """The note of this name, of the outermost graph that has it; None if there is none.

    example: shape and type of every input. pixels: how pictures become inputs. classes: names of the outputs.
    calibration: how the thresholds were set (calibrate.recorded). trained_on: labels that gates learned from (kinds).
    """
    for module in net.modules():
        meta = getattr(module, "meta", None)
        notes = meta.get("dslify") if isinstance(meta, dict) else None
        if notes and notes.get(what):
            return notes[what]
    return None


def recorded_inputs(graph: fx.GraphModule) -> list[Tensor]:
    """Zeros in place of the inputs that a network with a layer was captured with, flat."""
    return [torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in graph.meta["dslify"]["example"]]
