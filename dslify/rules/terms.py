"""The axis algebra: every axis of every value and parameter is a term.

    Axis(size)                 an atom: the thing that shrinks or stays
    Product of axes            several axes merged into one, the first varying slowest (view, flatten, heads, groups)
    Concat of axes             several axes one after the other (cat, split, chunk)

Equations between terms (`unify`) merge atoms or refine them into structure; contradictions freeze. An atom shrinks if
a parameter has it (`touched`) and nothing froze it. Sizes are integers, or sympy expressions where the capture is
dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor


@dataclass(frozen=True)
class Reason:
    """Why an axis keeps its size: the first node that demanded it, and what for."""

    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.why} ({self.node})"


class Axis:
    """A node of a union-find forest. Read it through `find()`; compare axes by identity of their roots.

    size: as captured (int or sympy expression). hint: its value at the example input. form: None for an atom,
    "product" or "concat" with `parts`.
    """

    __slots__ = ("form", "frozen", "hint", "parent", "parts", "size", "touched")

    def __init__(self, size: Any, hint: int, frozen: Reason | None = None, touched: bool = False):
        self.size, self.hint = size, hint
        self.frozen, self.touched = frozen, touched
        self.parent: Axis | None = None
        self.form: str | None = None
        self.parts: tuple[Axis, ...] = ()

    def find(self) -> Axis:
        axis = self
        while axis.parent is not None:
            if axis.parent.parent is not None:
                axis.parent = axis.parent.parent  # halves the path for the next one
            axis = axis.parent
        return axis

    def is_one(self) -> bool:
        """Whether the axis has size 1 and so gives way when it is broadcast."""
        size = self.find().size
        return size == 1 if isinstance(size, int) else same(size, 1)

    def atoms(self) -> Iterator[Axis]:
        """The atoms of the term, in order, with repetitions."""
        root = self.find()
        if root.form is None:
            yield root
        for part in root.parts:
            yield from part.atoms()

    def freeze(self, reason: Reason) -> None:
        for atom in self.atoms():
            atom.frozen = atom.frozen or reason

    def touch(self) -> None:
        for atom in self.atoms():
            atom.touched = True

    def __repr__(self) -> str:
        root = self.find()
        if root.form == "product":
            return "(" + " ".join(map(repr, root.parts)) + ")"
        if root.form == "concat":
            return "[" + " + ".join(map(repr, root.parts)) + "]"
        return str(root.size)


def product(parts: Sequence[Axis]) -> Axis:
    """The axis that merges `parts`, the first varying slowest; axes of size 1 vanish."""
    flat = [part for axis in parts for part in _factors(axis)]
    if len(flat) == 1:
        return flat[0]
    size, hint = 1, 1
    for part in flat:
        size, hint = size * part.size, hint * part.hint
    merged = Axis(_plain(size), hint)
    if flat:
        merged.form, merged.parts = "product", tuple(flat)
    else:
        merged.frozen = Reason("", "it has size 1")
    return merged


def concat(parts: Sequence[Axis]) -> Axis:
    """The axis that holds `parts` one after the other; empty ones vanish."""
    flat = [piece for axis in parts for piece in _pieces(axis)]
    if len(flat) == 1:
        return flat[0]
    joined = Axis(_plain(sum(part.size for part in flat)), sum(part.hint for part in flat))
    joined.form, joined.parts = "concat", tuple(flat)
    return joined


def unify(a: Axis, b: Axis, reason: Reason) -> None:
    """State that two axes are one. What cannot be reconciled is frozen, with `reason`."""
    a, b = a.find(), b.find()
    if a is b:
        return
    if not same(a.size, b.size):
        a.freeze(reason)
        b.freeze(reason)
    elif a.form is None:
        _become(a, b)
    elif b.form is None:
        _become(b, a)
    elif a.form == b.form:
        flatten, split = (_factors, _split_factor) if a.form == "product" else (_pieces, _split_piece)
        if _align(list(flatten(a)), list(flatten(b)), reason, split):
            a.parent = b
    else:
        concatenation, other = (a, b) if a.form == "concat" else (b, a)
        minor = other.parts[-1].find()
        pieces = [piece.find() for piece in concatenation.parts]
        if not all(_divides(minor.size, piece.size) for piece in pieces):
            a.freeze(reason)
            b.freeze(reason)
            return
        majors = [_quotient(piece, minor) for piece in pieces]
        for piece, major in zip(pieces, majors, strict=True):
            unify(piece, product([major, minor]), reason)
        unify(product(list(other.parts[:-1])), concat(majors), reason)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or _same(a, b)


@lru_cache(maxsize=4096)
def _same(a: Any, b: Any) -> bool:
    return sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0


def kept_size(axis: Axis, kept: Callable[[Axis], int]) -> int:
    """Size of a term at the example input, when each atom keeps `kept(atom)` entries."""
    root = axis.find()
    if root.form is None:
        return kept(root)
    sizes = [kept_size(part, kept) for part in root.parts]
    if root.form == "concat":
        return sum(sizes)
    total = 1
    for size in sizes:
        total *= size
    return total


def indices(axis: Axis, chosen: Callable[[Axis], Tensor | None], extent: Callable[[Axis], int] | None = None) -> Tensor:
    """Which entries of the axis remain (1-d int64), when each atom keeps the entries `chosen(atom)` (None: all).

    extent: size of a term, where axes that vary have another one than at the example.
    """
    root, size = axis.find(), extent or _hint
    if root.form is None:
        picked = chosen(root)
        return torch.arange(size(root)) if picked is None else picked
    if root.form == "concat":
        pieces, offset = [], 0
        for part in root.parts:
            pieces.append(indices(part, chosen, extent) + offset)
            offset += size(part.find())
        return torch.cat(pieces)
    result = torch.zeros(1, dtype=torch.int64)
    for part in root.parts:
        result = (result[:, None] * size(part.find()) + indices(part, chosen, extent)).flatten()
    return result


def _hint(axis: Axis) -> int:
    return axis.hint


def project(strength: Tensor, axis: Axis) -> Iterator[tuple[Axis, Tensor]]:
    """Share a non-negative strength per entry of the axis out over its atoms: (atom, strength per entry)."""
    root = axis.find()
    if root.form is None:
        yield root, strength
    elif root.form == "concat":
        sizes = [part.find().hint for part in root.parts]
        for part, piece in zip(root.parts, strength.split(sizes), strict=True):
            yield from project(piece, part)
    else:
        grid = strength.reshape([part.find().hint for part in root.parts])
        for at, part in enumerate(root.parts):
            others = [other for other in range(grid.dim()) if other != at]
            yield from project(grid.sum(others), part)


def _factors(axis: Axis) -> tuple[Axis, ...]:
    root = axis.find()
    if same(root.size, 1):
        return ()
    if root.form == "product":
        return tuple(factor for part in root.parts for factor in _factors(part))
    return (root,)


def _pieces(axis: Axis) -> tuple[Axis, ...]:
    root = axis.find()
    if root.form == "concat":
        return tuple(piece for part in root.parts for piece in _pieces(part))
    return () if same(root.size, 0) else (root,)


def _become(atom: Axis, root: Axis) -> None:
    """Merge an atom into another term, handing on what is known of it."""
    if atom.frozen:
        root.freeze(atom.frozen)
    if atom.touched:
        root.touch()
    atom.parent = root


def _align(a: list[Axis], b: list[Axis], reason: Reason, split: Callable[[Axis, Axis], Axis | None]) -> bool:
    """Unify two lists of parts from the left, splitting the larger of two unequal heads; freezes what does not fit."""
    while a and b:
        head, other = a[0].find(), b[0].find()
        if same(head.size, other.size):
            unify(head, other, reason)
            a.pop(0)
            b.pop(0)
        elif (rest := split(head, other)) is not None:
            a[0] = rest
            b.pop(0)
        elif (rest := split(other, head)) is not None:
            b[0] = rest
            a.pop(0)
        else:
            break
    for axis in a + b:
        axis.freeze(reason)
    return not a and not b


def _split_factor(axis: Axis, major: Axis) -> Axis | None:
    """Refine `axis` into (major, rest) and return rest; None if major does not divide it."""
    if not _divides(major.size, axis.size) or same(major.size, axis.size):
        return None
    rest = _quotient(axis, major)
    unify(axis, product([major, rest]), Reason("", "its factors do not fit together"))
    return rest


def _split_piece(axis: Axis, first: Axis) -> Axis | None:
    """Refine `axis` into [first + rest] and return rest; None if first is not shorter, or the axis is no atom."""
    if (
        axis.form is not None
        or not (isinstance(axis.size, int) and isinstance(first.size, int))
        or first.size >= axis.size
    ):
        return None
    rest = Axis(axis.size - first.size, axis.hint - first.hint)
    _become(axis, concat([first, rest]))
    return rest


def _quotient(axis: Axis, minor: Axis) -> Axis:
    return Axis(_divide(axis.size, minor.size), max(1, axis.hint // minor.hint))


def _divide(size: Any, divisor: Any) -> Any:
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor
    return _cancel(size, divisor)


def _divides(divisor: Any, size: Any) -> bool:
    if isinstance(divisor, int) and isinstance(size, int):
        return divisor > 0 and size % divisor == 0
    quotient = _cancel(size, divisor)
    return isinstance(quotient, int) or sympy.denom(quotient) == 1


@lru_cache(maxsize=4096)
def _cancel(size: Any, divisor: Any) -> Any:
    return _plain(sympy.cancel(sympy.sympify(size) / divisor))


def _plain(size: Any) -> Any:
    if isinstance(size, int):
        return size
    size = sympy.expand(size)
    return int(size) if size.is_Integer else size
