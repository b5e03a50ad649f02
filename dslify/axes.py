"""Binds the rules to a region's nodes: region -> AxisMap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from .functional import graphs_in, hint_of, inner_graph, is_tensor, op_name, tensor_at
from .rules import RULES, UNCOUNTED, Axis, Binding, Reason, kept_size

Kept = Mapping[Axis, int]
KINDS = ("macs", "params")  # of work


@dataclass(frozen=True)
class Boundary:
    """A value that enters or leaves the region. channel_axis: the axis that parameters act on most, None if none."""

    node: fx.Node
    axes: tuple[Axis, ...]
    channel_axis: int | None
    is_input: bool

    @property
    def channels(self) -> Axis:
        return self.axes[self.channel_axis or 0].find()


@dataclass(frozen=True)
class AxisMap:
    """The axes of a region, solved.

    parameters: get_attr target -> its axes. boundaries: tensors that enter (in the order of the region's inputs), then
    those that leave. ties: atom -> boundary axes that contain it. ledger: overload -> nodes without a rule.
    """

    region: fx.GraphModule
    binding: Binding
    parameters: dict[str, tuple[Axis, ...]]
    boundaries: tuple[Boundary, ...]
    ties: dict[Axis, frozenset[tuple[int, int]]] = field(repr=False)
    batch: int = 1

    @property
    def ledger(self) -> dict[str, list[str]]:
        return self.binding.ledger

    def atoms(self) -> Iterator[Axis]:
        """Every atom of a parameter, once."""
        seen: set[int] = set()
        for terms in self.parameters.values():
            for axis in terms:
                for atom in axis.atoms():
                    if id(atom) not in seen:
                        seen.add(id(atom))
                        yield atom

    def shrinks(self, atom: Axis, projected: frozenset[int] = frozenset()) -> bool:
        return self.kept_because(atom, projected) is None

    def kept_because(self, atom: Axis, projected: frozenset[int] = frozenset()) -> Reason | None:
        """Why an atom keeps its size, or None if it may shrink. projected: boundaries with a projection."""
        atom = atom.find()
        if atom.frozen:
            return atom.frozen
        if not atom.touched:
            return Reason("", "no parameter has it")
        for at, axis in sorted(self.ties.get(atom, ())):
            boundary = self.boundaries[at]
            if at not in projected or axis != boundary.channel_axis:
                side = "enters from the base" if boundary.is_input else "leaves the region"
                return Reason(boundary.node.name, f"it {side}")
        return None

    def work(self, projected: frozenset[int] = frozenset()) -> Iterator[tuple[str, int, tuple[Axis, ...]]]:
        """What macs and params are sums of: (kind, constant, axes whose sizes multiply with it). MACs of the captured
        batch."""
        for (kind, factors), constant in self._products.items():
            yield kind, constant, factors
        for at in projected:
            boundary = self.boundaries[at]
            others = math.prod(axis.find().hint for i, axis in enumerate(boundary.axes) if i != boundary.channel_axis)
            yield "macs", others * boundary.channels.hint, (boundary.channels,)
            yield "params", boundary.channels.hint, (boundary.channels,)

    @cached_property
    def _products(self) -> dict[tuple[str, tuple[Axis, ...]], int]:
        """(kind, axes that may shrink) -> the sum of what stays, over all operators and weights with these axes."""
        sums: dict[tuple[str, tuple[Axis, ...]], int] = {}
        counted = [("macs", factors) for _, factors in self.binding.macs]
        for kind, factors in [*counted, *(("params", self.parameters[name]) for name in self.weights)]:
            constant, shrinking = 1, []
            for root in (axis.find() for axis in factors):
                if any(atom.touched and not atom.frozen for atom in root.atoms()):
                    shrinking.append(root)
                else:
                    constant *= root.hint
            sums[kind, tuple(shrinking)] = sums.get((kind, tuple(shrinking)), 0) + constant
        return sums

    def macs(self, kept: Kept | None = None, projected: frozenset[int] = frozenset()) -> int:
        """Multiply-accumulates per sample at the example's size."""
        return self._total("macs", kept, projected) // self.batch

    def params(self, kept: Kept | None = None, projected: frozenset[int] = frozenset()) -> int:
        """Number of parameters (buffers not counted)."""
        return self._total("params", kept, projected)

    def _total(self, wanted: str, kept: Kept | None, projected: frozenset[int]) -> int:
        size = sizes(kept or {})
        return sum(
            constant * math.prod(map(size, factors))
            for kind, constant, factors in self.work(projected)
            if kind == wanted
        )

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Targets that are nn.Parameters, tied ones once."""
        held = {name: tensor_at(self.region, name) for name in self.parameters}
        return tuple({id(value): name for name, value in held.items() if isinstance(value, nn.Parameter)}.values())


def sizes(kept: Kept) -> Callable[[Axis], int]:
    """Size of any term at the example, when each atom keeps `kept` entries (all, if it is not listed)."""
    return lambda axis: kept_size(axis, lambda atom: kept.get(atom, atom.hint))


def analyse(region: fx.GraphModule, distrusted: Mapping[str, str] | None = None, samples: int | None = None) -> AxisMap:
    """Run every row over the region's nodes, once, in order.

    distrusted: node name -> why its row is not believed; such a node freezes what it touches, as one without a row.
    samples: batch size of the captured values; by default the first axis of the first input.
    """
    b, parameters = _bound(region, distrusted or {})
    inputs = [node for node in region.graph.nodes if node.op == "placeholder" and is_tensor(node)]
    outputs = [node for node in list(region.graph.nodes)[-1].all_input_nodes if is_tensor(node)]
    ties: dict[Axis, set[tuple[int, int]]] = {}
    strength = _touch_strength(region, parameters)
    boundaries = []
    for at, node in enumerate([*inputs, *outputs]):
        for axis, term in enumerate(b.terms[node]):
            for atom in term.atoms():
                ties.setdefault(atom, set()).add((at, axis))
        boundaries.append(Boundary(node, b.terms[node], _channel_axis(b.terms[node], strength), at < len(inputs)))
    frozen_ties = {atom: frozenset(places) for atom, places in ties.items()}
    return AxisMap(region, b, parameters, tuple(boundaries), frozen_ties, samples or _batch(inputs))


def node_macs(module: fx.GraphModule, samples: int, among: Iterable[fx.Node] | None = None) -> dict[fx.Node, int]:
    """MACs per sample of every node that has any, at the captured size.

    samples: batch size of the captured values. among: the nodes to look at, in order, with all that they read.
    """
    b = Binding(_hints(module))
    found: dict[fx.Node, int] = {}
    for node in module.graph.nodes if among is None else among:  # where nothing is counted shapes will do for axes
        if node.op == "get_attr":
            tensor = tensor_at(module, str(node.target))
            b.terms[node] = b.parameter(tensor) if isinstance(tensor, Tensor) else ()
        elif node.op == "placeholder" or op_name(node) in UNCOUNTED:
            b.terms[node] = b.fixed_outputs(node, "")
        elif node.op != "output":
            b.terms[node] = _bind(b, node, {})
    for node, factors in b.macs:
        found[node] = found.get(node, 0) + math.prod(axis.find().hint for axis in factors)
    return {node: macs // samples for node, macs in found.items()}


def _bound(module: fx.GraphModule, distrusted: Mapping[str, str]) -> tuple[Binding, dict[str, tuple[Axis, ...]]]:
    """The rows of a module's nodes, run, and the axes of its parameters."""
    b = Binding(_hints(module))
    parameters: dict[str, tuple[Axis, ...]] = {}
    tied: dict[int, tuple[Axis, ...]] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta["val"].shape if is_tensor(node) else ()
            b.terms[node] = tuple(b.one() if size == 1 else b.neutral(size) for size in shape)
        elif node.op == "get_attr":
            tensor = tensor_at(module, str(node.target))
            if isinstance(tensor, Tensor):
                b.terms[node] = parameters[str(node.target)] = tied.setdefault(id(tensor), b.parameter(tensor))
            else:
                b.terms[node] = ()
        elif node.op != "output":
            b.terms[node] = _bind(b, node, distrusted)
    return b, parameters


def _bind(b: Binding, node: fx.Node, distrusted: Mapping[str, str]) -> Any:
    value = node.meta.get("val")
    name = op_name(node)
    if not isinstance(value, (Tensor, tuple, list)):  # numbers: sizes and what is reckoned from them, or from values
        return () if name in ("", "aten.sym_size.int") else b.unknown(node, "a number is read from it")
    if node.name in distrusted:
        b.ledger.setdefault(name or str(node.target), []).append(node.name)
        return b.unknown(node, distrusted[node.name])
    if name in RULES:
        return RULES[name](b, node)
    if getattr(node.target, "__name__", "") == "getitem" and node.op == "call_function":
        return b.terms[node.args[0]][node.args[1]]  # type: ignore[index]
    if (inner := inner_graph(node)) is not None:
        return _enter(b, *inner, node, distrusted)
    b.ledger.setdefault(name or str(node.target), []).append(node.name)
    return b.unknown(node)


def _enter(
    b: Binding, body: fx.GraphModule, operands: tuple[Any, ...], call: fx.Node, distrusted: Mapping[str, str]
) -> Any:
    """The rows of a higher-order operator's own graph."""
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    counted = len(b.macs)
    for node, given in zip(inputs, operands, strict=True):
        b.terms[node] = b.terms.get(given, ()) if isinstance(given, fx.Node) else ()
    for node in body.graph.nodes:
        if node.op == "output":
            b.macs[counted:] = [(call, factors) for _, factors in b.macs[counted:]]
            return tuple(b.terms.get(out, ()) for out in node.args[0])
        if node.op == "get_attr":
            value = tensor_at(body, node.target)
            why = "a constant inside a region of its own"
            b.terms[node] = tuple(b.fixed(n, node, why) for n in value.shape) if isinstance(value, Tensor) else ()
        elif node.op != "placeholder":
            b.terms[node] = _bind(b, node, distrusted)
    return ()


def _hints(region: fx.GraphModule) -> Callable[[Any], int]:
    values: dict[Any, int] = {}

    def hint(size: Any) -> int:
        if isinstance(size, (int, torch.SymInt)):
            return hint_of(size)
        if not values:
            values.update(_symbols(region))
        return values[size] if size in values else int(sympy.sympify(size).subs(values))

    return hint


def _symbols(region: fx.GraphModule) -> Iterator[tuple[Any, int]]:
    """The expressions of sizes in a region, and their values at the example."""
    for node in (node for inner in graphs_in(region) for node in inner.graph.nodes):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                yield size.node.expr, int(size.node.hint)


def _touch_strength(region: fx.GraphModule, parameters: Mapping[str, tuple[Axis, ...]]) -> dict[Axis, int]:
    """How many parameter values each atom reaches."""
    strength: dict[Axis, int] = {}
    for name, axes in parameters.items():
        count = tensor_at(region, name).numel()
        for axis in axes:
            for atom in set(axis.atoms()):
                strength[atom] = strength.get(atom, 0) + count
    return strength


def _channel_axis(axes: tuple[Axis, ...], strength: Mapping[Axis, int]) -> int | None:
    reach = [max((strength.get(atom, 0) for atom in axis.atoms()), default=0) for axis in axes]
    return reach.index(max(reach)) if reach and max(reach) > 0 else None


def _batch(inputs: list[fx.Node]) -> int:
    """Samples in the captured example."""
    return max(1, hint_of(inputs[0].meta["val"].shape[0])) if inputs and inputs[0].meta["val"].dim() else 1
