"""How far a region of convolutions, poolings and resamplings sees: computed by running its graph on probes.

Everything before an entry is replaced, once by NaN, which spreads to whatever reads it even through a weight of zero,
and once by numbers of the other sign, which also pass a comparison; the last such entry that leaves a block of the
answer as it was is found by bisection, and the same from the other side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .errors import OptionError
from .functional import copied
from .layout import Stretch
from .rates import Rates, named_node, of_length

BLOCKS, SHORTEST = 64, 256  # of the first probe: blocks of the step, entries at least
LONGEST = 2**16  # entries of the last probe


@dataclass(frozen=True)
class Field:
    """`step_in` entries of the input make `step_out` of the (first) output, and block k of the output needs the input's
    entries k * step_in - before ... (k + 1) * step_in - 1 + after.

    outputs: how each runs with the input.
    """

    step_in: int
    step_out: int
    before: int
    after: int
    outputs: tuple[Stretch, ...] = ()

    def joined(self, other: Field) -> Field:
        """What both need, for blocks that fit both."""
        step = math.lcm(self.step_in, other.step_in)
        before, after = max(self.before, other.before), max(self.after, other.after)
        return replace(self, step_in=step, step_out=self.outputs[0].at(step), before=before, after=after)


def receptive_field(
    module: fx.GraphModule, values: Sequence[Any], entering: Sequence[Stretch], what: str = "The region"
) -> Field:
    """The field of a graph from `values`, of any length, to a tuple. Floating-point numbers among them stand for any.

    entering: how each value runs with the first one. what: the graph, as a message names it. Raises OptionError where
    an answer needs the whole sequence (attention, recurrent layers, means over time), naming the module, and where the
    length of an answer does not follow that of the input.
    """
    rates = Rates.of(module, values, entering, what)
    leaving = rates.outputs(what)
    step = rates.step(what)
    length = step * max(BLOCKS, -(-SHORTEST // step))
    culprit: str | None = None
    while True:
        probe = _Probe(module, values, entering, leaving, step, length)
        before, after = probe.before(), probe.after()
        if before is not None and after is not None:
            longer = _Probe(module, values, entering, leaving, step, 2 * length)
            if not longer.needs_only(before, after):
                raise OptionError(
                    f"{what} reads the farther away the longer the sequence is, so it cannot be routed by segments; "
                    "choose another cut, or route whole samples."
                )
            return Field(step, leaving[0].at(step), before, after, tuple(leaving))
        found = probe.culprit(rates, prefix=before is None)
        if (found and found == culprit) or length >= LONGEST:  # of four times as many entries it still needs them all
            side = "all that comes before" if before is None else "all that comes after"
            where = f" at {found}" if found else ""
            raise OptionError(
                f"{what} looks at the whole sequence{where}: an answer needs {side}, so it cannot be routed by "
                "segments. Cut behind that, end the region before it with `to`, or route whole samples."
            )
        culprit, length = found, 4 * length


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Convolutions that mix no more than they must: fast algorithms (Winograd, FFT) let a NaN reach its neighbours."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of TF32 on other devices
    try:
        with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class _Probe:
    """A graph at one length, and its answer for one block; not the middle one, which stays in place when time turns
    around."""

    def __init__(
        self,
        module: fx.GraphModule,
        values: Sequence[Any],
        entering: Sequence[Stretch],
        leaving: Sequence[Stretch],
        step: int,
        length: int,
    ):
        self.module, self.entering, self.leaving = module, entering, leaving
        self.step, self.length = step, length
        self.start = length // step * 3 // 8 * step
        self.stop = self.start + step
        stretched = [of_length(*pair, length) for pair in zip(values, entering, strict=True)]
        generator = torch.Generator().manual_seed(0)
        noise = [_noise(value, generator) for value in stretched]
        # of opposite signs too, so that of two values between which a sign decides each is read once
        self.values = (noise, [-value if _is_floating(value) else value for value in noise])
        self.expected = tuple(map(self._block, self.values))

    def before(self) -> int | None:
        """Entries in front of the block that it needs, None if those from the very first one on."""
        if not self._same(0, 1):
            return None
        low, high = 1, self.stop  # the block stays as it was without the first `low`, and not without the first `high`
        if self._same(0, high):
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._same(0, middle) else (low, middle)
        return max(0, self.start - low)

    def after(self) -> int | None:
        """Entries behind the block that it needs, None if those up to the very last one."""
        if not self._same(self.length - 1, self.length):
            return None
        low, high = self.start, self.length - 1
        if self._same(low, self.length):
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._same(middle, self.length) else (middle, high)
        return max(0, high - self.stop)

    def needs_only(self, before: int, after: int) -> bool:
        """Whether nothing farther away than that changes the block."""
        first, last = max(0, self.start - before), min(self.length, self.stop + after)
        return self._same(0, first) and self._same(last, self.length)

    def culprit(self, rates: Rates, prefix: bool) -> str:
        """The first node that carries what the first entry (or the last one) holds as far as the block; "" if the way
        there is not one of NaN."""
        first, last = (0, 1) if prefix else (self.length - 1, self.length)
        found: list[fx.Node] = []
        probe = self

        class Looking(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, (Tensor, int))]
                if not found and n.op not in ("placeholder", "get_attr", "output"):
                    pairs = zip(leaves, rates.values[n], strict=True)
                    if any(probe._reaches(leaf, stretch, prefix) for leaf, stretch in pairs):
                        found.append(n)
                return value

        with _plain_kernels():
            Looking(self.module).run(*self._disturbed(0, first, last, math.nan), enable_io_processing=False)
        return named_node(found[0]) if found else ""

    def _reaches(self, value: Any, stretch: Stretch, prefix: bool) -> bool:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        if stretch.axis is not None:
            size, at = value.shape[stretch.axis], min(stretch.at(self.start), value.shape[stretch.axis] - 1)
            value = value.narrow(stretch.axis, at, size - at) if prefix else value.narrow(stretch.axis, 0, at + 1)
        return bool(value.isnan().any())

    def _same(self, first: int, last: int) -> bool:
        """Whether the block is as it was when all inputs from `first` up to `last` are others."""
        for at, factor in enumerate((math.nan, -3.0)):
            found = self._block(self._disturbed(at, first, last, factor))
            pairs = zip(found, self.expected[at], strict=True)
            if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
                return False
        return True

    def _disturbed(self, at: int, first: int, last: int, factor: float) -> list[Any]:
        """The values with what lies between two entries of the cut multiplied; what is no number but a choice becomes
        the other one."""
        changed = []
        for value, stretch in zip(self.values[at], self.entering, strict=True):
            if isinstance(value, Tensor) and stretch.axis is not None:
                value = value.clone()
                size = value.shape[stretch.axis]
                low, high = stretch.at(first), size if last == self.length else min(size, stretch.at(last))
                part = value.narrow(stretch.axis, low, max(0, high - low))
                if value.dtype == torch.bool:
                    part.logical_not_()
                elif value.is_floating_point():
                    part.mul_(factor)
            changed.append(value)
        return changed

    def _block(self, values: Sequence[Any]) -> list[Tensor]:
        with _plain_kernels():
            found = self.module(*values)
        pairs = zip(found, self.leaving, strict=True)
        return [
            value.narrow(out.axis or 0, out.at(self.start), out.at(self.stop) - out.at(self.start))
            for value, out in pairs
        ]


def _noise(value: Any, generator: torch.Generator) -> Any:
    """A value with other numbers in the place of its own, of both signs and none of them small."""
    if not _is_floating(value):
        return value
    noise = torch.randn(value.shape, generator=generator)
    return (noise + 0.1 * noise.sign()).to(value.dtype)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def on_processor(module: nn.Module, values: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph and its inputs on the CPU, where every kernel reads only what it has to."""
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        module = copied(module).cpu()
    return module, [value.cpu() if isinstance(value, Tensor) else value for value in values]  # type: ignore[return-value]
