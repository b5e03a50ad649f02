"""The stage `retrofit`: a Dynamic Switch Layer in the codec's encoder, by the public commands alone, and its variants.

    dslify insert      at the cut, a light path of each variant, routed in segments of 0.32 s
    dslify finetune    the light path on half of train, the switch on the other half
    dslify calibrate   on valid, for a share of its speech, and apart from that for a share of its silence
    dslify evaluate    how far light is from full, and what the switch knows: on valid, and on test

    python -m recipes.soundstream.retrofit --data codec16k --work runs/soundstream

Train is divided by recording. With --joint the whole codec (encoder, quantizer, decoder) learns together with the layer
first, by the codec's own loss; the codec that the other stages compare with is then another one, so that is an option.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from dslify.errors import DataError, DslifyError
from dslify.files import written_whole
from recipes.commands import dslify
from recipes.soundstream.model import CUT
from recipes.soundstream.spectral import ReconstructionLoss
from recipes.soundstream.train import TERM_WEIGHTS
from recipes.soundstream.variants import JUDGED, VARIANTS, summary, table
from recipes.soundstream.work import SEGMENT, SILENCE_SHARE, SPEECH_SHARE, Work

MODEL = "recipes.soundstream:pretrained"
RATE = 16_000
CLIP = 5 * SEGMENT / RATE  # seconds of a sample; a whole number of segments
STEPS, LIGHT_RATE = 800, 0.02  # of the light path; the rate was chosen on valid, for inherited and random weights alike
SWITCH_STEPS, SWITCH_RATE, SWITCH_BATCH = 3000, 0.005, 128
SWITCH_EVERY = (
    2  # recordings of train, one of which is kept for the switch, which needs more of them than the light path
)
JOINT_STEPS, JOINT_RATE = 200, 1e-4
LOSS = "recipes.soundstream.retrofit:task_loss"
PARTS = ("light", "switch", "valid", "speech", "silence", "test")


def run(work: Work, variants: Sequence[str] = tuple(VARIANTS), joint: bool = False, jobs: int = 2) -> dict[str, Any]:
    """Every variant, MAIN and those that inheritance is judged by with every seed -> .dsl files, thresholds and
    variants.json, which is returned.

    jobs: retrofits at once. Raises DataError for data without train, valid and test, or without valid speech and
    silence; TrainError where a command fails, with what it said.
    """
    folder = work.folder.resolve()
    divide(work.data, folder / "splits")
    tasks = [(name, seed) for name in variants for seed in (work.seeds if VARIANTS[name].seeds else work.seeds[:1])]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(max(1, min(jobs, os.cpu_count() or 1))) as pool,
    ):
        task = bar.add_task("retrofits", total=len(tasks))

        def one(name: str, seed: int) -> dict[str, Any]:
            found = retrofit(work, name, seed, joint)
            bar.advance(task)
            return found

        running = [pool.submit(one, name, seed) for name, seed in tasks]
        outcomes = [future.result() for future in running]
    steps = {"joint": JOINT_STEPS if joint else 0, "light": STEPS, "switch": SWITCH_STEPS}
    found = summary(dict(zip(tasks, outcomes, strict=True)), steps)
    work.write("variants.json", found)
    return found


def retrofit(work: Work, name: str, seed: int, joint: bool = False) -> dict[str, Any]:
    """One .dsl file with its thresholds; what was measured on the way.

    The file keeps the threshold for speech. A retrofit that was there is made anew.
    """
    began = time.perf_counter()
    splits = work.folder.resolve() / "splits"
    file = work.switched(name, seed).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.glob(f"{file.stem}.run*"):
        shutil.rmtree(old)
    common = ("--segment", f"{CLIP:g}", "--rate", str(RATE))
    single = ("--segment", f"{SEGMENT / RATE:g}", "--rate", str(RATE))  # room tone is short: less of it is filled up
    learning = (*common, "--seed", str(seed), "--threads", str(work.threads))

    def call(command: str, *options: str) -> dict[str, Any]:
        return dslify(work.threads, command, *options)

    place = ("--scope", "encoder", "--at", CUT, "--route-every", str(SEGMENT))
    made = call("insert", MODEL, *place, *VARIANTS[name].options, "--seed", str(seed), "-o", str(file), "--force")
    light, switch = ("--data", str(splits / "light")), ("--switch-data", str(splits / "switch"))
    taught = call(
        "finetune", str(file), *light, "--steps", str(STEPS), "--switch-steps", "0", "--lr", str(LIGHT_RATE),
        *(together() if joint else ()), *learning,
    )  # fmt: skip
    call(
        "finetune", str(file), *light, *switch, "--steps", "0", "--switch-steps", str(SWITCH_STEPS), "--lr",
        str(SWITCH_RATE), "--batch-size", str(SWITCH_BATCH), *learning,
    )  # fmt: skip
    thresholds = {
        kind: call("calibrate", str(file), "--data", str(splits / kind), "--light-share", str(share), *pieces)
        for kind, share, pieces in (("silence", SILENCE_SHARE, single), ("speech", SPEECH_SHARE, common))
    }
    work.write(f"thresholds/{name}-{seed}.json", {kind: one["threshold"] for kind, one in thresholds.items()})
    judged = {part: call("evaluate", str(file), "--data", str(splits / part), *common) for part in JUDGED}
    phases = {phase["name"]: phase for phase in taught["phases"]}
    return {"insert": made, "phases": phases, "judged": judged, "seconds": time.perf_counter() - began}


def together() -> tuple[str, ...]:
    """Options of `dslify finetune` for a first phase in which the whole codec learns with the layer."""
    return ("--joint", MODEL, "--task-loss", LOSS, "--joint-steps", str(JOINT_STEPS), "--joint-lr", str(JOINT_RATE))


def divide(data: Path, folder: Path) -> None:
    """Folders with a manifest.csv each: light and switch (of train), valid, speech and silence (of valid), test.

    Recordings of each label take turns in the order of the data's manifest, so every retrofit has the same parts.
    Raises DataError where one would be empty.
    """
    table = data / "manifest.csv"
    if not table.is_file():
        raise DataError(
            f"{table} is missing; the data needs a manifest with the columns path, split, label, source_id."
        )
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if missing := {"path", "split", "label", "source_id"} - set(rows[0] if rows else ()):
        raise DataError(
            f"{table} has no column {' and no column '.join(sorted(missing))}; expected path, split, label, source_id."
        )
    parts: dict[str, list[dict[str, str]]] = {name: [] for name in PARTS}
    turns: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        known = turns[row["split"], row["label"]]
        part = known.setdefault(row["source_id"], _part(row["split"], len(known)))
        for name in (part, row["label"] if part == "valid" else ""):
            if name in parts:
                parts[name].append(row)
    for name, chosen in parts.items():
        if not chosen:
            raise DataError(
                f"{table} leaves nothing for {name}; expected train, valid and test, with speech and silence."
            )
        (folder / name).mkdir(parents=True, exist_ok=True)
        with written_whole(folder / name / "manifest.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "label", "source"))
            writer.writerows((data.resolve() / row["path"], row["label"], row["source_id"]) for row in chosen)


def _part(split: str, turn: int) -> str:
    if split != "train":
        return split
    return "switch" if turn % SWITCH_EVERY == SWITCH_EVERY - 1 else "light"


@cache
def _reconstruction() -> ReconstructionLoss:
    return ReconstructionLoss()


def task_loss(output: Tensor, sound: Tensor, labels: Tensor | None) -> Tensor:
    """The codec's own loss of reconstructions and sounds, (batch, 1, samples), for joint training: spectral and
    waveform terms, weighted as in its training, without the critic. labels: not used."""
    terms = _reconstruction()(sound, output)
    return torch.stack([TERM_WEIGHTS[name] * term for name, term in terms.items()]).sum()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipes.soundstream.retrofit", description=run.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="sound like codec16k, with its manifest.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/soundstream"), help="folder for all that is made")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--joint", action="store_true", help="first train the whole codec together with the layer")
    parser.add_argument("--jobs", type=int, default=2, help="retrofits at once")
    given = parser.parse_args(arguments)
    try:
        work = Work(given.data, given.work, seeds=tuple(given.seeds))
        found = run(work, given.variants, given.joint, given.jobs)
    except DslifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
