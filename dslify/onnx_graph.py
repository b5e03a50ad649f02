"""Programs -> ONNX: each part on its own, and all of them as one model with an If."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnxscript import ir, optimizer

from .attempt import quietly
from .errors import ExportError, one_line
from .onnx_recurrent import one_operator_each
from .onnx_registry import read_once
from .programs import Program, Programs

OPSET = 20
IR_VERSION = 10
SHARED = 1024  # bytes; for smaller equal tensors a reference across graphs only hinders the runtime's fusions
_THRESHOLD = re.compile(r"((light|full)\.)*threshold")  # names of the initializers
_RECURRENT = ("LSTM", "GRU", "RNN")
_MAKE_WEIGHTS = ("Gather", "Unsqueeze", "Concat")  # of recurrent operators, out of PyTorch's (onnx_recurrent.py)


def part_model(program: Program, name: str) -> ModelProto:
    """One part as a model of its own; axes of varying size are called batch, length, or by their value and place.

    An input that has the name of an output, as in the front part of a further layer, is called ..._given.
    Raises ExportError for an operator that ONNX has no equal of.
    """
    inputs = [f"{each}_given" if each in program.outputs else each for each in program.inputs]
    try:
        with quietly(), read_once(), one_operator_each(program.exported.graph) as translations:
            made: Any = torch.onnx.export(
                program.exported, input_names=inputs, output_names=program.outputs, dynamo=True,
                opset_version=OPSET, optimize=False, verbose=False, custom_translation_table=translations,
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"ONNX cannot hold the {name} part: {one_line(error)}.") from error
    # not the exporter's own optimizer: its rules (onnxscript 0.7) take x + 1e-10 for x + 0
    folded = made.model
    for _ in range(2):
        optimizer.inline(folded)
        optimizer.fold_constants_ir(folded, onnx_shape_inference=True, should_fold=_makes_weights)
        _without_ones(folded.graph)
        optimizer.remove_unused_nodes(folded)
    model: ModelProto = made.model_proto
    for each in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del each.metadata_props[:]  # stacks, with paths of this machine
    _name_sizes(model.graph, program.inputs)
    return model


def _without_ones(graph: ir.Graph) -> None:
    """Leave out products with the number 1, which the exporter writes around an ELU; a runtime keeps some of them."""
    for node in graph:
        if node.op_type != "Mul" or node.outputs[0].is_graph_output():
            continue
        for value, factor in (node.inputs, reversed(node.inputs)):
            known = ir.convenience.get_const_tensor(factor) if factor is not None else None
            if value is not None and known is not None and not known.shape and known.numpy() == 1:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                break


def _makes_weights(node: ir.Node) -> bool | None:
    """True for what only puts the weights of a recurrent operator in order, however large; None: as for any other."""
    users = [user for out in node.outputs for user in out.consumers()]
    mine = node.op_type in _MAKE_WEIGHTS and all(user.op_type in _RECURRENT or _makes_weights(user) for user in users)
    return True if mine and users else None


def _name_sizes(graph: GraphProto, inputs: Sequence[str]) -> None:
    """Readable names for the sizes that torch.export calls s27, in the inputs and all that is made of them."""
    names: dict[str, str] = {}
    outermost = "masked" not in inputs
    for value in graph.input:
        axes = value.type.tensor_type.shape.dim
        for axis, size in enumerate(axes):
            plain = {0: "batch", len(axes) - 1: "length"} if outermost else {}
            name = plain.get(axis, f"{value.name}_{axis}")
            if size.dim_param:
                names.setdefault(size.dim_param, f"{value.name}_{axis}" if name in names.values() else name)
    _rename_sizes((*graph.input, *graph.output, *graph.value_info), names)


def _rename_sizes(values: Iterable[ValueInfoProto], names: Mapping[str, str]) -> None:
    for value in values:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size.dim_param)


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

    The threshold is an initializer (no input as well: ONNX Runtime warns of those). With several samples in a call all
    of them go light or none. Weights that several parts have, such as those behind `to=`, are stored once. models: the
    parts, from models_of() unless given (quantized, say).
    """
    models = models or models_of(programs, threshold)
    front, paths = models["front"], (models["light"], models["full"])
    graph = GraphProto(name="dslify")
    shared = _shared({name: models[name].graph for name in ("front", "light", "full")})
    given = {value.name: name for value, name in zip(front.graph.input, programs.front.inputs, strict=True)}
    _add(graph, front.graph, "front/", given)
    graph.initializer.extend(_kept_outside(models["light"].graph, shared["light"]))
    graph.input.extend(_named_as(value, given[value.name]) for value in front.graph.input)
    value = np.float32(programs.layer.threshold.item())
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), threshold))
    made = {name for node in front.graph.node for name in node.output}  # the rest are inputs, passed on as they are
    # by place: the exporter calls an output masked_1 where an input is called masked
    crossing = {
        each: f"front/{out.name}" if out.name in made else given.get(out.name, f"front/{out.name}")
        for each, out in zip(programs.front.outputs, front.graph.output, strict=True)
    }
    score = crossing.pop("score")
    graph.node.extend(
        [
            helper.make_node("Less", [score, threshold], [f"{threshold}/taken"]),
            helper.make_node("Cast", [f"{threshold}/taken"], [f"{threshold}/number"], to=TensorProto.INT32),
            helper.make_node("ReduceMin", [f"{threshold}/number"], [f"{threshold}/least"], keepdims=0),
            helper.make_node("Cast", [f"{threshold}/least"], [f"{threshold}/light"], to=TensorProto.BOOL),
        ]
    )
    branches = []
    for name, model in zip(("light", "full"), paths, strict=True):
        branch = GraphProto(name=name)
        _add(branch, model.graph, f"{name}/", crossing | shared[name], shared[name])
        branch.output.extend(_named_as(out, f"{name}/{out.name}") for out in model.graph.output)
        branches.append(branch)
    outputs = [out.name for out in paths[1].graph.output]
    graph.node.append(
        helper.make_node(
            "If", [f"{threshold}/light"], outputs, name="switch", then_branch=branches[0], else_branch=branches[1]
        )
    )
    graph.output.extend(paths[1].graph.output)
    _rename_sizes(graph.output, _sizes_of(paths[1].graph.input, front.graph.output))
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


