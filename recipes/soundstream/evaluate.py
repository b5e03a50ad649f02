"""Everything the recipe shows, by one command: `python -m recipes.soundstream.evaluate --data codec16k`.

Runs the stages one after another, each into the work folder; a stage whose output is newer than all that it is made
from is not run again. So a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dslify.errors import DataError, DslifyError
from recipes import stages
from recipes.soundstream import tables, visqol
from recipes.soundstream.model import CHECKPOINT
from recipes.soundstream.work import Work


class Stage(stages.Stage):
    """A stage of this recipe."""

    page = tables.PAGE

    def made_from(self, work: Work) -> list[Path]:
        checkpoint = Path(os.environ.get("SOUNDSTREAM_CHECKPOINT", CHECKPOINT))
        return [checkpoint, *(folder / "manifest.csv" for folder in (work.data, work.keywords) if folder is not None)]


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
    stages.check_options(work, work.seeds, work.threads)
    visqol.required()


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
        checked(work)
        settings = {"data": str(work.data), "keywords": str(work.keywords), "seeds": list(work.seeds)}
        stages.remember(work, settings)
        stages.run_stages(work, [one for one in STAGES if one.name in (given.only or names)], given.again, console)
    except DslifyError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the stage that it was in", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
