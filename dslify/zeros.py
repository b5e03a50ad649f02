"""Values of which some channels are zero, and the operators that work on each entry or sum over the channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .functional import op_name
from .recurrent import OVERLOADS
from .rules import set_argument
from .slicing import Kept, Shapes, Slicer

Outcome = Kept | str | None  # what is left out of the result; None: nothing, it is whole; or why the zeros must be seen
Rule = Callable[["Zeros", fx.Node, dict[str, Any]], Outcome]
VALUES: dict[str, Rule] = {}

# f(0) = 0 for each entry, whatever numbers follow the tensor
_ZERO_TO_ZERO = (
    "relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "leaky_relu", "hardswish", "softsign",
    "softshrink", "hardshrink", "tanhshrink", "neg", "abs", "sqrt", "square", "sign", "erf", "sin", "sinh", "asinh",
    "atan", "expm1", "log1p", "trunc", "floor", "ceil", "round", "dropout", "feature_dropout", "alpha_dropout", "clone",
    "contiguous", "to", "_to_copy", "detach", "alias", "type_as",
)  # fmt: skip


@dataclass
class Zeros:
    """left: of each value that has zero channels, which channels are left in it; the others are known to be zero."""

    slicer: Slicer
    shapes: Shapes
    left: dict[fx.Node, Kept] = field(default_factory=dict)

    def axis(self, node: Any, axis: Any) -> int:
        """An axis counted from the front."""
        return int(axis) % max(1, len(self.shapes[node]))

    def rank(self, node: Any) -> int:
        return len(self.shapes[node]) if node in self.shapes else 0


def packet(node: fx.Node) -> str:
    """ "conv1d" for a call of aten.conv1d.default, "getitem" for one of operator.getitem, else "" """
    if node.target is operator.getitem:
        return "getitem"
    parts = op_name(node).split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "aten" else ""


def rule(table: dict[str, Rule], *names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for ATen operators of these names, whatever their overload."""

    def register(entered: Rule) -> Rule:
        for name in names:
            if name in table:
                raise ValueError(f"aten.{name} has two rules")
            table[name] = entered
        return entered

    return register


@rule(VALUES, *_ZERO_TO_ZERO)
def _each(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    if given.get("train"):
        return "it is in training mode"
    return zeros.left.get(node.args[0], "it reads them as a setting")  # type: ignore[arg-type]


@rule(VALUES, "hardtanh", "clamp")
def _bounded(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    low, high = given.get("min_val", given.get("min")), given.get("max_val", given.get("max"))
    numbers = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
    holds_zero = numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return zeros.left[node.args[0]] if holds_zero else "its bounds leave zero out"  # type: ignore[index]


@rule(VALUES, "pow")
def _power(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    exponent = given["exponent"]
    if isinstance(exponent, (int, float)) and exponent > 0:
        return zeros.left[given["self"]]
    return "its exponent is not a number above zero"


@rule(VALUES, "mul")
def _times(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    one, other = node.args[0], node.args[1]
    if one not in zeros.left:
        one, other = other, one
    kept = zeros.left[one]  # type: ignore[index]
    if not isinstance(other, fx.Node) or other not in zeros.shapes:
        return kept
    if other in zeros.left:
        return kept if _aligned(zeros, one, other) else "its operands are zero at other places"
    place = kept.axis - zeros.rank(one) + zeros.rank(other)
    if place >= 0 and zeros.shapes[other][place] != 1:
        node.replace_input_with(other, zeros.slicer.taken(other, kept.at(place)))
    return kept.at(max(kept.axis, place))


@rule(VALUES, "add", "sub")
def _plus(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    one, other = node.args[0], node.args[1]
    if one in zeros.left and other in zeros.left and _aligned(zeros, one, other):
        return zeros.left[one]  # type: ignore[index]
    return "it adds to them"


@rule(VALUES, "div")
def _divided(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    if node.args[0] in zeros.left and isinstance(node.args[1], (int, float)) and node.args[1]:
        return zeros.left[node.args[0]]  # type: ignore[index]
    return "it divides by a value"


def _aligned(zeros: Zeros, one: Any, other: Any) -> bool:
    return zeros.left[one] == zeros.left[other] and zeros.rank(one) == zeros.rank(other)


@rule(VALUES, "linear")
def _linear(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left.get(given["input"])
    if kept is None or kept.axis != zeros.rank(given["input"]) - 1:
        return "it works along another axis"
    return _contracted(zeros, node, given["weight"], kept.at(1))


@rule(VALUES, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left.get(given["input"])
    weight = given["weight"]
    if kept is None or given["groups"] != 1 or kept.axis != zeros.rank(given["input"]) - zeros.rank(weight) + 1:
        return "it has groups" if given["groups"] != 1 else "it works along another axis"
    return _contracted(zeros, node, weight, kept.at(0 if "transpose" in packet(node) else 1))


@rule(VALUES, "matmul", "mm", "bmm", "addmm")
def _product(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    names = ("mat1", "mat2") if packet(node) == "addmm" else ("self", "mat2" if "mat2" in given else "other")
    left, right = (given[name] for name in names)
    along = max(0, zeros.rank(right) - 2)
    if left in zeros.left and right not in zeros.left and zeros.left[left].axis == zeros.rank(left) - 1:
        return _contracted(zeros, node, right, zeros.left[left].at(along))
    if right in zeros.left and left not in zeros.left and zeros.left[right].axis == along:
        return _contracted(zeros, node, left, zeros.left[right].at(zeros.rank(left) - 1))
    return "it works along another axis"


@rule(VALUES, *OVERLOADS)
def _recurrent(zeros: Zeros, node: fx.Node, given: dict[str, Any]) -> Outcome:
    kept = zeros.left.get(given["input"])
    params = list(given["params"])
    per_direction = 4 if given["has_biases"] else 2
    directions = 2 if given["bidirectional"] else 1
    if kept is None or kept.axis != 2 or len(params) != given["num_layers"] * directions * per_direction:
        return "it reads them otherwise than as features"
    for direction in range(directions):
        at = direction * per_direction
        params[at] = zeros.slicer.taken(params[at], kept.at(1))
    set_argument(node, "params", params)
    return None


def _contracted(zeros: Zeros, node: fx.Node, weight: fx.Node, kept: Kept) -> Outcome:
    if weight in zeros.left:
        return "its weights are zero too"
    node.replace_input_with(weight, zeros.slicer.taken(weight, kept))
    return None
