"""A network on every window of a long sound, as it routes: answers, how far each window went, what was computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dslify.capture import evaluating
from dslify.cascade import parents
from dslify.cost import cost
from dslify.counted import executed
from dslify.errors import OptionError
from dslify.runtime import wire
from dslify.switch import DSLayer, dsl_layers

BATCH = 64
NUMBER = "int8"  # how activations cross a cut


@dataclass(frozen=True, eq=False)
class Passed:
    """What a network made of n windows, in their order.

    probabilities: (n, classes). reached, went_on: for each Dynamic Switch Layer, outermost first, which windows came to
    it and which took its full path, (layers, n) bool. sent: bytes of what entered its full path, as dslify's wire has
    it, of all windows together; (layers,). macs, transform_macs: executed, see dslify.counted.
    """

    probabilities: np.ndarray
    reached: np.ndarray
    went_on: np.ndarray
    sent: np.ndarray
    macs: int
    transform_macs: int

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def depth(self) -> np.ndarray:
        """How many layers let each window go on, (n,)."""
        found: np.ndarray = self.went_on.sum(0)
        return found

    @property
    def stopped(self) -> np.ndarray:
        """Which windows did not go through the whole network, (n,)."""
        found: np.ndarray = (self.reached & ~self.went_on).any(0)
        return found


_Calls = dict[DSLayer, tuple[Tensor, int]]  # of one batch: (paths.light_taken, bytes sent to the full path)


def passed(net: nn.Module, windows: Tensor, batch: int = BATCH) -> Passed:
    """Run the network over windows (n, 1, samples), in eval mode and as it routes.

    net: sound -> logits (batch, classes), with any number of Dynamic Switch Layers, or none.
    """
    layers = dsl_layers(net)
    above = parents(layers)
    answers: list[Tensor] = []
    reached = np.zeros((len(layers), len(windows)), bool)
    went_on = np.zeros_like(reached)
    sent = np.zeros(len(layers))
    calls: _Calls = {}
    with evaluating(net), torch.no_grad(), _watched(layers, calls), executed() as counter:
        for at in range(0, len(windows), batch):
            part = windows[at : at + batch]
            answers.append(net(part.contiguous()))
            _note(layers, above, calls, slice(at, at + len(part)), reached, went_on, sent)
        macs, transform = counter.macs, counter.transform_macs
    probabilities = torch.cat(answers).softmax(1).numpy()
    return Passed(probabilities, reached, went_on, sent, macs, transform)


def _note(
    layers: Sequence[DSLayer], above: Sequence[int | None], calls: _Calls, where: slice,
    reached: np.ndarray, went_on: np.ndarray, sent: np.ndarray,
) -> None:  # fmt: skip
    """Write down one batch. A layer inside a full path sees only the windows that came there, in their order."""
    for at, (layer, parent) in enumerate(zip(layers, above, strict=True)):
        inside = np.ones(where.stop - where.start, bool) if parent is None else went_on[parent, where]
        reached[at, where] = inside
        if layer in calls:  # no window came to the others
            light, size = calls.pop(layer)
            places = np.flatnonzero(inside) + where.start
            went_on[at, places] = ~light.numpy()
            sent[at] += size


@contextmanager
def _watched(layers: Sequence[DSLayer], calls: _Calls) -> Iterator[None]:
    def note(layer: DSLayer, inputs: tuple[Any, ...], _: Any) -> None:
        paths = layer.paths
        if paths is None or paths.light_taken is None:
            raise OptionError("The network's layers do not route; take it out of dslify.route() and run it as it is.")
        values = (paths.masked, *inputs[1:])
        size = sum(message(layer, values, at) for at in (~paths.light_taken).nonzero().flatten().tolist())
        calls[layer] = paths.light_taken, size

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def message(layer: DSLayer, values: Sequence[Any], at: int) -> int:
    """Bytes that the full path of sample `at` is sent: zeros as a bitmap, the rest int8, a scale for each channel.

    values: the masked activation at the cut, and what crosses beside it.
    """
    batch = len(values[0]) // layer.inputs[0].per_sample
    index = torch.tensor([at])
    own = [layout.take(value, index, batch) for layout, value in zip(layer.inputs, values, strict=True)]
    arrays = [value.numpy() for value in own if isinstance(value, Tensor)]
    return len(wire.encode(arrays, NUMBER, [(layer.inputs[0].axis or 0, layer.channel_axis)]))


def computed(net: nn.Module, found: Passed) -> tuple[float, float]:
    """(MACs, bytes to and from memory) of all windows, from dslify.cost and which windows reached which layer.

    Bytes as dslify.energy.work has them: every parameter is read once for a window, every activation written and read.
    """
    width = next((parameter.element_size() for parameter in net.parameters()), 4)
    macs = size = 0.0
    for row in cost(net):
        times = len(found)
        if row.layer:
            reached, on = found.reached[row.layer - 1], found.went_on[row.layer - 1]
            times = int({"switch": reached, "light": reached & ~on, "full": on}[row.name.split()[0]].sum())
        macs += times * row.macs
        size += times * (row.params * width + 2 * row.bytes)
    return macs, size


def one_by_one(nets: Mapping[str, nn.Module], windows: Tensor, rounds: int = 20) -> dict[str, float]:
    """Seconds of a window, by network: mean over all of them, one at a time, as a device hears them.

    The networks take turns, `rounds` times over all windows, so that whatever else the machine does hits all alike.
    """
    seconds = dict.fromkeys(nets, 0.0)
    with torch.no_grad():
        for net in nets.values():
            net(windows[:1].contiguous())
        for part in windows.tensor_split(min(rounds, len(windows))):
            for name, net in nets.items():
                with evaluating(net):
                    begun = time.perf_counter()
                    for at in range(len(part)):
                        net(part[at : at + 1])
                    seconds[name] += (time.perf_counter() - begun) / len(windows)
    return seconds
