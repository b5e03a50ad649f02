"""Checks of what the surgery built, on the user's own network, before it is handed over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from .axes import AxisMap
from .errors import VerifyError
from .functional import graphs_in, tensor_at
from .rules import Axis, indices

PERMUTED = 1e-6  # relative, float64: a right algebra leaves 1e-12 or so, a wrong one shows 1e-2 and more
PERIOD = 4099


def permutation_error(axes: AxisMap, inputs: Sequence[Any], seed: int = 0) -> float:
    """Permute every axis that could shrink, in all parameters, buffers and boundary values alike: the region's function
    must not change. Weights are jittered first, because zero-initialised ones hide errors. Runs in float64, one weight
    at a time.

    Returns the largest difference over the largest output.
    """
    worlds = _TwoWorlds(axes, seed)
    with torch.no_grad(), _double_by_default():
        found = worlds.run(*worlds.entering(inputs), enable_io_processing=False)
    leaving = [boundary for boundary in axes.boundaries if not boundary.is_input]
    pairs = [pair for pair in found if isinstance(pair[0], Tensor)]
    errors = [worlds.error(plain, moved, b.axes) for (plain, moved), b in zip(pairs, leaving, strict=True)]
    return max(errors, default=0.0)


def misunderstood(axes: AxisMap, inputs: Sequence[Any], seed: int = 0) -> str | None:
    """Name of the first node whose row does not hold under permutation, None if all do."""
    worlds = _TwoWorlds(axes, seed, compare=True)
    try:
        with torch.no_grad(), _double_by_default():
            worlds.run(*worlds.entering(inputs), enable_io_processing=False)
    except _Found as found:
        return found.node
    return None


@contextmanager
def _double_by_default() -> Iterator[None]:
    """Factories without a dtype make float64 within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Found(Exception):
    def __init__(self, node: str):
        super().__init__(node)
        self.node = node


