"""Results of a recipe as Markdown: tables, figures with their interval or range, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from dslify.files import written_whole
from dslify.tables import figure, plain_table, with_interval

Found = Mapping[str, Any]
Section = tuple[str, str, Callable[[Found], str]]  # title, the result that it shows, and how


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is words, the others numbers."""
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(one: Found, write: Callable[[float | None], str] = figure) -> str:
    return with_interval(one["value"], one.get("interval") or one.get("range"), write)


def score(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"


HOLDS = {True: "holds", False: "does not hold", None: "not judged"}


def verdict(found: Mapping[str, Found | None]) -> str:
    """Every claim with its value, its bound and whether it holds."""
    rows = []
    for content in found.values():
        for line in (content or {}).get("verdict", ()):
            said = HOLDS[line["holds"]] if line["holds"] else f"**{HOLDS[line['holds']]}**"
            words = f"{said}; {line['words']}" if line["words"] else said
            rows.append((line["what"], cell(line, score), _bound(line), words))
    return markdown(("what it has to show", "value", "bound", ""), rows)


def _bound(line: Found) -> str:
    return f"{line['sign']} {line['bound']:g}"


def verdict_table(found: Found) -> list[Table]:
    """The verdict for a terminal."""
    table = plain_table("what it has to show", "value", "bound", "")
    for line in found["verdict"]:
        table.add_row(line["what"], cell(line, score), _bound(line), HOLDS[line["holds"]])
    return [table]


@dataclass(frozen=True)
class Page:
    """tables.md of one recipe. A stage that has not run yet leaves a sentence that says so; nothing is made up for it.

    recipe: its folder's name. stages: the stage that writes each result (NAME.json). pictures: captions of
    figures/NAME.png, shown once the result `figures` is there.
    """

    recipe: str
    stages: Mapping[str, str]
    sections: Sequence[Section]
    pictures: Mapping[str, str] = field(default_factory=dict)

    def text(self, found: Mapping[str, Found | None]) -> str:
        """found: what each stage wrote, by `stages`; None where it has not."""
        parts = ["# What the recipe shows\n\n" + verdict(found)]
        for name, stage in self.stages.items():
            if found[name] is None:
                parts[0] += f"\n\nNothing of the stage `{stage}` yet: run {self._command(stage)}."
        for title, name, write in self.sections:
            content = found[name]
            text = write(content) if content is not None else f"Not there yet: run {self._command(self.stages[name])}."
            parts.append(f"## {title}\n\n{text}")
        if found.get("figures") is not None:
            pictures = "\n\n".join(f"![{text}](figures/{name}.png)\n\n{text}." for name, text in self.pictures.items())
            parts.append(f"## Figures\n\n{pictures}")
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> dict[str, Any]:
        """What the stages wrote -> tables.md; returns the lines of the verdict and which stages are missing."""
        found = {
            name: json.loads(path.read_text()) if (path := folder / f"{name}.json").is_file() else None
            for name in self.stages
        }
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / "tables.md") as temporary:
            temporary.write_text(self.text(found))
        lines = [line for content in found.values() for line in (content or {}).get("verdict", ())]
        return {"verdict": lines, "missing": [stage for name, stage in self.stages.items() if found[name] is None]}

    def _command(self, stage: str) -> str:
        return f"`python -m recipes.{self.recipe}.evaluate --only {stage}`"
