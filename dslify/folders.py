"""Folders and single files of sound or of pictures, read by threads into samples."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .audio import SUFFIXES as SOUND
from .audio import Clip, counts, read_clip, resampled
from .errors import DataError
from .images import SUFFIXES as PICTURES
from .images import fitting, read_picture, readable_shape
from .listing import File, alone, described, files_below, unusable
from .samples import Collector, Samples
from .wanted import DEFAULT_RATE, Wanted
from .workers import read_ahead

SUFFIXES = SOUND | PICTURES


def open_files(path: Path, wanted: Wanted, table: Path | None) -> Samples:
    """A folder or a file of sound or pictures; of a folder with both, what the network can read."""
    notes: tuple[str, ...] = ()
    if path.is_dir():
        files, notes = described(path, files_below(path, SUFFIXES), table)
    else:
        files = [alone(path)]
        if table is not None:
            files, notes = described(path.parent, files, table)
            files = [file for file in files if file.name == path.name]
            if not files:
                raise DataError(f"{table} does not list {path.name}; add a row for it, or leave the table out.")
    if not files:
        raise DataError(unusable(path))
    pictures = [file for file in files if file.path.suffix.lower() in PICTURES]
    sounds = [file for file in files if file.path.suffix.lower() not in PICTURES]
    if pictures and (not sounds or readable_shape(wanted.shape)):
        return _open_pictures(path, pictures, (*notes, *_left(sounds, "sound", "pictures")), wanted)
    return _open_audio(path, sounds, (*notes, *_left(pictures, "pictures", "sound")), wanted)


def _left(files: list[File], what: str, read: str) -> tuple[str, ...]:
    return (f"{len(files)} files of {what} were left out: the network reads {read}",) if files else ()


def _open_audio(path: Path, files: list[File], notes: tuple[str, ...], wanted: Wanted) -> Samples:
    shape, rate = wanted.shape, wanted.hertz
    if shape is None or len(shape) > 2 or not shape:
        raise DataError(
            f"Audio in {path} is cut into segments of the network's input, and {wanted.instead()}; expected (channels, "
            "samples) or (samples,), such as --input 1x1x16000, or give arrays of the features that the network reads."
        )
    if wanted.rate is None:
        notes = (*notes, f"the network is taken to read {DEFAULT_RATE} Hz; give the rate if it does not")
    into = Collector(str(path), wanted.classes)
    clips: list[Clip] = []
    read = partial(read_clip, shape=shape, rate=rate)
    found = read_ahead(read, (file.path for file in files), wanted.workers or 0)
    for file, clip in zip(files, wanted.tracked(found, len(files), "reading sound"), strict=True):
        clips.append(replace(clip, pieces=None))
        if clip.pieces is None:
            into.skipped.append((file.name, clip.reason or ""))
            continue
        for at, piece in enumerate(clip.pieces):
            into.add(torch.from_numpy(piece), file.label, file.source, f"{file.name}[{at}]")
    longest = max(clip.seconds for clip in clips)
    if len(into.rows) == sum(clip.padded for clip in clips) and longest > 0:
        raise DataError(
            f"The audio in {path} is shorter than a segment: the longest of {len(files)} files has {longest:.2f} s and "
            f"the network reads {shape[-1] / rate:.2f} s; give longer files, or a network with a shorter input."
        )
    used = [clip for clip in clips if clip.reason is None]
    return into.finish(len(used), (*notes, *resampled(used, rate)), rate=rate, **counts(used))


def _open_pictures(path: Path, files: list[File], notes: tuple[str, ...], wanted: Wanted) -> Samples:
    shape = wanted.shape
    if shape is None or not readable_shape(shape):
        raise DataError(
            f"The pictures in {path} are resized to the network's input, and {wanted.instead()}; expected (1, 3 or 4, "
            "height, width), such as --input 1x3x224x224."
        )
    pixels = fitting(wanted.pixels, shape[0])
    doubt = " (nothing is known of the pictures that the network was trained with)" if pixels.assumed else ""
    into = Collector(str(path), wanted.classes)
    read = partial(read_picture, shape=shape, pixels=pixels)
    found = read_ahead(read, (file.path for file in files), wanted.workers or 0)
    for file, picture in zip(files, wanted.tracked(found, len(files), "reading pictures"), strict=True):
        if isinstance(picture, str):
            into.skipped.append((file.name, picture))
        else:
            into.add(torch.from_numpy(picture), file.label, file.source, file.name)
    return into.finish(len(into.rows), (*notes, f"pictures: {pixels.words()}{doubt}"))
