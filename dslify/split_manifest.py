"""What the manifest of a split export says of its parts: shapes, what crosses the cut, where samples lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from onnx import ModelProto, ValueInfoProto
from torch import Tensor, fx

from . import __version__
from .checked import TOLERANCE, Case, case, error
from .notes import noted, recorded_inputs
from .programs import Programs, example_of, free_axes
from .runtime import manifest, wire
from .runtime.layout import Layout
from .runtime.stream import Stream

WAYS: tuple[Literal["full", "light"], ...] = ("full", "light")
_NOTES = ("example", "pixels", "classes")  # what data for the network looks like
_SENT_AXES = 8  # the most that a message has row axes among


@dataclass(frozen=True)
class Places:
    """Layouts of the inputs, of (masked, *passed) and of the outputs, and whether the samples can be told apart."""

    inputs: tuple[Layout, ...]
    crossing: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    routable: bool


def described(
    parts: Mapping[str, ModelProto],
    programs: Programs,
    graph: fx.GraphModule,
    example: Case,
    batch: int | None,
    number: str,
    stream: Stream | None = None,
) -> dict[str, Any]:
    """The manifest but for the files. example: any call. batch: samples in every call, None for any."""
    layer, known = programs.layer, graph.meta.get("dslify", {})
    places = places_of(programs, graph)
    names = (programs.front.outputs[0], *programs.front.outputs[2:])
    read = {entry.name for entry in parts["full"].graph.input}
    crossing = zip(names, places.crossing, _crossing(programs, example_of(graph, batch or 1)), strict=True)
    rows = {
        name: _rows(place, layer.channel_axis if name == names[0] else 1, value.dim())
        for name, place, value in crossing
        if name in read
    }
    inputs = zip(parts["front"].graph.input, recorded_inputs(graph), strict=True)
    listening = {} if stream is None else {manifest.STREAM: stream.to_json()}
    files = (*manifest.PARTS, *listening)
    return {
        "format": manifest.FORMAT,
        "dslify": __version__,
        "torch": torch.__version__,
        "cut": known.get("at"),
        "scope": known.get("scope"),
        "threshold": layer.threshold.item(),
        "scale": layer.scale.tolist(),
        "inputs": [_value(entry, value.numpy()) for entry, value in inputs],
        "outputs": [_value(*pair) for pair in zip(parts["full"].graph.output, example.outputs, strict=True)],
        "passed": names[1:],
        "layouts": {
            "inputs": [_triple(place) for place in places.inputs],
            "masked": [_triple(places.crossing[0])],
            "passed": [_triple(place) for place in places.crossing[1:]],
            "outputs": [_triple(place) for place in places.outputs],
        },
        "batch": batch,
        "routable": places.routable,
        "wire": {"version": wire.VERSION, "numbers": number, "rows": rows},
        "notes": {name: noted(graph, name) for name in _NOTES},
        "files": {
            part: {"file": f"{part}.onnx", "holds_layers": isinstance(getattr(programs, part, None), Programs)}
            for part in files
        },
        **listening,
    }


def places_of(programs: Programs, graph: fx.GraphModule) -> Places:
    """Seen on three random samples, and on two of them, whose values have to be found again in those of the three."""
    inputs = tuple(Layout(0 if 0 in axes else None) for axes in free_axes(graph))
    chosen = np.array([2, 0])
    three = example_of(graph, 3)
    two = tuple(torch.from_numpy(place.take(value.numpy(), chosen)) for place, value in zip(inputs, three, strict=True))

    def held(many: Sequence[np.ndarray], few: Sequence[np.ndarray]) -> tuple[tuple[Layout, ...], bool]:
        found = [_layout(more.shape, less.shape) for more, less in zip(many, few, strict=True)]
        places = tuple(place or Layout() for place in found)
        taken = [place.take(value, chosen) for place, value in zip(places, many, strict=True)]
        return places, None not in found and error(taken, few) <= TOLERANCE

    crossing, apart = held(*([value.numpy() for value in _crossing(programs, each)] for each in (three, two)))
    ways = [held(*(case(graph, way, each).outputs for each in (three, two))) for way in WAYS]
    routable = programs.layer.routable and apart and all(one for _, one in ways) and crossing[0].axis is not None
    return Places(inputs, crossing, ways[0][0], routable)


def _layout(many: Sequence[int], few: Sequence[int]) -> Layout | None:
    """Of a value whose shapes are these for three samples and for two; None if that cannot be told."""
    differing = [axis for axis, (more, less) in enumerate(zip(many, few, strict=True)) if more != less]
    if not differing:
        return Layout()
    axis = differing[0]
    each = many[axis] - few[axis]
    return Layout(axis, each) if len(differing) == 1 and few[axis] == 2 * each else None


def _crossing(programs: Programs, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(masked, *passed)"""
    with torch.no_grad():
        masked, _, *passed = programs.front.module(*inputs)
    return (masked, *passed)


def _rows(place: Layout, channel: int, axes: int) -> list[int]:
    """The row axes of a value on the wire: a row for each channel of each sample."""
    wanted = {axis for axis in (place.axis, channel) if axis is not None}
    return sorted(axis for axis in wanted if axis < min(axes, _SENT_AXES))


def _triple(place: Layout) -> list[Any]:
    """As switch.Layout: axis, per_sample, scales."""
    return [place.axis, place.per_sample, False]


def _value(entry: ValueInfoProto, example: np.ndarray) -> dict[str, Any]:
    sizes = entry.type.tensor_type.shape.dim
    free = [axis for axis, size in enumerate(sizes) if not size.HasField("dim_value")]
    return {"name": entry.name, "shape": list(example.shape), "dtype": example.dtype.name, "free": free}
