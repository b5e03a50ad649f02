"""LSTM, GRU and RNN as ONNX's operators of these names, of one layer each, where the exporter would unroll them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat
from onnxscript.onnx_opset import opset20
from torch import fx

from .errors import ExportError
from .programs import ONE_NODE
from .recurrent import to_aten


@dataclass(frozen=True)
class _Kind:
    """order: place in PyTorch's stack of gates of each gate of ONNX's. settings: attributes of ONNX's operator."""

    name: str
    order: tuple[int, ...]
    settings: dict[str, Any]


op: Any = opset20  # its type hints know tensors only, and it takes numbers too
_KINDS = {
    "lstm": _Kind("LSTM", (0, 3, 1, 2), {}),  # input, forget, cell, output -> input, output, forget, cell
    "gru": _Kind("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # reset, update, new -> update, reset, new
    "rnn_tanh": _Kind("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": _Kind("RNN", (0,), {"activations": ["Relu"]}),
}


@contextmanager
def one_operator_each(graph: fx.Graph) -> Iterator[dict[Callable[..., Any], Callable[..., Any]]]:
    """Within the block the recurrent nodes of an exported graph call the custom operators, which the exporter leaves
    whole; yields how it shall translate those."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = ONE_NODE.get(node.target, node.target)
    try:
        yield _TRANSLATIONS
    finally:
        to_aten(graph)


def _layers(
    kind: _Kind, input: Any, states: Sequence[Any], params: Sequence[Any], biases: bool, layers: int,
    bidirectional: bool, batch_first: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """(output, *final states), with the shapes of recurrent.outputs_like()."""
    sides, each = (2 if bidirectional else 1), (4 if biases else 2)
    if len(params) != layers * sides * each:
        raise ExportError("ONNX has no recurrent layers with a projection (proj_size); cut the network elsewhere.")
    size = states[0].shape[2]
    entries = (np.asarray(kind.order)[:, None] * size + np.arange(size)).reshape(-1)
    order = op.Constant(value_ints=[int(entry) for entry in entries])
    settings = dict(kind.settings)
    settings["direction"] = "bidirectional" if bidirectional else "forward"
    if "activations" in settings:
        settings["activations"] = settings["activations"] * sides
    value = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
    finals: list[list[Any]] = [[] for _ in states]
    for layer in range(layers):
        stacks: list[list[Any]] = [[], [], []]  # what enters, what recurs, biases of both
        for side in range(sides):
            at = (layer * sides + side) * each
            own = [op.Gather(tensor, order, axis=0) for tensor in params[at : at + each]]
            stacks[0].append(op.Unsqueeze(own[0], [0]))
            stacks[1].append(op.Unsqueeze(own[1], [0]))
            if biases:
                stacks[2].append(op.Unsqueeze(op.Concat(own[2], own[3], axis=0), [0]))
        weights = [op.Concat(*stack, axis=0) if stack else None for stack in stacks]
        begin = [
            op.Slice(state, [layer * sides], [(layer + 1) * sides], [0]) if layers > 1 else state for state in states
        ]
        found, *after = getattr(op, kind.name)(value, *weights, None, *begin, hidden_size=size, **settings)
        value = op.Reshape(op.Transpose(found, perm=[0, 2, 1, 3]), [0, 0, -1])  # (time, sides, batch, size) before
        for final, state in zip(finals, after, strict=True):
            final.append(state)
    output = op.Transpose(value, perm=[1, 0, 2]) if batch_first else value
    return (output, *(op.Concat(*final, axis=0) for final in finals))


def _lstm(
    input: TFloat, hx: Sequence[TFloat], params: Sequence[TFloat], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[TFloat, TFloat, TFloat]:  # fmt: skip
    return _layers(_KINDS["lstm"], input, hx, params, has_biases, num_layers, bidirectional, batch_first)  # type: ignore[return-value]


def _translation(name: str) -> Callable[..., Any]:
    """For the operators with a single state."""

    def translate(
        input: TFloat, hx: TFloat, params: Sequence[TFloat], has_biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[TFloat, TFloat]:  # fmt: skip
        return _layers(_KINDS[name], input, [hx], params, has_biases, num_layers, bidirectional, batch_first)  # type: ignore[return-value]

    return translate


_TRANSLATIONS = {
    getattr(torch.ops.dslify, name).default: _lstm if name == "lstm" else _translation(name) for name in _KINDS
}
