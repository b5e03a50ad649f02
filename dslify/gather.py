"""What finetune() computes once: all that frozen parts give for the data, and the losses that are taken from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TrainError
from .losses import anchor_loss, comparable, layer_difference, light_loss, sample_scale, switch_loss
from .output_losses import OutputLoss, output_losses
from .samples import Samples, expected_shape
from .schedule import device_of
from .switch import DSLayer, Layout, Paths, Switch, route

Batches = Callable[[Samples, str], Iterator[tuple[int, Tensor]]]  # (data, words for the bar) -> (first position, batch)


class Table:
    """What the frozen surroundings of one layer compute, for all samples at once: (cut, *crossing) and the answers.

    The cut is the one after the mask and the answers are the full path's, unless the mask trains: then the cut is the
    unmasked one and the answers are the original's. Answers that are not compared are None.
    """

    def __init__(self, layer: DSLayer, count: int):
        self.layouts, self.inputs, self.count = (*layer.inputs, *layer.outputs), len(layer.inputs), count
        self.values: list[Any] = []

    def write(self, values: Sequence[Any], begin: int, size: int, room: int) -> int | None:
        """Rows `begin` to `begin + size`. Returns what is left of `room` bytes; None when it cannot be kept."""
        if begin == 0:
            for value, layout in zip(values, self.layouts, strict=True):
                if _by_sample(value, layout):
                    room -= value.numel() * value.element_size() * self.count // size
            if room < 0:
                return None
            self.values = [self._room(value, layout, size) for value, layout in zip(values, self.layouts, strict=True)]
        for whole, value, layout in zip(self.values, values, self.layouts, strict=True):
            if _by_sample(value, layout):
                start, length = begin * layout.per_sample, size * layout.per_sample
                whole.narrow(layout.axis, start, length).copy_(value)
            elif isinstance(value, Tensor):
                if whole.shape != value.shape or not torch.equal(whole, value):
                    return None  # depends on which samples are together
            elif whole != (value // size * self.count if layout.scales else value):
                return None
        return room

    def take(self, positions: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(cut, *crossing) and the answers of these samples."""
        index = positions.to(self.values[0].device)
        rows = tuple(
            layout.take(value, index, self.count) for value, layout in zip(self.values, self.layouts, strict=True)
        )
        return rows[: self.inputs], rows[self.inputs :]

    def _room(self, value: Any, layout: Layout, size: int) -> Any:
        if _by_sample(value, layout):
            shape = list(value.shape)
            shape[layout.axis or 0] = self.count * layout.per_sample
            return value.new_empty(shape)
        return value // size * self.count if layout.scales else value


