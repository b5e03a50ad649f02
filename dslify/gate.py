"""Gates (GC, arXiv 2303.08970): a switch that says how probably a sample is positive, and the answer for the rest.

A negative sample stops at the gate with a constant answer. What trains the gate is the cross-entropy with Omega(y); the
papers do not say which loss, how a mask takes part in it, or what the answer is, so those are ours:

    answers    the mean of the full path's answers to the negative samples (or what the user gives)
    mask       with beta > 0: L_gate + beta L_comp + anchor L_anchor on mask and gate together
    gate       L_gate alone, on features that are computed once

A mask of thresholds lies behind the gate (DSLayer.unmasked), which then reads what it would without one: L_gate moves
factors, thresholds follow beta and the anchor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .answers import mean_answer
from .errors import DataError, OptionError, TrainError, one_line
from .gather import Batches, LightObjective, Table, check_finite
from .losses import anchor_loss, class_balance, gate_loss
from .output_losses import OutputLoss
from .samples import Samples, shaped
from .switch import DSLayer, Layout, Switch, route

GATE = "positive"  # Switch.kind


def gates(layers: Sequence[DSLayer]) -> tuple[DSLayer, ...]:
    """The layers whose switch is a gate."""
    return tuple(layer for layer in layers if layer.switch.kind == GATE)


def only_gates(layer: DSLayer) -> bool:
    """A gate whose light path has nothing to learn: none, or a constant answer, which is set and not trained."""
    return bool(gates([layer])) and all(name.startswith("answer") for name, _ in layer.light.named_parameters())


class GateObjective(nn.Module):
    """Positions of samples -> L_gate summed over the gates, (1,), from features that no longer change.

    features: of each switch, (n, 3 channels). positive: Omega(y), bool, (n,). Raises TrainError when all or none are
    positive.
    """

    def __init__(self, switches: Sequence[Switch], features: Sequence[Tensor], positive: Tensor):
        super().__init__()
        self.held = nn.ModuleList(switches)  # for Fabric to find the parameters
        self.switches, self.features = tuple(switches), features
        self.positive, self.weight = positive, class_balance(positive)

    def forward(self, positions: Tensor) -> Tensor:
        losses = []
        positive, weight = self.positive[positions], self.weight[positions]
        for switch, features in zip(self.switches, self.features, strict=True):
            score = switch.score(features[positions.to(features.device)])
            losses.append(gate_loss(score, positive.to(score.device), weight.to(score.device)))
        return torch.stack(losses).sum().reshape(1)


class GatedMaskObjective(LightObjective):
    """Positions of samples -> (gate, mask, anchor), unweighted, (3,), while masks train in front of gates.

    The gate's cross-entropy tells factors which channels the decision needs, the anchor which ones the full path does.
    tables, how: as for LightObjective. positive: Omega(y), bool, (n,). Raises TrainError when all or none are positive.
    """

    NAMES = ("gate", "mask", "anchor")

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[DSLayer],
        tables: Sequence[Table] | None,
        samples: Samples,
        positive: Tensor,
        how: Sequence[Sequence[OutputLoss]] | None = None,
    ):
        super().__init__(net, layers, tables, samples, how)
        self.positive, self.weight = positive, class_balance(positive)

    def forward(self, positions: Tensor) -> Tensor:
        totals = []
        positive, weight = self.positive[positions], self.weight[positions]
        for layer, how, answers in zip(self.layers, self.how, self._answers(positions), strict=True):
            read, masked, _, full, original = answers
            score = layer.switch(layer.pooled(read))
            told = [one.to(score.device).repeat_interleave(len(score) // len(one)) for one in (positive, weight)]
            losses = (
                gate_loss(score, *told),
                layer.mask.penalty(masked),
                anchor_loss(full, original, layer.scale, layer.outputs, how),
            )
            totals.append(torch.stack(losses))
        return torch.stack(totals).sum(0)


@torch.no_grad()
def fill_answers(
    net: nn.Module,
    layers: Sequence[DSLayer],
    batches: Batches,
    samples: Samples,
    negative: Tensor,
    given: Sequence[Any] | None = None,
) -> int:
    """Set the constant answers of light paths of kind "exit", in place; other light paths are left alone.

    An answer becomes the mean of what the full path answers to the negative samples, whole numbers rounded. negative:
    bool, (n,). given: instead, one tensor (or nested list) per output, of the output's shape without the batch axis.
    Returns how many layers have such an answer.

    Raises DataError when there is no negative sample, OptionError for given answers of another number or shape,
    TrainError for an answer that is not finite.
    """
    constant = [(layer, found) for layer in layers if (found := _answers(layer))]
    if not constant:
        return 0
    if given is not None:
        for _, answers in constant:
            _set(answers, given)
        return len(constant)
    count = int(negative.sum())
    if not count:
        raise DataError(
            f"The answer of an early exit is the mean of the full path's over negative samples, and none of "
            f"{len(negative)} is negative; give data with negatives, or the answer itself."
        )
    chosen = samples.subset(negative.nonzero().flatten().tolist())
    sums = [{at: torch.zeros_like(one, dtype=_exact(one)) for at, one in found.items()} for _, found in constant]
    with route(net, "full"):
        for begin, batch in batches(chosen, "answers to negatives"):
            net(batch)
            for (layer, _), total in zip(constant, sums, strict=True):
                if layer.paths is None or layer.paths.full is None:
                    raise TrainError("A gate did not run in the network's forward; remove what is never called.")
                for at, held in total.items():
                    value, place = layer.paths.full[at], layer.outputs[at]
                    check_finite(place.rows(value), chosen, begin)
                    held += len(batch) * mean_answer(value.to(held.dtype), place, _varying(value, place, held))
    for (_, answers), total in zip(constant, sums, strict=True):
        for at, answer in answers.items():
            _write(answer, total[at] / count)
    return len(constant)


def _answers(layer: DSLayer) -> dict[int, Tensor]:
    """The constants of a light path (dslify.answers), by position of the output; empty for other light paths. What all
    samples share is no answer to a sample."""
    found = ((at, getattr(layer.light, f"answer{at}", None)) for at in range(len(layer.outputs)))
    return {at: answer for at, answer in found if isinstance(answer, Tensor) and layer.outputs[at].axis is not None}


def _varying(value: Tensor, place: Layout, answer: Tensor) -> list[int]:
    """The axes of an output along which its constant answer is the same: their length is the input's."""
    axes = [axis for axis in range(value.dim()) if axis != place.axis]
    rest = answer.shape[1:] if place.per_sample > 1 else answer.shape
    return [axis for axis, size in zip(axes, rest, strict=True) if size == 1]


def _exact(answer: Tensor) -> torch.dtype:
    return torch.promote_types(answer.dtype, torch.float64)


def _set(answers: dict[int, Tensor], given: Sequence[Any]) -> None:
    if len(given) != len(answers):
        raise OptionError(
            f"{len(given)} answers for negatives were given and the region has {len(answers)} outputs; give one each."
        )
    for (at, answer), value in zip(answers.items(), given, strict=True):
        try:
            wanted = torch.as_tensor(value, dtype=_exact(answer), device=answer.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"The answer given for output {at} is no array of numbers: {one_line(error)}.") from error
        if wanted.shape != answer.shape:
            raise OptionError(
                f"The answer given for output {at} has the shape {shaped(wanted.shape)}; expected "
                f"{shaped(answer.shape)}, one answer without the batch axis."
            )
        if not wanted.isfinite().all():
            raise OptionError(f"The answer given for output {at} holds NaN or infinite values.")
        _write(answer, wanted)


def _write(answer: Tensor, value: Tensor) -> None:
    if answer.dtype == torch.bool:
        value = value >= 0.5
    elif not answer.is_floating_point():
        value = value.round()
    answer.copy_(value)
