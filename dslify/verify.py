"""Checks of what the surgery built, on the user's own network, before it is handed over."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from .axes import AxisMap
from .errors import VerifyError
from .functional import graphs_in, tensor_at
from .rules import Axis, indices

PERMUTED = 1e-6  # relative, float64: a right algebra leaves 1e-12 or so, a wrong one shows 1e-2 and more


def permutation_error(axes: AxisMap, inputs: Sequence[Any], seed: int = 0) -> float:
    """Permute every axis that could shrink, in all parameters, buffers and boundary values alike: the region's function
    must not change. Weights are jittered first, because zero-initialised ones hide errors. Runs in float64.

    Returns the largest difference over the largest output.
    """
    generator = torch.Generator().manual_seed(seed)
    everything = frozenset(range(len(axes.boundaries)))
    permutation = {a: torch.randperm(a.hint, generator=generator) for a in axes.atoms() if axes.shrinks(a, everything)}

    region = _in_float64(axes.region, generator)
    entering = [
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    ]
    expected = [value for value in region(*entering) if isinstance(value, Tensor)]

    for name, terms in axes.parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(
            region.get_submodule(owner),
            leaf,
            _as(tensor_at(region, name), _permute(tensor_at(region, name), terms, permutation)),
        )
    boundaries = iter(axes.boundaries)
    moved = [
        _permute(value, next(boundaries).axes, permutation) if isinstance(value, Tensor) else value
        for value in entering
    ]
    found = [value for value in region(*moved) if isinstance(value, Tensor)]

    worst = 0.0
    for before, after in zip(expected, found, strict=True):
        wanted = _permute(before, next(boundaries).axes, permutation).double()
        scale = wanted.abs().max().clamp_min(1e-12) if wanted.numel() else torch.ones(())
        worst = max(worst, ((after.double() - wanted).abs().max() / scale).item() if wanted.numel() else 0.0)
    return worst


def _permute(value: Tensor, terms: tuple[Axis, ...], permutation: dict[Axis, Tensor]) -> Tensor:
    for at, axis in enumerate(terms):
        if any(atom in permutation for atom in axis.atoms()):
            value = value.index_select(at, indices(axis, permutation.get))
    return value


def _as(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _in_float64(region: fx.GraphModule, generator: torch.Generator) -> fx.GraphModule:
    double = copy.deepcopy(region).double().requires_grad_(False)
    # casts to single precision inside the network would hide small errors
    for node in [node for inner in graphs_in(double) for node in inner.graph.nodes]:
        node.args, node.kwargs = (
            map_aggregate(part, lambda a: torch.float64 if a == torch.float32 else a)
            for part in (node.args, node.kwargs)
        )
    for inner in graphs_in(double):
        inner.recompile()
    for tensor in (*double.parameters(), *double.buffers()):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        with torch.no_grad():
            if tensor.min() > 0:  # variances and scales stay positive
                tensor.mul_(1 + noise)
            else:
                tensor.add_((noise - 0.5) * tensor.abs().max().clamp_min(0.1))
    return double


def check_light(light: nn.Module, full: nn.Module, inputs: Sequence[Any]) -> None:
    """Run the light path forward and backward. Raises VerifyError on other shapes, values that are not finite, or
    parameters that no gradient reaches."""
    with torch.no_grad():
        expected = full(*inputs)
    with torch.enable_grad():
        # contiguous: group_norm's backward crashes on a channels_last input that needs no gradient (torch 2.12.1, CPU)
        found = light(*(value.contiguous() if isinstance(value, Tensor) else value for value in inputs))
        for mine, theirs in zip(found, expected, strict=True):
            if not isinstance(theirs, Tensor):
                continue
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                raise VerifyError(
                    f"The light path answers {tuple(mine.shape)} of {mine.dtype} where the full path answers "
                    f"{tuple(theirs.shape)} of {theirs.dtype}."
                )
            if theirs.isfinite().all() and not mine.isfinite().all():
                raise VerifyError("The light path answers values that are not finite on the example input.")
        loss = sum(
            (mine.square().mean() for mine in found if isinstance(mine, Tensor) and mine.requires_grad), torch.zeros(())
        )
        if loss.requires_grad:
            loss.backward()
    lost = [name for name, parameter in light.named_parameters() if parameter.requires_grad and parameter.grad is None]
    light.zero_grad(set_to_none=True)
    if lost:
        raise VerifyError(
            f"No gradient reaches {lost[0]} of the light path{f' and {len(lost) - 1} more' if lost[1:] else ''}."
        )
