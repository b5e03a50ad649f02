"""manifest.json of a folder that `dslify export --split` wrote: what its models take and give, and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .layout import Layout
from .stream import Stream

FORMAT = 1
NAME = "manifest.json"
PARTS = ("front", "light", "full")
STREAM = "stream"  # the fourth file of a network that routes a long input segment by segment, and its entry


@dataclass(frozen=True)
class Value:
    """An input or output. free: its axes that may have another size than in `shape`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    free: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What is known of the parts.

    cut, scope: where the network was cut, and the module that was exported, None for all of it. threshold: samples with
    a score below it go light. passed: names of the values after masked. batch: samples in every call, None for any.
    routable: whether the samples of a batch can be told apart. each: parts that decide again inside, so that every
    sample runs on its own. sent: name -> row axes of what full reads. number: how it is sent (wire.NUMBERS).
    notes: what data for the network looks like (example, pixels, classes). stream: how it takes a sound that goes on,
    None for a network that is not routed segment by segment.
    """

    cut: str
    scope: str | None
    threshold: float
    scale: tuple[float, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    passed: tuple[str, ...]
    entering: tuple[Layout, ...]
    crossing: tuple[Layout, ...]  # of (masked, *passed)
    leaving: tuple[Layout, ...]
    batch: int | None
    routable: bool
    each: tuple[str, ...]
    sent: Mapping[str, tuple[int, ...]]
    number: str
    notes: Mapping[str, Any]
    stream: Stream | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        layouts = {name: tuple(Layout(*place[:2]) for place in places) for name, places in data["layouts"].items()}
        return cls(
            str(data["cut"]),
            data["scope"],
            float(data["threshold"]),
            tuple(map(float, data["scale"])),
            tuple(map(_value, data["inputs"])),
            tuple(map(_value, data["outputs"])),
            tuple(data["passed"]),
            layouts["inputs"],
            (*layouts["masked"], *layouts["passed"]),
            layouts["outputs"],
            data["batch"],
            bool(data["routable"]),
            tuple(part for part in PARTS if data["files"][part]["holds_layers"]),
            {name: tuple(axes) for name, axes in data["wire"]["rows"].items()},
            str(data["wire"]["numbers"]),
            data["notes"],
            Stream.from_json(data[STREAM]) if STREAM in data else None,
        )


def read(folder: Path) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files of the parts, which are held against their hashes.

    Raises ExportError for a folder that is none of ours, of another format, or damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise ExportError(f"{folder} is no folder of parts: it has no {NAME}; write one with dslify export --split.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = data["format"]
        if found == FORMAT:
            manifest = Manifest.from_json(data)
            parts = (*PARTS, STREAM) if manifest.stream else PARTS
            files = {part: (folder / Path(data["files"][part]["file"]).name, data["files"][part]) for part in parts}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ExportError(
            f"{path} is damaged, or none of dslify's ({type(error).__name__}: {error}); export the network again."
        ) from None
    if found != FORMAT:
        raise ExportError(
            f"{path} is in format {str(found)[:20]}, and this dslify reads format {FORMAT}; export again."
        )
    for part, (file, entry) in files.items():
        if not file.is_file():
            raise ExportError(f"{folder} lacks {file.name}, its {part} part; copy the folder whole, or export again.")
        if digest(file) != entry["sha256"]:
            raise ExportError(f"{file} is not the file that {NAME} names (its SHA-256 differs); export again.")
    return manifest, {part: file for part, (file, _) in files.items()}


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _value(entry: Mapping[str, Any]) -> Value:
    return Value(str(entry["name"]), tuple(entry["shape"]), str(entry["dtype"]), tuple(entry["free"]))
