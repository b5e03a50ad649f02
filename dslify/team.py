"""The processes that train together, and the precision they compute in.

Every process reads all data and holds the same network; a step's batch is divided among them, and gradients are summed,
so the weights stay equal, and equal to those of one process that takes the whole batch. Summing once after the last
part is ours and not DistributedDataParallel's: parts may differ in size, and what gets a gradient may differ by layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn

from .errors import DslifyError, OptionError, TrainError
from .losses import difference
from .processes import place
from .schedule import load_trained_state, trained_state
from .switch import DSLayer

Answer = TypeVar("Answer")
MOST_OFF = 0.3  # relative difference between half and single precision; bfloat16 has 8 bits, sound networks stay under


class Team:
    """This process among those that torchrun started, or alone; `first` is true for the one that writes and prints.

    device: of the network. precision: one of runs.PRECISIONS. Raises OptionError for 16-mixed on a CPU, TrainError when
    the network is on another process's GPU.
    """

    def __init__(self, device: torch.device, precision: str):
        at = place()
        self.rank, self.world, self.device = at.rank, at.world, device
        if precision == "16-mixed" and device.type == "cpu":
            raise OptionError("precision 16-mixed needs a GPU; on a CPU take bf16-mixed or 32-true.")
        self.precision = (
            None
            if precision == "32-true"
            else MixedPrecision(cast(Literal["16-mixed", "bf16-mixed"], precision), device.type)
        )
        plugins: list[Any] = [] if self.precision is None else [self.precision]
        if at.world == 1:
            devices = 1 if device.index is None or device.type == "cpu" else [device.index]
            self.fabric = Fabric(accelerator=device.type, devices=devices, plugins=plugins)
            return
        if device.type != "cpu" and device.index != at.local_rank:
            raise TrainError(
                f"Process {at.rank} has its network on {device}; move it to {device.type}:{at.local_rank} (LOCAL_RANK) "
                "before finetune."
            )
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces every process
        self.fabric = Fabric(
            accelerator=device.type, devices=at.local_world, num_nodes=at.nodes, strategy="ddp", plugins=plugins
        )
        self.fabric.launch()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def skips(self) -> bool:
        """The scale of the loss is being searched, and steps whose gradients overflow are left out."""
        return self.precision is not None and self.precision.scaler is not None

    def autocast(self) -> AbstractContextManager[Any]:
        return self.fabric.autocast()

    def part(self, positions: Tensor) -> Tensor:
        """This process's part of a batch, which may be empty."""
        return positions.tensor_split(self.world)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits everywhere."""
        return self._together(lambda: cast(Tensor, self.fabric.all_reduce(values, reduce_op="sum")), values)

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, in place."""
        if self.world == 1:
            return
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        summed = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, part in zip(parameters, summed.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def lead(self, work: Callable[[], Answer]) -> Answer:
        """What `work` returns, run by the first process alone. Its DslifyError is raised in all of them."""
        if self.world == 1:
            return work()
        told: tuple[str, Any] | None = None
        failed: DslifyError | None = None
        if self.first:
            try:
                told = ("done", work())
            except DslifyError as error:
                told, failed = ("failed", str(error)), error
        kind, answer = cast(tuple[str, Any], self._together(lambda: self.fabric.broadcast(told), told))
        if kind == "failed":
            raise failed or TrainError(answer)
        return cast(Answer, answer)

    def check_same(self, config: dict[str, Any]) -> None:
        """Raises TrainError in all processes when one has other options, other data or another network."""
        wanted = self.lead(lambda: config)
        other = sorted(key for key in {*config, *wanted} if config.get(key) != wanted.get(key))
        if self.any(bool(other)):
            which = f"Process {self.rank}" if other else "Another process"
            what = ", ".join(other) or "configuration"
            raise TrainError(
                f"{which} has another {what} than the first one; give all processes the same options, data and network."
            )

    def agree(self, layers: Sequence[DSLayer]) -> None:
        """Take the first process's state of the layers: other machines may round differently."""
        if self.world == 1:
            return
        states = self.lead(lambda: [trained_state(layer) for layer in layers])
        for layer, state in zip(layers, states, strict=True):
            load_trained_state(layer, state)

    def check_precision(self, net: nn.Module, layers: Sequence[DSLayer], batch: Tensor) -> None:
        """Both paths of `net` on `batch` in this precision against single. Raises OptionError where they are far apart.

        Not a formality: on CPUs with AMX torch 2.12.1 computes convolutions in bfloat16 wrongly and says nothing.
        """
        if self.precision is None:
            return
        with torch.no_grad():
            net(batch)
            exact = [layer.paths for layer in layers]
            with self.autocast():
                net(batch)
        for layer, wanted in zip(layers, exact, strict=True):
            found = layer.paths
            if found is None or wanted is None:
                continue
            for name in ("full", "light"):
                answers, truth = getattr(found, name) or (), getattr(wanted, name) or ()
                off = difference(answers, truth, torch.zeros_like(layer.scale), layer.outputs).mean().item()
                if not off <= MOST_OFF:  # a NaN is off as well
                    raise OptionError(
                        f"In {self.precision.precision} the {name} path's answer is {off:.2g} (relative difference) "
                        "away from single precision, which this processor or network cannot compute in half; take "
                        "precision 32-true."
                    )

    def _together(self, work: Callable[[], Answer], alone: Answer) -> Answer:
        if self.world == 1:
            return alone
        try:
            return work()
        except RuntimeError as error:
            raise TrainError(
                f"Process {self.rank} lost the others of this run; what the first one said comes before, and its last "
                "checkpoint is whole."
            ) from error
