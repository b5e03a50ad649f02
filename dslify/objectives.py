"""What a phase minimises, as one row of named losses, and what is logged beside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .mask import Mask

SPARSITY = ("weight_sparsity", "activation_sparsity")  # shares of exact zeros


class Objectives(nn.Module):
    """Several objectives over the same positions as one: losses of the same name are added up.

    parts: (names, module from positions to that many losses). masks: those that train; the mean share of exact zeros of
    their weights and of what leaves them follows the losses, without a gradient. `names` names the row: (losses,).
    """

    def __init__(self, parts: Sequence[tuple[Sequence[str], nn.Module]], masks: Sequence[Mask] = ()):
        super().__init__()
        self.modules_of_parts = nn.ModuleList(module for _, module in parts)
        self.parts, self.masks = tuple(parts), tuple(masks)
        self.losses = tuple(dict.fromkeys(name for names, _ in parts for name in names))
        self.names = (*self.losses, *(SPARSITY if masks else ()))

    def forward(self, positions: Tensor) -> Tensor:
        zeros: list[float] = []
        with ExitStack() as stack:
            for mask in self.masks:
                stack.callback(mask.register_forward_hook(_counting(zeros)).remove)
            found: dict[str, Tensor] = {}
            for names, module in self.parts:
                for name, loss in zip(names, module(positions), strict=True):
                    found[name] = found[name] + loss if name in found else loss
        row = torch.stack([found[name] for name in self.losses])
        if not self.masks:
            return row
        weights = [mask.sparsity() for mask in self.masks]
        shares = [sum(weights) / len(weights), sum(zeros) / max(1, len(zeros))]
        return torch.cat([row, row.new_tensor(shares)])


def _counting(zeros: list[float]) -> Any:
    return lambda mask, _, masked: zeros.append(mask.activation_sparsity(masked.detach()))