def _shared(parts: Mapping[str, GraphProto]) -> dict[str, dict[str, str]]:
    """Part -> its tensors that another one has as well -> their name in the graph around the branches."""
    found: dict[Any, dict[str, str]] = {}  # content -> part -> name there
    for part, graph in parts.items():
        for tensor in graph.initializer:
            value = numpy_helper.to_array(tensor)
            if value.nbytes >= SHARED:
                key = (tensor.data_type, value.shape, hashlib.sha256(value.tobytes()).digest())
                found.setdefault(key, {}).setdefault(part, tensor.name)
    names: dict[str, dict[str, str]] = {part: {} for part in parts}
    for places in found.values():
        if len(places) > 1:
            first = next(part for part in parts if part in places)
            for part, name in places.items():
                names[part][name] = f"{first if first == 'front' else 'shared'}/{places[first]}"
    return names


def _kept_outside(graph: GraphProto, shared: Mapping[str, str]) -> Iterator[TensorProto]:
    """Tensors of a branch for the graph around it, but for those of the front part, which lie there already."""
    for tensor in graph.initializer:
        if shared.get(tensor.name, "").startswith("shared/"):
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = shared[tensor.name]
            yield copy


def _named_as(value: ValueInfoProto, name: str) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _sizes_of(inputs: Sequence[ValueInfoProto], values: Sequence[ValueInfoProto]) -> dict[str, str]:
    """What the sizes of a path's inputs are in the sizes of the network's. values: outputs of the front part."""
    made = {value.name: value.type.tensor_type.shape.dim for value in values}
    return {
        size.dim_param: outer.dim_param
        for value in inputs
        for size, outer in zip(value.type.tensor_type.shape.dim, made.get(value.name, ()), strict=False)
        if size.dim_param and outer.dim_param
    }


def _add(
    target: GraphProto, source: GraphProto, prefix: str, names: Mapping[str, str], without: Container[str] = ()
) -> None:
    """The nodes and tensors of a graph under prefixed names. names: values that have their name already -> it. without:
    tensors that lie elsewhere."""

    def named(name: str) -> str:
        return name and (names.get(name) or (name if _THRESHOLD.fullmatch(name) else prefix + name))

    for tensor in source.initializer:
        if tensor.name not in without:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = named(tensor.name)
            target.initializer.append(copy)
    for node in source.node:
        target.node.append(_renamed(node, named))


def _renamed(node: NodeProto, named: Callable[[str], str]) -> NodeProto:
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


def _rename_inside(graph: GraphProto, named: Callable[[str], str]) -> None:
    for tensor in graph.initializer:
        tensor.name = named(tensor.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = named(value.name)
    for at, node in enumerate(list(graph.node)):
        graph.node[at].CopyFrom(_renamed(node, named))
