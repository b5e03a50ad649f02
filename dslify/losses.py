"""The losses of a Dynamic Switch Layer: pure functions, one per equation of the paper (arXiv 2404.04405).

Everything here speaks of tuples: `light` and `full` hold one entry for each value that leaves the region, `layouts` say
where each keeps its samples, `scale` is the layer's buffer of mean absolute full outputs, (outputs,). Outputs without a
batch axis and outputs that are no floating-point tensors are not compared.

Whatever autocast made of the answers, they are compared in single precision: half of it cannot hold a difference of a
few thousandths of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import TrainError
from .output_losses import PLAIN, Kinds, OutputLoss, output_loss, output_losses, row_means, single, unit_of
from .segments import by_segment
from .switch import DSLayer, Layout, required_layers

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
    columns = [row_means(value, layout) if comparable(value, layout) else None for value, layout in pairs]
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
        gaps.append(row_means(single(cheap) - single(dear), layout) / unit_of(dear, scale[at], layout))
    if not gaps:
        raise TrainError(_nothing_to_compare(full))
    return torch.stack(gaps).mean(0)


def layer_difference(
    layer: DSLayer, light: Sequence[Any] | None, full: Sequence[Any] | None, scale: Tensor | None = None
) -> Tensor:
    """`difference` of a layer's outputs, one number for whatever it routes: (batch,), or where it has segments one for
    each of them, (batch * segments,), sample-major.

    scale: the layer's where not given. Raises OptionError for outputs that are not made of whole segments.
    """
    unit = layer.scale if scale is None else scale
    return difference(by_segment(layer, light or ()), by_segment(layer, full or ()), unit, layer.outputs)


def light_loss(
    light: Sequence[Any],
    full: Sequence[Any],
    scale: Tensor,
    layouts: Sequence[Layout],
    how: Sequence[OutputLoss] = PLAIN,
) -> Tensor:
    """L_lwd (Eq. 4), a weighted mean over the outputs; a scalar.

        L_lwd = mean_n sum_o w_o l_o(D_o(f_m), stopgrad F_o(f_m)) / sum_o w_o

    how: from `output_losses`, one for each output, or one for all; the default is L1 in units of relative difference.
    The full answer is the ground truth, so no gradient reaches the full path through this loss (the stop is ours).
    Raises TrainError when no output can be compared or none that can has a weight.
    """
    how = tuple(how) * len(full) if len(how) == 1 else how
    total: Tensor | None = None
    weights = 0.0
    for at, (cheap, dear, layout, one) in enumerate(zip(light, _stopped(full), layouts, how, strict=True)):
        if one.weight == 0 or not comparable(dear, layout):
            continue
        part = one.weight * output_loss(cheap, dear, scale[at], layout, one)
        total, weights = part if total is None else total + part, weights + one.weight
    if total is None:
        raise TrainError(_nothing_to_compare(full))
    return total.mean() / weights


def switch_loss(score: Tensor, actual: Tensor) -> Tensor:
    """L_switch, our reading of Eq. 3: regression of the score S on the actual difference d; a scalar.

        L_switch = smooth_l1( log(S(f_m) + eps), log(stopgrad d + eps) ),  eps = SCORE_FLOOR

    Eq. 3 as printed does not contain S, so S would get no gradient; the text says that S predicts the difference.
    Logarithms, because d spans orders of magnitude. score, actual: (batch,).
    """
    return functional.smooth_l1_loss((single(score) + SCORE_FLOOR).log(), (actual.detach() + SCORE_FLOOR).log())


def gate_loss(score: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy of a gate's probability with Omega(y) (GC, arXiv 2303.08970); a scalar.

        L_gate = mean_n w_n ( -[n positive] log S_n - [n negative] log(1 - S_n) )

    score: (batch,), probability that the sample is positive. positive: (batch,) bool. weight: (batch,), of the samples;
    `class_balance` of the whole data set, so that rare positives weigh as much as all negatives (the papers are
    silent). Raises TrainError for a score that is no probability.
    """
    probability = single(score)
    if not ((probability >= 0) & (probability <= 1)).all():
        raise TrainError("A gate's score is a probability, from 0 to 1; this switch was built to predict a difference.")
    with torch.autocast(probability.device.type, enabled=False):  # which forbids cross-entropy of probabilities
        losses = functional.binary_cross_entropy(probability, positive.to(probability.dtype), reduction="none")
    return (weight * losses).mean()


