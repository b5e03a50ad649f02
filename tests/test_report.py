"""Tables: readable at 80 columns, whole names, plain text away from a terminal, numbers written one way."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dslify import report
from dslify.calibrate import Calibration
from dslify.cost import Cost
from dslify.cut import CutPoint
from dslify.measure import Evaluation, judge
from dslify.observe import Observations
from dslify.plan import Plan, Projection
from dslify.runs import History, Phase

WIDTHS = (80, 100)
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
    CutPoint("encoder", reason="nothing comes after it"),
    CutPoint("encoder.layers", (1, 16, "*"), 1_000_000, 8_000_000),
    CutPoint("encoder.layers.twice", reason="it is called 2 times"),
    CutPoint(LONG, (1, 16, 1024, 1024), 8_000_000, 1_000_000),
)
CALIBRATION = Calibration(
    0.1234, "share: 60 of 120 samples from 20 sources score under it (50.0 %, asked for 50.0 %)", 120, 20, 0.5, 0.0423,
    light_share=0.5, overlap=3, notes=("3 of 120 samples were used in training too",),
)  # fmt: skip


def history() -> History:
    falling = tuple(np.exp(-np.arange(400) / 90).tolist())
    data = {"light": {"samples": 300, "sources": 30}, "switch": {"samples": 100, "sources": 10}}
    phases = (Phase("light", {"total": falling, "light": falling}, 12.2), Phase("switch", {"total": falling}, 2.0))
    return History(phases, ((1.0,),), 0.31, True, {}, data, ("something to know",))


def plan() -> Plan:
    sides = (Projection("add", True, 192, 16),)
    return Plan(
        "block2", "encoder", 0.1, "batch", ("1", "16", "*"), ("skip",), {}, {}, sides, (), {"aten.flip": ["flip"]}
    )


PARTS = {
    "surgery": lambda: report.surgery(COSTS, plan()),
    "cuts": lambda: report.cut_table(POINTS),
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
        (report.cut_table(POINTS), LONG),
        (report.shares(evaluation().kinds), KINDS[3]),
        (report.predictions(evaluation().kinds), KINDS[3]),
    ):
        lines = text(part, width).splitlines()
        assert name in "".join(line.split()[0] for line in lines if line.split())


def test_the_surgery_says_where_and_how_much_smaller():
    shown = text(report.surgery(COSTS, plan()))
    for words in ("encoder.block2", "1x16x*", "width 0.100", "skip", "192 channels to 16", "aten.flip"):
        assert words in shown
    row = next(line for line in shown.splitlines() if line.startswith("light")).split()
    assert row == ["light", "3.1", "k", "440.0", "k", "20.9x", "12.3x"]


def test_the_cut_table_has_whole_names_and_reasons():
    shown = text(report.cut_table(POINTS), 100)
    lines = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    assert "nothing comes after it" in lines["encoder"]
    assert "89 %" in lines["encoder.layers"]
    assert any(name.endswith("twice") and "it is called 2 times" in line for name, line in lines.items())
    assert "twice" not in text(report.cut_table(POINTS, depth=2))


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
