"""How every value of a graph runs with time: entries for each of the first input's, from sizes at two lengths alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .errors import OptionError, one_line
from .functional import op_name
from .layout import Stretch
from .macs import fake
from .recurrent import OVERLOADS, outputs_like

FAR = 2**10 * 3**3 * 5**2 * 7  # entries: every step that divides it shows exactly
COARSEST = 2**12  # entries that one step may have
_RECURRENT = frozenset(OVERLOADS.values())


def of_length(value: Any, stretch: Stretch, length: int) -> Any:
    """A value as it would be for `length` entries of the first one: repeated, or cut short."""
    if not stretch.times:
        return value
    size = stretch.size(length)
    if not isinstance(value, Tensor):
        return size
    if stretch.axis is None:
        return value
    entries = torch.arange(size, device=value.device) % value.shape[stretch.axis]
    return value.index_select(stretch.axis, entries)


class Sizing(fx.Interpreter):
    """Runs a graph on fake tensors, a recurrent layer as one operator."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target in _RECURRENT:
            inputs, settings = self.fetch_args_kwargs_from_env(n)
            return outputs_like(*inputs, **settings)
        return super().run_node(n)


def stretch_of(short: Any, long: Any, by: int) -> Stretch:
    """How a value runs, from what it is for two lengths `by` entries apart; `extra` is not known yet."""
    if not isinstance(short, Tensor):
        grown = Fraction(long - short, by) if isinstance(short, int) else Fraction(0)
        return Stretch(None, grown.numerator, grown.denominator)
    for axis, (few, many) in enumerate(zip(short.shape, long.shape, strict=True)):
        if few != many:
            grown = Fraction(many - few, by)
            return Stretch(axis, grown.numerator, grown.denominator)
    return Stretch()


@dataclass(frozen=True)
class Rates:
    """Of every value in a graph how it runs with the first input. values: those of tuples one by one."""

    module: fx.GraphModule
    values: dict[fx.Node, tuple[Stretch, ...]]

    @classmethod
    def of(cls, module: fx.GraphModule, values: Sequence[Any], entering: Sequence[Stretch], what: str) -> Rates:
        short, long = (_sizes(module, values, entering, FAR * times, what) for times in (1, 2))
        return cls(
            module,
            {
                node: tuple(stretch_of(*pair, FAR) for pair in zip(short[node], long[node], strict=True))
                for node in short
            },
        )

    def outputs(self, what: str) -> list[Stretch]:
        last = next(iter(reversed(self.module.graph.nodes)))
        found = list(self.values[last])
        for node, stretch in zip(pytree.tree_leaves(last.args[0]), found, strict=True):
            if stretch.axis is None or stretch.times <= 0:
                raise OptionError(
                    f"{what} looks at the whole sequence: its answer {node} has no axis that runs with time, so it "
                    "cannot be routed by segments. End the region before that with `to`, or route whole samples."
                )
        return found

    def step(self, what: str) -> int:
        running = {s.per: node for node, found in self.values.items() for s in found if s.axis is not None}
        odd = next((node for per, node in running.items() if FAR % per or per > COARSEST), None)
        if odd is not None:
            raise OptionError(
                f"The length of {named_node(odd)} does not follow that of the sequence, which {what} needs."
            )
        return math.lcm(*running)


def _sizes(
    module: fx.GraphModule, values: Sequence[Any], entering: Sequence[Stretch], length: int, what: str
) -> dict[fx.Node, list[Any]]:
    """Every value of the graph at one length, as fake tensors and numbers."""
    (given,), mode = fake((values,))
    seen: dict[fx.Node, list[Any]] = {}

    class Watching(Sizing):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            seen[n] = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, (Tensor, int))]
            return value

    with torch.no_grad(), mode:
        try:
            stretched = [of_length(*pair, length) for pair in zip(given, entering, strict=True)]
            Watching(module).run(*stretched, enable_io_processing=False)
        except Exception as error:
            raise OptionError(
                f"{what} does not take sequences of any length, which routing by segments needs: {one_line(error)}."
            ) from None
    return seen


def named_node(node: fx.Node) -> str:
    """A node by its module, where it has one, and its operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = f"{stack[-1][0]} " if stack and stack[-1][0] else ""
    return f"{where}({op_name(node) or node.name})"
