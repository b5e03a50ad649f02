"""The losses of a Dynamic Switch Layer: pure functions, one per equation of the paper (arXiv 2404.04405).

Everything here speaks of tuples: `light` and `full` hold one entry for each value that leaves the region, `layouts` say
where each keeps its samples, `scale` is the layer's buffer of mean absolute full outputs, (outputs,). Outputs without a
batch axis and outputs that are no floating-point tensors are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import TrainError
from .switch import Layout, required_layers

SMALLEST_SCALE = 1e-8  # an output that is zero everywhere must not divide by zero
SCORE_FLOOR = 1e-3  # of a relative difference, before its logarithm: 0.1 % counts as none


def comparable(value: Any, layout: Layout) -> bool:
    """True for an output that a difference can be taken of: a floating-point tensor with a batch axis."""
    if layout.axis is None or not isinstance(value, Tensor):
        return False
    return value.is_floating_point() or value.is_complex()


def sample_scale(full: Sequence[Any], layouts: Sequence[Layout]) -> Tensor:
    """Mean absolute value of each sample of each output: (batch, outputs), 0 for an output that is not compared.

    The mean over a data set is the `scale` of `difference`:  scale_o = mean_n mean |F_o(x_n)|.
    Raises TrainError when no output can be compared.
    """
    pairs = zip(full, layouts, strict=True)
    columns = [_row_means(value, layout) if comparable(value, layout) else None for value, layout in pairs]
    known = next((column for column in columns if column is not None), None)
    if known is None:
        raise TrainError(_nothing_to_compare(full))
    return torch.stack([torch.zeros_like(known) if column is None else column for column in columns], dim=1)


def difference(light: Sequence[Any], full: Sequence[Any], scale: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """Relative difference of the two paths' answers, one number a sample: (batch,), unit-free.

        d_n = mean_o ( mean |D_o(x_n) - F_o(x_n)| / scale_o )

    The norm in the paper's Eq. 3 and 4; dividing by the scale is ours, so that a threshold means the same everywhere.
    An output whose scale has not been measured (0) is divided by this batch's own mean absolute full output instead.
    Differentiable in both paths. Raises TrainError when no output can be compared.
    """
    gaps = []
    for at, (cheap, dear, layout) in enumerate(zip(light, full, layouts, strict=True)):
        if not comparable(dear, layout):
            continue
        measured = torch.where(scale[at] > 0, scale[at], _row_means(dear.detach(), layout).mean())
        gaps.append(_row_means(cheap - dear, layout) / measured.clamp_min(SMALLEST_SCALE))
    if not gaps:
        raise TrainError(_nothing_to_compare(full))
    return torch.stack(gaps).mean(0)


def light_loss(light: Sequence[Any], full: Sequence[Any], scale: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """L_lwd (Eq. 4) with L1, in units of relative difference; a scalar.

        L_lwd = mean_n d(D(f_m), stopgrad F(f_m))

    The full answer is the ground truth, so no gradient reaches the full path through this loss (the stop is ours).
    """
    return difference(light, _stopped(full), scale, layouts).mean()


def switch_loss(score: Tensor, actual: Tensor) -> Tensor:
    """L_switch, our reading of Eq. 3: regression of the score S on the actual difference d; a scalar.

        L_switch = smooth_l1( log(S(f_m) + eps), log(stopgrad d + eps) ),  eps = SCORE_FLOOR

    Eq. 3 as printed does not contain S, so S would get no gradient; the text says that S predicts the difference.
    Logarithms, because d spans orders of magnitude. score, actual: (batch,).
    """
    return functional.smooth_l1_loss((score + SCORE_FLOOR).log(), (actual.detach() + SCORE_FLOOR).log())


def compression_loss(weights: Tensor) -> Tensor:
    """L_comp (Eq. 2): L1 norm of the mask's weights; a scalar.

    L_comp = ||W_M||_1
    """
    return weights.abs().sum()


def anchor_loss(
    full: Sequence[Any], original: Sequence[Any] | None, scale: Tensor, layouts: Sequence[Layout]
) -> Tensor:
    """Fidelity of the masked full path to the unmasked one; a scalar, 0 when `original` is None (mask not trained).

        L_anchor = mean_n d(F(M(f)), stopgrad F(f))

    Ours: with Eq. 5 alone W_M = 0 makes both paths constant and the loss zero. This term forbids it.
    """
    if original is None:
        return scale.new_zeros(())
    return difference(full, _stopped(original), scale, layouts).mean()


@dataclass(frozen=True)
class DslLoss:
    """The parts of Eq. 5, each a scalar, summed over the network's layers and not yet weighted; `total` is weighted."""

    total: Tensor
    switch: Tensor
    light: Tensor
    mask: Tensor
    anchor: Tensor


def dsl_loss(net: nn.Module, alpha: float = 1.0, beta: float = 1e-4, anchor: float = 1.0) -> DslLoss:
    """The loss of every Dynamic Switch Layer of `net` after one forward in training mode (Eq. 5, plus the anchor).

        L_dsl = alpha * L_switch + alpha * L_lwd + beta * L_comp + anchor * L_anchor

    Add `.total` to the task's own loss; with a task loss the anchor may be 0. Before the layers' scale is measured
    (finetune does it) differences are relative to the batch's own mean absolute full output.

    Raises OptionError for a network without a Dynamic Switch Layer, TrainError when the last forward did not run both
    paths (eval mode, or no forward yet).
    """
    layers = required_layers(net)
    parts = []
    for layer in layers:
        paths = layer.paths
        if paths is None or paths.full is None or paths.light is None:
            ran = "no forward" if paths is None else "a forward that did not run both paths on the whole batch"
            raise TrainError(f"dsl_loss found {ran}; call net.train() and then net(batch) before it.")
        actual = difference(paths.light, _stopped(paths.full), layer.scale, layer.outputs)
        parts.append(
            (
                switch_loss(paths.score, actual),
                actual.mean(),
                compression_loss(layer.mask.weight),
                anchor_loss(paths.full, paths.original, layer.scale, layer.outputs),
            )
        )
    switch, light, mask, held = (torch.stack(column).sum() for column in zip(*parts, strict=True))
    return DslLoss(alpha * (switch + light) + beta * mask + anchor * held, switch, light, mask, held)


def _row_means(value: Tensor, layout: Layout) -> Tensor:
    """Mean absolute value of every sample, (batch,), in float32 at least."""
    means = layout.rows(value).abs().mean(1)
    return means.to(torch.promote_types(means.dtype, torch.float32))


def _stopped(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)


def _nothing_to_compare(full: Sequence[Any]) -> str:
    found = ", ".join(str(value.dtype) if isinstance(value, Tensor) else type(value).__name__ for value in full)
    return (
        f"The two paths cannot be compared: what leaves the region is {found or 'nothing'}, and at least one "
        "floating-point tensor with a batch axis is expected; choose a cut further from the output."
    )
