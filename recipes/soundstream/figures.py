"""The figures of the recipe, named by what they show: a picture and its numbers as CSV for each.

    routed_sound       which segments of a sound take which path           (the paper's Fig. 3)
    share_and_quality  share light, and distance to the recording, against the threshold    (Fig. 4)
    mask_sparsity      zeros at the cut over the training of a mask, for several beta       (Fig. 6)
    predicted_actual   the switch's prediction against the true difference, and its error over training (Fig. 7)
    earlier_cuts       the correlation of the two for layers at earlier cuts                (Fig. 8)

The paper's figures are known here by what its text says of them; ours show the same quantities in our own way.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dslify.files import written_whole
from dslify.samples import show_progress
from dslify.tables import percent
from recipes.pictures import FAINT, INK, picture
from recipes.soundstream.clips import RATE, Clip, read_clips
from recipes.soundstream.curves import (
    BETAS,
    CUTS,
    LEVELS,
    MASKS,
    SWITCH_STEPS,
    HeardClips,
    Inside,
    Rows,
    earlier_cuts,
    listened,
    mask_sparsity,
    stretches,
    sweep,
    switch_progress,
)  # fmt: skip
from recipes.soundstream.routes import Heard
from recipes.soundstream.work import MAIN, SEGMENT, Work

if TYPE_CHECKING:
    pass

FULL, LIGHT = "#44618a", "#d9691e"
SHADES = (FULL, LIGHT, "#2f8f6b", "#8a5aa8", INK)
LINES = (":", "-", "--", "-.", "-")
SECOND = SEGMENT / RATE
MASK_WORDS = {"channel": "one factor for each channel", "activation": "thresholds on the activation"}


def write_rows(path: Path, rows: Rows) -> None:
    """CSV with the keys of the first row as columns; numbers to 6 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for row in rows:
            table.writerow({name: f"{one:.6g}" if isinstance(one, float) else one for name, one in row.items()})


