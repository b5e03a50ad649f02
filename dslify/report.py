"""Results as tables and paragraphs for a terminal or a file, 80 columns and up. Nothing here computes or knows torch.

Every function takes a frozen result and returns something that rich prints; without a terminal it is plain text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .measure import Evaluation, Kind, Row
    from .plan import Plan
    from .resampling import Interval
    from .runs import History

PREFIXES = ("", " k", " M", " G", " T")
UNLABELLED = "(no label)"
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
LEGEND = (
    "random, oracle (by the true difference) and loudness (quietest first) send as many samples light as mixed does"
)


class CostRow(Protocol):
    """What a table of costs needs: a path's name, its parameters, and MACs per sample."""

    @property
    def name(self) -> str: ...
    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...


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


def percent(share: float | None) -> str:
    """0.364 -> "36 %"; "-" for None and NaN."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


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


def surgery(rows: Iterable[CostRow], plan: Plan | None = None) -> RenderableType:
    """What was cut and where; parameters and MACs of base, switch, full and light with ratios."""
    found = list(rows)
    full = next((row for row in found if row.name == "full"), None)
    table = plain_table("path", "parameters", "MACs", "fewer\nparameters", "fewer\nMACs")
    for row in found:
        light = full is not None and row.name == "light"
        ratios = (
            (times(full.params, row.params), times(full.macs, row.macs)) if full is not None and light else ("", "")
        )
        table.add_row(row.name, human(row.params), human(row.macs), *ratios)
    if plan is None:
        return table
    cut = f"{plan.scope}.{plan.at}" if plan.scope else plan.at
    lines = [
        f"cut behind {cut}, value of shape {shape_words(plan.cut_shape)}; light path at width {figure(plan.width)}"
    ]
    if why := plan.why:
        lines.append(f"chosen by --at auto: {why}")
    if plan.dynamic:
        lines.append(f"inputs: {plan.dynamic}")
    if plan.crossing:
        lines.append(f"also crossing the cut: {', '.join(plan.crossing)}")
    lines += [
        f"{'into' if side.entering else 'out of'} the light path: 1x1 projection, {side.full_channels} channels "
        f"{'to' if side.entering else 'from'} {side.light_channels}"
        for side in plan.projections
    ]
    lines += [f"kept at full width, no rule: {name} ({len(nodes)}x)" for name, nodes in plan.ledger.items()]
    lines += [f"kept at full width, {why}: {node}" for node, why in plan.distrusted.items()]
    if plan.dropped:
        kept = f"depth {figure(plan.depth)}"
        lines.append(f"left out ({kept}): {', '.join(plan.dropped)}")
    return Group(*map(_line, lines), table)


def training(history: History) -> RenderableType:
    """The losses of each phase, from the mean of the first steps to that of the last, with their curve."""
    table = plain_table("phase", "steps", "loss", "first", "last", "curve", "seconds")
    table.columns[2].justify = table.columns[5].justify = "left"
    for phase in history.phases:
        parts = [name for name, values in phase.losses.items() if name != "total" and any(values)]
        shown = parts if len(parts) == 1 else ["total", *parts]
        for at, name in enumerate(shown):
            curve = phase.losses[name]
            once = (phase.name, str(phase.steps), f"{phase.seconds:.0f}") if at == 0 else ("", "", "")
            row = (once[0], once[1], name, figure(phase.first(name)), figure(phase.last(name)), Spark(curve), once[2])
            table.add_row(*row)
    lines = [f"{name}: {part['samples']} samples from {part['sources']} sources" for name, part in history.data.items()]
    if history.unseen is not None:
        lines.append(
            f"light differs from full by {figure(history.unseen)} on the switch's data, which it was not fitted to"
        )
    lines += [f"note: {note}" for note in history.notes]
    return Group(table, *map(_line, lines))


def calibration(result: Calibration) -> RenderableType:
    """The threshold, how it was set, and what to beware of."""
    lines = [
        f"threshold {figure(result.threshold)} (relative difference)",
        f"set by {result.how}",
        f"light: {percent(result.share)} of the samples; mean difference over all {figure(result.mean_difference)}",
    ]
    return Group(*map(_line, [*lines, *(f"note: {note}" for note in result.notes)]))


def evaluation(result: Evaluation) -> RenderableType:
    """Ways to route side by side, what happens to each kind of sound, how well the switch predicts, and the verdict."""
    head = (
        f"{result.n} samples from {result.sources} sources, threshold {figure(result.threshold)}; [95 % over sources]"
    )
    tables = [routes(result.rows), shares(result.kinds), predictions(result.kinds)]
    loudness = with_interval(result.saved_loudness, result.saved_loudness_interval, percent)
    against = "" if result.void else f" Against loudness: {loudness}."
    verdict = _line(f"{result.verdict[:1].upper()}{result.verdict[1:]}.{against}")
    verdict.stylize("bold yellow" if result.void else "bold")
    parts = itertools.chain.from_iterable((table, "") for table in tables)
    return Group(_line(head), "", *parts, verdict, *(_line(f"note: {note}") for note in result.notes))


def routes(rows: Iterable[Row]) -> RenderableType:
    """Difference, share and MACs of full, light, mixed, random, oracle and loudness."""
    found = list(rows)
    judged = any(row.metric is not None for row in found)
    table = plain_table("route", "light", "difference", "MACs", *(["metric"] if judged else []))
    for row in found:
        metric = (with_interval(row.metric, row.metric_interval),) if judged else ()
        difference = with_interval(row.difference, row.interval)
        style = "bold" if row.name == "mixed" else None
        table.add_row(row.name, percent(row.share), difference, human(row.macs), *metric, style=style)
    spread = next((row.spread for row in found if row.spread is not None), None)
    drawn = f"; random varies by {figure(spread)} (standard deviation) from draw to draw" if spread is not None else ""
    return Group(table, _line(LEGEND + drawn))


def shares(kinds: Iterable[Kind]) -> RenderableType:
    """Per kind of sample: how many go light, and what that costs."""
    table = plain_table("kind", "samples", "sources", "light", "difference\nif light", "as\nrouted")
    for kind in kinds:
        share = with_interval(kind.share, kind.share_interval, percent)
        cells = (str(kind.n), str(kind.sources), share, figure(kind.difference), figure(kind.mixed))
        table.add_row(kind.label or UNLABELLED, *cells)
    return table


def predictions(kinds: Iterable[Kind]) -> RenderableType:
    """Per kind of sample: how the switch's prediction goes with the actual difference."""
    headers = (
        "predicted\n/ actual",
        "log\nerror",
        "correlation\nof logs",
        "rank\ncorrelation",
        "loudness'\nrank corr.",
    )
    table = plain_table("kind", *headers)
    for kind in kinds:
        table.add_row(
            kind.label or UNLABELLED,
            figure(kind.ratio),
            figure(kind.log_error),
            with_interval(kind.pearson_log, kind.pearson_log_interval, signed),
            with_interval(kind.spearman, kind.spearman_interval, signed),
            signed(kind.loudness_spearman),
        )
    return table


def plain_table(*headers: str) -> Table:
    """Names to the left, numbers to the right; a name that does not fit is broken over lines, never cut off."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for at, header in enumerate(headers):
        first = at == 0
        table.add_column(header, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    return table


def _line(text: str) -> Text:
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
