"""Gates for a keyword network of your own, in one command: insert, finetune, calibrate, evaluate, export.

    python -m recipes.keyword_spotting.retrofit model.pt --data FOLDER
    python -m recipes.keyword_spotting.retrofit model.pt --data FOLDER --at blocks.0 blocks.1 blocks.2

FOLDER holds train/, valid/ and test/ with the label of each clip as its folder's name, or a manifest.csv with the
columns path, label and source. The network is what `dslify insert` takes: a whole module saved by torch.save, a .pt2,
weights with --arch, or a name. Without --at the cut nearest to half of the network's MACs is taken; several cuts make a
cascade under one budget. Everything is done by the public commands, which are shown.

A promise of 1 % takes 299 keywords that the network has not learned from, one of 2 % takes 149. With fewer in valid/,
--speakers keeps a share of train's speakers for the threshold: rightly only if the network has not heard them either.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dslify.data import open_data
from dslify.errors import DataError, DslifyError, OptionError
from dslify.files import written_whole
from dslify.omega import omega
from dslify.samples import Samples, split
from dslify.tables import figure, human, line, percent, plain_table, with_interval
from recipes.commands import dslify

from .data import CALIBRATION, PARTS, POSITIVE, SPLIT_SEED

OWN = "recipes.keyword_spotting."  # whose networks have not heard CALIBRATION of train's speakers


@dataclass(frozen=True)
class Retrofit:
    """What one retrofit is asked for. model, at, opening: as `dslify insert` takes them (opening: --arch, --trust ...).

    max_lost: share of new keywords that all gates may lose together, with `confidence`. beta: weight of L_comp; at 0
    there is no mask. copies, tests: varied copies of each clip, to learn from and to set thresholds by. speakers: share
    of train's that sets thresholds too.
    """

    model: str
    data: Path
    out: Path
    at: tuple[str, ...] = ()
    positive: str = POSITIVE
    max_lost: float = 0.02
    confidence: float = 0.95
    beta: float = 0.003
    steps: int = 300
    switch_steps: int = 600
    copies: int = 4
    tests: int = 8
    speakers: float = 0.0
    seed: int = 0
    threads: int = 1
    to: str = "onnx"
    opening: tuple[str, ...] = ()
    rate: tuple[str, ...] = field(default=())

    @property
    def file(self) -> Path:
        """The .dsl file."""
        name = Path(self.model).stem if Path(self.model).exists() else self.model.rpartition(":")[2]
        return self.out.resolve() / f"{name}.dsl"


def run(asked: Retrofit, console: Console) -> dict[str, Any]:
    """Do it -> what the commands said, also in retrofit.json beside the .dsl and the exported file.

    Raises DataError for a folder without train, valid and test, OptionError for numbers out of range, TrainError where
    a command fails, with what it said.
    """
    _check(asked)
    model = str(Path(asked.model).resolve()) if Path(asked.model).exists() else asked.model
    file = asked.file
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.glob(f"{file.stem}.run*"):  # of a retrofit that is made anew
        shutil.rmtree(old)

    def call(command: str, *options: str) -> dict[str, Any]:
        words = f"dslify {shlex.join((command, *options))}"
        console.print(words, style="bold", markup=False, highlight=False, soft_wrap=True)
        with console.status(command):
            return dslify(asked.threads, command, *options)

    cuts = asked.at or (halfway(call("inspect", model, *asked.opening)),)
    learning, calibration = divided(asked)
    test = ("--data", str((asked.data / "test").resolve()))
    common = ("--positive", asked.positive)
    seed, threads = ("--seed", str(asked.seed)), ("--threads", str(asked.threads))
    found: dict[str, Any] = {"model": asked.model, "cuts": list(cuts), "file": str(file)}
    for number, cut in enumerate(cuts):
        source, opening = (str(file), ()) if number else (model, asked.opening)
        gate = ("--light", "exit", "--mode", "gc", "--mask", "activation", *seed)
        found["insert"] = call("insert", source, "--at", cut, *gate, *opening, "-o", str(file), "--force")
    found["finetune"] = call(
        "finetune", str(file), *learning, "--switch-data", *learning[1:], *common, "--loss", "kl",
        "--steps", str(asked.steps if asked.beta else 0), "--switch-steps", str(asked.switch_steps), "--beta",
        f"{asked.beta:g}", "--lr", "0.02", "--batch-size", "32", "--copies", str(asked.copies), *asked.rate, *seed,
        *threads,
    )  # fmt: skip
    found["calibrate"] = call(
        "calibrate", str(file), *calibration, *common, "--max-lost", f"{asked.max_lost:g}", "--confidence",
        f"{asked.confidence:g}", "--copies", str(asked.tests), *asked.rate,
    )  # fmt: skip
    found["evaluate"] = call("evaluate", str(file), *test, *common, *asked.rate)
    target = file.with_suffix(f".{asked.to}")
    target.unlink(missing_ok=True)
    found["export"] = call("export", str(file), "--to", asked.to, "-o", str(target))
    found["exported"] = str(target)
    with written_whole(file.with_name("retrofit.json")) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    return found


def halfway(inspected: Mapping[str, Any]) -> str:
    """The cut nearest to half of the MACs, of blocks that leave one value if there are such, else of all cuts. Raises
    DataError where there is none."""
    points = [one for one in inspected["cut_points"] if not one["reason"] and one["region_macs"] and one["base_macs"]]
    if not points:
        raise DataError("The network has no place for a gate, as dslify inspect shows; name one with --at.")
    blocks = [one for one in points if one["block"] and not one["crossing"]]
    return str(min(blocks or points, key=_off)["path"])


def _off(point: Mapping[str, Any]) -> float:
    """How far from half of the MACs, as a share of them."""
    return abs(point["base_macs"] / (point["base_macs"] + point["region_macs"]) - 0.5)


def divided(asked: Retrofit) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options for data to learn from and to set thresholds by: train/ and valid/, or tables of both folders."""
    if not asked.speakers:
        folders = ((asked.data / name).resolve() for name in ("train", "valid"))
        learning, calibration = (("--data", str(folder)) for folder in folders)
        return learning, calibration
    parts = {name: open_data(asked.data / name, (1, 16_000), progress=False) for name in ("train", "valid")}
    kept, held = split(parts["train"], (1 - asked.speakers, asked.speakers), SPLIT_SEED)
    tables = {"learning": [("train", kept)], "calibration": [("valid", parts["valid"]), ("train", held)]}
    options = []
    for name, several in tables.items():
        path = asked.out.resolve() / f"{name}.csv"
        with written_whole(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "label", "source"))
            for folder, samples in several:
                writer.writerows(_rows(folder, samples))
        options.append(("--data", str(asked.data.resolve()), "--labels", str(path)))
    return options[0], options[1]


