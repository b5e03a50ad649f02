"""LSTM, GRU and RNN, kept as one node: a hidden size shrinks in all gates, layers and directions alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, rule, shape
from .terms import Axis, concat, product

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _gates(node: fx.Node) -> int:
    """How many gates the operator stacks along the first axis of its weights."""
    name = str(node.target).split(".")[1].removesuffix("_cell")
    return _GATES[name]


def _cell(b: Binding, node: fx.Node, entering: Axis, state: Axis, hidden: Axis, weights: Sequence[fx.Node]) -> None:
    """(g h) i, (g h) s, biases (g h): the gates g vary slowest and are as many as the operator has."""
    gates = _gates(node)
    rows = product([b.fixed(gates, node, "it holds the gates"), hidden]) if gates > 1 else hidden
    b.unify(node, b[weights[0]][1], entering)
    b.unify(node, b[weights[1]][1], state)
    for weight in weights:
        b.unify(node, b[weight][0], rows)


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(b: Binding, node: fx.Node) -> tuple[Terms, ...]:
    """t n i, (l d) n s, (l d) n h -> t n (d s), (l d) n s, (l d) n h

    t: time, n: batch (swapped with batch_first), l: layers, d: directions, h: hidden, s: the state that is handed on,
    h itself or the projection's (proj_size) axis.
    """
    a = arguments(node)
    x, directions = b[a["input"]], 2 if a["bidirectional"] else 1
    initial = a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    states = [b[node] for node in initial]
    state, hidden = states[0][-1], states[-1][-1]
    projects = len(states) == 2 and shape(initial[0])[-1] != shape(initial[1])[-1]
    if len(states) == 2 and not projects:
        b.unify(node, state, hidden)
    step = 1 + projects + 1 + 2 * bool(a["has_biases"])
    params = a["params"]
    entering, weights = x[-1], [params[at : at + step] for at in range(0, len(params), step)]
    for layer in range(a["num_layers"]):
        for mine in weights[layer * directions : (layer + 1) * directions]:
            _cell(b, node, entering, state, hidden, mine[: step - projects])
            if projects:  # s h
                b.unify(node, b[mine[-1]][0], state)
                b.unify(node, b[mine[-1]][1], hidden)
            for weight in mine:
                if len(b[weight]) == 2:
                    b.count(node, *x[:-1], *b[weight])
        entering = concat([state] * directions)
    time, batch = (x[1], x[0]) if a["batch_first"] else x[:2]
    b.freeze(node, time, "it is time")
    for values in states:
        b.freeze(node, values[0], "it counts layers and directions")
        b.unify(node, values[1], batch)
    return ((*x[:-1], entering), *states)


@rule("lstm_cell.default", "gru_cell.default", "rnn_tanh_cell.default", "rnn_relu_cell.default")
def cell(b: Binding, node: fx.Node) -> Any:
    """n i, n h -> n h: one step."""
    a = arguments(node)
    x, initial = b[a["input"]], a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    states = [b[value] for value in initial]
    hidden = states[0][-1]
    for values in states[1:]:
        b.unify(node, values[-1], hidden)
    _cell(b, node, x[-1], hidden, hidden, [a[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if a[name] is not None])
    for values in states:
        b.broadcast(node, values[:-1], x[:-1])
    for name in ("w_ih", "w_hh"):
        b.count(node, *x[:-1], *b[a[name]])
    return tuple(states) if len(states) > 1 else states[0]
