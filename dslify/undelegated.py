"""Operators that a device's accelerated kernels do not take, rewritten exactly into ones that they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attempt import quietly
from .functional import op_name

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """scale (max(x, 0) + alpha (exp(input_scale min(x, 0)) - 1)), for any shape."""
    below = _times(x.clamp(max=0.0), input_scale).exp() - 1.0
    return _times(x.clamp(min=0.0) + _times(below, alpha), scale)


def selu(x: Tensor) -> Tensor:
    """SELU as elu()."""
    return elu(x, SELU_ALPHA, SELU_SCALE)


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """CELU as elu()."""
    return elu(x, alpha, input_scale=1 / alpha)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


REWRITES: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.elu.default: elu,
    torch.ops.aten.selu.default: selu,
    torch.ops.aten.celu.default: celu,
}


def rewritten(program: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """(the program without the operators of REWRITES, the names of those it held). It shares the tensors."""
    held = tuple(sorted({op_name(node) for node in program.graph.nodes} & {str(target) for target in REWRITES}))
    if not held:
        return program, ()
    with quietly():
        return program.run_decompositions(dict(REWRITES)), held
