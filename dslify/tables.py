"""Numbers as short text, and tables of them: what all results for a terminal or a file are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .resampling import Interval

PREFIXES = ("", " k", " M", " G", " T")
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"


def human(number: float | None, unit: str = "") -> str:
    """65024 -> "65.0 k", 5.4e6 -> "5.4 M"; below a thousand as it is. "-" for None and NaN."""
    if number is None or not math.isfinite(number):
        return "-"
    step = 0
    while abs(number) >= 999.95 and step < len(PREFIXES) - 1:
        number, step = number / 1000, step + 1
    digits = f"{number:.0f}" if step == 0 and number == round(number) else f"{number:.1f}"
    return f"{digits}{PREFIXES[step]}{unit}" if step else f"{digits}{' ' * bool(unit)}{unit}"


def figure(number: float | None) -> str:
    """Three significant digits; "-" for None and NaN."""
    if number is None or not math.isfinite(number):
        return "-"
    if number == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:.{places}f}" if places <= 6 else f"{number:.1e}"


def percent(share: float | None, digits: int = 0) -> str:
    """0.364 -> "36 %"; "-" for None and NaN."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def signed(number: float | None) -> str:
    """A correlation with two digits; "-" for None and NaN."""
    return f"{number:.2f}" if number is not None and math.isfinite(number) else "-"


def times(full: float, light: float) -> str:
    """How many times smaller: "20.9x"."""
    return f"{full / light:.1f}x" if light else "-"


class Spark:
    """A curve in one line of text; each cell is the mean of its part of the values."""

    def __init__(self, values: Sequence[float], width: int = 24):
        self.values, self.width = tuple(values), width

    def __str__(self) -> str:
        return self.draw(BLOCKS)

    def draw(self, blocks: str) -> str:
        known = [value for value in self.values if math.isfinite(value)]
        if not known:
            return ""
        width = min(self.width, len(known))
        edges = [len(known) * cell // width for cell in range(width + 1)]
        cells = [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        low, high = min(cells), max(cells)
        top = len(blocks) - 1
        return "".join(blocks[round(top * (cell - low) / (high - low)) if high > low else 0] for cell in cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.draw(PLAIN_BLOCKS if options.ascii_only else BLOCKS), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Any:
        from rich.measure import Measurement

        width = min(self.width, len(self.values))
        return Measurement(width, width)


def plain_table(*headers: str) -> Table:
    """Names to the left, numbers to the right; a name that does not fit is broken over lines, never cut off."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for at, header in enumerate(headers):
        first = at == 0
        table.add_column(header, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    return table


def line(text: str) -> Text:
    """A paragraph; a word that does not fit is broken, never cut off."""
    return Text(text, overflow="fold")


def shape_words(shape: Iterable[Any]) -> str:
    """1x16x*."""
    return "x".join(map(str, shape)) or "a single number"


def with_interval(value: float | None, interval: Interval, write: Callable[[float | None], str] = figure) -> str:
    """ "0.120 [0.101 0.140]", or the value alone."""
    if interval is None:
        return write(value)
    low, high = (write(end).removesuffix(" %") for end in interval)
    return f"{write(value)} [{low} {high}]"
