"""The sounds that the evaluation judges by: whole files, and which of their segments are speech and which pauses."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dslify.errors import DataError
from dslify.samples import QUIETEST_DB
from recipes.soundstream.sound import Sound, find_recordings
from recipes.soundstream.work import SEGMENT

RATE = 16_000
NORMAL_DB = -26.0  # root mean square of a level-normalised clip, in dB of full scale

Place = Literal["speech", "pause", "edge", ""]


@dataclass(frozen=True)
class Clip:
    """One file. kind: its label, such as "speech". sound: (samples,) float32, 16 kHz.

    places: one for each segment of a file of speech: "pause" where all of it is silence, "speech" where at most half
    is, else "edge"; "" where nobody has said.
    """

    name: str
    kind: str
    sound: NDArray[np.float32]
    places: tuple[Place, ...]

    @property
    def segments(self) -> int:
        """The last one may be shorter."""
        return -(-len(self.sound) // SEGMENT)

    def levels(self) -> NDArray[np.float64]:
        """Root mean square of every segment in dB, (segments,): the loudness that a switch has to beat."""
        return np.array([level(self.sound[at : at + SEGMENT]) for at in range(0, len(self.sound), SEGMENT)])

    def normalised(self) -> Clip:
        """The same at NORMAL_DB; nothing is clipped, since the codec takes any float."""
        return replace(self, sound=self.sound * np.float32(10 ** ((NORMAL_DB - level(self.sound)) / 20)))


def level(sound: NDArray[np.float32]) -> float:
    """Root mean square in dB of full scale, at least QUIETEST_DB."""
    power = float(np.mean(np.square(sound, dtype=np.float64)))
    return max(QUIETEST_DB, 10 * math.log10(power)) if power > 0 else QUIETEST_DB


def read_clips(data: Path, split: str) -> tuple[Clip, ...]:
    """Every file of one split, in a fixed order; files that cannot be read are left out.

    data: as `sound.find_recordings` takes it. Where segments.csv lies in it (columns path, start_s, end_s, label) it
    says what is speech and what is silence inside files. Raises DataError where there is nothing to read.
    """
    root = data if data.is_dir() else data.parent
    stretches = _stretches(root / "segments.csv")
    sound = Sound(find_recordings(data, split))
    clips = []
    for index, samples in sound.usable():
        recording = sound.recordings[index]
        name = recording.path.relative_to(root).as_posix()
        places = tuple(
            _place(stretches[name], at / RATE, min(at + SEGMENT, len(samples)) / RATE) if name in stretches else ""
            for at in range(0, len(samples), SEGMENT)
        )
        clips.append(Clip(name, recording.label or "sound", samples, places))
    if not clips:
        raise DataError(f"None of the {len(sound.recordings)} files of {data} for the split {split!r} can be read.")
    return tuple(clips)


def _stretches(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Seconds of silence, from and to, inside each file that segments.csv knows."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                silent = found[row["path"]]
                if row["label"] == "silence":
                    silent.append((float(row["start_s"]), float(row["end_s"])))
    return dict(found)


def _place(silent: Sequence[tuple[float, float]], start: float, stop: float) -> Place:
    quiet = sum(max(0.0, min(stop, end) - max(start, begin)) for begin, end in silent)
    share = quiet / (stop - start)
    if share > 1 - 1e-3:  # the file's end is rounded to milliseconds
        return "pause"
    return "speech" if share <= 0.5 else "edge"
