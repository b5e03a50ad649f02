"""Whole numbers that a forward reads out of its tensors (a mask as long as `lengths.max()`), fixed for a capture.

torch.export cannot let a size depend on values. Where such numbers come from the inputs' whole numbers alone, they are
taken from the example, and the captured graph checks at every call that they are still the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

CHECK = "aten._assert_async.msg"
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_METHODS = ("item", "__int__", "__index__")
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Reading:
    """One number, and the line of the forward that read it ("model.py:12")."""

    number: int
    line: str


class SizeFromValues(RuntimeError):
    """A captured size depends on values."""


def depends_on_values(error: BaseException | None) -> bool:
    """Whether a capture failed because a size or a branch depends on values."""
    while error is not None:
        if isinstance(error, (GuardOnDataDependentSymNode, SizeFromValues)):
            return True
        error = error.__cause__ or error.__context__
    return False


def readings(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Reading, ...]:
    """The numbers that one forward reads, in order; none where they follow the inputs' real numbers, which no two
    samples share."""
    found = _read(module, args, kwargs)
    generator = torch.Generator().manual_seed(0)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf + torch.randn(leaf.shape, generator=generator).to(leaf)

    try:
        again = _read(module, *pytree.tree_map(other, (args, kwargs)))
    except Exception:  # values that the forward refuses
        return ()
    return found if found == again else ()


def words(found: tuple[Reading, ...]) -> str:
    """ "40 (model.py:12), 48 (model.py:90)" """
    return ", ".join(dict.fromkeys(f"{reading.number} ({reading.line})" for reading in found))


@contextmanager
def fixed(found: tuple[Reading, ...]) -> Iterator[None]:
    """Within the block, a forward that is traced reads these numbers, and its graph checks that they are there."""
    waiting = iter(found)

    def read(tensor: Tensor, _: Callable[[Tensor], int]) -> int:
        reading = next(waiting, None)
        if reading is None:
            raise SizeFromValues("traced, the forward reads more numbers from its values than it does otherwise")
        torch.ops.aten._assert_async.msg(
            tensor.reshape(()) == reading.number,
            f"The network was captured for inputs where {reading.line} reads {reading.number}; this one reads another.",
        )
        return reading.number

    with _reading(read):
        yield


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Reading, ...]:
    found: list[Reading] = []

    def read(tensor: Tensor, plainly: Callable[[Tensor], int]) -> int:
        number = int(plainly(tensor))
        found.append(Reading(number, _line()))
        return number

    with torch.no_grad(), _reading(read):
        module(*args, **kwargs)
    return tuple(found)


@contextmanager
def _reading(read: Callable[[Tensor, Callable[[Tensor], int]], int]) -> Iterator[None]:
    """Within the block, whole numbers are read out of tensors by `read`; the second argument reads them as ever."""
    own = {name: vars(Tensor).get(name) for name in _METHODS}

    def replaced(name: str) -> Callable[[Tensor], Any]:
        plainly = getattr(Tensor, name)
        return lambda tensor: read(tensor, plainly) if tensor.dtype in _WHOLE else plainly(tensor)

    stand_ins = {name: replaced(name) for name in _METHODS}
    for name, stand_in in stand_ins.items():
        setattr(Tensor, name, stand_in)
    try:
        yield
    finally:
        for name, before in own.items():
            if before is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, before)


def _line() -> str:
    """The line that is running, the last one outside of torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__, "<")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
