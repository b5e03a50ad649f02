"""Tables: readable at 80 columns, whole names, plain text away from a terminal, numbers written one way."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dslify import report
from dslify.calibrate import Calibration
from dslify.cost import Cost
from dslify.cut_tree import CutTree
from dslify.explained import explanation, grouped
from dslify.measure import Evaluation, judge
from dslify.observe import Observations
from dslify.plan import NarrowedTensor, Plan, Projection
from dslify.runs import History, Phase
from dslify.survey import SurveyPoint

WIDTHS = (80, 100, 120)
LONG = "encoder.layers.attention_block.self_attention.query_key_value_projection"
KINDS = ("silence", "ambient", "environment", "speech_in_a_very_long-winded_foreign_language_with_noise")


def text(part: object, width: int = 80, encoding: str = "utf-8") -> str:
    """What a file gets."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width, force_terminal=False).print(part)
    stream.flush()
    return raw.getvalue().decode(encoding)


def evaluation(metric: bool = False) -> Evaluation:
    random = np.random.default_rng(0)
    difference = random.exponential(size=200)
    score = difference * np.exp(random.normal(size=200) / 3)
    taken = score < 0.5
    quality = {name: random.normal(size=200) for name in ("full", "light", "mixed")} if metric else {}
    seen = Observations(
        score, difference, np.log(difference), tuple(KINDS[at % 4] for at in range(200)),
        tuple(str(at // 4) for at in range(200)), torch.ones(1), taken, np.where(taken, difference, 0), quality,
    )  # fmt: skip
    return judge(seen, 0.5, {"base": 3.6e6, "switch": 3e3, "light": 0.44e6, "full": 5.4e6})


COSTS = (
    Cost("base", 5_000, 3_600_000, 1), Cost("switch", 300, 3_000, 1),
    Cost("light", 3_104, 440_000, 1), Cost("full", 65_024, 5_400_000, 1),
)  # fmt: skip
POINTS = (
    SurveyPoint("encoder", reason="nothing comes after it"),
    SurveyPoint(
        "encoder.layers", (1, 16, "*"), 1_000_000, 8_000_000, 100, 300, ("skip", "size"), value="add",
        light_macs=160_000, crossing_shapes=((1, 16), ()),
    ),
    SurveyPoint("encoder.layers.twice", reason="it is called 2 times"),
    SurveyPoint(LONG, (1, 16, 1024, 1024), 8_000_000, 1_000_000, 300, 100, value="linear", light_macs=1),
    SurveyPoint("head", (1, 4), 8_900_000, 100_000, 399, 1, value="head"),
)  # fmt: skip
CALIBRATION = Calibration(
    0.1234, "share: 60 of 120 samples from 20 sources score under it (50.0 %, asked for 50.0 %)", 120, 20, 0.5, 0.0423,
    light_share=0.5, overlap=3, notes=("3 of 120 samples were used in training too",),
)  # fmt: skip


def history() -> History:
    falling = tuple(np.exp(-np.arange(400) / 90).tolist())
    data = {
        "light": {"samples": 300, "originals": 100, "sources": 30},
        "switch": {"samples": 100, "originals": 100, "sources": 10},
    }
    phases = (Phase("light", {"total": falling, "light": falling}, 12.2), Phase("switch", {"total": falling}, 2.0))
    return History(phases, ((1.0,),), 0.31, True, True, {}, data, ("something to know",))


def tensors(layers: range) -> Iterator[NarrowedTensor]:
    for at in layers:
        yield NarrowedTensor(f"encoder.blocks.{at}.qkv.weight", (576, 192), (60, 20), ("", ""))
        yield NarrowedTensor(f"encoder.blocks.{at}.out.bias", (192,), (192,), (f"it leaves the region (add_{at})",))


def plan() -> Plan:
    sides = (Projection("add", True, 192, 16), Projection("norm", False, 192, 16))
    sizes = {"base": 9, "full": 1000, "light": 100, "unprojected": 400}
    shapes = (*tensors(range(4, 12)), NarrowedTensor("encoder.scale", (), (), ()))
    return Plan(
        "block2", "encoder", 0.1, "batch", ("1", "16", "*"), ("skip",), sizes, sizes, sides, shapes,
        {"aten.flip.default": ["flip", "flip_1"]}, 0.5, ("blocks.5.mlp",), {"roll_3": "its rule does not hold here"},
    )  # fmt: skip


PARTS = {
    "surgery": lambda: report.surgery(COSTS, plan()),
    "cuts": lambda: CutTree(POINTS, [point.path for point in POINTS], "encoder.layers"),
    "explanation": lambda: explanation(plan()),
    "training": lambda: report.training(history()),
    "calibration": lambda: report.calibration(CALIBRATION),
    "evaluation": lambda: report.evaluation(evaluation()),
    "evaluation with a metric": lambda: report.evaluation(evaluation(metric=True)),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_cut_off_or_too_wide(name: str, width: int):
    shown = text(PARTS[name](), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert "\x1b" not in shown
    assert "nan" not in shown
    assert "None" not in shown


@pytest.mark.parametrize("name", PARTS)
def test_an_ascii_stream_can_hold_it(name: str):
    assert text(PARTS[name](), encoding="ascii")


@pytest.mark.parametrize("width", WIDTHS)
def test_long_names_are_broken_over_lines_and_whole(width: int):
    for part, name in (
        (report.shares(evaluation().kinds), KINDS[3]),
        (report.predictions(evaluation().kinds), KINDS[3]),
    ):
        lines = text(part, width).splitlines()
        assert name in "".join(line.split()[0] for line in lines if line.split())


def test_the_surgery_says_where_and_how_much_smaller():
    shown = text(report.surgery(COSTS, plan()))
    for words in (
        "encoder.block2", "1x16x*", "width 0.100", "skip", "192 channels to 16", "aten.flip", "roll_3",
        "left out (depth 0.500): blocks.5.mlp",
    ):  # fmt: skip
        assert words in shown
    row = next(line for line in shown.splitlines() if line.startswith("light")).split()
    assert row == ["light", "3.1", "k", "440.0", "k", "20.9x", "12.3x"]


def tree(width: int, shown: Iterable[str] = (), auto: str = "") -> list[str]:
    return text(CutTree(POINTS, list(shown) or [point.path for point in POINTS], auto), width).splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tree_has_every_figure(width: int):
    rows = {line.split()[0]: line for line in tree(width, auto="encoder.layers") if line.split()}
    marked = ["layers", "*", "1x16x*", "1", "25/75", "11/89", "160.0", "k", "2.0", "%"]
    assert rows["layers"].split()[: len(marked)] == marked
    assert rows["layers"].startswith("  layers")
    assert rows["encoder"].split(maxsplit=1)[1] == "nothing comes after it"
    assert rows["twice"].split(maxsplit=1)[1] == "it is called 2 times"
    assert rows["head"].split() == ["head", "1x4", "100/0", "99/1", *rows["head"].split()[4:]]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_list_of_one_shares_its_row_and_long_names_are_whole(width: int):
    inner = LONG.removeprefix("encoder.layers.")
    lines = tree(width)
    names = [line.split()[0] for line in lines if line.split()]
    assert inner in "".join(names[names.index("head") - 6 : names.index("head")])


def test_a_wide_terminal_has_bars_and_a_narrow_one_a_curve():
    layers = next(line for line in tree(120) if "layers" in line)
    assert layers.count("█") == 2  # a ninth of 20
    assert layers.count("▒") == 1
    assert layers.count("·") == 17
    assert not any("·" in line for line in tree(80))
    assert any("MACs before each cut" in line for line in tree(80))


def test_the_tree_says_how_many_modules_are_left_out():
    shown = tree(80, ["encoder", "encoder.layers"])
    assert "3 of 5 modules are not shown; --levels 5 shows all of them." in shown
    assert not any("twice" in line for line in shown)
    assert not any("not shown" in line for line in tree(80))


def test_an_explanation_groups_what_is_alike():
    shown = text(explanation(plan()), 100)
    lines = [line.split() for line in shown.splitlines()]
    assert "names under encoder." in shown
    assert ["blocks.4-11.qkv.weight", "8", "576x192", "60x20", "92.2x"] in lines
    assert ["blocks.4-11.out.bias", "8", "192", "192", "stays"] in lines
    assert ["scale", "scalar", "scalar", "stays"] in lines
    assert "192: it leaves the region (add_4): blocks.4-11.out.bias[0]" in shown
    assert "into add: 192 -> 16 channels, 3.1 k parameters" in shown
    assert "out to norm: 16 -> 192 channels" in shown
    assert "100 MACs with them, 400 without" in shown
    assert "(75 % saved)" in " ".join(shown.split())
    assert "blocks.5.mlp" in shown
    assert "aten.flip.default, 2x: flip, flip_1" in shown
    assert "@rule('aten.flip.default')" in shown
    assert "roll_3: its rule does not hold here" in shown


def test_groups_lose_no_tensor_and_differ_where_tensors_do():
    some = list(tensors(range(3)))
    gap = list(tensors(range(4, 6)))
    other = dataclasses.replace(some[0], name="encoder.blocks.9.qkv.weight", after=(64, 24))
    rows = grouped([*some, *gap, other])
    assert sorted(tensor.name for row in rows for tensor in row.tensors) == sorted(
        tensor.name for tensor in (*some, *gap, other)
    )
    assert [row.name for row in rows] == [
        "encoder.blocks.*.qkv.weight", "encoder.blocks.*.out.bias", "encoder.blocks.9.qkv.weight"
    ]  # fmt: skip


def test_training_shows_falling_losses():
    shown = text(report.training(history()))
    assert "0.952" in shown
    assert "0.0125" in shown
    assert "█" in shown
    assert "31" in shown
    assert "something to know" in shown


def test_the_evaluation_shows_every_route_and_the_verdict():
    result = evaluation()
    shown = text(report.evaluation(result))
    for row in result.rows:
        line = next(line for line in shown.splitlines() if line.startswith(row.name))
        assert report.figure(row.difference) in line
        assert report.percent(row.share) in line
        assert report.human(row.macs) in line
    assert result.verdict[1:30] in shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"), (999, "999"), (12.34, "12.3"), (1000, "1.0 k"), (65_024, "65.0 k"), (5.4e6, "5.4 M"),
        (999_949, "999.9 k"), (999_950, "1.0 M"), (3.2e9, "3.2 G"), (7e15, "7000.0 T"), (-1500, "-1.5 k"),
        (None, "-"), (float("nan"), "-"),
    ],
)  # fmt: skip
def test_human(number: float | None, shown: str):
    assert report.human(number) == shown


def test_human_with_a_unit():
    assert report.human(5.4e6, "MAC/s") == "5.4 MMAC/s"
    assert report.human(12, "s") == "12 s"


@given(st.floats(1e-12, 1e12))
def test_a_figure_is_within_half_a_percent(number: float):
    assert float(report.figure(number)) == pytest.approx(number, rel=0.051 if number < 1e-4 else 0.0051)


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 40))
def test_a_curve_is_one_line_from_low_to_high(values: list[float], width: int):
    drawn = str(report.Spark(values, width))
    assert len(drawn) == min(width, len(values))
    if drawn and max(drawn) != min(drawn):
        assert {"▁", "█"} <= set(drawn)


def test_a_falling_curve_falls():
    assert str(report.Spark([4, 3, 2, 1], 4)) == "█▆▃▁"
    assert str(report.Spark([1, float("nan"), 2], 4)) == "▁█"
