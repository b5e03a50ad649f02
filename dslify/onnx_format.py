"""One ONNX file in which an If runs the light or the full path, with what is known of the network in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper
from torch import Tensor, fx

from .checked import SEEDS, TOLERANCE, case, error, refuse, stretched
from .errors import ExportError, one_line
from .notes import noted
from .onnx_graph import one_file
from .onnx_session import session
from .programs import ANY, Program, Programs, example_of, free_axes
from .switch import DSLayer, Route
from .written import Written, facts, trials

SEVERAL = 3  # samples that a file for any number is tried with, after one
ALWAYS, NEVER = 1e9, -1.0  # thresholds under which everything goes light, or nothing
_NOTES = ("example", "pixels", "classes")  # what data for the network look like
LARGEST = 2**31 - 1  # bytes that protobuf writes
WAYS: tuple[Route, ...] = ("full", "light")


@dataclass(frozen=True)
class PartSize:
    """nodes: operators, those of both branches where it branches again. parameters: values of its weights. bytes."""

    part: str
    nodes: int
    parameters: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def part_size(part: str, model: ModelProto) -> PartSize:
    """The size of one part's model."""
    graphs = list(_graphs(model.graph))
    nodes = sum(node.op_type != "Constant" for graph in graphs for node in graph.node)
    weights = sum(int(np.prod(tensor.dims)) for graph in graphs for tensor in graph.initializer)
    return PartSize(part, nodes, weights, model.ByteSize())


def _graphs(graph: GraphProto) -> Iterable[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def whole_model(
    programs: Programs, models: Mapping[str, ModelProto], graph: fx.GraphModule, batch: int = 1
) -> ModelProto:
    """The parts as one model, with metadata: dslify.version, .torch, .cut, .scope, .threshold, .scale, .switch,
    .routes, .layers, .calibration, .batch and .notes, each as JSON but for plain words."""
    model = one_file(programs, models=models)
    known: dict[str, Any] = facts(graph, batch)
    known["version"] = known.pop("dslify")
    names = {graph_name(layer, graph): initializers for layer, initializers in thresholds_of(programs).items()}
    known["layers"] = [{**each, "initializers": names[each["name"]]} for each in known["layers"]]
    known["routes"] = ["light", "full"]
    known["notes"] = {name: noted(graph, name) for name in _NOTES}
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}
    helper.set_model_props(model, {f"dslify.{key}": value for key, value in words.items()})
    model.doc_string = (
        f"Written by dslify. Runs the light path if every sample's score is below {known['threshold']:.6g}, else the "
        "full one; the threshold is the initializer of this name."
    )
    return model


def graph_name(layer: DSLayer, graph: fx.GraphModule) -> str:
    """The name of a layer in its graph."""
    return next(name for name, module in graph.named_modules() if module is layer)


def thresholds_of(programs: Programs, name: str = "threshold") -> dict[DSLayer, list[str]]:
    """The initializers that hold a layer's threshold in one file; several for a layer behind another one's outputs."""
    found = {programs.layer: [name]}
    for way in ("light", "full"):
        part: Program | Programs = getattr(programs, way)
        if isinstance(part, Programs):
            for layer, names in thresholds_of(part, f"{way}.{name}").items():
                found.setdefault(layer, []).extend(names)
    return found


def check(
    model: ModelProto,
    programs: Programs,
    graph: fx.GraphModule,
    batch: int = 1,
    dynamic: bool = True,
    exact: bool = True,
) -> Written:
    """What ONNX Runtime answers, held against the network; see written.Written.

    Every way through the layers is tried with thresholds just beyond the scores of the inputs, then with another length
    where that may vary, and the model as it is with its own thresholds. exact: raise ExportError for an error above
    TOLERANCE; otherwise only for a model that does not run.
    """
    names = thresholds_of(programs)
    sizes = (1, SEVERAL) if batch == ANY else (batch,)
    runner = _session(_steered(model, [name for each in names.values() for name in each]))
    errors: dict[str, float] = {}

    def judge(
        way: str, inputs: Iterable[Tensor], wanted: Sequence[np.ndarray], thresholds: dict[str, np.ndarray]
    ) -> None:
        feed = {name: value.numpy() for name, value in zip(programs.inputs, inputs, strict=True)}
        try:
            off = error(runner.run(None, feed | thresholds), wanted)
        except Exception as refusal:
            raise ExportError(f"ONNX Runtime cannot run the {way} route: {one_line(refusal)}.") from refusal
        if not np.isfinite(off) or (exact and not off <= TOLERANCE):
            raise refuse("The ONNX file", way, off)
        errors[way] = max(errors.get(way, 0.0), off)

    for each in (trial for size in sizes for trial in trials(graph, size)):
        beyond = each.thresholds if exact else dict.fromkeys(names, ALWAYS if each.way == "light" else NEVER)
        judge(each.way, each.inputs, each.outputs, _values(names, beyond))
    notes = []
    longer = stretched(graph, sizes[-1]) if dynamic else None
    if longer is not None and _fixed(model, graph):
        notes.append(f"fixed here, though the network lets it vary: {', '.join(_fixed(model, graph))}")
    elif longer is not None:
        for way in WAYS:
            values = _values(names, dict.fromkeys(names, ALWAYS if way == "light" else NEVER))
            judge(way, longer, case(graph, way, longer).outputs, values)
    runner = _session(model)
    if sizes[0] == 1 and exact:
        for seed in SEEDS:
            mixed = case(graph, "mixed", example_of(graph, 1, seed))
            judge("mixed", map(torch.from_numpy, mixed.inputs), mixed.outputs, {})
    return Written(errors, tuple(notes))


def write_onnx(model: ModelProto, path: Path) -> None:
    """Raises ExportError for a model that is too large for one file."""
    if model.ByteSize() > LARGEST:
        raise ExportError(
            f"The network takes {model.ByteSize() / 2**30:.1f} GiB, and one ONNX file holds 2; "
            "write it in parts with --split, or with --to pt2."
        )
    path.write_bytes(model.SerializeToString())


def _session(model: ModelProto) -> Any:
    try:
        return session(model)
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the network: {one_line(error)}.") from error


def _steered(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy whose thresholds are inputs, so that one session can be sent all ways."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for graph in _graphs(copy.graph):
        kept = [tensor for tensor in graph.initializer if tensor.name not in names]
        del graph.initializer[:]
        graph.initializer.extend(kept)
    copy.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in names)
    return copy


def _values(names: Mapping[DSLayer, Sequence[str]], values: Mapping[DSLayer, float]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values[layer], np.float32) for layer, each in names.items() for name in each}


def _fixed(model: ModelProto, graph: fx.GraphModule) -> list[str]:
    """Axes of the inputs with one size, which the capture let vary."""
    return [
        f"axis {axis} of {value.name}"
        for value, axes in zip(model.graph.input, free_axes(graph), strict=True)
        for axis in sorted(axes - {0})
        if not value.type.tensor_type.shape.dim[axis].dim_param
    ]
