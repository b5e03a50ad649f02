"""Programs -> ONNX: each part on its own, and all of them as one model with an If."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnxscript import optimizer

from .attempt import quietly
from .errors import ExportError, one_line
from .programs import Program, Programs

OPSET = 20
IR_VERSION = 10


def part_model(program: Program, name: str) -> ModelProto:
    """One part as a model of its own. Raises ExportError for an operator that ONNX has no equal of."""
    try:
        with quietly():
            made = torch.onnx.export(
                program.exported, input_names=program.inputs, output_names=program.outputs, dynamo=True,
                opset_version=OPSET, optimize=False, verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"ONNX cannot hold the {name} part: {one_line(error)}.") from error
    # not the exporter's own optimizer: its rules (onnxscript 0.7) take x + 1e-10 for x + 0
    folded = made.model
    for _ in range(2):
        optimizer.inline(folded)
        optimizer.fold_constants_ir(folded, onnx_shape_inference=True)
        optimizer.remove_unused_nodes(folded)
    model: ModelProto = made.model_proto
    return model


def models_of(programs: Programs, threshold: str = "threshold") -> dict[str, ModelProto]:
    """front, light and full as models; a part that holds further layers is one model with an If inside."""
    return {
        "front": part_model(programs.front, "front"),
        "light": _model_of(programs.light, f"light.{threshold}", "light"),
        "full": _model_of(programs.full, f"full.{threshold}", "full"),
    }


def _model_of(part: Program | Programs, threshold: str, name: str) -> ModelProto:
    return part_model(part, name) if isinstance(part, Program) else one_file(part, threshold)


def one_file(
    programs: Programs, threshold: str = "threshold", models: Mapping[str, ModelProto] | None = None
) -> ModelProto:
    """The whole network as one model in which an If runs light or full.

    The threshold is an initializer (no input as well: ONNX Runtime warns of those). With several samples in a call all of
    them go light or none. models: the parts, from models_of() unless given (quantized, say).
    """
    models = models or models_of(programs, threshold)
    front, paths = models["front"], (models["light"], models["full"])
    graph = GraphProto(name="dslify")
    _add(graph, front.graph, "front/", {each: each for each in programs.front.inputs})
    graph.input.extend(front.graph.input)
    value = np.float32(programs.layer.threshold.item())
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), threshold))
    graph.node.extend(
        [
            helper.make_node("Less", ["front/score", threshold], [f"{threshold}/taken"]),
            helper.make_node("Cast", [f"{threshold}/taken"], [f"{threshold}/number"], to=TensorProto.INT32),
            helper.make_node("ReduceMin", [f"{threshold}/number"], [f"{threshold}/least"], keepdims=0),
            helper.make_node("Cast", [f"{threshold}/least"], [f"{threshold}/light"], to=TensorProto.BOOL),
        ]
    )
    branches = []
    for name, model in zip(("light", "full"), paths, strict=True):
        branch = GraphProto(name=name)
        passed = {each: f"front/{each}" for each in programs.front.outputs if each != "score"}
        inner = {tensor.name: tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".threshold")}
        _add(branch, model.graph, f"{name}/", passed | inner)
        for out in model.graph.output:
            found = ValueInfoProto()
            found.CopyFrom(out)
            found.name = f"{name}/{out.name}"
            branch.output.append(found)
        branches.append(branch)
    outputs = [out.name for out in paths[1].graph.output]
    graph.node.append(
        helper.make_node(
            "If", [f"{threshold}/light"], outputs, name="switch", then_branch=branches[0], else_branch=branches[1]
        )
    )
    graph.output.extend(paths[1].graph.output)
    whole = helper.make_model(
        graph, opset_imports=_opsets((front, *paths)), ir_version=IR_VERSION, producer_name="dslify"
    )
    functions = {(each.domain, each.name): each for model in (front, *paths) for each in model.functions}
    whole.functions.extend(functions.values())
    return whole


def with_thresholds(model: ModelProto, values: Mapping[str, float]) -> ModelProto:
    """A copy with other thresholds, by the names of their initializers; those of further layers lie in a branch."""
    copy = ModelProto()
    copy.CopyFrom(model)
    waiting, left = [copy.graph], dict(values)
    while waiting:
        graph = waiting.pop()
        for tensor in graph.initializer:
            if tensor.name in left:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(left.pop(tensor.name), np.float32), tensor.name))
        waiting += [each.g for node in graph.node for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]
    if left:
        raise ExportError(f"The model has no threshold named {', '.join(left)}.")
    return copy


def _opsets(models: Iterable[ModelProto]) -> list[onnx.OperatorSetIdProto]:
    versions: dict[str, int] = {}
    for model in models:
        for entry in model.opset_import:
            versions[entry.domain] = max(entry.version, versions.get(entry.domain, 0))
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _add(target: GraphProto, source: GraphProto, prefix: str, names: Mapping[str, Any]) -> None:
    """The nodes and tensors of a graph under prefixed names. names: values that have their name already -> it."""

    def named(name: str) -> str:
        return name and str(names.get(name) or prefix + name)

    for tensor in source.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = named(tensor.name)
        target.initializer.append(copy)
    for node in source.node:
        target.node.append(_renamed(node, named))


def _renamed(node: NodeProto, named: Any) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = named(node.name)
    del copy.input[:], copy.output[:]
    copy.input.extend(map(named, node.input))
    copy.output.extend(map(named, node.output))
    for attribute in copy.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            _rename_inside(attribute.g, named)
    return copy


def _rename_inside(graph: GraphProto, named: Any) -> None:
    for tensor in graph.initializer:
        tensor.name = named(tensor.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = named(value.name)
    for at, node in enumerate(list(graph.node)):
        graph.node[at].CopyFrom(_renamed(node, named))
