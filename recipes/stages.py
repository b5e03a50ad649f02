"""An evaluation in stages: each writes one file into the work folder, and is run again only where that is out of date.

So a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markdown import Markdown

from dslify.errors import DataError, OptionError
from dslify.files import written_whole
from recipes.pages import Page, verdict_table

SETTINGS = "settings.json"


@dataclass(frozen=True)
class WorkFolder:
    """Where an evaluation keeps what it makes. data: what it is made from, folder: for everything that is made."""

    data: Path
    folder: Path

    def read(self, name: str) -> Any:
        """A JSON file below the folder. Raises DataError where it is missing: run the stage that writes it."""
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; run the stage that writes it, or all of them.")
        return json.loads(path.read_text())

    def write(self, name: str, content: Mapping[str, Any]) -> Path:
        """JSON below the folder, whole or not at all."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, mark=f".{os.getpid()}") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        return path


@dataclass(frozen=True)
class Stage:
    """One step. module: of the recipe, with `run(work) -> dict`, or "module:function" for one of another name.

    output: the file that is there once it has run. needs: outputs of other stages that it is made from.
    """

    name: str
    module: str
    output: str
    needs: tuple[str, ...] = ()

    page: ClassVar[Page]

    def run(self, work: Any) -> dict[str, Any]:
        module, _, function = self.module.partition(":")
        run: Callable[[Any], dict[str, Any]] = getattr(
            import_module(f"recipes.{self.page.recipe}.{module}"), function or "run"
        )
        return run(work)

    def made_from(self, work: Any) -> list[Path]:
        """The files outside of the work folder that its output follows; those that are not there do not count."""
        raise NotImplementedError

    def summary(self, found: dict[str, Any]) -> list[Any]:
        """What rich prints of its result: its part of tables.md; of the last stage, the verdict."""
        if self.output == "tables.md":
            return verdict_table(found)
        parts = [(title, write) for title, name, write in self.page.sections if f"{name}.json" == self.output]
        return [Markdown(f"### {title}\n\n{write(found)}") for title, write in parts]

    def fresh(self, work: Any) -> bool:
        """Whether the output is there and newer than the settings, what it is made from, and the stages before."""
        output = work.folder / self.output
        if not output.is_file():
            return False
        sources = [work.folder / SETTINGS, *(work.folder / name for name in self.needs), *self.made_from(work)]
        return all(output.stat().st_mtime >= one.stat().st_mtime for one in sources if one.exists())


def remember(work: WorkFolder, settings: Mapping[str, Any]) -> None:
    """Keep the settings in the work folder; what was made with others is older than the file then, so made again."""
    path = work.folder / SETTINGS
    if not path.is_file() or path.read_text() != json.dumps(settings, indent=1) + "\n":
        work.write(SETTINGS, settings)


def run_stages(work: WorkFolder, stages: Sequence[Stage], again: bool, console: Console) -> None:
    """Run the stages in their order and show what each found; skip fresh ones unless `again`."""
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


def check_options(work: WorkFolder, seeds: Sequence[int], threads: int) -> None:
    """Raises OptionError for seeds or threads that cannot be, or for a work folder that is a file."""
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise OptionError(f"--seeds are different numbers from 0 on, got {' '.join(map(str, seeds)) or 'none'}.")
    if threads < 1:
        raise OptionError(f"--threads has to be at least 1, got {threads}.")
    if work.folder.exists() and not work.folder.is_dir():
        raise OptionError(f"--work {work.folder} is a file; a folder to write to is expected.")
