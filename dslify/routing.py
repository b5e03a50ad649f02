"""route_every(): a layer of a network is told to route long sequences segment by segment; what that takes is worked out
from its graphs and tried before it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import OptionError, VerifyError
from .layout import Stretch
from .macs import fake
from .programs import example_of, free_axes
from .rates import FAR, Sizing, stretch_of
from .receptive import on_processor, receptive_field
from .segments import Segments, routed
from .switch import DSLayer, dsl_layers, required_layers

EXACT = 1e-5  # of the largest value: a segment on its own window against the same path on the whole sequence
TRIED = 4  # segments of the sequence that this is tried on, and a part of another one


def route_every(net: nn.Module, entries: int | None) -> Segments | None:
    """Let the layer of a network route long sequences segment by segment, `entries` entries of the network's input
    each; None lets it route whole samples again. Changes `net`, and returns what the layer got.

    entries: along the axis of the input that may vary (of the scope's input, where there is one), a multiple of what
    both paths make one entry of. What they read around a segment is computed from their graphs (receptive_field), and
    routing at random is held against the whole sequence before anything is changed.

    Raises OptionError where the layer is not the only one, the input has no such axis, values that cross the cut do not
    run with it, `entries` does not fit, or a path looks at the whole sequence; VerifyError where the trial fails.
    """
    layers = required_layers(net)
    if entries is None:
        for layer in layers:
            layer.segments = None
        return None
    if entries < 1:
        raise OptionError(f"route_every must be at least 1 entry of the network's input; got {entries}.")
    if len(layers) > 1:
        raise OptionError(
            f"Only a network with one Dynamic Switch Layer routes by segments, and this one holds {len(layers)}; "
            "route whole samples, or take a layer out."
        )
    found = _segments(_Host(net, layers[0]), entries)
    layers[0].segments = found
    return found


class _Host:
    """The captured graph that calls a layer, at any length of its input."""

    def __init__(self, net: nn.Module, layer: DSLayer):
        graphs = [module for module in net.modules() if isinstance(module, fx.GraphModule)]
        known = [graph for graph in graphs if "dslify" in graph.meta and layer in dsl_layers(graph)]
        if len(known) != 1 or not all(isinstance(path, fx.GraphModule) for path in (layer.light, layer.full)):
            raise OptionError(
                "route_every reads networks that dslify.insert made; this one's layer was put in by hand."
            )
        self.graph, self.layer = known[0], layer
        free = free_axes(self.graph)
        self.axes = [tuple(axis for axis in axes if axis) for axes in free]
        first = next((at for at, axes in enumerate(self.axes) if axes), None)
        if first is None:
            raise OptionError(
                "Only sequences are routed by segments, and the inputs of this network have fixed sizes: "
                f"{', '.join('x'.join(map(str, v.shape)) for v in example_of(self.graph))}; route whole samples."
            )
        sizes = {
            value.shape[axis] for value, axes in zip(example_of(self.graph), self.axes, strict=True) for axis in axes
        }
        if len(sizes) > 1 or len(self.axes[first]) > 1:
            raise OptionError(
                f"The inputs of this network vary along several axes, of {', '.join(map(str, sorted(sizes)))} entries; "
                "routing by segments needs one length that is common to all."
            )

    def inputs(self, length: int, batch: int = 1) -> list[Tensor]:
        """Random inputs of one length."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for value, axes in zip(example_of(self.graph, batch), self.axes, strict=True):
            shape = [length if axis in axes else size for axis, size in enumerate(value.shape)]
            noise = torch.rand(shape, generator=generator) * 2 - 1
            made.append(noise.to(value.dtype) if value.is_floating_point() else (noise > 0).to(value.dtype))
        return made

    def sizes(self, length: int) -> tuple[Any, ...]:
        """(cut, *crossing) at one length of the input, as fake tensors."""
        (given,), mode = fake((example_of(self.graph),))
        with torch.no_grad(), mode:
            stretched = [
                value.new_empty([length if axis in axes else size for axis, size in enumerate(value.shape)])
                for value, axes in zip(given, self.axes, strict=True)
            ]
            return self._entering(Sizing, stretched)

    def values(self, length: int, batch: int = 1) -> tuple[Any, ...]:
        """(masked cut, *crossing) at one length of the input."""
        device = self.layer.threshold.device
        with torch.no_grad():
            cut, *crossing = self._entering(fx.Interpreter, [v.to(device) for v in self.inputs(length, batch)])
            return self.layer.mask(cut), *crossing

    def _entering(self, kind: type[fx.Interpreter], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What enters the layer; what follows it does not run."""
        graph, layer = self.graph, self.layer

        class Stopping(kind):  # type: ignore[valid-type, misc]
            def run_node(self, n: fx.Node) -> Any:
                if n.op == "call_module" and graph.get_submodule(str(n.target)) is layer:
                    raise _Arrived(self.fetch_args_kwargs_from_env(n)[0])
                return super().run_node(n)

        try:
            Stopping(graph).run(*inputs, enable_io_processing=False)
        except _Arrived as arrived:
            return arrived.values
        raise VerifyError("The network ran without reaching its Dynamic Switch Layer.")


class _Arrived(Exception):
    def __init__(self, values: tuple[Any, ...]):
        super().__init__()
        self.values = values


def _segments(host: _Host, entries: int) -> Segments:
    """What a layer needs to route every `entries` entries of the input, tried."""
    layer = host.layer
    short, long = host.sizes(FAR), host.sizes(2 * FAR)
    by_input = [stretch_of(*pair, FAR) for pair in zip(short, long, strict=True)]
    ratio = Fraction(by_input[0].times, by_input[0].per)
    _check_places(layer, short, by_input)
    length = short[0].shape[by_input[0].axis]
    entering = [_by_cut(value, stretch, ratio, length) for value, stretch in zip(short, by_input, strict=True)]
    template = host.values(2 * entries)
    full, light = (
        receptive_field(*on_processor(path, template), entering, f"The {name} path")
        for name, path in (("full", layer.full), ("light", layer.light))
    )
    if light.outputs != full.outputs:
        raise OptionError("Light and full path answer at different rates, so segments of one cannot follow the other.")
    both = full.joined(light)
    step = both.step_in
    least = (step / ratio).numerator
    if entries % least:
        raise OptionError(
            f"route_every must be a multiple of {least} entries of the network's input, of which the paths behind the "
            f"cut make whole entries; got {entries}."
        )
    before, after = (-(-side // step) * step for side in (both.before, both.after))
    axis = by_input[0].axis or 0
    found = Segments(entries, int(entries * ratio), axis, before, after, step, tuple(entering), tuple(full.outputs))
    _try(host, found, least)
    return found


def _check_places(layer: DSLayer, values: Sequence[Any], by_input: Sequence[Stretch]) -> None:
    """Raise OptionError unless samples, time and channels of every value can be told apart."""
    cut, stretch = values[0], by_input[0]
    others = {layer.inputs[0].axis, layer.channel_axis}
    if cut.dim() != 3 or stretch.axis is None or stretch.axis in others or stretch.times <= 0:
        shape = "x".join(map(str, layer.plan.cut_shape)) if layer.plan else f"of {cut.dim()} axes"
        raise OptionError(
            f"The value at the cut, {shape}, needs an axis of samples, one of channels and one that runs with the "
            "length of the input, and no other, to be routed by segments; choose another cut, or route whole samples."
        )
    crossing = zip(values[1:], layer.inputs[1:], by_input[1:], strict=True)
    tangled = any(
        place.per_sample != 1
        or (stretch.times and (place.scales or (isinstance(value, Tensor) and place.axis is None)))
        for value, place, stretch in crossing
    )
    if not layer.routable or tangled or layer.inputs[0].per_sample != 1:
        names = ", ".join(layer.plan.crossing) if layer.plan else "the values beside it"
        raise OptionError(
            f"What crosses the cut ({names}) mixes samples and time so that segments cannot be taken out of it; choose "
            "another cut, or route whole samples."
        )
    if any(place.axis is None or place.per_sample != 1 for place in layer.outputs):
        raise OptionError(
            "Not every value that leaves the region has an axis of samples of its own, which routing by segments "
            "needs; choose another cut, or end the region earlier with `to`."
        )


def _by_cut(value: Any, stretch: Stretch, ratio: Fraction, length: int) -> Stretch:
    """How a value runs with the cut, from how it runs with the input. ratio: of the cut to the input. length: of the
    cut where the value was seen."""
    if not stretch.times:
        return Stretch()
    times = Fraction(stretch.times, stretch.per) / ratio
    found = Stretch(stretch.axis, times.numerator, times.denominator)
    size = value.shape[stretch.axis or 0] if isinstance(value, Tensor) else value
    return replace(found, extra=size - found.at(length))


def _try(host: _Host, segments: Segments, least: int) -> None:
    """Raise VerifyError unless segments routed at random answer as their paths do on the whole sequence. least: entries
    of the input that make whole ones behind the cut."""
    layer, generator = host.layer, torch.Generator().manual_seed(0)
    for odd in (0, least, segments.entries // 2 + 1):
        try:
            inputs = host.values(TRIED * segments.entries + odd, batch=2)
        except OptionError:  # the network takes no such length
            continue
        windows = segments.windows(inputs[0].shape[segments.axis])
        batch = inputs[0].shape[layer.inputs[0].axis or 0]
        light = (torch.rand(batch, len(windows), generator=generator) < 0.5).index_fill(1, torch.tensor([1]), True)
        light[:, 2] = False
        with torch.no_grad():
            found = routed(
                segments, (layer.full, layer.light), inputs, light.flatten().tolist(), layer.inputs, layer.outputs
            )
            whole = zip(layer.full(*inputs), layer.light(*inputs), strict=True)
        for got, (dear, cheap), place, out in zip(found, whole, layer.outputs, segments.outputs, strict=True):
            moved = [value.movedim((place.axis or 0, out.axis or 0), (0, 1)) for value in (got, dear, cheap)]
            if moved[0].shape != moved[1].shape:
                off = math.inf
            else:
                size = out.at(segments.frames)
                of = (torch.arange(moved[0].shape[1]) // size).clamp(max=len(windows) - 1)
                goes = light[:, of].to(moved[0].device).view(*moved[0].shape[:2], *[1] * (moved[0].dim() - 2))
                wanted = torch.where(goes, moved[2], moved[1])
                off = float((moved[0] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            if not off <= max(EXACT, 64 * torch.finfo(got.dtype).eps):
                raise VerifyError(
                    f"Routed by segments the network answers otherwise than on the whole sequence, by {off:.2g} of the "
                    "largest value: what it answers for a segment depends on where that lies. Choose another cut, or "
                    "route whole samples."
                )
