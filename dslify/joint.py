"""Joint training, end to end (Eq. 5; of a gate with labels, GC): what it minimises, and how it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OptionError, TrainError
from .functional import copied
from .losses import class_balance, dsl_loss, gate_loss
from .output_losses import Kinds
from .samples import Samples
from .schedule import device_of
from .switch import required_layers
from .training_network import training_network


class JointObjective(nn.Module):
    """Positions of samples -> the losses that `names` names, unweighted, (losses,).

    Of a switch the parts of Eq. 5: task, switch, light and mask. Of a gate (GC, arXiv 2303.08970) the task, the gate's
    cross-entropy with Omega(y), and the mask: what comes before the cut learns to tell positives from negatives.

    network: from training_network(). task_loss: (output, batch, labels) -> a scalar; labels: where each sample's label
    stands among the classes, int64, (batch,), or None where the data has no labels. loss, weights: as in dsl_loss().
    positive: Omega(y) of the samples for a gate, bool, (n,).
    """

    def __init__(
        self,
        network: nn.Module,
        samples: Samples,
        task_loss: Callable[[Any, Tensor, Tensor | None], Tensor],
        loss: Kinds = "l1",
        weights: Sequence[float] | None = None,
        positive: Tensor | None = None,
    ):
        super().__init__()
        self.network, self.samples, self.task_loss, self.how = network, samples, task_loss, (loss, weights)
        self.positive, self.balance = positive, None if positive is None else class_balance(positive)
        self.names = ("task", "switch", "light", "mask") if positive is None else ("task", "gate", "mask")
        self.labels = samples.class_indices() if any(samples.labels) else None

    def forward(self, positions: Tensor) -> Tensor:
        device = device_of(self.network)
        batch = self.samples.batch(positions).to(device)
        labels = None if self.labels is None else self.labels[positions].to(device)
        task = self.task_loss(self.network(batch), batch, labels)
        if not isinstance(task, Tensor) or task.numel() != 1 or not task.requires_grad:
            found = f"{tuple(task.shape)}" if isinstance(task, Tensor) else type(task).__name__
            raise TrainError(f"The task loss gave {found}; expected one number that depends on the network's output.")
        loss, weights = self.how
        if self.positive is None or self.balance is None:
            parts = dsl_loss(self.network, loss=loss, weights=weights)
            return torch.stack([task.reshape(()).to(parts.light.dtype), parts.switch, parts.light, parts.mask])
        (layer,) = required_layers(self.network)
        assert layer.paths is not None  # the task's forward has run it
        told = self.positive[positions].to(device), self.balance[positions].to(device)
        gate = gate_loss(layer.paths.score, *told)
        return torch.stack([task.reshape(()).to(gate.dtype), gate, layer.mask.penalty(layer.paths.masked)])


@dataclass(frozen=True)
class Joint:
    """A first phase of finetune() in which base, full path, light path, switch and mask learn together (Eq. 5).

    model: the plain network that was cut, for its code; its weights are not used. task_loss: as in JointObjective.
    steps, lr: of this phase. routes, share: see training_network(). Raises OptionError.
    """

    model: nn.Module
    task_loss: Callable[[Any, Tensor, Tensor | None], Tensor]
    steps: int = 400
    lr: float = 3e-4
    routes: str = "full"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"The steps of joint training are at least 1; got {self.steps}.")

    def objective(
        self,
        net: nn.Module,
        samples: Samples,
        loss: Kinds,
        weights: Sequence[float] | None,
        positive: Tensor | None = None,
    ) -> JointObjective:
        """The training network on these samples, with its losses. Raises as training_network() does."""
        batch = samples.batch(range(min(2, len(samples)))).to(device_of(net))
        model = self.model if device_of(self.model) == device_of(net) else copied(self.model).to(device_of(net))
        network = training_network(net, model, (batch,), routes=self.routes, share=self.share)
        return JointObjective(network, samples, self.task_loss, loss, weights, positive)
