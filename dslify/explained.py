"""A plan, explained for the terminal: what shrank from what to what, what stayed and why, projections, the ledger."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from .report import human, percent, plain_table, shape_words, times

if TYPE_CHECKING:
    from .plan import NarrowedTensor, Plan, Projection

_NUMBER = re.compile(r"\d+")
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a name that is a number, as the entries of a list have
ANSWERS = {
    "exit": "a constant for each output: nothing behind the cut runs for an input that takes it",
    "head": "mean and deviation of the cut over its free axes, and one linear layer for each output",
    "identity": "what enters at the cut leaves as it is: the modules in between do not run",
}
NAMED = 4  # examples in one line
LONG = 6  # letters of a common beginning that is worth leaving out


@dataclass(frozen=True)
class Rows:
    """Tensors that differ only in the numbers in their names, as one row of the table."""

    name: str
    tensors: tuple[NarrowedTensor, ...]

    @property
    def first(self) -> NarrowedTensor:
        return self.tensors[0]


def grouped(tensors: Iterable[NarrowedTensor]) -> list[Rows]:
    """blocks.4.attn.qkv.weight, blocks.5.attn.qkv.weight ... as "blocks.4-11.attn.qkv.weight" where they are alike:
    same shapes before and after, and the same reasons but for numbers in the names of nodes.
    """
    alike: dict[tuple[object, ...], list[NarrowedTensor]] = {}
    for tensor in tensors:
        reasons = tuple(_NUMBER.sub("", why) for why in tensor.why)
        alike.setdefault((_INDEX.sub("*", tensor.name), tensor.before, tensor.after, reasons), []).append(tensor)
    return [Rows(_joined([tensor.name for tensor in group]), tuple(group)) for group in alike.values()]


def explanation(plan: Plan) -> RenderableType:
    """Every tensor of the light path, why axes stayed, the projections, branches left out, operators without a rule."""
    if plan.light in ANSWERS:
        return Text(f"\nThe light path ({plan.light}) is {ANSWERS[plan.light]}.", overflow="fold")
    rows = grouped(plan.tensors)
    prefix = _prefix([row.name for row in rows])
    under = f" (names under {prefix})" if prefix else ""
    parts: list[RenderableType] = [
        Text(""),
        Text(f"What each tensor of the light path became{under}", style="bold", overflow="fold"),
        _sizes(rows, prefix),
    ]
    for title, lines in (
        ("Axes that stayed, as tensor[axis], and why", _stayed(rows, prefix)),
        ("Projections", _projections(plan)),
        ("Residual branches left out", list(plan.dropped)),
        ("Convolutions that became depthwise and pointwise, by the pointwise weight", list(plan.separated)),
        ("Operators that are not understood", _ledger(plan)),
    ):
        if lines:
            parts += [Text(""), Text(title, style="bold"), *(Text(f"  {line}", overflow="fold") for line in lines)]
    return Group(*parts)


def _sizes(rows: Sequence[Rows], prefix: str) -> RenderableType:
    table = plain_table("tensor", "how many", "full", "light", "fewer values")
    for row in rows:
        count = len(row.tensors)
        before, after = (_values(shape) for shape in (row.first.before, row.first.after))
        fewer = times(before, after) if before != after else "stays"
        sizes = (_size(row.first.before), _size(row.first.after))
        table.add_row(row.name.removeprefix(prefix), str(count) if count > 1 else "", *sizes, fewer)
    return table


def _stayed(rows: Sequence[Rows], prefix: str) -> list[str]:
    """One line for each reason: the axes that it holds at full width; axes of size 1 go without saying."""
    reasons: dict[tuple[int, str], tuple[str, list[str]]] = {}
    for row in rows:
        for at, (size, after, why) in enumerate(zip(row.first.before, row.first.after, row.first.why, strict=True)):
            if why and size == after and size > 1:
                _, names = reasons.setdefault((size, _NUMBER.sub("", why)), (why, []))
                names.append(f"{row.name.removeprefix(prefix)}[{at}]")
    return [f"{size}: {why}: {_some(names)}" for (size, _), (why, names) in reasons.items()]


def _projections(plan: Plan) -> list[str]:
    lines = [_projection(side) for side in plan.projections]
    plain, light = plan.macs.get("unprojected"), plan.macs.get("light")
    if lines and plain and light:
        lines.append(
            f"they pay: {human(light)} MACs with them, {human(plain)} without, because the channels at the boundary "
            f"would hold every layer that adds to them at full width ({percent(1 - light / plain)} saved)"
        )
    return lines


def _projection(side: Projection) -> str:
    values = side.full_channels * side.light_channels
    if side.entering:
        return f"into {side.value}: {side.full_channels} -> {side.light_channels} channels, {human(values)} parameters"
    return f"out to {side.value}: {side.light_channels} -> {side.full_channels} channels, {human(values)} parameters"


def _ledger(plan: Plan) -> list[str]:
    lines = [f"{name}, {len(nodes)}x: {_some(nodes)}" for name, nodes in plan.ledger.items()]
    lines += [f"{node}: {why}" for node, why in plan.distrusted.items()]
    if plan.ledger:
        name = next(iter(plan.ledger))
        lines.append(
            f"what they touch stays at full width. A rule for one of them is a function under @rule({name!r}) from "
            "dslify.rules that says which axes are the same; import it before dslify.insert."
        )
    return lines


def _joined(names: Sequence[str]) -> str:
    """One name for many that differ in their numbers: ranges where they are whole, else a star."""
    if len(names) == 1:
        return names[0]
    places = [sorted(set(place)) for place in zip(*(map(int, _INDEX.findall(name)) for name in names), strict=True)]
    total = 1
    for place in places:
        total *= len(place)
    whole = total == len(names) and all(b - a == 1 for place in places for a, b in itertools.pairwise(place))
    words = iter([f"{place[0]}-{place[-1]}" if len(place) > 1 else f"{place[0]}" for place in places])
    return _INDEX.sub(lambda _: next(words) if whole else "*", names[0])


def _prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot; "" where that is short."""
    parts = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*(name.split(".")[:-1] for name in names)))  # noqa: B905
    shared = ".".join(words[0] for words in parts)
    return f"{shared}." if len(names) > 1 and len(shared) >= LONG else ""


def _some(names: Sequence[str]) -> str:
    left = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {left} more" if left > 0 else "")


def _size(shape: Sequence[int]) -> str:
    return shape_words(shape) if shape else "scalar"


def _values(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
