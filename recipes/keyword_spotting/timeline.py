"""A picture of one minute of the stream: what was said, how far each window went, what fired, what it cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dslify.cost import cost
from dslify.omega import omega
from dslify.samples import Samples
from dslify.switch import dsl_layers
from dslify.tables import percent
from recipes.pictures import FAINT, INK, picture

from .data import POSITIVE
from .detection import detections, scored, smoothed
from .network import LENGTH, RATE
from .soundscape import Soundscape, composed
from .stream import HOP, Decision
from .windows import passed

SECONDS = 60.0
BINS = 160  # samples in one vertical line of the waveform
# Okabe and Ito's colours, told apart with any colour vision; depth also goes by height and is written beside the axis
KEYWORD, OTHER, ALARM = "#0072B2", "#E69F00", "#D55E00"
SHADES = ("#C9D1D9", "#8FB8DE", "#4A87C0", "#1B4F8A")  # of windows by how far they went: lighter is earlier


def timeline(
    path: Path,
    net: nn.Module,
    ungated: nn.Module,
    split: Samples,
    decision: Decision,
    *,
    positive: str = POSITIVE,
    seed: int = 0,
    minutes: float = 20.0,
) -> dict[str, Any]:
    """Write the picture as PNG. net: with gates, one inside the other. The minute is the one of the stream (the one
    `judged` makes with this seed and length) with most words in it. Gives the minute's figures."""
    scape = composed(split, omega(positive, split.labels), minutes, seed)
    begin = busiest(scape)
    part = _cut(scape, begin)
    windows = part.windows(HOP)
    found, whole = passed(net, windows), passed(ungated, windows)
    means = smoothed(found.probabilities, decision.count)
    fired = detections(means, decision.labels, decision.threshold, HOP, decision.count)
    score = scored(fired, part)
    costs = _costs(net, found.depth) / (whole.macs / len(windows))
    gates = len(dsl_layers(net))
    told = {
        "begin_s": begin, "macs_share": found.macs / whole.macs, "keywords": len(score.words),
        "found": sum(score.found), "false_alarms": score.false_alarms, "stopped": float(found.stopped.mean()),
    }  # fmt: skip
    title = (
        f"One minute of the test stream: {percent(float(found.stopped.mean()))} of the windows stop at a gate, "
        f"{percent(found.macs / whole.macs)} of the MACs are left"
    )
    with picture(path, 1, (10, 6.6), title) as (figure, axes):
        figure.delaxes(axes[0])
        wave, depth, belief, cost = figure.subplots(4, 1, sharex=True, height_ratios=(1.2, 1.3, 1, 1))
        _draw_wave(wave, part, fired, score.right)
        _draw_depth(depth, found.depth, gates)
        _draw_belief(belief, means, decision, part)
        _draw_cost(cost, costs)
        cost.set(xlabel="time, s", xlim=(0, len(part.sound) / RATE))
        figure.align_ylabels()
    return told


def busiest(scape: Soundscape) -> float:
    """Where the SECONDS with most words begin, keywords counting twice; s, not in the middle of a word."""
    last = len(scape.sound) / RATE - SECONDS
    if last <= 0:
        return 0.0
    begins = [max(0.0, min(word.start - 1.0, last)) for word in scape.words]

    def weight(begin: float) -> int:
        inside = [word for word in scape.words if begin <= word.start and word.start + 1 <= begin + SECONDS]
        return sum(1 + word.keyword for word in inside)

    return max(begins, key=weight)


def _cut(scape: Soundscape, begin: float) -> Soundscape:
    start = round(begin * RATE)
    size = min(len(scape.sound), round(SECONDS * RATE))
    words = [word for word in scape.words if begin <= word.start and word.start * RATE + LENGTH <= start + size]
    return Soundscape(
        scape.sound[start : start + size], tuple(replace(word, start=word.start - start / RATE) for word in words)
    )


def _costs(net: nn.Module, depth: np.ndarray) -> np.ndarray:
    """MACs of each window that `depth` gates let on, from dslify.cost, (windows,)."""
    rows = cost(net)
    layers = len(dsl_layers(net))
    prices = []
    for passed_gates in range(layers + 1):
        reached = [row for row in rows if row.layer and row.layer <= min(passed_gates + 1, layers)]
        switches = sum(row.macs for row in reached if row.name.startswith("switch"))
        fulls = sum(row.macs for row in reached if row.name.startswith("full") and row.layer <= passed_gates)
        prices.append(rows[0].macs + switches + fulls)
    return np.array(prices, float)[depth]


