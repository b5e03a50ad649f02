"""Mask: what makes the activation at the cut sparse, by factors on it or by thresholds on its magnitude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import OptionError

MaskKind = Literal["weight", "activation"]
KINDS: tuple[MaskKind, ...] = ("weight", "activation")


class Mask(nn.Module):
    """Compresses the activation at the cut: weights per channel (or element), and values that become exactly zero.

    kind "weight": one factor each, started at 1 and driven to zero by L1; the soft threshold leaves 1 exactly at 1, so
    a fresh mask changes nothing. Source: DSL (arXiv 2404.04405) Eq. 2; the soft threshold is ours, the papers do not
    say how zeros become exact.

        M(x) = x sign(w) relu(|w| - SOFT) / (1 - SOFT)

    kind "activation": one threshold each, on the magnitude of the activation (ours). It shrinks towards zero by t:

        M(x) = sign(x) relu(|x| - t),   t = softplus(GAIN w) magnitude

    magnitude: buffer, mean |x| of each channel, so that one learning rate suits all. A threshold of zero gets no
    gradient, so t starts above it, and no such mask is exact: `on`, a buffer, holds it at t = 0, where it changes
    nothing to the last bit, until turn_on(). Both buffers are stored: a mask that was trained stays on when loaded.

    shape: the weights' shape, broadcast against the activation (1 on every axis that is not masked). Raises OptionError
    for another kind.
    """

    SOFT = 2.0**-7  # a power of two: (1 - SOFT) / (1 - SOFT) and 1 - SOFT are exact in every float format
    START = 0.1  # threshold at which a mask on the activation is turned on, as a share of the channel's magnitude
    GAIN = 8.0  # so that a threshold crosses its range in as many steps as a factor goes from 1 to 0
    SILENT = 1e-4  # of the mean magnitude: the least one for a channel, so that a dead one can be divided by
    on: Tensor
    magnitude: Tensor

    def __init__(self, shape: Sequence[int], kind: MaskKind = "weight"):
        super().__init__()
        if kind not in KINDS:
            raise OptionError(f"The kind of a mask is one of {', '.join(KINDS)}; got {kind!r}.")
        self.kind = kind
        if kind == "weight":
            self.weight = nn.Parameter(torch.ones(tuple(shape)))
            return
        self.weight = nn.Parameter(torch.full(tuple(shape), math.log(math.expm1(self.START)) / self.GAIN))
        self.register_buffer("on", torch.zeros((), dtype=torch.bool))
        self.register_buffer("magnitude", torch.ones(tuple(shape)))

    def extra_repr(self) -> str:
        return f"{self.kind}, shape={tuple(self.weight.shape)}"

    def effective(self) -> Tensor:
        """The factors after the soft threshold, or the thresholds in units of the activation; same shape as weight."""
        if self.kind == "activation":
            return self.on * functional.softplus(self.GAIN * self.weight) * self.magnitude
        return functional.softshrink(self.weight, self.SOFT) / (1 - self.SOFT)

    @torch.no_grad()
    def turn_on(self, value: Tensor) -> None:
        """Begin to train a mask on the activation: take each channel's magnitude from `value`, unmasked activations at
        the cut of any batch size. Does nothing to a mask that is on, or to one of factors."""
        if self.kind == "weight" or self.on:
            return
        found = value.abs().to(self.magnitude.dtype)
        for axis in range(found.dim()):
            if self.magnitude.shape[axis] == 1:
                found = found.mean(axis, keepdim=True)
        self.magnitude.copy_(found.clamp_min(self.SILENT * found.mean()).clamp_min(torch.finfo(found.dtype).tiny))
        self.on.fill_(True)

    def penalty(self, masked: Tensor) -> Tensor:
        """L_comp, a scalar that is about the number of weights for a fresh mask of either kind.

            weight:      L_comp = ||w||_1                                       (Eq. 2)
            activation:  L_comp = sum over channels of mean |M(x)| / magnitude

        masked: the activation after the mask. The second form pushes on every threshold that still lets values
        through, by the share of them; an L1 on the thresholds themselves would lower them.
        """
        if self.kind == "weight":
            return self.weight.abs().sum()
        relative = masked.to(torch.promote_types(masked.dtype, torch.float32)) / self.magnitude
        return relative.abs().mean() * self.weight.numel()

    def sparsity(self) -> float:
        """Share of factors that are exactly zero: weight sparsity. A mask of thresholds has no factors: 0."""
        return (self.effective() == 0).float().mean().item() if self.kind == "weight" else 0.0

    @staticmethod
    def activation_sparsity(masked: Tensor) -> float:
        """Share of values of a masked activation that are exactly zero, whatever made them so."""
        return (masked == 0).float().mean().item()

    def forward(self, value: Tensor) -> Tensor:
        if self.kind == "weight":
            return value * self.effective()
        threshold = self.effective().to(value.dtype)
        return value - value.clamp(-threshold, threshold)
