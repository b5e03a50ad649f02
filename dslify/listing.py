"""Which files of a folder are read, with their labels and sources: from the folders' names or from a CSV table."""

from __future__ import annotations

import csv
from contextlib import suppress
from dataclasses import dataclass, replace
from os.path import normpath
from pathlib import Path, PurePosixPath

from .errors import DataError, some

TABLES = ("manifest.csv", "labels.csv")  # looked for in the folder; the first one also one folder up
_SEPARATORS = ",;\t"


@dataclass(frozen=True)
class File:
    """One file to read. name: relative to the folder, for messages. source: what must not be split over two sets."""

    path: Path
    name: str
    label: str
    source: str


@dataclass(frozen=True)
class Row:
    """One line of a table; label and source are empty where the table says nothing."""

    line: int
    label: str
    source: str


def alone(path: Path) -> File:
    """A single file, as if it were the only one of its folder."""
    return File(path, path.name, _folder_of(path), path.name)


def files_below(folder: Path, suffixes: frozenset[str]) -> list[File]:
    """The files under `folder` with one of these suffixes in a fixed order, each labelled with its folder's name.

    Each file is its own source. Hidden files and folders are left out.
    """
    found = []
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)  # such as macOS's ._ twins
        if not hidden and path.suffix.lower() in suffixes and path.is_file():
            found.append(File(path, inside.as_posix(), _folder_of(path), inside.as_posix()))
    return sorted(found, key=lambda file: file.name)


def described(folder: Path, files: list[File], table: Path | None = None) -> tuple[list[File], tuple[str, ...]]:
    """The files that are to be read, with the labels and sources of a CSV table, and remarks for the report.

    A table has the columns path, and as wanted label and source (or source_id). With `table`, or a manifest.csv or
    labels.csv in the folder, only the files that it lists are read, in its order, missing ones included (reading says
    so). Paths are relative to the folder, or where nothing is found there to the table; `table` may list files outside
    the folder, which are left out. A manifest.csv one folder up gives labels and sources too, but chooses nothing.

    Raises DataError for a table that cannot be read, contradicts itself, or lists no file of the folder.
    """
    own = [folder / name for name in TABLES if (folder / name).is_file()]
    if table is None and len(own) > 1:
        raise DataError(f"{folder} holds {' and '.join(TABLES)}; keep one of them, or name the one to use (--labels).")
    if table is not None or own:
        return _chosen(folder, files, table or own[0], needs_label=table is not None)
    above = folder.resolve().parent / TABLES[0]
    if not above.is_file():
        return files, ()
    rows, inside = read_table(above), folder.resolve().name
    known = {file.name: rows[f"{inside}/{file.name}"] for file in files if f"{inside}/{file.name}" in rows}
    files = [_labelled(file, known.get(file.name)) for file in files]
    return files, (f"labels and sources are from {above.name} one folder up",) if known else ()


def _chosen(folder: Path, files: list[File], table: Path, needs_label: bool) -> tuple[list[File], tuple[str, ...]]:
    rows = read_table(table, needs_label)
    there = {file.name: file for file in files}
    listed: dict[str, File] = {}
    outside = 0
    for name, row in rows.items():
        path = folder / name
        if not path.exists() and (table.parent / name).exists():
            path = table.parent / name
        inside = _inside(path, folder)
        if inside is None and needs_label:
            outside += 1
            continue
        key = inside or name
        if key in listed:
            raise DataError(f"{table} lists {key} twice under other names, again in line {row.line}; keep one of them.")
        plain = File(path, key, _folder_of(path), key)
        listed[key] = _labelled(there.get(key, plain), row)
    if not listed:
        where = f" of {folder}" if outside else ""
        raise DataError(f"{table} lists no file{where}; expected one row a file under a 'path' heading.")
    left, bare = len(set(there) - set(listed)), sum(not row.label for row in rows.values())
    notes = [f"labels and sources are from {table}"] if needs_label else []
    if left:
        notes.append(f"{left} files are not listed in {table.name} and were left out")
    if outside:
        notes.append(f"{outside} files that {table.name} lists lie outside {folder} and were left out")
    if 0 < bare < len(rows):
        notes.append(f"{bare} rows of {table.name} have no label, which is taken from the folder's name")
    return list(listed.values()), tuple(notes)


def _inside(path: Path, folder: Path) -> str | None:
    """The path relative to the folder, None where it lies elsewhere. Links are followed only if that is needed."""
    for place, root in ((path.absolute(), folder.absolute()), (path.parent.resolve() / path.name, folder.resolve())):
        with suppress(ValueError):
            return Path(normpath(place)).relative_to(normpath(root)).as_posix()
    return None


def _folder_of(path: Path) -> str:
    return path.parent.name or path.parent.resolve().name


def read_table(path: Path, needs_label: bool = False) -> dict[str, Row]:
    """The rows of a CSV file by path, in the file's order; commas, semicolons or tabs between the cells.

    Raises DataError for a file that is no such table, has no 'path' column (with needs_label: no 'label' column
    either), a row without a path or with more cells than the heading, or two rows of one path that differ.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            heading = lines.readline()
            lines.seek(0)
            separator = next((sign for sign in _SEPARATORS if "path" in _columns(heading, sign)), ",")
            reader = csv.reader(lines, delimiter=separator, strict=True)
            columns = [cell.strip().lower() for cell in next(reader, [])]
            cells = [(reader.line_num, row) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV table ({error}); repair or remove it.") from error
    for wanted in ("path", "label") if needs_label else ("path",):
        if wanted not in columns:
            raise DataError(
                f"{path} has the columns {', '.join(columns) or 'none'}; a '{wanted}' column is expected "
                "(of path, label, and source as wanted)."
            )
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} has a column twice ({', '.join(columns)}); give every column a name of its own.")
    rows: dict[str, Row] = {}
    for line, row in cells:
        if len(row) > len(columns):
            raise DataError(
                f"{path}, line {line} has {len(row)} cells and the heading {len(columns)}; put quotes around a cell "
                f"that holds a {separator!r}."
            )
        cell = dict(zip(columns, map(str.strip, row), strict=False))
        if not cell["path"]:
            raise DataError(f"{path}, line {line} names no file; every row needs a path.")
        name = PurePosixPath(cell["path"].replace("\\", "/")).as_posix()  # ./a.wav and speech\a.wav are understood
        found = Row(line, cell.get("label", ""), cell.get("source", "") or cell.get("source_id", ""))
        if (known := rows.setdefault(name, found)) != replace(found, line=known.line):
            raise DataError(
                f"{path} lists {name} twice with other labels or sources, in lines {known.line} and {line}; keep one."
            )
    return rows


def _columns(heading: str, separator: str) -> list[str]:
    return [cell.strip(' "\r\n').lower() for cell in heading.split(separator)]


def _labelled(file: File, row: Row | None) -> File:
    return file if row is None else replace(file, label=row.label or file.label, source=row.source or file.source)


def unusable(folder: Path) -> str:
    """One sentence for a folder in which nothing can be read."""
    others = [path for path in folder.rglob("*") if path.is_file()]
    if not others:
        return f"{folder} is an empty folder; audio (wav, flac, ogg, mp3) or pictures (png, jpg) are expected below it."
    found = sorted({path.suffix.lower() or "no suffix" for path in others})
    return (
        f"{folder} holds {len(others)} files ({some(found)}) and none is audio or a picture; wav, flac, ogg, mp3, png "
        "or jpg files are expected in it or below it."
    )
