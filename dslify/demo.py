"""`dslify demo`: the whole path on a trained codec and on sound that the project ships, in a few minutes, offline."""

from __future__ import annotations

import importlib
import shutil
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import nn

from . import report
from .calibrate import Calibration, calibrate
from .console import Output
from .cost import Cost, cost
from .data import Samples, expected_shape, open_data, split
from .errors import LoadError
from .insert import insert
from .measure import Evaluation, evaluate
from .runs import History
from .store import save
from .switch import dsl_layers, route
from .train import finetune

RECIPE = "recipes.soundstream"
RATE = 16_000
WIDTH = 0.1
STEPS, SWITCH_STEPS = 1200, 600
MAX_DIFFERENCE = 0.1  # mean relative difference from the full path that the threshold may cost
SEED = 0
LISTEN = ("full", "mixed", "light")  # routes that one test clip is coded on


@dataclass(frozen=True)
class Demo:
    """Everything the demo found, in the order of its steps."""

    costs: tuple[Cost, ...]
    history: History
    calibration: Calibration
    evaluation: Evaluation
    files: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "cost": [row.to_json() for row in self.costs],
            "training": self.history.to_json(),
            "calibration": self.calibration.to_json(),
            "evaluation": self.evaluation.to_json(),
            "files": list(self.files),
            "seconds": round(self.seconds, 1),
        }
