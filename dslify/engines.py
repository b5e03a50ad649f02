"""What runs a network, each with one sample at a time: its parts and the whole of it, ready to be timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .attempt import quietly
from .errors import ExportError, one_line
from .functional import copied
from .onnx_session import require_onnx, session
from .parts import parts_of
from .programs import example_of, programs_of
from .switch import dsl_layers

THRESHOLD = "threshold"  # of a layer, in a model; those of further layers end in ".threshold"


@dataclass(frozen=True)
class Engine:
    """A captured graph with a layer in one runtime.

    arrays: a sample's inputs, flat, as the runtime takes them. front: these -> what crosses the cut. light, full: that
    -> the outputs. whole: (inputs, light) -> the outputs; it computes the score and decides by a threshold which all
    scores lie below (light) or above. Outputs are flat. note: what there is to say about it.
    """

    name: str
    arrays: Callable[[Sequence[Tensor]], Any]
    front: Callable[[Any], Any]
    light: Callable[[Any], Any]
    full: Callable[[Any], Any]
    whole: Callable[[Any, bool], Any]
    note: str = ""


def eager(graph: fx.GraphModule, *_: Any) -> Engine:
    """The network as it is, under as many threads as torch is told to use."""
    ways = _by_route(graph)
    light, full = parts_of(ways[True]), parts_of(ways[False])
    spec = graph._in_spec

    def arrays(inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], tuple[Any, ...], dict[str, Any]]:
        return inputs, *pytree.tree_unflatten(list(inputs), spec)

    return Engine(
        "eager",
        arrays,
        lambda given: light.front(*given[0]),
        _path(light.light),
        _path(full.full),
        lambda given, go_light: ways[go_light](*given[1], **given[2]),
    )


def compiled(graph: fx.GraphModule, *_: Any) -> Engine:
    """The parts under torch.compile, at fixed sizes; Python compares the score and calls a path.

    Raises ExportError where that does not compile.
    """
    ways = _by_route(graph)
    light, full = parts_of(ways[True]), parts_of(ways[False])
    front, *paths = (torch.compile(part, dynamic=False) for part in (light.front, light.light, full.full))
    to_light, to_full = map(_path, paths)

    def whole(inputs: Sequence[Tensor], go_light: bool) -> Any:
        crossing = front(*inputs)
        threshold = math.inf if go_light else -math.inf
        return to_light(crossing) if bool((crossing[1] < threshold).all()) else to_full(crossing)

    begin = time.perf_counter()
    try:
        with quietly(), torch.no_grad():
            crossing = front(*example_of(graph))
            to_light(crossing), to_full(crossing)
    except Exception as error:
        raise ExportError(f"torch.compile cannot hold this network here: {one_line(error)}.") from error
    took = f"{time.perf_counter() - begin:.0f} s to compile; Python calls light or full by the score"
    return Engine("compiled", tuple, lambda inputs: front(*inputs), to_light, to_full, whole, took)


def _path(module: Callable[..., Any]) -> Callable[[Any], Any]:
    """A path on what crosses the cut, (masked, score, *passed), of which it leaves the score out."""
    return lambda crossing: module(crossing[0], *crossing[2:])


def _by_route(graph: fx.GraphModule) -> dict[bool, fx.GraphModule]:
    """Two copies that share all tensors but the thresholds: with all samples light, and with all full."""
    made = {}
    for light in (True, False):
        shared = {id(value): value for value in (*graph.parameters(), *graph.buffers())}
        for layer in dsl_layers(graph):
            shared[id(layer.threshold)] = torch.full_like(layer.threshold, math.inf if light else -math.inf)
        copy = copied(graph, dict(shared))
        for layer in dsl_layers(copy):
            layer.route = "mixed"
        made[light] = copy
    return made  # type: ignore[return-value]


def onnxruntime(graph: fx.GraphModule, threads: int, dynamic: bool) -> Engine:
    """The model with its If, as dslify.export writes it, but for the threshold, which is one more input here.

    dynamic: with the axes that the capture let vary. Raises ExportError without ONNX Runtime, and for a network that
    ONNX cannot hold.
    """
    require_onnx("The runtime onnxruntime")
    from .onnx_graph import models_of, one_file

    programs = programs_of(graph, dynamic=dynamic)
    models = models_of(programs)
    front, light, full, both = (
        session(_thresholds_as_inputs(model), threads)
        for model in (models["front"], models["light"], models["full"], one_file(programs, models=models))
    )
    names = [each.name for each in both.get_inputs() if not _is_threshold(each.name)]
    crossing = [each.name for each in front.get_outputs()]
    routes = {go_light: _thresholds(both, go_light) for go_light in (True, False)}

    def path(part: Any, go_light: bool) -> Callable[[Any], Any]:
        read = {each.name for each in part.get_inputs()}
        fixed = _thresholds(part, go_light)

        def run(values: dict[str, np.ndarray]) -> list[np.ndarray]:
            return part.run(None, {**{name: values[name] for name in values if name in read}, **fixed})

        return run

    return Engine(
        "onnxruntime",
        lambda inputs: {name: value.numpy() for name, value in zip(names, inputs, strict=True)},
        lambda inputs: dict(zip(crossing, front.run(None, inputs), strict=True)),
        path(light, True),
        path(full, False),
        lambda inputs, go_light: both.run(None, {**inputs, **routes[go_light]}),
    )


def _is_threshold(name: str) -> bool:
    return name == THRESHOLD or name.endswith(f".{THRESHOLD}")


def _thresholds(part: Any, light: bool) -> dict[str, np.ndarray]:
    value = np.asarray(np.inf if light else -np.inf, np.float32)
    return {each.name: value for each in part.get_inputs() if _is_threshold(each.name)}


def _thresholds_as_inputs(model: Any) -> Any:
    """A copy of a model that is told its thresholds with every call; those inside a branch as well."""
    from onnx import AttributeProto, ModelProto, TensorProto, helper

    copy = ModelProto()
    copy.CopyFrom(model)
    waiting = [copy.graph]
    while waiting:
        graph = waiting.pop()
        kept = [tensor for tensor in graph.initializer if not _is_threshold(tensor.name)]
        copy.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, [])
            for tensor in graph.initializer
            if _is_threshold(tensor.name)
        )
        if len(kept) < len(graph.initializer):
            kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
            del graph.initializer[:]
            graph.initializer.extend(kept)
        waiting += [each.g for node in graph.node for each in node.attribute if each.type == AttributeProto.GRAPH]
    return copy