def class_balance(positive: Tensor) -> Tensor:
    """Weights with which positives and negatives count the same: (n,), of mean 1. positive: (n,) bool.

    Raises TrainError when one of the two is missing.
    """
    count, found = len(positive), int(positive.sum())
    if found in (0, count):
        kind = "none of them" if found == 0 else "every one"
        raise TrainError(f"A gate learns from samples of both kinds; of its {count} samples {kind} is positive.")
    return torch.where(positive, count / (2 * found), count / (2 * (count - found)))


def anchor_loss(
    full: Sequence[Any],
    original: Sequence[Any] | None,
    scale: Tensor,
    layouts: Sequence[Layout],
    how: Sequence[OutputLoss] = PLAIN,
) -> Tensor:
    """Fidelity of the masked full path to the unmasked one; a scalar, 0 when `original` is None (mask not trained).

        L_anchor = mean_n sum_o w_o l_o(F_o(M(f)), stopgrad F_o(f)) / sum_o w_o

    Ours: with Eq. 5 alone W_M = 0 makes both paths constant and the loss zero. This term forbids it.
    """
    return scale.new_zeros(()) if original is None else light_loss(full, original, scale, layouts, how)


@dataclass(frozen=True)
class DslLoss:
    """The parts of Eq. 5, each a scalar, summed over the network's layers and not yet weighted; `total` is weighted."""

    total: Tensor
    switch: Tensor
    light: Tensor
    mask: Tensor
    anchor: Tensor


def dsl_loss(
    net: nn.Module,
    alpha: float = 1.0,
    beta: float = 1e-4,
    anchor: float = 1.0,
    *,
    loss: Kinds = "l1",
    weights: Sequence[float] | None = None,
) -> DslLoss:
    """The loss of every Dynamic Switch Layer of `net` after one forward in training mode (Eq. 5, plus the anchor).

        L_dsl = alpha * L_switch + alpha * L_lwd + beta * L_comp + anchor * L_anchor

    Add `.total` to the task's own loss; with a task loss the anchor may be 0. Before the layers' scale is measured
    (finetune does it) differences are relative to the batch's own mean absolute full output.
    loss, weights: of the light path's outputs and the anchor, see output_losses; the switch always predicts the
    relative difference.

    net may be any module around the layers. Under autocast the losses are in single precision all the same. In
    DistributedDataParallel take it as it is by default (find_unused_parameters looks for parameters in the network's
    answer and not in this loss), and measure the scale first: a batch's own mean is another one in every process.

    Raises OptionError for a network without a Dynamic Switch Layer and for unknown losses, TrainError when the last
    forward did not run both paths (eval mode, or no forward yet).
    """
    layers = required_layers(net)
    parts = []
    for layer in layers:
        if layer.switch.kind == "positive":
            raise TrainError("dsl_loss is for switches, and this layer has a gate, which learns labels (gate_loss).")
        paths = layer.paths
        if paths is None or paths.full is None or paths.light is None:
            ran = "no forward" if paths is None else "a forward that did not run both paths on the whole batch"
            raise TrainError(f"dsl_loss found {ran}; call net.train() and then net(batch) before it.")
        how = output_losses(loss, weights, len(layer.outputs))
        about = (layer.scale, layer.outputs)
        parts.append(
            (
                switch_loss(paths.score, layer_difference(layer, _stopped(paths.light), _stopped(paths.full))),
                light_loss(paths.light, paths.full, *about, how),
                layer.mask.penalty(paths.masked),
                anchor_loss(paths.full, paths.original, *about, how),
            )
        )
    switch, light, mask, held = (torch.stack(column).sum() for column in zip(*parts, strict=True))
    return DslLoss(alpha * (switch + light) + beta * mask + anchor * held, switch, light, mask, held)


def _stopped(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)


def _nothing_to_compare(full: Sequence[Any]) -> str:
    found = ", ".join(str(value.dtype) if isinstance(value, Tensor) else type(value).__name__ for value in full)
    return (
        f"The two paths cannot be compared: what leaves the region is {found or 'nothing'}, and at least one "
        "floating-point tensor with a batch axis is expected; choose a cut further from the output."
    )
