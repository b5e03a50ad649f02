"""Everything the recipe shows, by one command: `python -m recipes.soundstream.evaluate --data codec16k`.

Runs the stages one after another, each into the work folder; a stage whose output is newer than all that it is made
from is not run again. So a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from dslify.errors import DataError, DslifyError, OptionError
from recipes.soundstream import tables, visqol
from recipes.soundstream.model import CHECKPOINT
from recipes.soundstream.work import Work

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Stage:
    """One step. module: of recipes.soundstream, with `run(work) -> dict`.

    output: the file that is there once it has run. needs: outputs of other stages that it is made from.
    """

    name: str
    module: str
    output: str
    needs: tuple[str, ...] = ()

    def run(self, work: Work) -> dict[str, Any]:
        run: Callable[[Work], dict[str, Any]] = import_module(f"recipes.soundstream.{self.module}").run
        return run(work)

    def summary(self, found: dict[str, Any]) -> list[Any]:
        """What rich prints of its result: its part of tables.md; of the last stage, the verdict."""
        if self.name == "tables":
            return tables.summary(found)
        parts = [(title, write) for title, name, write in tables.PAGE if f"{name}.json" == self.output]
        return [Markdown(f"### {title}\n\n{write(found)}") for title, write in parts]

    def fresh(self, work: Work) -> bool:
        """Whether the output is there and newer than the settings, the codec, the data and the stages before."""
        output = work.folder / self.output
        if not output.is_file():
            return False
        checkpoint = Path(os.environ.get("SOUNDSTREAM_CHECKPOINT", CHECKPOINT))
        sources = [work.folder / SETTINGS, checkpoint, *(work.folder / name for name in self.needs)]
        sources += [folder / "manifest.csv" for folder in (work.data, work.keywords) if folder is not None]
        return all(output.stat().st_mtime >= one.stat().st_mtime for one in sources if one.exists())


STAGES = (
    Stage("retrofit", "retrofit", "variants.json"),
    Stage("quality", "quality", "quality.json", ("variants.json",)),
    Stage("downstream", "downstream", "downstream.json", ("variants.json",)),
    Stage("latency", "stream_latency", "latency.json", ("variants.json",)),
    Stage("figures", "figures", "figures.json", ("variants.json",)),
    Stage(
        "tables", "tables", "tables.md",
        ("variants.json", "quality.json", "downstream.json", "latency.json", "figures.json"),
    ),
)  # fmt: skip


def checked(work: Work) -> None:
    """Before anything is made. Raises DataError for data that is not there, OptionError for seeds or packages."""
    for option, folder in (("--data", work.data), ("--keywords", work.keywords)):
        if folder is not None and not (folder / "manifest.csv").is_file():
            found = "has no manifest.csv" if folder.is_dir() else "is no folder"
            raise DataError(
                f"{option} {folder} {found}; a folder with manifest.csv and the files it names is expected."
            )
    if not work.seeds or min(work.seeds) < 0 or len(set(work.seeds)) < len(work.seeds):
        raise OptionError(f"--seeds are different numbers from 0 on, got {' '.join(map(str, work.seeds)) or 'none'}.")
    if work.threads < 1:
        raise OptionError(f"--threads has to be at least 1, got {work.threads}.")
    if work.folder.exists() and not work.folder.is_dir():
        raise OptionError(f"--work {work.folder} is a file; a folder to write to is expected.")
    visqol.required()


def remember(work: Work) -> None:
    """Keep the settings in the work folder; what was made with others is older than the file then, so made again."""
    told = {"data": str(work.data), "keywords": str(work.keywords), "seeds": list(work.seeds)}
    path = work.folder / SETTINGS
    if not path.is_file() or path.read_text() != json.dumps(told, indent=1) + "\n":
        work.write(SETTINGS, told)


def evaluate(work: Work, stages: Sequence[Stage], again: bool, console: Console) -> None:
    """Run the stages in their order and show what each found; skip fresh ones unless `again`."""
    checked(work)
    remember(work)
    for stage in stages:
        began = time.perf_counter()
        if stage.fresh(work) and not again:
            console.print(f"[bold]{stage.name}[/]: {work.folder / stage.output} is up to date", highlight=False)
            continue
        console.print(f"[bold]{stage.name}[/] ...", highlight=False)
        found = stage.run(work)
        seconds = time.perf_counter() - began
        console.print(f"[bold]{stage.name}[/]: {work.folder / stage.output}, {seconds:.0f} s", highlight=False)
        for part in stage.summary(found):
            console.print(part)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m recipes.soundstream.evaluate", description="Retrofit the codec and judge it, stage by stage."
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder like codec16k: manifest.csv, segments.csv")
    parser.add_argument("--keywords", type=Path, help="a folder like kws16k; without it no keyword is detected")
    parser.add_argument("--work", type=Path, default=Path("runs/soundstream"), help="folder for all that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the retrofits (default: 0 1 2)")
    parser.add_argument("--again", action="store_true", help="run stages whose output is up to date, too")
    parser.add_argument("--only", action="append", choices=names, metavar="STAGE", help=f"one of {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    given = parser.parse_args(arguments)
    work = Work(given.data, given.work, given.keywords, tuple(given.seeds), given.threads)
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
    try:
        evaluate(work, [one for one in STAGES if one.name in (given.only or names)], given.again, console)
    except DslifyError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the stage that it was in", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
