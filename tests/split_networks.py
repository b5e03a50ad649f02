"""Small networks as split folders, each exported once per test process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import dslify
from dslify.onnx_graph import models_of
from dslify.programs import ANY, Programs, host_graph, programs_of
from dslify.split import Split, write_split
from tests.cascades import cascade, sounds


class Sound(nn.Module):
    """(batch, 1, length) -> (batch, 4, frames) and a level per sample, for which the sound is read behind the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 8, 4, 2)
        self.middle = nn.Conv1d(16, 16, 3, 1, 1)
        self.out = nn.Conv1d(16, 4, 3, 1, 1)

    def forward(self, sound: Tensor) -> dict[str, Tensor]:
        sound = sound - sound.mean(2, keepdim=True)
        value = torch.relu(self.middle(torch.relu(self.stem(sound))))
        return {"code": self.out(value), "level": sound.square().mean((1, 2)) + value.mean((1, 2))}


class Turned(nn.Module):
    """(batch, time, 6); inside, samples lie on the second axis, and all share positions, read behind the cut too."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.inner, self.leave = (
            nn.Linear(*size) for size in ((6, 16), (16, 16), (16, 24), (24, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], dtype=torch.float32).div(10).cos()[:, None, None]
        value = torch.relu(self.mix(torch.relu(self.enter(x.transpose(0, 1)) + place)))
        return self.leave(torch.relu(self.inner(value * place))).transpose(0, 1)


@dataclass(frozen=True)
class Exported:
    """net: as eager answers. x: samples, half of which go light. folder: the split export, not to be changed."""

    net: nn.Module
    graph: fx.GraphModule
    programs: Programs
    models: dict[str, Any]
    folder: Path
    written: Split
    x: np.ndarray

    def eager(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """(outputs, who went light at the first layer)"""
        with torch.no_grad():
            answer = self.graph(torch.from_numpy(x))
        taken = dslify.dsl_layers(self.graph)[0].paths.light_taken
        return [leaf.numpy() for leaf in pytree.tree_leaves(answer)], taken.numpy()


@cache
def exported(name: str) -> Exported:
    """ "sound", "turned", or "nested", a layer inside a layer."""
    net, x = (cascade("classifier"), sounds(24)) if name == "nested" else _inserted(name)
    _, graph = host_graph(net)
    programs = programs_of(graph, ANY)
    models = models_of(programs)
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / "parts"
    return Exported(net, graph, programs, models, folder, write_split(models, programs, graph, folder), x.numpy())


def _inserted(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, at, shape = (Sound(), "stem", (1, 64)) if name == "sound" else (Turned(), "mix", (10, 6))
    x = torch.randn(12, *shape) * torch.logspace(-2, 1, 12)[:, None, None]
    net = dslify.insert(model.eval(), at=at, width=0.25, example_inputs=(x[:2],))
    layer = dslify.dsl_layers(net)[0]
    with torch.no_grad():
        layer.mask.weight.flatten()[::2] = 0
        net(x)
        layer.threshold.fill_(layer.paths.score.sort().values[5:7].mean())
    return net, x
