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


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Write one argument by its schema name, wherever it stands."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)
