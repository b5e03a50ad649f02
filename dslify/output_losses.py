"""How one output of the light path is held to the full path's: L1, mean square, cosine or KL of logits, and its weight.

Whatever autocast made of the answers, they are compared in single precision: half of it cannot hold a difference of a
few thousandths of the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OptionError, TrainError
from .switch import Layout

LOSSES = ("l1", "mse", "cosine", "kl")
SMALLEST_SCALE = 1e-8  # an output that is zero everywhere must not divide by zero


@dataclass(frozen=True)
class OutputLoss:
    """How one output of the light path is held to the full path's, and its weight among the outputs.

    kind: one of LOSSES. axis: of the classes, for "kl". Raises OptionError.
    """

    kind: str = "l1"
    weight: float = 1.0
    axis: int = -1

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise OptionError(
                f"loss is one of {', '.join(LOSSES)} (kl:1 where axis 1 holds the classes); got {self.kind!r}."
            )
        if not 0 <= self.weight < float("inf"):
            raise OptionError(f"weights of outputs are 0 or more; got {self.weight}.")


Kinds = str | Sequence[str] | Mapping[int, str]  # of light losses: for all outputs, for each, or for some by position
PLAIN = (OutputLoss(),)


def output_losses(loss: Kinds, weights: Sequence[float] | None, outputs: int) -> tuple[OutputLoss, ...]:
    """The loss of each of `outputs` outputs.

    loss: one kind for all; or one for each; or {position: kind}, "l1" where nothing is said. "kl" takes the last axis
    for the classes, "kl:1" axis 1. weights: one for each output, None for 1 each.
    Raises OptionError for another kind or count, and when no output has a weight.
    """
    if isinstance(loss, Mapping):
        given = {int(at): kind for at, kind in loss.items()}
        if outside := [at for at in given if not 0 <= at < outputs]:
            raise OptionError(f"loss names output {outside[0]}; the layer's outputs are 0 to {outputs - 1}.")
        kinds = [given.get(at, "l1") for at in range(outputs)]
    else:
        kinds = [loss] * outputs if isinstance(loss, str) else list(loss)
    shares = [1.0] * outputs if weights is None else [float(weight) for weight in weights]
    for name, found in (("loss", kinds), ("weights", shares)):
        if len(found) != outputs:
            raise OptionError(f"{name} has {len(found)} entries and the layer {outputs} outputs; give one for each.")
    if not any(shares):
        raise OptionError(f"weights are 0 for all {outputs} outputs; at least one has to count.")
    return tuple(map(_parsed, kinds, shares))


def _parsed(text: str, weight: float) -> OutputLoss:
    kind, colon, axis = str(text).partition(":")
    if not colon:
        return OutputLoss(kind, weight)
    if kind != "kl" or not axis.removeprefix("-").isdigit():
        raise OptionError(f"loss is one of {', '.join(LOSSES)} or kl:AXIS; got {text!r}.")
    return OutputLoss(kind, weight, int(axis))


def output_loss(light: Tensor, full: Tensor, scale: Tensor, layout: Layout, how: OutputLoss) -> Tensor:
    """One output's loss, one number a sample: (batch,). D is the light answer, F the full one, s its scale.

        l1      mean |D - F| / s                            the relative difference, as `difference` has it
        mse     mean |D - F|^2 / s^2                        large errors weigh more
        cosine  1 - Re<D, F> / (|D| |F|)                    of the whole sample; blind to its level
        kl      mean sum_k p_k (log p_k - log q_k),  p = softmax F, q = softmax D       for logits (Hinton et al. 2015)

    scale: a scalar, 0 for the batch's own mean |F|. Differentiable in both. Raises TrainError for "kl" on complex
    values or without that axis, or where the axis is the one of the samples.
    """
    light, full = single(light), single(full)
    if how.kind == "kl":
        return _divergence(light, full, layout, how.axis)
    if how.kind == "cosine":
        mine, theirs = layout.rows(light), layout.rows(full)
        lengths = mine.abs().square().sum(1).sqrt() * theirs.abs().square().sum(1).sqrt()
        return 1 - (mine * theirs.conj()).real.sum(1) / lengths.clamp_min(SMALLEST_SCALE)
    unit = unit_of(full, scale, layout)
    if how.kind == "mse":
        return layout.rows(light - full).abs().square().mean(1) / unit.square()
    return row_means(light - full, layout) / unit


def _divergence(light: Tensor, full: Tensor, layout: Layout, axis: int) -> Tensor:
    shape = "x".join(map(str, full.shape))
    if full.is_complex() or not -full.ndim <= axis < full.ndim or axis % full.ndim == layout.axis:
        raise TrainError(
            f"The loss kl compares logits over axis {axis}, and an output is {full.dtype} of shape {shape}; name the "
            "classes' axis (kl:1) or take l1, mse or cosine there."
        )
    truth, guess = full.log_softmax(axis), light.log_softmax(axis)
    return layout.rows((truth.exp() * (truth - guess)).sum(axis, keepdim=True)).mean(1)


def row_means(value: Tensor, layout: Layout) -> Tensor:
    """Mean absolute value of every sample, (batch,), in float32 at least."""
    return layout.rows(single(value)).abs().mean(1)


def single(value: Tensor) -> Tensor:
    """In single precision at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def unit_of(full: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """What one output's differences are relative to: its scale, or while that is 0 this batch's; a scalar."""
    return torch.where(scale > 0, scale, row_means(full.detach(), layout).mean()).clamp_min(SMALLEST_SCALE)
