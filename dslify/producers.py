"""In front of a cut of which only some channels are wanted: the operators that make them need not make the others."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from .rules import arguments, set_argument
from .slicing import Kept, Shapes, Slicer, readers
from .zero_axes import moved
from .zeros import packet

# each entry of the result comes from the same entry of the first tensor alone
_EACH = frozenset((
    "relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid", "leaky_relu", "hardswish",
    "hardsigmoid", "hardtanh", "clamp", "softplus", "softsign", "neg", "abs", "sqrt", "square", "exp", "log", "log1p",
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "to", "_to_copy", "detach", "alias",
))  # fmt: skip
_WINDOWS = frozenset(f"{name}{n}d" for name in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3))
_PAIRED = ("add", "sub", "mul", "div")


def narrow_cut(module: fx.GraphModule, call: fx.Node, kept: Kept, shapes: Shapes) -> bool:
    """Let a graph give only the kept channels of its cut to a layer, in place. call: the layer's node.

    True if the operators that make the cut do less now; False if the channels are selected from the whole value, which
    others read too or which comes from an operator that makes all channels together.
    """
    narrowing = _Narrowing(Slicer(module, shapes))
    cut, *crossing = cast(tuple[fx.Node, ...], call.args)
    saves = cut not in crossing and narrowing.saves(cut, kept.axis)
    narrow = narrowing.narrow(cut, kept) if saves else narrowing.slicer.taken(cut, kept)
    call.args = (narrow, *crossing)
    narrowing.slicer.clean()
    return saves


class _Narrowing:
    def __init__(self, slicer: Slicer):
        self.slicer, self.shapes = slicer, slicer.shapes

    def saves(self, node: Any, axis: int) -> bool:
        """Whether less is computed when only some entries of this axis are wanted of a value."""
        if not isinstance(node, fx.Node) or node.op != "call_function" or len(readers(node)) != 1:
            return False
        name, given = packet(node), arguments(node) if packet(node) not in ("", "getitem") else {}
        if name == "linear":
            return axis == len(self.shapes[node]) - 1 and self.slicer.constant(given["weight"])
        if name.startswith("conv") and "weight" in given:
            return self._by_convolution(node, name, given, axis)
        if name in _PAIRED:
            return any(self.saves(value, axis) for value in self._along(node, axis))
        below = self._below(node, name, given, axis)
        return below is not None and self.saves(*below)

    def narrow(self, node: fx.Node, kept: Kept) -> fx.Node:
        """The value with only the kept entries: the node itself, changed, or a selection from it."""
        if not self.saves(node, kept.axis):
            return self.slicer.taken(node, kept)
        name, given = packet(node), arguments(node)
        if name in _PAIRED:
            for value in dict.fromkeys(self._along(node, kept.axis)):
                place = kept.axis - len(self.shapes[node]) + len(self.shapes[value])
                self._give(node, value, kept.at(place))
            return node
        if name == "linear" or name.startswith("conv"):
            self._shrink(node, given, kept)
            return node
        below, axis = self._below(node, name, given, kept.axis)  # type: ignore[misc]
        if name == "batch_norm":
            for weight in ("weight", "bias", "running_mean", "running_var"):
                if given[weight] is not None:
                    node.replace_input_with(given[weight], self.slicer.taken(given[weight], kept.at(0)))
        self._give(node, below, kept.at(axis))
        return node

    def _give(self, node: fx.Node, value: fx.Node, kept: Kept) -> None:
        narrow = self.narrow(value, kept)
        if narrow is not value:
            node.replace_input_with(value, narrow)

    def _by_convolution(self, node: fx.Node, name: str, given: dict[str, Any], axis: int) -> bool:
        weight = given["weight"]
        if not self.slicer.constant(weight) or axis != len(self.shapes[node]) - len(self.shapes[weight]) + 1:
            return False
        return given["groups"] == 1 or self._depthwise(node, name, given, axis)

    def _depthwise(self, node: fx.Node, name: str, given: dict[str, Any], axis: int) -> bool:
        """One filter a channel, so that its input's channels go as well."""
        alone = given["groups"] == self.shapes[node][axis] == self.shapes[given["input"]][axis]
        return alone and "transpose" not in name

    def _shrink(self, node: fx.Node, given: dict[str, Any], kept: Kept) -> None:
        """Leave out filters of a convolution, or rows of a linear layer."""
        groups = given.get("groups", 1)
        filters = 1 if "transpose" in packet(node) else 0
        for value, axis in ((given["weight"], filters), (given["bias"], 0)):
            if value is not None:
                node.replace_input_with(value, self.slicer.taken(value, kept.at(axis)))
        if groups != 1:
            set_argument(node, "groups", len(kept.keep))
            self._give(node, given["input"], kept)

    def _along(self, node: fx.Node, axis: int) -> list[fx.Node]:
        """The operands of a sum or product that have the axis, in full."""
        found = []
        for value in node.args[:2]:
            shape = self.shapes.get(value, ()) if isinstance(value, fx.Node) else ()
            place = axis - len(self.shapes[node]) + len(shape)
            if isinstance(value, fx.Node) and place >= 0 and shape[place] != 1:
                found.append(value)
        return found

    def _below(self, node: fx.Node, name: str, given: dict[str, Any], axis: int) -> tuple[fx.Node, int] | None:
        """The one operand that a value's entries come from, and where it has the axis."""
        value = node.args[0] if node.args else None
        if not isinstance(value, fx.Node) or value not in self.shapes:
            return None
        rank = len(self.shapes[value])
        if name in _EACH:
            numbers = all(used is value for used in node.all_input_nodes) and not given.get("train")
            return (value, axis) if numbers else None
        if name == "batch_norm":
            return (value, axis) if axis == 1 and not given["training"] else None
        if name in _WINDOWS:
            return (value, axis) if axis < rank - int(name[-2]) else None
        if name in ("pad", "constant_pad_nd"):
            return (value, axis) if axis < rank - len(given["pad"]) // 2 else None
        order = moved(rank, name, given)
        return None if order is None else (value, order[axis])
