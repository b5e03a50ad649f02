"""The stage `quality`: how good the codec sounds on every path, what the switch knows, and whether borders are heard.

On whole files of the test split, with both thresholds as validation set them. Writes quality.json, quality.csv (a row
for each file, route and retrofit) and quality.npz (every segment: what was predicted, and what was so).

Figures are means over retrofits; their intervals, 95 %, come from a bootstrap over files.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dslify.errors import DataError
from dslify.files import written_whole
from recipes.soundstream import visqol
from recipes.soundstream.clips import Clip, read_clips
from recipes.soundstream.findings import aggregated
from recipes.soundstream.listening import MIXED, ROUTES, THRESHOLDS, Listened, listen
from recipes.soundstream.verdict import quality_lines
from recipes.soundstream.work import SEGMENT, Work

CACHE = "visqol-cache"
_BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

Array = NDArray[np.float64]


def run(work: Work) -> dict[str, Any]:
    """Needs the stage `retrofit`; returns what quality.json holds: findings.aggregated, and "verdict".

    Raises DataError where files of that stage or the data are missing, OptionError without ViSQOL.
    """
    began = time.perf_counter()
    visqol.required()
    torch.set_num_threads(work.threads)
    clips = read_clips(work.data, "test")
    if not any(clip.kind == "speech" for clip in clips):
        raise DataError(f"{work.data} has no test files with the label speech; quality is judged on speech.")
    thresholds = [work.thresholds(seed=seed) for seed in work.seeds]
    nets = [work.net(seed=seed) for seed in work.seeds]
    console = Console(stderr=True)
    with Progress(*_BAR, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("every path", total=len(clips) * len(nets))
        heard = [
            listen(net, mine, clips, seed, lambda: bar.advance(task))
            for net, mine, seed in zip(nets, thresholds, work.seeds, strict=True)
        ]
        listened = time.perf_counter()
        pairs = [
            visqol.Compared(
                clip.name, clip.sound, tuple(one.played[name][at].sound for one in heard for name in ROUTES)
            )
            for at, clip in enumerate(clips)
        ]
        task = bar.add_task("ViSQOL", total=sum(len(pair.outputs) for pair in pairs))
        scores = np.array(visqol.scores(pairs, work.folder / CACHE, done=lambda count: bar.advance(task, count)))
    mos = scores.reshape(len(clips), len(heard), len(ROUTES)).transpose(1, 2, 0)  # (retrofits, routes, clips)
    found = aggregated(clips, heard, mos) | {
        "seeds": list(work.seeds),
        "thresholds": thresholds,
        "seconds": {"paths": listened - began, "visqol": time.perf_counter() - listened},
        "visqol": {"version": visqol.required(), "mode": "audio", "rate": visqol.MODES["audio"]},
    }
    found["verdict"] = [line.to_json() for line in quality_lines(found)]
    work.folder.mkdir(parents=True, exist_ok=True)
    _write_csv(work.folder / "quality.csv", clips, heard, mos)
    _write_segments(work.folder / "quality.npz", clips, heard)
    work.write("quality.json", found)
    return found


def _write_csv(path: Path, clips: Sequence[Clip], heard: Sequence[Listened], mos: Array) -> None:
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["seed", "file", "kind", "route", "share_light", "visqol", "log_mel_db"])
        for seed, one in enumerate(heard):
            for number, name in enumerate(ROUTES):
                for at, (clip, played) in enumerate(zip(clips, one.played[name], strict=True)):
                    numbers = (played.light.mean(), mos[seed, number, at], played.log_mel_db)
                    rows.writerow([one.seed, clip.name, clip.kind, name, *(f"{each:.4f}" for each in numbers)])


def _write_segments(path: Path, clips: Sequence[Clip], heard: Sequence[Listened]) -> None:
    """By segment `source` (its number in `files`), `kind`, `place`, `start` (s), `level` and `level_normal` (dB), (n,);
    by retrofit too `actual`, `predicted`, the same with `_normal`, `light_speech` and `light_silence`, (seeds, n)."""
    counts = [clip.segments for clip in clips]
    columns: dict[str, Any] = {
        "files": np.array([clip.name for clip in clips]),
        "source": np.repeat(np.arange(len(clips)), counts),
        "kind": np.repeat([clip.kind for clip in clips], counts),
        "place": np.array([place for clip in clips for place in clip.places]),
        "start": np.concatenate([np.arange(count) * SEGMENT / visqol.RATE for count in counts]),
        "level": np.concatenate([clip.levels() for clip in clips]),
        "level_normal": np.concatenate([clip.normalised().levels() for clip in clips]),
        "seeds": np.array([one.seed for one in heard]),
    }
    for name in ("actual", "predicted"):
        columns[name] = np.array([np.concatenate([getattr(each, name) for each in one.heard]) for one in heard])
        columns[f"{name}_normal"] = np.array(
            [np.concatenate([getattr(each, name) for each in one.normal]) for one in heard]
        )
    for name in THRESHOLDS:
        columns[f"light_{name}"] = np.array(
            [np.concatenate([each.light for each in one.played[MIXED[name]]]) for one in heard]
        )
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **columns)