def _rows(folder: str, samples: Samples) -> list[tuple[str, str, str]]:
    """(path, label, source) of each file; a sample's name is its file's with its number in it."""
    files = (f"{folder}/{name.rpartition('[')[0]}" for name in samples.names)
    return list(dict.fromkeys(zip(files, samples.labels, samples.sources, strict=True)))


def _check(asked: Retrofit) -> None:
    missing = [name for name in PARTS if not (asked.data / name).is_dir()]
    if missing:
        raise DataError(f"--data {asked.data} has no folder {' and no folder '.join(missing)}; expected {PARTS}.")
    if not 0 <= asked.speakers < 1:
        raise OptionError(f"--speakers is a share of train's speakers, from 0 to below 1; got {asked.speakers:g}.")
    if asked.out.exists() and not asked.out.is_dir():
        raise OptionError(f"--out {asked.out} is a file; a folder to write to is expected.")


def shown(found: Mapping[str, Any], positive: str) -> list[Any]:
    """The outcome for a terminal: of test, what is stopped of each label, what goes on, and what that saves."""
    judged = found["evaluate"]
    parts: list[Any] = []
    table = plain_table("label", "clips", "stopped")
    rows = {row["name"]: row for row in judged["rows"]}
    kinds = [kind for kind in judged["kinds"] if kind["label"] != "all"]
    inside = omega(positive, [kind["label"] for kind in kinds]).positive([kind["label"] for kind in kinds])
    for kind, keyword in zip(kinds, inside, strict=True):
        table.add_row(kind["label"] + " (keyword)" * bool(keyword), str(kind["n"]), percent(kind["share"]))
    parts.append(_headed(f"gates behind {', '.join(found['cuts'])}, on test", table))
    gating = judged["gating"]
    recall = with_interval(gating["recall"], gating["recall_interval"], percent)
    stopped = with_interval(gating["stopped"], gating["stopped_interval"], percent)
    saved = f"MACs of a clip: {human(rows['mixed']['macs'])} of {human(rows['full']['macs'])}"
    thresholds = [one["threshold"] for one in found["calibrate"].get("layers") or [found["calibrate"]]]
    parts += [
        line(f"{recall} of the keywords go on, {stopped} of the negatives are stopped; {saved}"),
        line(f"thresholds {', '.join(map(figure, thresholds))}: {found['calibrate']['promise']}"),
        line(f"wrote {found['file']} and {found['exported']}"),
    ]
    return parts


def _headed(title: str, table: Table) -> Table:
    table.title, table.title_justify = title, "left"
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.keyword_spotting.retrofit", description="Gates for a keyword network, in one command."
    )
    parser.add_argument("model", help="model.pt, model.pt2, weights with --arch, or pkg.mod:factory")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/, valid/ and test/")
    parser.add_argument("--at", nargs="+", default=[], metavar="MODULE", help="where the gates go (half of the MACs)")
    parser.add_argument("--out", type=Path, default=Path("runs/retrofit"), help="folder for all that is made")
    parser.add_argument("--positive", default=POSITIVE, help="labels that must not be stopped (%(default)s)")
    for name, words in (("max-lost", "of the keywords, at most"), ("confidence", "that this holds for new ones"),
                        ("beta", "of the compression; 0 for no mask")):  # fmt: skip
        default = getattr(Retrofit, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{words} ({default})")
    parser.add_argument(
        "--speakers", type=float, help=f"of train, for the threshold (0; {CALIBRATION} for the recipe's)"
    )
    for name in ("steps", "switch-steps", "copies", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Retrofit, name.replace("-", "_")))
    parser.add_argument("--to", default="onnx", choices=("onnx", "pt2"), help="format of the exported file")
    for name in ("input", "scope", "arch", "trust", "code", "rate"):
        parser.add_argument(f"--{name}", help="as dslify insert takes it" if name != "rate" else "Hz of the network")
    given = parser.parse_args(arguments)
    opening = [
        word for name in ("input", "scope", "arch", "trust", "code") if (value := getattr(given, name))
        for word in (f"--{name}", value)
    ]  # fmt: skip
    own = CALIBRATION if given.model.startswith(OWN) else 0.0
    plain = {name: getattr(given, name) for name in ("model", "data", "out", "positive", "confidence", "beta", "steps",
             "max_lost", "switch_steps", "copies", "seed", "threads", "to")}  # fmt: skip
    asked = Retrofit(
        **plain, at=tuple(given.at), opening=tuple(opening),
        speakers=own if given.speakers is None else given.speakers,
        rate=("--rate", given.rate) if given.rate else (),
    )  # fmt: skip
    console = Console(stderr=True)
    try:
        found = run(asked, console)
    except (DslifyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part in shown(found, asked.positive):
        Console().print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