class _TwoWorlds(fx.Interpreter):
    """Runs a region twice in lockstep, plain and permuted; every value is a pair of the two."""

    def __init__(self, axes: AxisMap, seed: int, compare: bool = False):
        super().__init__(axes.region)
        self.axes, self.seed, self.compare = axes, seed, compare
        generator = torch.Generator().manual_seed(seed)
        everything = frozenset(range(len(axes.boundaries)))
        self.permutation = {
            a: torch.randperm(a.hint, generator=generator) for a in axes.atoms() if axes.shrinks(a, everything)
        }
        self.sizes: dict[Any, int] = {}  # of what varies, on the inputs given
        self.order: dict[int, int] = {}  # tied tensors get the same jitter

    def entering(self, inputs: Sequence[Any]) -> list[Any]:
        boundaries = [boundary for boundary in self.axes.boundaries if boundary.is_input]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        for boundary, value in zip(boundaries, tensors, strict=True):
            self.sizes |= {axis.find().size: found for axis, found in zip(boundary.axes, value.shape, strict=True)}
        entering = iter(boundaries)
        pairs: list[Any] = []
        for value in inputs:
            if not isinstance(value, Tensor):
                pairs.append((value, value))
                continue
            plain = value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
            pairs.append((plain, self.permuted(plain, next(entering).axes).clone()))
        return pairs

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return next(self.args_iter)
        if n.op == "get_attr":
            return None  # made where it is used, so that one weight at a time is there in double precision
        if n.op == "output":
            return tuple(self._pair(out) if isinstance(out, fx.Node) else (out, out) for out in cast(tuple, n.args[0]))
        pairs = {used: self._pair(used) for used in n.all_input_nodes}
        plain, moved = (self._call(n, {used: pair[world] for used, pair in pairs.items()}) for world in (0, 1))
        if self.compare:
            self._compare(n, plain, moved, self.axes.binding.terms.get(n, ()))
        return plain, moved

    def _pair(self, n: fx.Node) -> tuple[Any, Any]:
        return self._held(n) if n.op == "get_attr" else self.env[n]

    @staticmethod
    def _call(n: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = (map_arg(part, values.__getitem__) for part in (n.args, n.kwargs))
        args, kwargs = (map_aggregate(part, _doubled) for part in (args, kwargs))
        return cast(Any, n.target)(*args, **cast(dict, kwargs))

    def _held(self, n: fx.Node) -> Any:
        value = tensor_at(self.axes.region, str(n.target))
        if isinstance(value, fx.GraphModule):
            body = _in_double(value)
            return body, body
        if not isinstance(value, Tensor):
            return value, value
        plain = value.detach().clone()
        if value.is_floating_point() and value.numel():
            plain = plain.double()
            low, high = value.detach().aminmax()
            noise = self._noise(value).to(value.device)
            if low > 0:  # variances and scales stay positive
                plain.mul_(1 + noise)
            else:
                plain.add_(noise - 0.5, alpha=max(0.1, abs(float(low)), abs(float(high))))
        terms = self.axes.parameters.get(str(n.target))
        moved = plain if terms is None else self.permuted(plain, terms)
        return plain, moved.clone() if moved is plain else moved

    def _noise(self, value: Tensor) -> Tensor:
        """Uniform in [0, 1), its period a prime number, because random numbers for every weight would take longer than
        the test itself."""
        generator = torch.Generator().manual_seed(self.seed + 1 + self.order.setdefault(id(value), len(self.order)))
        period = torch.rand(min(PERIOD, value.numel()), generator=generator, dtype=torch.float64)
        return period.repeat(-(-value.numel() // len(period)))[: value.numel()].view(value.shape)

    def permuted(self, value: Tensor, terms: tuple[Axis, ...]) -> Tensor:
        for at, axis in enumerate(terms):
            if any(atom in self.permutation for atom in axis.atoms()):
                entries = indices(axis, self.permutation.get, self.extent)
                value = value.index_select(at, entries.to(value.device))
        return value

    def extent(self, axis: Axis) -> int:
        """Size of a term on the inputs given, whose batch may differ from the captured one."""
        if isinstance(axis.size, int):
            return axis.size
        found = self.sizes.get(axis.size) or axis.size.subs(self.sizes)
        return axis.hint if getattr(found, "free_symbols", None) else int(found)

    def error(self, plain: Tensor, moved: Tensor, terms: tuple[Axis, ...]) -> float:
        """How far the permuted world is from the permutation of the plain one, over the largest value."""
        wanted = self.permuted(plain, terms)
        if not wanted.numel():
            return 0.0
        if not (wanted.is_floating_point() or wanted.is_complex()):
            wanted, moved = wanted.double(), moved.double()
        difference = torch.where(wanted == moved, 0.0, (moved - wanted).abs())  # infinities may meet
        both_nan = wanted.isnan() & moved.isnan()
        finite = wanted.abs()[wanted.isfinite()]
        scale = finite.max().clamp_min(1e-12) if finite.numel() else torch.ones(())
        return float(difference.masked_fill(both_nan, 0.0).max() / scale)

    def _compare(self, n: fx.Node, plain: Any, moved: Any, terms: Any) -> None:
        if isinstance(plain, Tensor) and len(terms) == plain.dim():
            if plain.shape != moved.shape or not self.error(plain, moved, terms) < PERMUTED:
                raise _Found(n.name)
        elif isinstance(plain, (tuple, list)) and isinstance(terms, tuple) and len(terms) == len(plain):
            for mine, theirs, term in zip(plain, moved, terms, strict=True):
                self._compare(n, mine, theirs, term)


def _doubled(argument: Any) -> Any:
    # casts to single precision inside the network would hide small errors
    return torch.float64 if argument is torch.float32 else argument


def _in_double(body: fx.GraphModule) -> fx.GraphModule:
    """The graph of a higher-order operator, its casts and constants in double precision."""
    double = copy.deepcopy(body).double()
    for inner in graphs_in(double):
        for node in inner.graph.nodes:
            node.args, node.kwargs = (map_aggregate(part, _doubled) for part in (node.args, node.kwargs))
        inner.recompile()
    return double


def check_light(light: nn.Module, full: nn.Module, inputs: Sequence[Any]) -> None:
    """Run the light path forward and backward. Raises VerifyError on other shapes, values that are not finite, or
    parameters that a gradient reaches in the full path alone."""
    with torch.no_grad():
        expected = full(*inputs)
    found = _run_backward(light, inputs)
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
    lost = _unreached(light)
    light.zero_grad(set_to_none=True)
    if lost:  # codebooks behind an argmax and the like are unreached in the full path too
        frozen = {name for name, parameter in full.named_parameters() if not parameter.requires_grad}
        full.requires_grad_(True)
        _run_backward(full, inputs)
        lost = [name for name in lost if name not in _unreached(full)]
        full.zero_grad(set_to_none=True)
        for name, parameter in full.named_parameters():
            parameter.requires_grad_(name not in frozen)
    if lost:
        raise VerifyError(
            f"No gradient reaches {lost[0]} of the light path{f' and {len(lost) - 1} more' if lost[1:] else ''}."
        )


def _run_backward(module: nn.Module, inputs: Sequence[Any]) -> Any:
    with torch.enable_grad():
        # contiguous: group_norm's backward crashes on a channels_last input that needs no gradient (torch 2.12.1, CPU)
        found = module(*(value.contiguous() if isinstance(value, Tensor) else value for value in inputs))
        loss = sum(
            (mine.square().mean() for mine in found if isinstance(mine, Tensor) and mine.requires_grad), torch.zeros(())
        )
        if loss.requires_grad:
            loss.backward()
    return found


def _unreached(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None]


def misfit(light: fx.GraphModule, axes: AxisMap, inputs: Sequence[Any], size: Callable[[Axis], int]) -> str | None:
    """Name of the region's first node whose copy in the light path fails or has another shape than the algebra says."""

    class Fitting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            name = n.meta.get("region_node")
            try:
                value = super().run_node(n)
            except Exception as error:
                raise _Found(name or "") from error
            if name and isinstance(value, Tensor):
                terms = axes.binding.terms.get(nodes[name], ())
                if len(terms) == value.dim() and not all(map(fits, terms, value.shape)):
                    raise _Found(name)
            return value

    def fits(axis: Axis, found: int) -> bool:
        return not isinstance(axis.find().size, int) or size(axis) == found

    nodes = {node.name: node for node in axes.region.graph.nodes}
    try:
        with torch.no_grad():
            Fitting(light).run(*inputs, enable_io_processing=False)
    except _Found as found:
        return found.node or None
    return None
