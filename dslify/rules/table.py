"""The table of rules: one row per ATen overload, and what a row may say about its node.

A row is a function `rule(b: Binding, node) -> terms of the output` registered under exact overload names. It states
equations (`b.unify`), demands (`b.freeze`), the multiply-accumulates (`b.macs`) and which arguments have to be written
anew in a narrow copy (`b.rewrite`). An overload without a row freezes what it touches and enters the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..functional import symbolic
from .terms import Axis, Reason, unify

Terms = tuple[Axis, ...]
Rule = Callable[["Binding", fx.Node], Any]
Sizes = Callable[[Axis], int]  # kept size of a term at the example input

RULES: dict[str, Rule] = {}


def rule(*overloads: str) -> Callable[[Rule], Rule]:
    """Register a row, "conv1d.default" for aten or "namespace.op.overload". A second row for one overload raises."""

    def register(row: Rule) -> Rule:
        for overload in overloads:
            name = overload if overload.count(".") == 2 else f"aten.{overload}"
            if name in RULES:
                raise ValueError(f"{name} has a rule already: {RULES[name].__name__}")
            RULES[name] = row
        return row

    return register


@dataclass
class Binding:
    """What is known while the rows run over a graph, in order.

    terms: node -> its axes (tuples nest for several outputs). macs: (node, axes whose sizes multiply to its MACs).
    rewrites: node -> argument -> how to compute it in the narrow copy. ledger: overload -> nodes without a row.
    hints: concrete value of a symbolic size.
    """

    hint: Callable[[Any], int]
    terms: dict[fx.Node, Any] = field(default_factory=dict)
    macs: list[tuple[fx.Node, Terms]] = field(default_factory=list)
    rewrites: dict[fx.Node, dict[str, Callable[[Sizes], Any]]] = field(default_factory=dict)
    ledger: dict[str, list[str]] = field(default_factory=dict)

    # -- terms -------------------------------------------------------------------------------------------------------
    def __getitem__(self, node: Any) -> Terms:
        return self.terms[node]

    def neutral(self, size: Any) -> Axis:
        """An axis that follows whatever it meets."""
        return Axis(symbolic(size), self.hint(size))

    def fixed(self, size: Any, node: fx.Node, why: str) -> Axis:
        return Axis(symbolic(size), self.hint(size), Reason(node.name, why))

    def one(self) -> Axis:
        return Axis(1, 1, Reason("", "it has size 1"))

    def fresh(self, size: Any) -> Axis:
        """An axis that follows whatever it meets, or stays if its size is 1."""
        return self.one() if symbolic(size) == 1 else self.neutral(size)

    def given(self, size: Any, node: fx.Node) -> Axis:
        """An axis whose size is an argument of `node`: it follows what it meets, where the argument can be rewritten.

        A sum or product of varying sizes cannot be: the narrow copy would have to know which part of it shrank.
        """
        if isinstance(symbolic(size), int) or symbolic(size).is_Symbol:
            return self.fresh(size)
        return self.fixed(size, node, "its size is computed from sizes that vary")

    def parameter(self, value: Tensor) -> Terms:
        """Axes of a tensor the network holds: those of parameters shrink, those of buffers follow what they meet."""
        touched = isinstance(value, nn.Parameter)
        return tuple(self.one() if size == 1 else Axis(int(size), int(size), touched=touched) for size in value.shape)

    # -- statements --------------------------------------------------------------------------------------------------
    def unify(self, node: fx.Node, a: Axis, b: Axis) -> None:
        unify(a, b, Reason(node.name, "its structure cannot be followed"))

    def freeze(self, node: fx.Node, axes: Sequence[Axis] | Axis, why: str) -> None:
        for axis in [axes] if isinstance(axes, Axis) else axes:
            axis.freeze(Reason(node.name, why))

    def broadcast(self, node: fx.Node, *operands: Terms) -> Terms:
        """Unify operands axis by axis from the right, size-1 axes give way; returns the axes of the result."""
        rank = max((len(operand) for operand in operands), default=0)
        out: list[Axis] = []
        for back in range(rank, 0, -1):
            meeting = [operand[-back] for operand in operands if len(operand) >= back]
            wide = [axis for axis in meeting if not axis.is_one()]
            for axis in wide[1:]:
                self.unify(node, wide[0], axis)
            out.append(wide[0] if wide else meeting[0])
        return tuple(out)

    def renewed(self, node: fx.Node, axis: Axis, size: Any, why: str) -> Axis:
        """Freeze an axis along which the operator mixes or moves entries; returns the fixed axis that comes out."""
        self.freeze(node, axis, why)
        return self.fixed(size, node, why)

    def count(self, node: fx.Node, *axes: Axis) -> None:
        self.macs.append((node, axes))

    def rewrite(self, node: fx.Node, argument: str, compute: Callable[[Sizes], Any]) -> None:
        self.rewrites.setdefault(node, {})[argument] = compute

    def unknown(self, node: fx.Node, why: str = "no rule for this operator") -> Any:
        """Freeze everything the node touches; its outputs are fixed."""
        for used in node.all_input_nodes:
            for axis in leaves(self.terms.get(used, ())):
                self.freeze(node, axis, why)
        return self.fixed_outputs(node, why)

    def fixed_outputs(self, node: fx.Node, why: str) -> Any:
        return self._fixed(node.meta.get("val"), node, why)

    def _fixed(self, value: Any, node: fx.Node, why: str) -> Any:
        if isinstance(value, Tensor):
            return tuple(self.fixed(size, node, why) for size in value.shape)
        if isinstance(value, (tuple, list)):
            return tuple(self._fixed(item, node, why) for item in value)
        return ()


def shape(node: Any) -> tuple[Any, ...]:
    """Shape of a node's value as captured."""
    return tuple(node.meta["val"].shape)


def dims(value: Any, rank: int) -> list[int]:
    """A `dim` argument (an int, a list, or None for all) as axes counted from the left."""
    given = [value] if isinstance(value, int) else list(value or [])
    return sorted({dim % rank for dim in given}) if given and rank else list(range(rank))


def size_of(axis: Axis) -> Callable[[Sizes], int]:
    """An argument that is the size of an axis."""
    return lambda size: size(axis)


@dataclass(frozen=True)
class Scaled:
    """A size that the graph computes, in the narrow copy: node // before * after."""

    node: fx.Node
    before: int
    after: int


def new_sizes(given: Sequence[Any], axes: Sequence[Axis], size: Sizes) -> list[Any]:
    """A size argument in the narrow copy: what did not change stays as written.

    A -1 that was there gives way to the number where there is one."""
    return [_new_size(old, axis, size) for old, axis in zip(given, axes, strict=True)]


def _new_size(old: Any, axis: Axis, size: Sizes) -> Any:
    root = axis.find()
    inferred = isinstance(old, int) and old == -1
    if isinstance(root.size, int):
        return old if size(root) == root.hint and not inferred else size(root)
    return old if size(root) == root.hint or not isinstance(old, fx.Node) else Scaled(old, root.hint, size(root))


def leaves(terms: Any) -> list[Axis]:
    """Every axis in nested tuples of terms."""
    if isinstance(terms, Axis):
        return [terms]
    return [axis for item in terms or () for axis in leaves(item)]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of its overload's schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound.update(zip((argument.name for argument in schema), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def tensors(node: fx.Node) -> list[fx.Node]:
    """The node's tensor operands, each once."""
    return [used for used in node.all_input_nodes if isinstance(used.meta.get("val"), Tensor)]


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Write one argument by its schema name, wherever it stands."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)
