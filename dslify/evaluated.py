"""An evaluation as tables: ways to route side by side, what each layer does with what reaches it, the verdict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from .tables import figure, human, line, percent, plain_table, signed, with_interval

if TYPE_CHECKING:
    from .measure import Evaluation
    from .rivals import Row
    from .uses import Gating, Kind, Use

UNLABELLED = "(no label)"
LEGEND = (
    "random, oracle (by the true difference) and loudness (quietest first) send as many samples light as mixed does"
)


def evaluation(result: Evaluation) -> RenderableType:
    """Ways to route side by side, what each layer does with each kind of sample and how well its switch predicts, and
    the verdict.
    """
    thresholds = ", ".join(figure(layer.threshold) for layer in result.layers)
    several = len(result.layers) > 1
    word = "thresholds" if several else "threshold"
    counted = (
        f"{result.n} segments of {result.n // result.segments} samples"
        if result.segments > 1
        else f"{result.n} samples"
    )
    head = f"{counted} from {result.sources} sources, {word} {thresholds}; [95 % over sources]"
    tables = [routes(result.rows), *([uses(result.layers)] if several else [])]
    for layer in result.layers:
        tables += list(_layer(layer, several, "segments" if result.segments > 1 else "samples"))
    if result.gating and several:
        tables.append(_gating(result.gating, "all gates together"))
    loudness = with_interval(result.saved_loudness, result.saved_loudness_interval, percent)
    against = "" if result.void else f" Against loudness: {loudness}."
    verdict = line(f"{result.verdict[:1].upper()}{result.verdict[1:]}.{against}")
    verdict.stylize("bold yellow" if result.void else "bold")
    parts = itertools.chain.from_iterable((table, "") for table in tables)
    return Group(line(head), "", *parts, verdict, *(line(f"note: {note}") for note in result.notes))


def routes(rows: Iterable[Row]) -> RenderableType:
    """Difference, share and MACs of full, light, mixed, random, oracle and loudness, and what was judged of each."""
    found = list(rows)
    judged = [name for name in ("metric", "accuracy") if any(getattr(row, name) is not None for row in found)]
    table = plain_table("route", "light", "difference", "MACs", *judged[:1])
    rest = plain_table("route", *judged[1:])  # both are too much for 80 columns
    for row in found:
        cells = [_judged(row, name) for name in judged]
        difference = with_interval(row.difference, row.interval)
        style = "bold" if row.name == "mixed" else None
        table.add_row(row.name, percent(row.share), difference, human(row.macs), *cells[:1], style=style)
        rest.add_row(row.name, *cells[1:], style=style)
    spread = next((row.spread for row in found if row.spread is not None), None)
    drawn = f"; random varies by {figure(spread)} (standard deviation) from draw to draw" if spread is not None else ""
    both: tuple[RenderableType, ...] = ("", rest, "") if judged[1:] else ()
    return Group(table, *both, line(LEGEND + drawn))


def _judged(row: Row, name: str) -> str:
    write = {"metric": figure, "accuracy": lambda share: percent(share, 1)}[name]
    return with_interval(getattr(row, name), getattr(row, f"{name}_interval"), write)


def uses(layers: Iterable[Use]) -> RenderableType:
    """Per layer, outermost first: how many samples reach it, how many of them go light, how its switch predicts."""
    table = plain_table("layer", "threshold", "reached", "light, of\nthese", "light,\nof all", "rank\ncorrelation")
    for layer in layers:
        table.add_row(
            f"{layer.layer}{' (gate)' * (layer.switch == 'positive')}",
            figure(layer.threshold),
            percent(layer.reached),
            with_interval(layer.share, layer.share_interval, percent),
            with_interval(layer.of_all, layer.of_all_interval, percent),
            signed(layer.kinds[0].spearman) if layer.kinds else "-",
        )
    return table


def _layer(layer: Use, several: bool, counted: str) -> Iterator[RenderableType]:
    """What a layer does with each kind, and how well it predicts, or as a gate stops. counted: what is routed."""
    if layer.kinds:
        words = (line(f"layer {layer.layer}, of what reaches it"),) if several else ()
        yield Group(*words, shares(layer.kinds, counted))
        if layer.switch == "difference":
            yield predictions(layer.kinds)
    if layer.gating:
        yield _gating(layer.gating, f"gate {layer.layer}, of what reaches it" if several else "the gate")
    if layer.mask:
        yield line(f"mask{f' {layer.layer}' * several}: {layer.mask}")


def _gating(found: Gating, words: str) -> Text:
    recall = with_interval(found.recall, found.recall_interval, percent)
    stopped = with_interval(found.stopped, found.stopped_interval, percent)
    sent = (
        f"; of a positive that goes on {percent(found.zeros)} of the values at the cut are zero: {human(found.sent)} "
        f"of {human(found.dense)} bytes as int8 with a bitmap, {percent(found.sent / found.dense)}"
        if math.isfinite(found.sent)
        else ""
    )
    return line(f"{words}: {recall} of the positives go on, {stopped} of the negatives are stopped{sent}")


def shares(kinds: Iterable[Kind], counted: str = "samples") -> RenderableType:
    """Per kind of sample: how many go light, and what that costs. counted: "segments" where these are routed."""
    table = plain_table("kind", counted, "sources", "light", "difference\nif light", "as\nrouted")
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