def _draw_wave(axes: Any, scape: Soundscape, fired: Any, right: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    pieces = scape.sound[: len(scape.sound) // BINS * BINS].view(-1, BINS)
    time = (torch.arange(len(pieces)) + 0.5) * BINS / RATE
    axes.vlines(time, pieces.amin(1), pieces.amax(1), colors=FAINT, linewidth=0.6)
    top = float(scape.sound.abs().max()) * 1.1
    for word in scape.words:
        colour = KEYWORD if word.keyword else OTHER
        axes.axvspan(word.start, word.start + 1, color=colour, alpha=0.25, linewidth=0)
        name = word.label if word.keyword else "other"
        axes.text(word.middle, top * 1.08, name, ha="center", va="bottom", fontsize=7.5, color=INK)
    for at, (one, good) in enumerate(zip(fired, right, strict=True)):
        axes.plot(one.time, -top * 1.12, "^" if good else "X", color=KEYWORD if good else ALARM, markersize=6,
                  markeredgewidth=0, clip_on=False)  # fmt: skip
        if at + 1 == len(fired) or fired[at + 1].time - one.time > 2:  # else the names would lie on each other
            axes.text(one.time + 0.35, -top * 1.12, one.label, va="center", fontsize=7, color=INK)
    axes.set(ylim=(-top * 1.35, top * 1.1), ylabel="waveform")
    axes.set_yticks([])
    axes.grid(False)
    marks = [
        Patch(color=KEYWORD, alpha=0.25, label="keyword"), Patch(color=OTHER, alpha=0.25, label="other speech"),
        Line2D([], [], marker="^", color=KEYWORD, linestyle="", label="found"),
        Line2D([], [], marker="X", color=ALARM, linestyle="", label="false alarm"),
    ]  # fmt: skip
    axes.legend(handles=marks, loc="lower right", bbox_to_anchor=(1, 1.1), ncols=4, borderaxespad=0)


def _draw_depth(axes: Any, depth: np.ndarray, gates: int) -> None:
    starts = np.arange(len(depth)) * HOP + LENGTH / RATE / 2 - HOP / 2  # a window is drawn at its middle, HOP wide
    shades = [SHADES[round(at * (len(SHADES) - 1) / gates)] for at in range(gates + 1)]
    axes.bar(starts, depth + 1, HOP, align="edge", color=[shades[at] for at in depth], linewidth=0)
    words = [f"stopped at gate {at + 1}" if gates > 1 else "stopped" for at in range(gates)] + ["whole network"]
    shares = [float((depth == at).mean()) for at in range(gates + 1)]
    axes.set_yticks(
        range(1, gates + 2), [f"{word} ({percent(share)})" for word, share in zip(words, shares, strict=True)]
    )
    axes.set(ylabel="windows go", ylim=(0, gates + 1.25))
    axes.grid(False, axis="x")


def _draw_belief(axes: Any, means: np.ndarray, decision: Decision, scape: Soundscape) -> None:
    time = (np.arange(len(means)) - (decision.count - 1) / 2) * HOP + LENGTH / RATE / 2
    axes.fill_between(time, means[:, 1:].max(1), color=KEYWORD, alpha=0.8, linewidth=0, step="mid")
    axes.axhline(decision.threshold, color=INK, linewidth=0.9, linestyle="--")
    axes.annotate("threshold", (0, decision.threshold), (2, 2), textcoords="offset points", fontsize=7.5)
    axes.set(ylim=(0, 1.05), ylabel="keyword\nprobability")


def _draw_cost(axes: Any, costs: np.ndarray) -> None:
    time = np.arange(len(costs)) * HOP + LENGTH / RATE / 2
    near = round(2.0 / HOP)
    running = np.convolve(np.pad(costs, near, mode="edge"), np.full(2 * near + 1, 1 / (2 * near + 1)), mode="valid")
    axes.axhline(1, color=FAINT, linewidth=1)
    axes.annotate("ungated", (0, 1), (2, 2), textcoords="offset points", fontsize=7.5)
    axes.fill_between(time, running, color=SHADES[1], linewidth=0)
    axes.plot(time, running, color=SHADES[3], linewidth=1)
    axes.axhline(costs.mean(), color=INK, linewidth=0.9, linestyle="--")
    axes.annotate(f"mean {percent(costs.mean())}", (0, costs.mean()), (2, 2), textcoords="offset points", fontsize=7.5)
    axes.set(ylim=(0, 1.3), ylabel="MACs, of 1\n(4 s mean)")
