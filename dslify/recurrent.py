"""LSTM, GRU and RNN as one node: torch.export would unroll them over time, minutes for a second of sound.

While a module is captured, its recurrent layers call custom operators that know only their shapes; in the captured
graph those become ATen's own (aten.lstm.input and its like), which do the computing. Cells are single steps already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules import rnn as layers
from torch.nn.utils import rnn as packing

from .errors import CaptureError

OVERLOADS = {name: getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


def outputs_like(input: Tensor, hx: Any, params: Any, *settings: Any) -> tuple[Tensor, ...]:
    """Empty outputs of a recurrent operator, with the sizes and strides that ATen's have: (output, *final states).

    input: (time, batch, features), (batch, time, features) if batch_first. hx: the state (layers x directions, batch,
    size), for an LSTM the pair of hidden and cell state. Arguments as of aten.lstm.input.
    """
    bidirectional, batch_first = settings[-2:]
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    batch, time = input.shape[:2] if batch_first else input.shape[1::-1]
    output = input.new_empty(time, batch, states[0].shape[2] * (2 if bidirectional else 1))
    return (output.transpose(0, 1) if batch_first else output, *(state.new_empty(state.shape) for state in states))


def recurrent_macs(input: Tensor, params: Any) -> int:
    """MACs of a recurrent operator: every weight matrix, once a step and sample. input: of any order of its axes."""
    return input.shape[0] * input.shape[1] * sum(weight.numel() for weight in params if weight.dim() == 2)


def _custom(name: str) -> Any:
    schema = str(OVERLOADS[name]._schema)
    torch.library.define(f"dslify::{name}", schema[schema.index("(") :])
    torch.library.register_fake(f"dslify::{name}")(outputs_like)
    return getattr(torch.ops.dslify, name).default


_CUSTOM = {name: _custom(name) for name in OVERLOADS}
_TO_ATEN = {_CUSTOM[name]: overload for name, overload in OVERLOADS.items()}


class _Kernels:
    """Stands where torch.nn.modules.rnn has torch._VF: the names a layer's forward calls."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in _CUSTOM:
            if name in ("_pack_padded_sequence", "_pad_packed_sequence"):
                raise _packed()
            return getattr(torch._VF, name)  # type: ignore[no-any-return]

        def call(input: Tensor, hx: Any, params: Any, has_biases: Any, *settings: Any) -> Any:
            if not isinstance(has_biases, bool):  # the variant with batch_sizes
                raise _packed()
            return _CUSTOM[name](input, hx if isinstance(hx, Tensor) else list(hx), params, has_biases, *settings)

        return call


def _packed() -> CaptureError:
    return CaptureError(
        "The network packs its sequences (pack_padded_sequence), whose sizes depend on the data, so torch.export "
        "cannot capture it; give the recurrent layer padded batches, or capture a part without it with --scope."
    )


@contextmanager
def one_node_each() -> Iterator[None]:
    """Within the block a recurrent layer that is traced becomes one node of a custom operator; see to_aten()."""
    before = layers._VF, packing._VF
    layers._VF = packing._VF = _Kernels()  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        layers._VF, packing._VF = before  # type: ignore[attr-defined, assignment]


def to_aten(graph: fx.Graph) -> None:
    """Let the custom operators of a graph be ATen's."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _TO_ATEN.get(node.target, node.target)
