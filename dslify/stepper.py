"""One optimizer step, however many parts its batch is taken in and however many processes share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .runs import Options
from .team import Team

CLIP = 1.0  # largest norm of all gradients together
WEIGHT_DECAY = 1e-4
SKIPPED = 20  # steps in a row that may overflow in 16-mixed while the loss finds its scale


class Diverged(Exception):
    """A loss or a gradient that is not finite; the message says which."""


class Stepper:
    """AdamW on the parameters of `groups`, for an objective from positions of samples to a row of losses.

    pieces: parts of a process's share of the batch that run one after another (gradient accumulation).
    """

    def __init__(
        self, team: Team, objective: nn.Module, groups: list[dict[str, Any]], options: Options, pieces: int = 1
    ):
        self.team, self.objective, self.pieces, self.skipped = team, objective, pieces, 0
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        # the fused kernel scales gradients back by itself, after they would have been clipped
        fused = team.device.type in ("cpu", "cuda") and not team.skips
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=WEIGHT_DECAY, fused=fused)
        self._fabric_optimizer: Any = team.fabric.setup_optimizers(self.optimizer)

    def step(self, positions: Tensor, weights: Sequence[float], rate: float) -> tuple[list[float], float]:
        """Move the parameters by one step at the learning rate `rate`.

        positions: of the whole batch, of all processes. weights: of the losses in the total that is minimised. Returns
        the losses, each a mean over the whole batch, and that total. Raises Diverged.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._fabric_optimizer.zero_grad()
        losses, value = self._run(positions, weights, train=True)
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value}")
        self.team.sum_gradients(self.parameters)
        if self.team.precision is not None:
            self.team.precision.unscale_gradients(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, CLIP))  # not through Fabric, which searches the net
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (SKIPPED if self.team.skips else 0):
            raise Diverged(f"the gradient is {norm}")
        self._fabric_optimizer.step()
        return losses, value

    def measure(self, positions: Tensor, weights: Sequence[float]) -> float:
        """The total over these samples, without a step."""
        return self._run(positions, weights, train=False)[1]

    def _run(self, positions: Tensor, weights: Sequence[float], train: bool) -> tuple[list[float], float]:
        found = torch.zeros(len(weights), device=self.team.device)
        for piece in self.team.part(positions).tensor_split(self.pieces):
            if not len(piece):
                continue
            share = len(piece) / len(positions)
            with self.team.autocast():
                losses = self.objective(piece)
            if train:
                self.team.fabric.backward(share * (losses * losses.new_tensor(weights)).sum())
            found += share * losses.detach()
        losses = self.team.sum(found).tolist()
        return losses, sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