class LightObjective(nn.Module):
    """Positions of samples -> the unweighted light loss, or (light, mask, anchor) while masks train.

    how: of each layer the losses of its outputs, from output_losses; None for L1. read: of these layers, if there is
    one that has learned how often they run.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[DSLayer],
        tables: Sequence[Table] | None,
        samples: Samples,
        how: Sequence[Sequence[OutputLoss]] | None = None,
        read: Reader | None = None,
    ):
        super().__init__()
        self.net, self.layers, self.tables, self.samples = net, layers, tables, samples
        self.how = how or [output_losses("l1", None, len(layer.outputs)) for layer in layers]
        self.read = read or Reader(net, layers)

    def forward(self, positions: Tensor) -> Tensor:
        total: Tensor | None = None
        for layer, how, answers in zip(self.layers, self.how, self._answers(positions), strict=True):
            _, masked, light, full, original = answers
            losses = [light_loss(light, full, layer.scale, layer.outputs, how)]
            if layer.mask.weight.requires_grad:
                losses.append(layer.mask.penalty(masked))
                losses.append(anchor_loss(full, original, layer.scale, layer.outputs, how))
            stacked = torch.stack(losses)
            total = stacked if total is None else total + stacked
        if total is None:
            raise TrainError("There is no Dynamic Switch Layer to train.")
        return total

    def _answers(self, positions: Tensor) -> Iterator[tuple[Tensor, Tensor, Any, Any, Any]]:
        """(what the switch reads, masked, light, full, original) of every layer."""
        if self.tables is None:
            self.read(self.samples.batch(positions).to(device_of(self.net)))
            for layer in self.layers:
                paths = _ran(layer)
                yield paths.read, paths.masked, paths.light, paths.full, paths.original
            return
        for layer, table in zip(self.layers, self.tables, strict=True):
            (cut, *crossing), answers = table.take(positions)
            if layer.mask.weight.requires_grad:
                masked = layer.mask(cut)
                read = layer.switch_input(cut, masked)
                yield read, masked, layer.light(masked, *crossing), layer.full(masked, *crossing), answers
            else:  # the table holds what follows the mask, and no switch learns from it
                yield cut, cut, layer.light(cut, *crossing), answers, None


class SwitchObjective(nn.Module):
    """Positions of samples -> the switch loss, from features and actual differences that no longer change."""

    def __init__(self, switches: Sequence[Switch], features: Sequence[Tensor], actual: Sequence[Tensor]):
        super().__init__()
        self.held = nn.ModuleList(switches)
        self.switches, self.features, self.actual = tuple(switches), features, actual

    def forward(self, positions: Tensor) -> Tensor:
        losses = []
        for switch, features, actual in zip(self.switches, self.features, self.actual, strict=True):
            index = positions.to(features.device)
            losses.append(switch_loss(switch.score(features[index]), actual[index]))
        return torch.stack(losses).sum().reshape(1)


@torch.no_grad()
def gather(
    net: nn.Module,
    layers: Sequence[DSLayer],
    batches: Batches,
    samples: Samples,
    room: int,
    masks_train: bool,
    read: Reader | None = None,
) -> tuple[list[Tensor], list[Table] | None]:
    """One pass of the full route: the output scale of every layer and, while they fit into `room` bytes, its table.

    With masks_train, masks on the activation are turned on at the end, by what the first batch brings.
    """
    first: list[Tensor] = []
    calls: list[list[tuple[Any, ...]]] = [[] for _ in layers]
    tables = [Table(layer, len(samples)) for layer in layers] if room else None
    totals = [torch.zeros(len(layer.outputs), dtype=torch.float64) for layer in layers]
    with ExitStack() as stack:
        for layer, seen in zip(layers, calls, strict=True):
            stack.callback(layer.register_forward_pre_hook(_keeper(seen)).remove)
        stack.enter_context(route(net, "full"))
        read = read or Reader(net, layers)
        for begin, batch in batches(samples, "reading the full path"):
            for seen in calls:
                seen.clear()
            read(batch)
            if begin == 0 and masks_train:
                first = [seen[0][0] for seen in calls if seen]
            for at, layer in enumerate(layers):
                paths = _ran(layer)
                means = sample_scale(paths.full or (), layer.outputs)
                check_finite(means, samples, begin)
                totals[at] += means.sum(0).cpu()
                if tables is None or len(calls[at]) != 1:  # a layer that runs twice has no single input
                    tables = None
                    continue
                cut, *crossing = calls[at][0]
                answers = layer.full(cut, *crossing) if masks_train else paths.full
                compared = [
                    value if comparable(value, layout) else None
                    for value, layout in zip(answers or (), layer.outputs, strict=True)
                ]
                values = (cut if masks_train else paths.masked, *crossing, *compared)
                left = tables[at].write(values, begin, len(batch), room)
                if left is None:
                    tables = None
                else:
                    room = left
    for layer, cut in zip(layers, first, strict=False):  # none where no mask trains
        layer.mask.turn_on(cut)
    return [total / len(samples) for total in totals], tables


@torch.no_grad()
def judge(
    net: nn.Module, layers: Sequence[DSLayer], batches: Batches, samples: Samples
) -> tuple[list[Tensor], list[Tensor]]:
    """For every layer the switch's features, (n, 3 channels), and the actual differences, (n,); of a layer that routes
    segments, n counts these, sample by sample."""
    features: list[list[Tensor]] = [[] for _ in layers]
    actual: list[list[Tensor]] = [[] for _ in layers]
    read = Reader(net, layers)
    for begin, batch in batches(samples, "comparing the paths"):
        read(batch)
        for at, layer in enumerate(layers):
            paths = _ran(layer)
            gaps = layer_difference(layer, paths.light, paths.full)
            check_finite(gaps.reshape(len(batch), -1), samples, begin)
            features[at].append(layer.switch.features(layer.pooled(paths.read)))
            actual[at].append(gaps)
    return [torch.cat(parts) for parts in features], [torch.cat(parts) for parts in actual]


def _keeper(seen: list[tuple[Any, ...]]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, inputs: seen.append(inputs)


def _by_sample(value: Any, layout: Layout) -> bool:
    return layout.axis is not None and isinstance(value, Tensor)


def _ran(layer: DSLayer) -> Paths:
    if layer.paths is None:
        raise TrainError("A Dynamic Switch Layer did not run in the network's forward; remove what is never called.")
    return layer.paths


class _Enough(BaseException):
    """Every layer has run; no Exception, so that no handler on the way up takes it for an error."""


class Reader:
    """Runs the network as far as its layers need it: behind the last one, a codec's decoder say, nothing is computed.

    How often the layers run in one forward is learned from the first call, which runs to the end.
    """

    def __init__(self, net: nn.Module, layers: Sequence[DSLayer]):
        self.net, self.layers = net, layers
        self.expected: int | None = None

    def __call__(self, batch: Tensor) -> None:
        ran = 0

        def count(*_: Any) -> None:
            nonlocal ran
            ran += 1
            if ran == self.expected:
                raise _Enough

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(count).remove)
            try:
                self.net(batch)
            except _Enough:
                return
            except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
                raise TrainError(self._refusal(batch, error)) from error
        self.expected = ran

    def _refusal(self, batch: Tensor, error: Exception) -> str:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        shape = expected_shape(self.net)
        known = "" if shape is None else f"; it was captured with samples of {'x'.join(map(str, shape))}"
        found = "x".join(map(str, batch.shape))
        return f"The network cannot take a batch of shape {found} ({reason[:200]}){known}."


def check_finite(values: Tensor, samples: Samples, begin: int) -> None:
    """values: (batch, anything), of the samples from `begin` on."""
    broken = (~torch.isfinite(values).all(1)).nonzero().flatten().tolist()
    if broken:
        raise TrainError(
            f"The network's answer is not finite for {samples.names[begin + broken[0]]} ({len(broken)} such in its "
            "batch), so nothing can be learned from it; check the network or leave that sample out."
        )
