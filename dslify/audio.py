"""Folders of sound: which files, their labels and sources, and how a file becomes segments of the network's length."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import soundfile
import soxr

from .errors import DataError

SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"}
)
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
MANIFEST = "manifest.csv"


@dataclass(frozen=True)
class AudioFile:
    """One file to read. name: relative to the folder, for messages. source: what must not be split over two sets."""

    path: Path
    name: str
    label: str
    source: str


@dataclass(frozen=True)
class Clip:
    """What a file held: `pieces` (segments, *sample shape) float32, or the `reason` why it is skipped.

    seconds: of the file. padded: the last piece is completed with zeros. dropped: a rest under half a piece left out.
    """

    pieces: numpy.ndarray | None = None
    reason: str | None = None
    seconds: float = 0.0
    rate: int = 0
    padded: bool = False
    dropped: bool = False


def audio_files(folder: Path) -> tuple[list[AudioFile], tuple[str, ...]]:
    """The sound files under `folder` in a fixed order, and remarks for the report.

    Labels are the names of the files' parent folders and each file is its own source, unless `manifest.csv` (columns
    path, and as wanted label and source_id) lies in the folder: then only the listed files are read, with its labels
    and sources. A manifest one folder up that lists the files gives labels and sources too, but chooses nothing.

    Raises DataError for a folder without sound and for a manifest that cannot be read.
    """
    found = sorted((path for path in folder.rglob("*") if _is_sound(path, folder)), key=lambda path: path.as_posix())
    files = [AudioFile(path, path.relative_to(folder).as_posix(), path.parent.name, "") for path in found]
    files = [replace(file, source=file.name) for file in files]
    if (folder / MANIFEST).is_file():
        rows = _manifest(folder / MANIFEST)
        listed = [
            _described(AudioFile(folder / name, name, Path(name).parent.name, name), row) for name, row in rows.items()
        ]
        if not listed:
            raise DataError(f"{folder / MANIFEST} lists no file; expected one row a file under a 'path' heading.")
        left = len({file.name for file in files} - set(rows))
        return listed, ((f"{left} audio files are not listed in {MANIFEST} and were left out",) if left else ())
    if not files:
        raise DataError(_no_sound(folder))
    above = folder.resolve().parent / MANIFEST
    if above.is_file():
        rows = _manifest(above)
        inside = folder.resolve().name
        files = [_described(file, rows.get(f"{inside}/{file.name}", {})) for file in files]
        if any(f"{inside}/{file.name}" in rows for file in files):
            return files, (f"labels and sources are from {MANIFEST} one folder up",)
    return files, ()


def read_clip(file: AudioFile, shape: tuple[int, ...], rate: int) -> Clip:
    """Read, mix, resample and cut one file into pieces of `shape`, (channels, samples) or (samples,), at `rate` Hz.

    A last piece of at least half the length is completed with zeros, a shorter one is left out. A file that cannot be
    used comes back as a reason; nothing is raised for it.
    """
    if not file.path.is_file():
        return Clip(reason="no such file")
    try:
        sound, own_rate = soundfile.read(file.path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        why = getattr(error, "error_string", None) or str(error).strip() or type(error).__name__
        return Clip(reason=f"not readable as audio: {why.rstrip('.')}")
    if not len(sound):
        return Clip(reason="holds no samples")
    if not numpy.isfinite(sound).all():
        return Clip(reason="holds NaN or infinite samples")
    channels, length = (shape[0] if len(shape) == 2 else 1), shape[-1]
    if channels == 1:
        sound = sound.mean(axis=1, keepdims=True)
    elif sound.shape[1] == 1:
        sound = sound.repeat(channels, axis=1)
    elif sound.shape[1] != channels:
        return Clip(reason=f"has {sound.shape[1]} channels, {channels} or 1 expected")
    seconds = len(sound) / own_rate
    if own_rate != rate:
        sound = soxr.resample(sound, own_rate, rate)
    whole, rest = divmod(len(sound), length)
    keep = 2 * rest >= length and rest > 0
    if not whole and not keep:
        return Clip(reason=f"{seconds:.2f} s is under half a segment ({length / rate:.2f} s)", seconds=seconds)
    count = whole + keep
    held = numpy.zeros((count * length, channels), dtype=numpy.float32)
    held[: min(len(sound), len(held))] = sound[: len(held)]
    pieces = held.reshape(count, length, channels).transpose(0, 2, 1).reshape(count, *shape)
    return Clip(pieces, None, seconds, own_rate, padded=keep, dropped=rest > 0 and not keep)


def _is_sound(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)  # such as macOS's ._ twins
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def _manifest(path: Path) -> dict[str, dict[str, str]]:
    """Row by file name, in the file's order."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV table ({error}); repair or remove it.") from error
    if "path" not in (reader.fieldnames or ()):
        raise DataError(
            f"{path} has the columns {', '.join(reader.fieldnames or ['none'])}; a 'path' column is expected "
            "(and label, source_id as wanted)."
        )
    return {row["path"]: row for row in rows if row["path"]}


def _described(file: AudioFile, row: dict[str, str]) -> AudioFile:
    return replace(file, label=row.get("label") or file.label, source=row.get("source_id") or file.source)


def _no_sound(folder: Path) -> str:
    others = [path for path in folder.rglob("*") if path.is_file()]
    if not others:
        return f"{folder} is an empty folder; audio files (wav, flac, ogg, mp3) are expected in it or below it."
    kinds = sorted({path.suffix.lower() or "no suffix" for path in others})
    if PICTURES.intersection(kinds):
        return (
            f"{folder} holds pictures, and folders of pictures are not read; give an array file (.npy, .pt, "
            ".safetensors) of preprocessed pictures, or a dataset as pkg.mod:factory."
        )
    return (
        f"{folder} holds {len(others)} files ({', '.join(kinds[:4])}) and none is audio; wav, flac, ogg or mp3 "
        "files are expected in it or below it."
    )
