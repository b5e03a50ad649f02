"""Binds the rules to a region's nodes: region -> AxisMap, and the sizes that a width gives its atoms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator

from .functional import graphs_in, op_name, symbolic, tensor_at
from .rules import RULES, Axis, Binding, Reason, kept_size

Kept = Mapping[Axis, int]
PAYS = 0.01  # share of the region's MACs that projections have to save


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

    def macs(self, kept: Kept | None = None, projected: frozenset[int] = frozenset()) -> int:
        """Multiply-accumulates per sample at the example's size."""
        size = sizes(kept or {})
        total = sum(math.prod(size(axis) for axis in axes) for _, axes in self.binding.macs)
        for at in projected:
            boundary = self.boundaries[at]
            others = math.prod(axis.find().hint for i, axis in enumerate(boundary.axes) if i != boundary.channel_axis)
            total += others * boundary.channels.hint * size(boundary.channels)
        return total // self.batch

    def params(self, kept: Kept | None = None, projected: frozenset[int] = frozenset()) -> int:
        """Number of parameters (buffers not counted)."""
        size = sizes(kept or {})
        total = 0
        for name in self.weights():
            total += math.prod(size(axis) for axis in self.parameters[name])
        return total + sum(self.boundaries[at].channels.hint * size(self.boundaries[at].channels) for at in projected)

    def weights(self) -> list[str]:
        """Targets that are nn.Parameters, tied ones once."""
        by_id = {
            id(tensor_at(self.region, name)): name
            for name in self.parameters
            if isinstance(tensor_at(self.region, name), nn.Parameter)
        }
        return list(by_id.values())


def sizes(kept: Kept) -> Callable[[Axis], int]:
    """Size of any term at the example, when each atom keeps `kept` entries (all, if it is not listed)."""
    return lambda axis: kept_size(axis, lambda atom: kept.get(atom, atom.hint))


def analyse(region: fx.GraphModule, distrusted: Mapping[str, str] | None = None) -> AxisMap:
    """Run every row over the region's nodes, once, in order.

    distrusted: node name -> why its row is not believed; such a node freezes what it touches, as one without a row.
    """
    hint = _hints(region)
    distrusted = distrusted or {}
    b = Binding(hint)
    parameters: dict[str, tuple[Axis, ...]] = {}
    tied: dict[int, tuple[Axis, ...]] = {}
    inputs, outputs = [], []
    for node in region.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            b.terms[node] = (
                tuple(b.one() if size == 1 else b.neutral(size) for size in value.shape)
                if isinstance(value, Tensor)
                else ()
            )
            if isinstance(value, Tensor):
                inputs.append(node)
        elif node.op == "get_attr":
            tensor = tensor_at(region, node.target)
            if not isinstance(tensor, Tensor):
                b.terms[node] = ()
                continue
            b.terms[node] = parameters[node.target] = tied.setdefault(id(tensor), b.parameter(tensor))
        elif node.op == "output":
            outputs = [
                out for out in node.args[0] if isinstance(out, fx.Node) and isinstance(out.meta.get("val"), Tensor)
            ]
        else:
            b.terms[node] = _bind(b, region, node, distrusted)
    ties: dict[Axis, set[tuple[int, int]]] = {}
    strength = _touch_strength(region, parameters)
    boundaries = []
    for at, node in enumerate([*inputs, *outputs]):
        for axis, term in enumerate(b.terms[node]):
            for atom in term.atoms():
                ties.setdefault(atom, set()).add((at, axis))
        boundaries.append(Boundary(node, b.terms[node], _channel_axis(b.terms[node], strength), at < len(inputs)))
    frozen_ties = {atom: frozenset(places) for atom, places in ties.items()}
    return AxisMap(region, b, parameters, tuple(boundaries), frozen_ties, _batch(inputs))


def _bind(b: Binding, region: fx.GraphModule, node: fx.Node, distrusted: Mapping[str, str]) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, (Tensor, tuple, list)):
        return ()  # integers made of sizes
    name = op_name(node)
    if node.name in distrusted:
        b.ledger.setdefault(name or str(node.target), []).append(node.name)
        return b.unknown(node, distrusted[node.name])
    if name in RULES:
        return RULES[name](b, node)
    if getattr(node.target, "__name__", "") == "getitem" and node.op == "call_function":
        return b.terms[node.args[0]][node.args[1]]  # type: ignore[index]
    if (body := body_of(region, node)) is not None:
        return _enter(b, body, node, distrusted)
    b.ledger.setdefault(name or str(node.target), []).append(node.name)
    return b.unknown(node)


