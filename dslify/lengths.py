"""Sizes that vary, reckoned in a graph from those of its inputs: how long a region's answer is, without running it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .functional import hint_of, symbolic

aten = torch.ops.aten
LOOKED_AT = 4096  # sizes of the network's input, from this one on: several times the product of all strides


def size_node(graph: fx.Graph, wanted: Any, inputs: Sequence[fx.Node]) -> fx.Node | int | None:
    """A node of `graph` for the size `wanted`, captured as a number or a symbolic one. inputs: nodes with captured
    values. A size that is none of theirs has to follow from one of theirs as

        wanted = times ((size + before) // step) + after

    which is what chains of convolutions, poolings and transposed convolutions make of a length. None if it does not.
    """
    expression = symbolic(wanted)
    if isinstance(expression, int):
        return expression
    known = [(node, axis, size) for node in inputs for axis, size in _sizes(node)]
    for node, axis, size in known:
        if symbolic(size) == expression:
            return _read(graph, node, axis)
    for node, axis, size in known:
        rule = _rule(size, wanted)
        if rule is not None:
            times, before, step, after = rule
            found = _read(graph, node, axis)
            for function, number, neutral in (
                (operator.add, before, 0), (operator.floordiv, step, 1),
                (operator.mul, times, 1), (operator.add, after, 0),
            ):  # fmt: skip
                found = found if number == neutral else graph.call_function(function, (found, number))
            return found
    return None


def _sizes(node: fx.Node) -> list[tuple[int | None, Any]]:
    """(axis, size) of a tensor, (None, value) of a size."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return list(enumerate(value.shape))
    return [(None, value)] if isinstance(value, torch.SymInt) else []


def _read(graph: fx.Graph, node: fx.Node, axis: int | None) -> fx.Node:
    return node if axis is None else graph.call_function(aten.sym_size.int, (node, axis))


def _rule(size: Any, wanted: Any) -> tuple[int, int, int, int] | None:
    """(times, before, step, after), from what both sizes are for many sizes of the network's input."""
    have, want = symbolic(size), symbolic(wanted)
    if isinstance(have, int) or len(have.free_symbols | want.free_symbols) != 1 or not have.free_symbols:
        return None
    (symbol,) = have.free_symbols
    pairs: dict[int, int] = {}
    for value in range(LOOKED_AT, 2 * LOOKED_AT):
        try:
            mine, other = (int(sympy_interp(PythonReferenceAnalysis, {symbol: value}, each)) for each in (have, want))
        except KeyError:  # a function that torch has no Python for
            return None
        if pairs.setdefault(mine, other) != other:
            return None  # lengths that become one size here become several there
    found = sorted(pairs)
    jumps = [at for last, at in pairwise(found) if pairs[at] != pairs[last]]
    if len(jumps) < 3 or found[-1] - found[0] >= len(found):
        return None
    step, times = jumps[1] - jumps[0], pairs[jumps[0]] - pairs[jumps[0] - 1]
    before = -jumps[0] % step
    after = pairs[jumps[0]] - times * ((jumps[0] + before) // step)
    pairs[hint_of(size)] = hint_of(wanted)
    right = all(many == times * ((few + before) // step) + after for few, many in pairs.items())
    return (times, before, step, after) if right else None
