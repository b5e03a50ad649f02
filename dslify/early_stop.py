"""Early stopping: some sources are held out, the loss on them is taken now and then, and the best state is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .samples import Samples, split
from .schedule import load_trained_state, trained_state
from .switch import DSLayer

HELD = 0.1  # share of a phase's samples, by source


class EarlyStop:
    """The best state of a phase so far, and how long there was no better one.

    patience: judgings in a row without a better one until a phase ends; None for no early stopping. kept: of the phases
    that are over, the step whose state they ended with.
    """

    def __init__(self, layers: Sequence[DSLayer], patience: int | None):
        self.layers, self.patience = layers, patience
        self.kept: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """Begin a phase."""
        self.value, self.step, self.stale = math.inf, -1, 0
        self.best: list[dict[str, Any]] | None = None

    @property
    def fresh(self) -> bool:
        """The state that the phase starts from has not been judged yet."""
        return self.patience is not None and self.best is None

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def divide(self, samples: Samples, seed: int) -> tuple[Tensor, Tensor]:
        """Positions of the samples to learn from and of those held out (none without patience). Raises DataError."""
        everything = torch.arange(len(samples))
        if self.patience is None:
            return everything, everything[:0]
        chosen, held = split(replace(samples, index=everything), (1 - HELD, HELD), seed)
        return chosen.index, held.index

    def offer(self, value: float, step: int) -> bool:
        """Judge the state after `step` by its loss on what is held out. Returns whether it is the best so far."""
        if value < self.value:
            self.value, self.step, self.stale = value, step, 0
            self.best = [_copied(trained_state(layer)) for layer in self.layers]
            return True
        self.stale += 1
        return False

    def keep(self, phase: str) -> None:
        """End the phase: the layers get the best state."""
        if self.best is not None:
            for layer, state in zip(self.layers, self.best, strict=True):
                load_trained_state(layer, state)
        self.kept[phase] = self.step

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "step": self.step, "stale": self.stale, "best": self.best, "kept": self.kept}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.step, self.stale = state["value"], state["step"], state["stale"]
        self.best, self.kept = state["best"], dict(state["kept"])


def _copied(state: Any) -> Any:
    """Tensors cloned: training goes on in the ones that were given."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    return {name: _copied(value) for name, value in state.items()}