def routed_sound(folder: Path, clip: Clip, one: Heard, threshold: float) -> dict[str, Any]:
    """Waveform coloured by path, and the switch's prediction with the true difference, of one recording."""
    count, light = len(one.predicted), one.predicted < threshold
    rows: Rows = [
        {"start_s": at * SECOND, "path": "light" if light[at] else "full", "predicted": float(one.predicted[at]),
         "actual": float(one.actual[at]), "place": clip.places[at]}
        for at in range(count)
    ]  # fmt: skip
    write_rows(folder / "routed_sound.csv", rows)
    from matplotlib.patches import Patch

    title = f"Which path each 0.32 s of a sound takes ({percent(light.mean())} light)"
    with picture(folder / "routed_sound.png", 1, (8, 3.6), title) as (figure, axes):
        figure.delaxes(axes[0])
        wave, scores = figure.subplots(2, 1, sharex=True)
        bins = 160  # samples in one vertical line
        pieces = clip.sound[: len(clip.sound) // bins * bins].reshape(-1, bins)
        time = (np.arange(len(pieces)) + 0.5) * bins / RATE
        for goes, colour in ((False, FULL), (True, LIGHT)):
            inside = light[(np.arange(len(pieces)) * bins) // SEGMENT] == goes
            wave.vlines(time[inside], pieces[inside].min(1), pieces[inside].max(1), colors=colour, linewidth=0.8)
        middles = (np.arange(count) + 0.5) * SECOND
        scores.bar(middles, one.predicted, SECOND * 0.92, color=np.where(light, LIGHT, FULL), alpha=0.75)
        scores.plot(middles, one.actual, "o", color=INK, markersize=3.5)
        scores.axhline(threshold, color=INK, linewidth=1, linestyle="--")
        scores.annotate("threshold", (0, threshold), (2, 3), textcoords="offset points", fontsize=8)
        wave.set_ylabel("waveform")
        wave.grid(False)
        scores.set(xlabel="time, s", ylabel="difference", xlim=(0, len(clip.sound) / RATE))
        known = [Patch(color=FULL, label="full path"), Patch(color=LIGHT, label="light path")]
        wave.legend(handles=known, loc="upper right", ncols=2)
        scores.legend(
            handles=[
                Patch(color=FAINT, label="predicted by the switch"),
                scores.plot([], [], "o", color=INK, markersize=3.5, label="actual")[0],
            ],
            loc="upper right",
            ncols=2,
        )
    return {"recording": clip.name, "share_light": float(light.mean())}


def share_and_quality(
    folder: Path, rows: Rows, thresholds: Mapping[str, float], routes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Panels against the threshold: share of segments light, log-mel distance to the output of always full, and ViSQOL.

    routes: of the stage `quality`, which knows ViSQOL at the two thresholds and of both paths alone; None leaves that
    panel out.
    """
    write_rows(folder / "share_and_quality.csv", rows)
    title = "Share on the light path, and quality, against the threshold"
    with picture(folder / "share_and_quality.png", 2 + (routes is not None), (9, 3.2), title) as (_, panels):
        share, distance, *scores = panels
        last = max(row["threshold"] for row in rows)
        known = sorted([(0.0, "full"), (last, "light"), *((at, f"mixed at {name}") for name, at in thresholds.items())])
        for number, kind in enumerate(sorted({row["kind"] for row in rows}, key=_kind_order)):
            mine = [row for row in rows if row["kind"] == kind]
            x = [row["threshold"] for row in mine]
            style: dict[str, Any] = {
                "color": SHADES[number % len(SHADES)],
                "marker": "o",
                "markersize": 3,
                "label": kind,
            }
            share.plot(x, [row["share"] for row in mine], **style)
            distance.plot(x, [row["from_full"] for row in mine], **style)
            if routes is not None:
                points = [(at, routes[kind][name]["visqol"]["value"]) for at, name in known]
                scores[0].plot(*zip(*points, strict=True), **style)
        ticks = [tick for tick in (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if tick < 1.3 * last]
        for panel in panels:
            panel.set_xscale("symlog", linthresh=0.1, linscale=0.7)
            panel.set_xticks(ticks, list(map(str, ticks)))
            panel.set_xlabel("threshold (relative difference)")
            for name, value in thresholds.items():
                panel.axvline(value, color=INK, linewidth=0.9, linestyle="--" if name == "speech" else ":")
        share.set(ylabel="share of segments light", ylim=(-0.03, 1.03))
        distance.set_ylabel("log-mel distance to always full, dB")
        if routes is not None:
            scores[0].set_ylabel("ViSQOL")
        panels[-1].legend(loc="best")
    return {"rows": rows}


def _kind_order(kind: str) -> tuple[int, str]:
    """Speech and silence first."""
    return ("speech", "silence", kind).index(kind), kind


def draw_mask_sparsity(folder: Path, rows: Rows) -> dict[str, Any]:
    """A panel for each kind of mask: share of zeros after so many steps, a line for each beta."""
    write_rows(folder / "mask_sparsity.csv", rows)
    title = "Zeros at the cut while a mask trains"
    with picture(folder / "mask_sparsity.png", len(MASKS), (8, 3.2), title) as (_, panels):
        for panel, kind in zip(panels, MASKS, strict=True):
            for at, beta in enumerate(BETAS):
                mine = [row for row in rows if (row["mask"], row["beta"]) == (kind, beta)]
                steps, zeros = ([row[name] for row in mine] for name in ("step", "zeros"))
                panel.plot(steps, zeros, color=SHADES[at], linestyle=LINES[at], label=f"beta {beta:g}")
            panel.set(xlabel="step", ylim=(-0.03, 1.03), title=MASK_WORDS[kind])
            panel.legend(loc="upper left")
        panels[0].set_ylabel("share of exact zeros")
    ends = [row for row in rows if row["step"] == max(each["step"] for each in rows)]
    return {"at_the_end": ends}


def predicted_actual(folder: Path, inside: Inside, progress: Rows) -> dict[str, Any]:
    """Scatter of test speech with the diagonal; mean absolute error after so many steps of the switch."""
    write_rows(
        folder / "predicted_actual.csv",
        [{"predicted": float(a), "actual": float(b)} for a, b in zip(inside.predicted, inside.actual, strict=True)],
    )
    write_rows(folder / "switch_error.csv", progress)
    value, interval = inside.spearman()
    title = "What the switch predicts, inside test speech"
    with picture(folder / "predicted_actual.png", 2, (8, 3.4), title) as (_, (cloud, error)):
        low, high = (f(inside.actual.tolist() + inside.predicted.tolist()) for f in (min, max))
        cloud.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle="--", label="diagonal")
        cloud.plot(inside.actual, inside.predicted, ".", color=FULL, markersize=4, alpha=0.6)
        cloud.set(xscale="log", yscale="log", xlabel="actual difference", ylabel="predicted difference")
        cloud.set_title(f"Spearman {value:.3f}, {len(inside.predicted)} segments", loc="left")
        cloud.legend(loc="upper left")
        error.plot([row["steps"] for row in progress], [row["error"] for row in progress], "o-", color=LIGHT)
        error.set(xscale="log", xlabel="steps of the switch", ylabel="mean absolute error", ylim=(0, None))
        error.set_xticks(SWITCH_STEPS, list(map(str, SWITCH_STEPS)))
        error.minorticks_off()
    return {"spearman": value, "interval": interval, "error": progress}


def draw_earlier_cuts(folder: Path, rows: Rows) -> dict[str, Any]:
    """Rank correlation by cut, from the first to the last, with intervals."""
    write_rows(folder / "earlier_cuts.csv", rows)
    title = "The earlier the cut, the weaker the prediction? Inside test speech"
    with picture(folder / "earlier_cuts.png", 1, (5.2, 3.2), title) as (_, (panel,)):
        values = np.array([row["spearman"] for row in rows])
        spread = np.abs(np.array([[row["low"] for row in rows], [row["high"] for row in rows]]) - values)
        panel.errorbar(range(len(rows)), values, spread, fmt="o-", color=FULL, capsize=3)
        for at, value in enumerate(values):
            panel.annotate(f"{value:.3f}", (at, value), (6, 5), textcoords="offset points", fontsize=8)
        panel.set_xticks(range(len(rows)), [row["cut"] for row in rows])
        panel.set(ylabel="Spearman, predicted and actual", xlim=(-0.4, len(rows) - 0.4))
    return {"cuts": rows}


def run(work: Work) -> dict[str, Any]:
    """All figures -> figures/*.png, figures/*.csv and figures.json. Needs the retrofit of MAIN with the first seed."""
    torch.set_num_threads(work.threads)
    folder = work.folder / "figures"
    seed = work.seeds[0]
    routes = work.read("quality.json")["routes"] if (work.folder / "quality.json").is_file() else None
    net, thresholds = work.net(MAIN, seed), work.thresholds(MAIN, seed)
    steps = LEVELS + len(MASKS) * len(BETAS) + len(SWITCH_STEPS) + len(CUTS) + 1
    with show_progress(None) as progress:
        bar = progress.add_task("figures", total=steps)

        def step(text: str) -> None:
            progress.update(bar, advance=1, description=text)

        test = read_clips(work.data, "test")
        speech = [clip for clip in test if clip.kind == "speech"]
        found = listened(net, test)
        step("test recordings")
        train, learn = stretches(work, "train", 2), stretches(work, "valid")
        error = switch_progress(work, work.net(MAIN, seed), learn, speech, step)
        content = {
            "routed_sound": routed_sound(folder, *typical(found, thresholds["speech"]), thresholds["speech"]),
            "share_and_quality": share_and_quality(folder, sweep(net, found, step), thresholds, routes),
            "mask_sparsity": draw_mask_sparsity(folder, mask_sparsity(work, train, step)),
            "predicted_actual": predicted_actual(folder, Inside.of(found), error),
            "earlier_cuts": draw_earlier_cuts(folder, earlier_cuts(work, train, learn, speech, step)),
        }
    work.write("figures.json", content)
    return content


def typical(found: HeardClips, threshold: float) -> tuple[Clip, Heard]:
    """The recording of speech whose share light is nearest to the median of all; the longer one where two are."""
    speech = [(clip, one) for clip, one in found if clip.kind == "speech"]
    shares = np.array([(one.predicted < threshold).mean() for _, one in speech])
    near = np.abs(shares - np.median(shares)).round(2)
    return min(zip(near, speech, strict=True), key=lambda pair: (pair[0], -len(pair[1][0].sound)))[1]