def body_of(region: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The graph that a higher-order operator runs on the arguments behind it (autocast and no-grad regions)."""
    if not isinstance(node.target, HigherOrderOperator):
        return None
    graphs = [used for used in node.args if isinstance(used, fx.Node) and used.op == "get_attr"]
    modules = [tensor_at(region, str(used.target)) for used in graphs]
    return next((module for module in modules if isinstance(module, fx.GraphModule)), None)


def _enter(b: Binding, body: fx.GraphModule, call: fx.Node, distrusted: Mapping[str, str]) -> Any:
    """The rows of a higher-order operator's own graph."""
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    for node, given in zip(inputs, call.args[len(call.args) - len(inputs) :], strict=True):
        b.terms[node] = b.terms.get(given, ()) if isinstance(given, fx.Node) else ()
    for node in body.graph.nodes:
        if node.op == "output":
            return tuple(b.terms.get(out, ()) for out in node.args[0])
        if node.op == "get_attr":
            value = tensor_at(body, node.target)
            why = "a constant inside a region of its own"
            b.terms[node] = tuple(b.fixed(n, node, why) for n in value.shape) if isinstance(value, Tensor) else ()
        elif node.op != "placeholder":
            b.terms[node] = _bind(b, body, node, distrusted)
    return ()


def _hints(region: fx.GraphModule) -> Callable[[Any], int]:
    values: dict[Any, int] = {}
    for node in (node for inner in graphs_in(region) for node in inner.graph.nodes):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr not in values:
                values[size.node.expr] = int(size.node.hint)

    def hint(size: Any) -> int:
        if isinstance(size, int):
            return size
        if isinstance(size, torch.SymInt):
            return int(size.node.hint)
        return values[size] if size in values else int(sympy.sympify(size).subs(values))

    return hint


def _touch_strength(region: fx.GraphModule, parameters: Mapping[str, tuple[Axis, ...]]) -> dict[Axis, int]:
    """How many parameter values each atom reaches."""
    strength: dict[Axis, int] = {}
    for name, axes in parameters.items():
        for axis in axes:
            for atom in set(axis.atoms()):
                strength[atom] = strength.get(atom, 0) + tensor_at(region, name).numel()
    return strength


def _channel_axis(axes: tuple[Axis, ...], strength: Mapping[Axis, int]) -> int | None:
    reach = [max((strength.get(atom, 0) for atom in axis.atoms()), default=0) for axis in axes]
    return reach.index(max(reach)) if reach and max(reach) > 0 else None


def _batch(inputs: list[fx.Node]) -> int:
    """Samples in the captured example."""
    first = inputs[0].meta["val"].shape[0] if inputs and inputs[0].meta["val"].dim() else 1
    return max(1, int(first.node.hint) if isinstance(first, torch.SymInt) else 1)


def choose(axes: AxisMap, width: float, projected: frozenset[int] = frozenset()) -> dict[Axis, int]:
    """Kept size of every atom that shrinks at `width`: heads before head size, groups before their members."""
    shares: dict[Axis, float] = {}
    free = {atom for atom in axes.atoms() if axes.shrinks(atom, projected)}
    for term in _products(axes):
        share = width
        for part in term.parts:
            for atom in part.atoms():
                if atom not in free:
                    continue
                settled = shares.setdefault(atom, share)  # by the first product that holds it
                if part.find() is atom:  # what this factor could not give up, the next one has to
                    share = min(1.0, share * atom.hint / rounded(atom.hint, settled))
    for atom in free:
        shares.setdefault(atom, width)
    return {atom: rounded(atom.hint, share) for atom, share in shares.items()}


def _products(axes: AxisMap) -> Iterator[Axis]:
    seen: set[int] = set()

    def walk(axis: Axis) -> Iterator[Axis]:
        root = axis.find()
        if id(root) in seen:
            return
        seen.add(id(root))
        if root.form == "product":
            yield root
        for part in root.parts:
            yield from walk(part)

    for terms in axes.parameters.values():
        for axis in terms:
            yield from walk(axis)


def rounded(size: int, share: float) -> int:
    """Entries to keep of `size`, never fewer than the share: wide axes to a multiple of 4, which kernels like.

    Upwards, because a narrow layer is a bottleneck for all that follows: on the codec 8 instead of 4 of 32 channels
    more than halved the difference that fine-tuning ends at.
    """
    exact = math.ceil(size * share - 1e-9)
    return min(size, 4 * math.ceil(exact / 4) if size >= 32 else max(1, exact))


def decide_projections(axes: AxisMap, width: float) -> frozenset[int]:
    """The boundaries at which a learned 1x1 projection saves MACs, by descent from all of them; empty if none pays.

    A projection is a bottleneck as well, so the set has to save at least PAYS of the region's MACs.
    """
    candidates = [at for at, boundary in enumerate(axes.boundaries) if _projectable(axes, at)]

    def cost(chosen: frozenset[int]) -> tuple[int, int]:
        kept = choose(axes, width, chosen)
        return axes.macs(kept, chosen), axes.params(kept, chosen)

    if width >= 1 or not candidates:
        return frozenset()
    chosen = frozenset(candidates)
    best = cost(chosen)
    for at in candidates:
        without = chosen - {at}
        if (price := cost(without)) <= best:
            chosen, best = without, price
    return chosen if best[0] <= cost(frozenset())[0] - PAYS * axes.macs() else frozenset()


def _projectable(axes: AxisMap, at: int) -> bool:
    boundary = axes.boundaries[at]
    if boundary.channel_axis is None or not boundary.node.meta["val"].dtype.is_floating_point:
        return False
    everything = frozenset(range(len(axes.boundaries)))
    fixed = isinstance(symbolic(boundary.channels.size), int)
    return fixed and any(axes.shrinks(atom, everything) for atom in boundary.channels.atoms())
