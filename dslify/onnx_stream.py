"""The front part for a sound that goes on: it gets context that it must not score, and scores with few operators."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .switch import DSLayer

FIRST, LAST = "stream/first", "stream/last"  # inputs, (1,): which of its frames are wanted
_KEPT = "stream/masked"


def stream_model(front: ModelProto, layer: DSLayer, axis: int, frames: int, after: int) -> ModelProto:
    """(input, first, last) -> (masked, score): frames `first` to `last` of the masked activation, and their score.

    front: the front part of a network that passes nothing else on, with axes (batch, ..., channel, ...). axis: of the
    frames. frames: those that the switch reads, the first ones. after: those that may follow for light and full to look
    ahead.
    """
    graph = GraphProto(name="stream")
    masked, score = (value.name for value in front.graph.output[:2])
    nodes = _needed(front.graph, masked)
    read = {name for node in nodes for name in node.input}
    graph.initializer.extend(tensor for tensor in front.graph.initializer if tensor.name in read)
    graph.initializer.append(_tensor("stream/axis", np.array([axis])))
    scored = nodes[-1].input[0] if layer.unmasked else masked  # thresholds: what they take from it is the last step
    before = {each for node in _needed(front.graph, scored) for each in node.output}
    behind = [node for node in nodes if before.isdisjoint(node.output)]  # the mask's own, of the part alone
    for node in nodes:  # what they made of it is the whole, of which the output is a part
        if node not in behind:
            _renamed(node, scored, "stream/whole")
            graph.node.append(node)
    graph.node.append(helper.make_node("Slice", ["stream/whole", FIRST, LAST, "stream/axis"], [scored]))
    graph.node.extend(behind)
    if after:
        for name, value in (("stream/zero", 0), ("stream/frames", frames)):
            graph.initializer.append(_tensor(name, np.array([value])))
        graph.node.append(helper.make_node("Slice", [scored, "stream/zero", "stream/frames", "stream/axis"], [_KEPT]))
        scored = _KEPT
    rank = len(front.graph.output[0].type.tensor_type.shape.dim)
    _add_switch(graph, layer, scored, score, rank)
    graph.input.extend(front.graph.input)
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in (FIRST, LAST))
    graph.output.extend(front.graph.output[:2])
    dims = graph.output[0].type.tensor_type.shape.dim
    dims[axis].Clear()
    dims[axis].dim_param = "frames"
    model = ModelProto()
    model.CopyFrom(front)
    model.graph.CopyFrom(graph)
    return model


def _needed(graph: GraphProto, name: str) -> list[NodeProto]:
    """Copies of the nodes that a value is made by, in their order."""
    wanted, found = {name}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            copy = NodeProto()
            copy.CopyFrom(node)
            found.append(copy)
            wanted.update(_reads(node))
    return found[::-1]


def _reads(node: NodeProto) -> set[str]:
    inner = [each.g for each in node.attribute if each.type == AttributeProto.GRAPH]
    return set(node.input).union(*(_reads(each) for graph in inner for each in graph.node))


def _renamed(node: NodeProto, old: str, new: str) -> None:
    for names in (node.input, node.output):
        for at, name in enumerate(names):
            if name == old:
                names[at] = new


def _add_switch(graph: GraphProto, layer: DSLayer, value: str, score: str, rank: int) -> None:
    """Switch.forward on the axes as they lie: standardising and the root are in the weights, and nothing is reshaped
    that depends on a length; half as many operators, each of which costs more than what it computes."""
    switch, batch = layer.switch, layer.inputs[0].axis or 0
    free = [axis for axis in range(rank) if axis not in (batch, layer.channel_axis)]
    first, bias = (each.detach().double().numpy() for each in (switch.hidden.weight, switch.hidden.bias))
    offset, spread = (each.double().numpy() for each in (switch.offset, switch.spread))
    weight = first / spread
    bias = bias - weight @ offset
    channels = weight.shape[1] // switch.MOMENTS
    weight[:, channels : 2 * channels] /= 2  # of log(sqrt(x))
    last = switch.out.weight.detach().numpy()
    constants = {
        "axes": np.array(free),
        "one": np.array([1]),
        "floor": np.float32(switch.FLOOR),
        "square_floor": np.float32(switch.FLOOR**2),
        "hidden": weight.astype(np.float32),
        "hidden_bias": bias.astype(np.float32),
        "out": last,
        "out_bias": switch.out.bias.detach().numpy(),
    }
    graph.initializer.extend(_tensor(f"switch/{name}", constant) for name, constant in constants.items())
    operators: tuple[tuple[str, tuple[str, ...], str, dict[str, Any]], ...]
    end = "Softplus" if switch.kind == "difference" else "Sigmoid"
    operators = (
        ("ReduceMean", (value, "axes"), "mean", {}),
        ("Sub", (value, "mean"), "apart", {}),
        ("Mul", ("apart", "apart"), "squares", {}),
        ("ReduceMean", ("squares", "axes"), "variance", {"keepdims": 0}),
        ("Add", ("variance", "square_floor"), "above", {}),
        ("Log", ("above",), "deviation", {}),
        ("Squeeze", ("mean", "axes"), "level", {}),
        ("Abs", (value,), "magnitudes", {}),
        ("ReduceMean", ("magnitudes", "axes"), "loudness", {"keepdims": 0}),
        ("Add", ("loudness", "floor"), "audible", {}),
        ("Log", ("audible",), "magnitude", {}),
        ("Concat", ("level", "deviation", "magnitude"), "features", {"axis": 1}),
        ("Gemm", ("features", "hidden", "hidden_bias"), "first", {"transB": 1}),
        ("Sigmoid", ("first",), "gate", {}),
        ("Mul", ("first", "gate"), "inner", {}),
        ("Gemm", ("inner", "out", "out_bias"), "last", {"transB": 1}),
        (end, ("last",), "found", {}),
        ("Squeeze", ("found", "one"), score, {}),
    )
    for operator, inputs, output, attributes in operators:
        names = [name if name == value else f"switch/{name}" for name in inputs]
        graph.node.append(
            helper.make_node(operator, names, [output if output == score else f"switch/{output}"], **attributes)
        )


def _tensor(name: str, value: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)
