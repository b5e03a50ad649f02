"""The cut points of a network as a tree for the terminal: module by module, what a cut behind it costs and saves."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from .report import Spark, human, shape_words

if TYPE_CHECKING:
    from .survey import SurveyPoint

PAGE = 40  # rows that a terminal shows at once
FEW, SIBLINGS = 8, 12  # a level with fewer rows says little; then the next one is shown, long lists in part
BAR, BAR_FROM = 20, 104  # cells, and the width from which there is room for them
CELLS, PLAIN_CELLS = ("█", "▒", "·"), ("#", "-", ".")  # base, light, saved
HEADS = (("value", ""), ("other", "tensors"), ("params %", "bef/behind"), ("MACs %", "bef/behind"), ("light", "MACs"),
         ("of what", "is behind"))  # fmt: skip


@dataclass
class Branch:
    """A module: its point (None for one that computes nothing itself, such as a list), and the modules inside it."""

    name: str
    path: str
    point: SurveyPoint | None = None
    inner: dict[str, Branch] = field(default_factory=dict)

    def walk(self) -> Iterator[Branch]:
        for branch in self.inner.values():
            yield branch
            yield from branch.walk()


def shown_paths(points: Sequence[SurveyPoint], levels: int | None = None, always: str = "") -> list[str]:
    """The paths of the rows that a tree of so many levels has; None: as many as a page holds.

    always: a path that is shown in any case.
    """
    if levels is not None:
        return [point.path for point in points if point.path.count(".") < levels or point.path == always]
    deepest = max((point.path.count(".") + 1 for point in points), default=1)
    counts = [_rows([point for point in points if point.path.count(".") < level]) for level in range(1, deepest + 1)]
    fitting = max((level for level, rows in enumerate(counts, 1) if rows <= PAGE), default=1)
    if counts[fitting - 1] >= FEW or fitting == deepest:
        return shown_paths(points, fitting, always)
    root = _tree([point for point in points if point.path.count(".") <= fitting])
    kept = {always}
    for parent in (root, *root.walk()):
        inner = list(parent.inner.values())
        step = max(1.0, len(inner) / SIBLINGS)
        kept |= {inner[int(at * step)].path for at in range(min(len(inner), SIBLINGS))}
    return [point.path for point in points if point.path in kept]


@dataclass(frozen=True)
class CutTree:
    """What rich prints. points: all; shown: paths to show; auto: the path to mark; width: of the light paths."""

    points: Sequence[SurveyPoint]
    shown: Sequence[str]
    auto: str = ""
    width: float = 0.1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        known = set(self.shown)
        rows = list(_rows_of(_tree([point for point in self.points if point.path in known])))
        bar = options.max_width >= BAR_FROM
        cells = [_figures(branch.point) for _, branch in rows]
        widths = [max(map(len, column)) for column in zip(*cells, *HEADS_ROWS, strict=False)]
        room = options.max_width - sum(widths) - len(widths) - (BAR + 2 if bar else 0)
        names = [f"{'  ' * depth}{branch.name}{' *' * (branch.path == self.auto)}" for depth, branch in rows]
        name_width = max(12, min(room, max(map(len, ["module", *names]))))
        for at, head in enumerate(HEADS_ROWS):
            yield Text(_row("module" if at == 0 else "", head, name_width, widths, ""), style="bold", no_wrap=True)
        yield Text(
            ("-" if options.ascii_only else "─") * (name_width + sum(widths) + len(widths) + (BAR + 2 if bar else 0)),
            no_wrap=True,
        )
        for name, (depth, branch), figures in zip(names, rows, cells, strict=True):
            yield from self._lines(name, depth, branch, figures, name_width, widths, bar, options)
        yield from self._legend(bar, options)

    def _lines(
        self, name: str, depth: int, branch: Branch, figures: tuple[str, ...], name_width: int, widths: Sequence[int],
        bar: bool, options: ConsoleOptions,
    ) -> Iterator[Text]:  # fmt: skip
        point = branch.point
        style = "bold" if branch.path == self.auto else "dim" if point is None or point.reason else ""
        first, *rest = _folded(name, name_width, 2 * depth + 2)
        if point is not None and point.reason:
            reasons = textwrap.wrap(point.reason, max(20, options.max_width - name_width - 1))
            lines = [f"{first:{name_width}} {reasons[0]}", *(f"{'':{name_width}} {more}" for more in reasons[1:])]
        else:
            drawn = _bar(point, PLAIN_CELLS if options.ascii_only else CELLS) if bar and point is not None else ""
            lines = [_row(first, figures, name_width, widths, drawn)]
        for line in (*lines, *rest):
            yield Text(line.rstrip(), style=style, no_wrap=True)

    def _legend(self, bar: bool, options: ConsoleOptions) -> Iterator[Text | Spark]:
        usable = [point for point in self.points if not point.reason and point.base_macs + point.region_macs]
        if usable and not bar:
            yield Text("MACs before each cut, from the first to the last:")
            yield Spark([point.base_share for point in usable], options.max_width - 2)
        base, light, saved = PLAIN_CELLS if options.ascii_only else CELLS
        bars = f" Bars: {base} base, {light} light path, {saved} saved where the light path is taken." if bar else ""
        yield Text(
            f"light: a light path at width {self.width:g}, and its share of the MACs it replaces. "
            f"What lies before a cut runs for every input.{bars}"
        )
        hidden = len(self.points) - len(set(self.shown))
        if hidden:
            deepest = max(point.path.count(".") + 1 for point in self.points)
            yield Text(f"{hidden} of {len(self.points)} modules are not shown; --levels {deepest} shows all of them.")


HEADS_ROWS = tuple(tuple(head[line] for head in HEADS) for line in range(2))


def _figures(point: SurveyPoint | None) -> tuple[str, ...]:
    if point is None or point.reason:
        return ("",) * len(HEADS)
    params = point.base_params + point.region_params
    light = "" if point.light_macs is None else human(point.light_macs)
    share = "" if point.light_share != point.light_share else _percent(point.light_share)
    return (
        shape_words(point.shape),
        str(point.tensors) if point.tensors else "",
        _split(point.base_params / params) if params else "",
        _split(point.base_share) if point.base_share == point.base_share else "",
        light,
        share,
    )


def _row(name: str, figures: Sequence[str], name_width: int, widths: Sequence[int], drawn: str) -> str:
    first, *others = figures
    cells = [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
    return f"{name:{name_width}} {' '.join(cells)}{'  ' + drawn if drawn else ''}"


def _bar(point: SurveyPoint, cells: Sequence[str]) -> str:
    if point.base_share != point.base_share:
        return ""
    base = round(BAR * point.base_share)
    light = 0
    if point.light_macs and point.light_share == point.light_share:
        light = min(BAR - base, max(1, round(BAR * (1 - point.base_share) * point.light_share)))
    return cells[0] * base + cells[1] * light + cells[2] * (BAR - base - light)


def _split(share: float) -> str:
    """Before and behind in per cent."""
    before = round(100 * share)
    return f"{before}/{100 - before}"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def _folded(name: str, width: int, indent: int) -> list[str]:
    """A name over as many lines as it needs, whole."""
    lines = [name[:width]]
    rest = name[width:]
    while rest:
        step = max(4, width - indent)
        lines.append(" " * indent + rest[:step])
        rest = rest[step:]
    return lines


def _rows(points: Sequence[SurveyPoint]) -> int:
    return sum(1 for _ in _rows_of(_tree(points)))


def _tree(points: Sequence[SurveyPoint]) -> Branch:
    """Modules in the order in which they, or the first module inside them, end."""
    root = Branch("", "")
    for point in points:
        branch = root
        parts = point.path.split(".")
        for at, part in enumerate(parts):
            branch = branch.inner.setdefault(part, Branch(part, ".".join(parts[: at + 1])))
        branch.point = point
    return root


def _rows_of(root: Branch, depth: int = 0) -> Iterator[tuple[int, Branch]]:
    """(indentation, module); a list that holds a single module shares its row."""
    for branch in root.inner.values():
        name = branch.name
        while branch.point is None and len(branch.inner) == 1:
            (branch,) = branch.inner.values()
            name = f"{name}.{branch.name}"
        yield depth, Branch(name, branch.path, branch.point)
        yield from _rows_of(branch, depth + 1)
