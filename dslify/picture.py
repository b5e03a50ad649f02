"""A picture of the cost along a network's depth: one bar for each cut, as .svg, .png or a self-contained .html page.

A picture is a list of shapes, written by hand as SVG (which follows the reader's light or dark mode) or by Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import written_whole
from .report import human, shape_words

if TYPE_CHECKING:
    from .survey import SurveyPoint

ROWS, FEW = 48, 8  # bars in one picture: at most; and at least, when inner modules are left out to make room
SIZE, STEP, BARS, MARGIN = 13, 22, 560, 24  # points: text, from bar to bar, the longest bar, around it all
NAME = 46  # letters of a module's name
LETTER = 0.6  # width of a letter of the monospaced font, in units of its size
SHARP = 2  # pixels of the .png for one point
LIGHT = {"back": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0", "base": "#44618a",
         "light": "#d9691e", "saved": "#eaeef2", "mark": "#d9691e"}  # fmt: skip
DARK = {"back": "#0d1117", "ink": "#e6edf3", "faint": "#9198a1", "grid": "#3d444d", "base": "#7aa2d8",
        "light": "#f0a35e", "saved": "#21262d", "mark": "#f0a35e"}  # fmt: skip


@dataclass(frozen=True)
class Box:
    """A filled rectangle. role: its colour. note: shown by a browser when pointed at."""

    x: float
    y: float
    width: float
    height: float
    role: str
    note: str = ""


@dataclass(frozen=True)
class Words:
    """A line of text whose middle is at height y; align: "start", "middle" or "end" at x."""

    x: float
    y: float
    text: str
    align: str = "start"
    role: str = "ink"
    bold: bool = False


@dataclass(frozen=True)
class Picture:
    width: float
    height: float
    shapes: tuple[Box | Words, ...]
    title: str


def draw(points: Sequence[SurveyPoint], title: str, width: float, auto: str = "") -> Picture:
    """Bars of base, light path and what is saved, from the first cut to the last.

    points: priced ones; the others are left out. title: one line. width: of the light paths. auto: the path to mark.
    """
    rows = _bars(points, auto)
    names = [_short(point.path) for point in rows]
    left = MARGIN + LETTER * SIZE * max([len("--at auto "), *map(len, names)]) + 12
    top = MARGIN + 4.4 * STEP
    bottom = top + STEP * max(1, len(rows))
    total = max((point.base_macs + point.region_macs for point in rows), default=0)
    shapes: list[Box | Words] = [
        Words(MARGIN, MARGIN + 6, title, bold=True),
        Words(
            MARGIN, MARGIN + STEP + 2, "MACs per sample before and behind each cut, from input to output", role="faint"
        ),
    ]
    at = float(MARGIN)
    for role, text in (
        ("base", "base: runs always"),
        ("light", f"light path at width {width:g}"),
        ("saved", "saved when it goes light"),
    ):
        shapes += [Box(at, MARGIN + 2 * STEP - 2, 12, 12, role), Words(at + 18, MARGIN + 2 * STEP + 4, text)]
        at += 18 + LETTER * SIZE * len(text) + 24
    for tick in range(0, 101, 25):
        x = left + BARS * tick / 100
        shapes += [
            Words(x, top - 14, f"{tick} %", "middle", "faint"),
            Box(x - 0.5, top - 4, 1, bottom - top + 8, "grid"),
            Words(x, bottom + 16, human(total * tick / 100), "middle", "faint"),
        ]
    for number, (point, name) in enumerate(zip(rows, names, strict=True)):
        y = top + STEP * number
        chosen = point.path == auto
        shapes += _row(point, name, left, y, chosen)
    return Picture(left + BARS + MARGIN + 90, bottom + 16 + MARGIN, tuple(shapes), title)


def write_picture(picture: Picture, path: Path, points: Sequence[SurveyPoint] = ()) -> None:
    """Write by suffix. points: the rows of the table in a .html page. Raises OSError."""
    with written_whole(path) as temporary:
        match path.suffix.lower():
            case ".png":
                _image(picture).save(temporary, format="PNG")
            case ".svg":
                temporary.write_text(svg(picture), encoding="utf-8")
            case _:
                temporary.write_text(_page(picture, points), encoding="utf-8")


def svg(picture: Picture) -> str:
    """The picture as one SVG element, with its colours for light and dark."""
    colours = " ".join(f".{role} {{ fill: {colour} }}" for role, colour in LIGHT.items())
    dark = " ".join(f".{role} {{ fill: {colour} }}" for role, colour in DARK.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture.width:.0f} {picture.height:.0f}" '
        f'width="{picture.width:.0f}" height="{picture.height:.0f}" role="img" aria-label="{escape(picture.title)}">',
        f"<style>text {{ font: {SIZE}px ui-monospace, Menlo, Consolas, monospace; dominant-baseline: central }} "
        f".bold {{ font-weight: bold }} {colours} @media (prefers-color-scheme: dark) {{ {dark} }}</style>",
        '<rect class="back" width="100%" height="100%"/>',
    ]
    for shape in picture.shapes:
        if isinstance(shape, Box):
            note = f"<title>{escape(shape.note)}</title>" if shape.note else ""
            place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
            parts.append(f'<rect class="{shape.role}" {place}>{note}</rect>' if note else
                         f'<rect class="{shape.role}" {place}/>')  # fmt: skip
        else:
            style = f"{shape.role} bold" if shape.bold else shape.role
            place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.align}"'
            parts.append(f'<text class="{style}" {place}>{escape(shape.text)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _row(point: SurveyPoint, name: str, left: float, y: float, chosen: bool) -> list[Box | Words]:
    base = BARS * point.base_share
    light = (BARS - base) * min(1.0, point.light_share)
    note = (
        f"{point.path}: base {human(point.base_macs)}, light path {human(point.light_macs)}, "
        f"instead of {human(point.region_macs)} MACs; value {shape_words(point.shape)}"
    )
    shapes: list[Box | Words] = [
        Words(left - 10, y + STEP / 2, name, "end", "mark" if chosen else "ink", chosen),
        Box(left, y + 4, base, STEP - 8, "base", note),
        Box(left + base, y + 4, light, STEP - 8, "light", note),
        Box(left + base + light, y + 4, BARS - base - light, STEP - 8, "saved", note),
    ]
    if chosen:
        shapes.append(Words(left + BARS + 10, y + STEP / 2, "--at auto", "start", "mark", True))
    return shapes


def _bars(points: Sequence[SurveyPoint], auto: str) -> list[SurveyPoint]:
    """One point for each value, by the MACs before it: outer modules alone if there are too many, or some of them."""
    values: dict[str, SurveyPoint] = {}
    for point in points:
        if not point.reason and point.light_share == point.light_share:
            known = values.get(point.value)
            better = known is None or (known.path != auto and point.path.count(".") < known.path.count("."))
            if better or point.path == auto:
                values[point.value] = point
    rows = sorted(values.values(), key=lambda point: point.base_macs)
    level = max((point.path.count(".") for point in rows), default=0)
    while len(rows) > ROWS and level:
        outer = [point for point in rows if point.path.count(".") < level or point.path == auto]
        if len(outer) < FEW:
            break
        rows, level = outer, level - 1
    kept = {round(at * (len(rows) - 1) / (ROWS - 2)) for at in range(ROWS - 1)}
    return [point for at, point in enumerate(rows) if len(rows) <= ROWS or at in kept or point.path == auto]


def _short(name: str) -> str:
    """A name with its middle left out if it is long."""
    half = (NAME - 1) // 2
    return name if len(name) <= NAME else f"{name[:half]}…{name[-half:]}"


def _image(picture: Picture) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (round(SHARP * picture.width), round(SHARP * picture.height)), LIGHT["back"])
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(SHARP * SIZE)
    anchors = {"start": "lm", "middle": "mm", "end": "rm"}
    for shape in picture.shapes:
        if isinstance(shape, Box):
            ends = (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)
            x, y, right, bottom = (round(SHARP * end) for end in ends)
            if right > x:
                canvas.rectangle([(x, y), (right - 1, bottom - 1)], LIGHT[shape.role])
        else:
            place = (SHARP * shape.x, SHARP * shape.y)
            canvas.text(place, shape.text, LIGHT[shape.role], font, anchors[shape.align], stroke_width=int(shape.bold))
    return image


def _page(picture: Picture, points: Sequence[SurveyPoint]) -> str:
    heads = ("module", "value", "other tensors", "parameters before", "behind", "MACs before", "behind", "light MACs",
             "light parameters", "remark")  # fmt: skip
    rows = []
    for point in points:
        counts = (point.base_params, point.region_params, point.base_macs, point.region_macs, point.light_macs,
                  point.light_params)  # fmt: skip
        figures = [shape_words(point.shape), str(point.tensors), *map(human, counts)] if not point.reason else [""] * 8
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in (point.path, *figures, point.reason)))
    header = "".join(f"<th>{head}</th>" for head in heads)
    table = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(picture.title)}</title>\n<style>'
        ":root { color-scheme: light dark } body { font: 14px system-ui, sans-serif; margin: 1rem } "
        "svg { max-width: 100%; height: auto } table { border-collapse: collapse } "
        "td, th { text-align: right; padding: 2px 10px; border-bottom: 1px solid #8884 } "
        "td:first-child, th:first-child, td:last-child { text-align: left; font-family: ui-monospace, monospace } "
        f"</style>\n{svg(picture)}\n<table><tr>{header}</tr>\n{table}</table></html>\n"
    )
