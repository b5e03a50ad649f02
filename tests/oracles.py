"""How a row of the table is compared with the operator itself: permute what the rule says is one axis, run, compare.

Each case is a small network whose operators in question stand between parameters, so that their axes are free. The
oracle is the permutation test (the equation holds), the widths test (the rewritten arguments hold), and the number of
free axes (the rule does not hide behind freezing everything).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from dslify.axes import AxisMap, analyse
from dslify.capture import capture
from dslify.cut import find_cut, partition
from dslify.graft import region_inputs, region_module
from dslify.light import build
from dslify.verify import PERMUTED, check_light, permutation_error
from dslify.widths import choose, decide_projections

SHAPES = {"sound": (2, 6, 40), "tokens": (2, 7, 16), "image": (2, 3, 12, 12), "video": (2, 3, 6, 8, 8), "rows": (4, 16)}


def conv(i: int, o: int, rank: int = 1, kernel: int = 3, **options: Any) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](i, o, kernel, padding=kernel // 2, **options)


@dataclass
class Case:
    """shape: a name in SHAPES, or sizes. operator: (module with `parts` as attributes, value) -> value. before, after:
    layers around it. free: atoms that may shrink."""

    shape: str | tuple[int, ...]
    operator: Callable[[Any, Tensor], Any]
    before: nn.Module
    after: nn.Module
    free: int
    parts: dict[str, nn.Module | Tensor] = field(default_factory=dict)


class Between(nn.Module):
    """scale -> (cut) -> before -> operator -> after."""

    def __init__(self, case: Case):
        super().__init__()
        self.before, self.after = case.before, case.after
        self.scale = nn.Parameter(torch.ones(()))
        for name, part in case.parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)
        self.operator = case.operator

    def forward(self, x: Tensor) -> Any:
        return self.after(self.operator(self, self.before(x * self.scale)))


@dataclass
class Region:
    """A case, captured and analysed behind its first multiplication."""

    axes: AxisMap
    inputs: tuple[Any, ...]
    full: fx.GraphModule

    @property
    def free(self) -> list[Any]:
        return [atom for atom in self.axes.atoms() if self.axes.shrinks(atom)]

    @property
    def overloads(self) -> set[str]:
        return {str(node.target) for node in self.full.graph.nodes if node.op == "call_function"}


def call(name: str, *operands: Any, **options: Any) -> Any:
    """An ATen operator by name, with its overload if that is not the default one."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")(*operands, **options)


def total(values: Sequence[Any]) -> Tensor:
    """The sum of many results as floats, complex ones by their parts."""
    parts = [part for value in values for part in (value if isinstance(value, (tuple, list)) else [value])]
    real = [torch.view_as_real(part.resolve_conj()).sum(-1) if part.is_complex() else part for part in parts]
    return sum((part.to(torch.get_default_dtype()) for part in real), torch.zeros(()))


@cache
def region_of(make: Callable[[], Case]) -> Region:
    """Of a case of a table: captured once per test process, so nobody may write into it."""
    torch.manual_seed(0)
    case = make()
    shape = SHAPES[case.shape] if isinstance(case.shape, str) else case.shape
    return region_behind(Between(case).eval(), (torch.randn(shape),))


def region_behind(model: nn.Module, inputs: tuple[Any, ...], at: str | None = None) -> Region:
    """The region behind a node, by default behind the first multiplication."""
    captured = capture(model, inputs)
    graph = captured.module.graph
    at = at or next(node.name for node in graph.nodes if node.op == "call_function" and node.name.startswith("mul"))
    parts = partition(graph, find_cut(graph, at))
    full = region_module(captured.module, parts)
    return Region(analyse(full), region_inputs(captured.module, parts, captured), full)


def check(region: Region, free: int, widths: tuple[float, ...] = (0.5, 0.2)) -> None:
    """The invariants of a right row."""
    torch.manual_seed(0)
    axes = region.axes
    assert not axes.ledger, axes.ledger
    assert len(region.free) == free, axes.parameters
    assert permutation_error(axes, region.inputs) < PERMUTED
    for width in widths:
        for chosen in {frozenset(), decide_projections(axes, width)}:
            kept = choose(axes, width, chosen)
            light = build(axes, kept, chosen)
            check_light(light, region.full, region.inputs)
            assert sum(p.numel() for p in light.parameters()) == axes.params(kept, chosen)
            assert axes.params(kept) < axes.params() or not free
    for mine, theirs in zip(build(axes, {})(*region.inputs), region.full(*region.inputs), strict=True):
        assert torch.equal(mine, theirs) or torch.allclose(mine, theirs, equal_nan=True)
