"""The stage `figures`: what each gate stops against what it loses, over all thresholds, on test."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np

import dslify
from dslify.files import written_whole
from dslify.observe import collect
from recipes.pictures import FAINT, INK, picture

from . import gates
from .data import words_of
from .judge import Judge
from .rivals import WHOLE, activity, certainty
from .stream import Decision
from .timeline import timeline
from .work import DEPTHS, Work

# colours that colour-blind readers tell apart (Okabe and Ito); lines differ in kind as well
LOOKS = {"1/4": ("#56b4e9", ":"), "1/2": ("#0072b2", "-"), "3/4": ("#009e73", "--")}
MOST = 0.03  # keywords lost: as far as the picture goes


def run(work: Work) -> dict[str, Any]:
    """figures/stopped_lost.png, its numbers as CSV -> figures.json."""
    judge = gates.judge_of(work)
    scores = {
        depth: [score_of(work, gates.name_of(at, gates.MAIN_BETA), seed, judge) for seed in work.seeds]
        for at, depth in DEPTHS.items()
    }
    curves = {depth: np.mean([curve(judge, score) for score in own], axis=0) for depth, own in scores.items()}
    others = {
        "voice activity": curve(judge, activity(judge.samples)),
        "loudness": curve(judge, judge.samples.rms_db.numpy()),
        WHOLE: curve(judge, certainty(judge.logits)),
    }
    rows = work.read("gates.json")["gates"]
    marks = {row["depth"]: row["figures"] for row in rows if row["beta"] == gates.MAIN_BETA}
    draw(work, curves, others, marks)
    decision = Decision(tuple(words_of(judge.samples, judge.omega)), work.read("stream.json")["decision"]["threshold"])
    cascade = dslify.load(work.gate(gates.CASCADE, work.seeds[0]))
    path = work.folder / "figures" / "timeline.png"
    minute = timeline(path, cascade, work.network(), judge.samples, decision, minutes=work.minutes)
    found = {"at no loss": {name: float(one[0]) for name, one in {**curves, **others}.items()}, "minute": minute}
    work.write("figures.json", found)
    return found


def score_of(work: Work, name: str, seed: int, judge: Judge) -> np.ndarray:
    """The gate's score of every test clip."""
    return collect(dslify.load(work.gate(name, seed)), judge.samples, progress=False).score


def curve(judge: Judge, score: np.ndarray) -> np.ndarray:
    """At each number of keywords lost, from none on, the largest share of negatives that can be stopped, (steps,).

    A keyword that the whole network takes for none cannot be lost.
    """
    own = judge.positive & (judge.original == judge.truth)
    ends = np.append(np.sort(score[own]), np.inf)[: steps(judge)]
    negatives = np.sort(score[~judge.positive])
    return np.searchsorted(negatives, ends, side="left") / len(negatives)


def steps(judge: Judge) -> int:
    """How many lost keywords the picture shows, and none."""
    return round(MOST * int(judge.positive.sum())) + 1


def draw(work: Work, curves: dict[str, Any], others: dict[str, Any], marks: dict[str, Any]) -> None:
    """The picture, and beside it all of its numbers."""
    folder = work.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(curves.values())))
    lost = 100 * MOST * np.arange(count) / max(1, count - 1)
    with written_whole(folder / "stopped_lost.csv") as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("keywords_lost_percent", *curves, *others))
        table.writerows(
            (f"{at:.3f}", *(f"{one[number]:.4f}" for one in (*curves.values(), *others.values())))
            for number, at in enumerate(lost)
        )
    with picture(folder / "stopped_lost.png", 1, (7.2, 3.8), "What a gate stops, and what that loses (test)") as (
        _, (panel,),
    ):  # fmt: skip
        for name, one in curves.items():
            colour, style = LOOKS[name]
            panel.step(lost, 100 * one, style, where="post", color=colour, label=f"gate at {name}")
            mark = marks[name]
            panel.plot(
                100 * mark["keywords lost"]["value"], 100 * mark["negatives stopped"]["value"],
                "o", color=colour, markeredgecolor=INK, markersize=6,
            )  # fmt: skip
        for (name, one), style in zip(others.items(), ("-.", ":", "-"), strict=True):
            label = f"{name} (saves nothing)" if name == WHOLE else name
            panel.step(lost, 100 * one, style, where="post", color=FAINT, label=label)
        panel.set(xlabel="keywords lost, %", ylabel="negatives stopped, %", ylim=(0, 102), xlim=(-0.05, 100 * MOST))
        panel.legend(
            loc="upper right", bbox_to_anchor=(1, 0.92), title="circles: the calibrated thresholds", title_fontsize=8
        )
