"""One batch through a network with Dynamic Switch Layers: on both paths, on every way, and as it would be routed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cascade import Way, forced, parents
from .errors import OptionError, VerifyError
from .losses import comparable, layer_difference, sample_scale
from .sparsity import entries, zeros
from .switch import DSLayer, Paths, Route, route

Judge = Callable[[Any, Any, Sequence[int]], Any]
"""(network output, model input, positions in the data) of a batch -> one number per sample."""

Columns = dict[tuple[str, int], np.ndarray]
"""By name and number of a layer or way; MIXED for what came of routing."""

MIXED = -1


def scales(net: nn.Module, layers: Sequence[DSLayer], batches: Iterable[Tensor]) -> list[Tensor]:
    """Each layer's stored scale, or where an output of it was never measured, the one of this data; (outputs,)."""
    rows: list[list[Tensor]] = [[] for _ in layers]
    measured = [True] * len(layers)
    for inputs in batches:
        left = _whole(net, layers, inputs, "full").left
        for at, layer in enumerate(layers):
            known = zip(left[at], layer.outputs, layer.scale, strict=True)
            if any(scale == 0 and comparable(value, layout) for value, layout, scale in known):
                measured[at] = False
                rows[at].append(sample_scale(left[at], layer.outputs))
        if all(measured):
            break
    return [
        layer.scale.clone() if known else torch.cat(own).mean(0).to(layer.scale)
        for layer, own, known in zip(layers, rows, measured, strict=True)
    ]


class Probe:
    """Looks at one batch after the other.

    layers: of the network, outermost first. scales: one a layer, (outputs,). judges: by name. ways: to try beside the
    two paths, all full first; with none, nothing is routed or judged.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[DSLayer],
        scales: Sequence[Tensor],
        judges: dict[str, Judge],
        ways: Sequence[Way] = (),
    ):
        self.net, self.layers, self.scales, self.judges, self.ways = net, layers, scales, judges, ways
        self.parents = parents(layers)

    def columns(self, inputs: Tensor, positions: Sequence[int]) -> Columns:
        """What one batch shows, each (batch,); of layers that route segments, (batch * segments,), sample by sample.

        score, difference: of every layer, with both paths of all of them run. zeros, entries: of every gate, the share
        of zeros in what crosses the cut, and its values. way: difference of every way from all
        full, where the last layer ends. mixed: the same of the routed run. taken, reached: of every layer in it. And
        each judgement under its name, for every way and MIXED: a sample's, at each of its segments.
        """
        both = _whole(self.net, self.layers, inputs, "both")
        size = len(inputs) * _paths(self.layers[0]).segments
        columns: Columns = {}
        for at, layer in enumerate(self.layers):
            columns["score", at] = _column(_paths(layer).score, size, _LAYER)
            columns["difference", at] = self._apart(_paths(layer).light or (), both, at, size)
            if layer.switch.kind == "positive":
                columns["zeros", at] = _column(zeros(layer, _paths(layer)), size, _LAYER)
                columns["entries", at] = np.full(size, entries(layer, _paths(layer)))
        if not self.ways:
            return columns
        for number, way in enumerate(self.ways):
            if not self.judges and _light_at(both.last, way):
                columns["way", number] = columns["difference", both.last]
                continue
            ran = _run(self.net, self.layers, inputs, forced(self.layers, way)) if number else both
            columns["way", number] = self._apart(ran.left[both.last], both, both.last, size)
            columns |= self._judged(ran.output, inputs, positions, number)
        mixed = _run(self.net, self.layers, inputs, route(self.net, "mixed"))
        columns["mixed", MIXED] = self._apart(mixed.left[both.last], both, both.last, size)
        return columns | self._judged(mixed.output, inputs, positions, MIXED) | self._routed(mixed, size)

    def _apart(self, values: tuple[Any, ...], both: _Ran, at: int, size: int) -> np.ndarray:
        """Relative difference from the full output of layer `at`, (batch,)."""
        return _column(layer_difference(self.layers[at], values, both.left[at], self.scales[at]), size, _LAYER)

    def _judged(self, output: Any, inputs: Tensor, positions: Sequence[int], number: int) -> Columns:
        asked = ((name, judge(output, inputs, positions)) for name, judge in self.judges.items())
        columns = {(name, number): _column(value, len(inputs), f"The {name}") for name, value in asked}
        return {key: column.repeat(_paths(self.layers[0]).segments) for key, column in columns.items()}

    def _routed(self, mixed: _Ran, size: int) -> Columns:
        """Who reached each layer and who went light there; a layer inside a full path sees only those who took it."""
        columns: Columns = {}
        for at, (layer, parent) in enumerate(zip(self.layers, self.parents, strict=True)):
            reached, taken = np.ones(size, bool), np.zeros(size, bool)
            if parent is not None:
                reached = columns["reached", parent] & ~columns["taken", parent]
            if at in mixed.left:  # else its paths are those of an earlier batch
                taken[reached] = _column(_paths(layer).light_taken, int(reached.sum()), _LAYER).astype(bool)
            columns["reached", at], columns["taken", at] = reached, taken
        return columns


@dataclass(frozen=True)
class _Ran:
    """One forward: the network's output, and what left each layer that ran, in the order in which they ended."""

    output: Any
    left: dict[int, tuple[Any, ...]]

    @property
    def last(self) -> int:
        """The layer behind which nothing is routed any more."""
        return next(reversed(self.left))


def _run(net: nn.Module, layers: Sequence[DSLayer], inputs: Tensor, routed: AbstractContextManager[Any]) -> _Ran:
    left: dict[int, tuple[Any, ...]] = {}

    def keeper(at: int) -> Callable[..., None]:
        def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            left.pop(at, None)
            # What follows the layer may work in place on what left it.
            left[at] = tuple(value.clone() if isinstance(value, Tensor) else value for value in values)

        return keep

    handles = [layer.register_forward_hook(keeper(at)) for at, layer in enumerate(layers)]
    try:
        with routed:
            return _Ran(net(inputs), left)
    finally:
        for handle in handles:
            handle.remove()


def _whole(net: nn.Module, layers: Sequence[DSLayer], inputs: Tensor, mode: Route) -> _Ran:
    """A run that reaches every layer. Raises VerifyError where it does not."""
    ran = _run(net, layers, inputs, route(net, mode))
    if len(ran.left) < len(layers):
        raise VerifyError("The network ran without reaching its Dynamic Switch Layer, so nothing can be measured.")
    return ran


def _light_at(last: int, way: Way) -> bool:
    """Whether a way is light at the layer `last` and full wherever else it comes."""
    return all(bool(light) == (at == last) for at, light in enumerate(way))


def _paths(layer: DSLayer) -> Paths:
    if layer.paths is None:
        raise VerifyError("The Dynamic Switch Layer kept nothing of its last forward, so nothing can be measured.")
    return layer.paths


_LAYER = "The Dynamic Switch Layer"


def _column(value: Any, size: int, what: str) -> np.ndarray:
    """One number per sample as float64, (size,)."""
    try:
        array = torch.as_tensor(value).detach().double().cpu().numpy()
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(
            f"{what} must give one number per sample, shape ({size},); got a value of type {type(value).__name__}."
        ) from None
    if array.shape != (size,):
        raise OptionError(
            f"{what} must give one number per sample, shape ({size},) for {size} samples; got shape {array.shape}."
        )
    return array
