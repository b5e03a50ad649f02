"""Everything the recipe shows, by one command: `python -m recipes.keyword_spotting.evaluate --data kws16k`.

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

from dslify.errors import DataError, DslifyError, OptionError
from dslify.files import written_whole
from recipes import stages

from . import tables
from .data import PARTS
from .work import Work

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"  # of what --readme replaces


class Stage(stages.Stage):
    """A stage of this recipe."""

    page = tables.PAGE

    def made_from(self, work: Work) -> list[Path]:
        name = "transformer" if self.name == "transformer" else "convolutional"
        return [work.weights(name), work.data / "manifest.csv"]


STAGES = (
    Stage("gates", "gates", "gates.json"),
    Stage("masks", "gates:run_masks", "masks.json"),
    Stage("cascade", "gates:run_cascade", "cascade.json"),
    Stage("rivals", "rivals", "rivals.json", ("gates.json",)),
    Stage("stream", "listen", "stream.json", ("gates.json", "cascade.json")),
    Stage("profile", "listen:run_profile", "profile.json", ("gates.json", "cascade.json")),
    Stage("transformer", "listen:run_transformer", "transformer.json"),
    Stage("figures", "figures", "figures.json", ("gates.json", "stream.json")),
    Stage(
        "tables", "tables", "tables.md",
        (
            "gates.json", "masks.json", "cascade.json", "rivals.json", "stream.json", "profile.json",
            "transformer.json", "figures.json",
        ),
    ),
)  # fmt: skip


def checked(work: Work) -> None:
    """Before anything is made. Raises DataError for data that is not there, OptionError for what cannot be."""
    missing = [name for name in PARTS if not (work.data / name).is_dir()]
    if missing:
        folders = " and no folder ".join(missing)
        raise DataError(f"--data {work.data} has no folder {folders}; expected train, valid and test.")
    stages.check_options(work, work.seeds, work.threads)
    if work.jobs < 1 or work.minutes <= 0:
        raise OptionError(f"--jobs is at least 1 and --minutes above 0; got {work.jobs} and {work.minutes:g}.")
    if work.checkpoint is not None and not work.checkpoint.is_file():
        raise OptionError(f"--checkpoint {work.checkpoint} is no file; give what the recipe's train wrote.")


def into_readme(folder: Path, readme: Path) -> None:
    """Put the page of tables between the markers of a README, and its pictures beside it. Raises OptionError where the
    markers are missing."""
    page = (folder / "tables.md").read_text()
    text = readme.read_text()
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise OptionError(f"{readme} lacks {BEGIN} or {END}, between which --readme writes the tables.")
    below = page.partition("\n")[2].strip().replace("\n## ", "\n### ")
    with written_whole(readme) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{below}\n{END}{after}")
    for picture in tables.PAGE.pictures:
        drawn, beside = (place / "figures" / f"{picture}.png" for place in (folder, readme.parent))
        if drawn.is_file() and drawn != beside:
            beside.parent.mkdir(exist_ok=True)
            with written_whole(beside) as temporary:
                temporary.write_bytes(drawn.read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m recipes.keyword_spotting.evaluate", description="Gates in the keyword network, stage by stage."
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder like kws16k: train/, valid/, test/")
    parser.add_argument("--work", type=Path, default=Path("runs/keywords"), help="folder for all that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the retrofits (default: 0 1 2)")
    parser.add_argument("--minutes", type=float, default=Work.minutes, help="of the stream")
    parser.add_argument("--checkpoint", type=Path, help="of the network, as the recipe's train wrote it (its own)")
    parser.add_argument("--again", action="store_true", help="run stages whose output is up to date, too")
    parser.add_argument("--only", action="append", choices=names, metavar="STAGE", help=f"one of {', '.join(names)}")
    parser.add_argument("--jobs", type=int, default=Work.jobs, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--readme", type=Path, metavar="FILE.md", help="write the tables into it, too")
    given = parser.parse_args(arguments)
    work = Work(
        given.data, given.work, tuple(given.seeds), given.threads, given.jobs, given.minutes, given.checkpoint
    )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
    try:
        checked(work)
        told = {"data": str(work.data), "seeds": list(work.seeds), "minutes": work.minutes}
        stages.remember(work, told | {"checkpoint": str(work.weights())})
        stages.run_stages(work, [one for one in STAGES if one.name in (given.only or names)], given.again, console)
        if given.readme is not None:
            into_readme(work.folder, given.readme)
    except (DslifyError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the stage that it was in", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
