"""What gates may lose: the share of positives, how surely, counted by what, and how it is divided among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from .errors import DataError, OptionError
from .gate import gates
from .rising import least_epsilon, needed_units
from .switch import DSLayer, required_layers

Unit = Literal["sample", "source"]
UNITS: tuple[Unit, ...] = ("sample", "source")


@dataclass(frozen=True)
class Budget:
    """What calibration by lost positives is asked for. max_lost: share of a new unit's positives. positive: label map,
    as omega() reads it. delta: 1 - confidence, None for a point estimate. units: what is exchangeable with what is to
    come. weights: of the gates' odds, outermost first; None for equal ones.
    """

    max_lost: float
    positive: Any
    delta: float | None
    units: Unit
    weights: tuple[float, ...] | None

    @classmethod
    def of(
        cls, max_lost: float, positive: Any, confidence: float | None, units: Unit, weights: Sequence[float] | None
    ) -> Budget:
        """From the arguments of calibrate(). Raises OptionError for what is missing or out of range."""
        if not 0 < max_lost < 1:
            raise OptionError(f"max_lost is a share of the positives, between 0 and 1, such as 0.01; got {max_lost:g}.")
        if positive is None:
            raise OptionError(
                "max_lost is about positives; say which labels these are, such as positive='1-9', 'yes,no' or "
                "'!background' (--positive)."
            )
        if confidence is not None and not 0 < confidence < 1:
            raise OptionError(f"confidence lies between 0 and 1, such as 0.95; got {confidence:g}.")
        if units not in UNITS:
            raise OptionError(f"units is one of {', '.join(UNITS)}; got {units!r}.")
        if weights is not None and not all(0 < weight < math.inf for weight in weights):
            given = ", ".join(f"{weight:g}" for weight in weights)
            raise OptionError(f"gate_weights are numbers above 0, one for each gate; got {given}.")
        delta = None if confidence is None else 1 - confidence
        return cls(max_lost, positive, delta, units, None if weights is None else tuple(map(float, weights)))

    def of_gates(self, net: nn.Module) -> tuple[tuple[DSLayer, ...], np.ndarray]:
        """The gates of a network, outermost first, and their weights. Raises OptionError for layers that are no gates
        or that route segments, and for another number of weights."""
        layers = required_layers(net)
        for at, layer in enumerate(layers, 1):
            if not gates([layer]):
                raise OptionError(
                    f"max_lost is for gates, and layer {at} of {len(layers)} has a switch that predicts a difference; "
                    "give max_difference instead, or insert with mode='gc' (--mode gc)."
                )
            if layer.segments is not None:
                raise OptionError(
                    "max_lost counts whole samples, and this network routes segments of them one by one; turn that off "
                    "with route_every(net, None), or give light_share instead."
                )
        weights = self.weights or (1.0,) * len(layers)
        if len(weights) != len(layers):
            raise OptionError(
                f"gate_weights takes one number for each gate of the network, outermost first, and it has "
                f"{len(layers)}; got {len(weights)}."
            )
        return layers, np.array(weights)

    def enough(self, sizes: np.ndarray) -> None:
        """Raises DataError where so many units are too few. sizes: the positives of each, (units,)."""
        units, share = len(sizes), f"{100 * self.max_lost:g} %"
        what = "positive sources" if self.units == "source" else "positive samples (copies count with their originals)"
        if self.delta is None:
            needed, said = math.ceil(1 / self.max_lost), f"A loss of {share} can be seen"
        else:
            whole = bool((sizes == 1).all())
            needed = needed_units(self.max_lost, self.delta, whole)
            said = f"At most {share} lost can be promised with {100 * (1 - self.delta):.4g} % confidence"
        if units >= needed:
            return
        rest = ""
        if self.delta is not None and units:
            least = math.ceil(1000 * least_epsilon(units, self.delta, whole)) / 1000
            rest = f" (these can promise {least:g})" if least < 1 else ""
        raise DataError(f"{said} from {needed} {what} on; got {units}. Give more data, or let more be lost{rest}.")
