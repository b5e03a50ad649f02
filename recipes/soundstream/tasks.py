"""The two downstream tasks as sound: keywords, and mixtures of up to three speakers; divided by speaker."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dslify.errors import DataError
from recipes.soundstream.clips import RATE
from recipes.soundstream.sound import Recording, Sound
from recipes.soundstream.work import SEGMENT

COUNTS = (0, 1, 2, 3)  # speakers at once
MIXTURE = 6 * SEGMENT  # samples of a mixture: 1.92 s
MIXTURES = {"train": 320, "valid": 80, "test": 120}  # of each count
SHIFT, GAIN_DB = 1600, (-9.0, 6.0)  # how far training clips are moved in time and level


@dataclass(frozen=True)
class Clips:
    """Sounds of one length: (n, 1, samples). classes: (n,) int64. sources: (n,), the speaker or recording of each."""

    sounds: Tensor
    classes: Tensor
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    name: str
    classes: tuple[str, ...]
    clips: dict[str, Clips]


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of manifest.csv. Raises DataError where it or one of its columns is missing."""
    path = folder / "manifest.csv"
    if not path.is_file():
        raise DataError(f"{folder} has no manifest.csv, which names path, split, label and source_id of every clip.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"path", "split", "label", "source_id"} - set(rows[0] if rows else ())
    if missing:
        raise DataError(f"{path} has no column {min(missing)}; it needs path, split, label and source_id.")
    return rows


def keywords(folder: Path) -> Task:
    """Clips of one second and the word in each; "unknown" and "background" are words too."""
    rows = table(folder)
    names = tuple(sorted({row["label"] for row in rows}))
    clips = {}
    for split in MIXTURES:
        mine = [row for row in rows if row["split"] == split]
        sound = Sound([Recording(folder / row["path"], row["label"]) for row in mine])
        found = [(_fitted(samples, RATE), mine[at]) for at, samples in sound.usable()]
        if not found:
            raise DataError(f"{folder} has no usable clip for the split {split!r}.")
        clips[split] = Clips(
            torch.from_numpy(np.stack([samples for samples, _ in found]))[:, None],
            torch.tensor([names.index(row["label"]) for _, row in found]),
            tuple(row["source_id"] for _, row in found),
        )
    return Task("keywords", names, clips)


def speakers(folder: Path) -> Task:
    """Mixtures of 0 to 3 speakers, each at the level of its recording; 0 is room tone or an ambient sound.

    Stretches of 1.92 s, with every speaker heard: a stretch is at most 6 dB under its whole recording. Mixtures are
    drawn with a fixed seed from the speakers of one split. Every recording leads as often as any other; a mixture's
    source is the one that leads it.
    """
    rows = table(folder)
    clips = {}
    for number, (split, count) in enumerate(MIXTURES.items()):
        generator = np.random.default_rng(number)
        voices, quiet = (_recordings(folder, rows, split, labels) for labels in (("speech",), ("silence", "ambient")))
        sounds, classes, sources = [], [], []
        for people in COUNTS:
            pool = voices if people else quiet
            order = np.concatenate([generator.permutation(len(pool)) for _ in range(-(-count // len(pool)))])[:count]
            for first in order:
                others = [at for at in generator.permutation(len(pool)) if pool[at][0] != pool[first][0]]
                chosen = [first, *others[: max(0, people - 1)]]
                mixed = np.sum([_stretch(pool[at][1], generator) for at in chosen], axis=0)
                sounds.append(mixed / max(1.0, float(np.abs(mixed).max())))
                classes.append(people)
                sources.append(pool[first][0])
        stacked = torch.from_numpy(np.stack(sounds).astype(np.float32))[:, None]
        clips[split] = Clips(stacked, torch.tensor(classes), tuple(sources))
    return Task("speakers", tuple(map(str, COUNTS)), clips)


def _recordings(
    folder: Path, rows: Sequence[dict[str, str]], split: str, labels: Sequence[str]
) -> list[tuple[str, np.ndarray]]:
    """(source, samples) of the recordings with these labels. Raises DataError for fewer than there are speakers."""
    mine = [row for row in rows if row["split"] == split and row["label"] in labels]
    sound = Sound([Recording(folder / row["path"], row["label"]) for row in mine])
    found = [(mine[at]["source_id"], samples) for at, samples in sound.usable()]
    if len({source for source, _ in found}) < max(COUNTS):
        raise DataError(f"{folder} needs {max(COUNTS)} sources of {' or '.join(labels)} for the split {split!r}.")
    return found


def _stretch(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    level = np.sqrt(np.mean(samples**2))
    for _ in range(50):
        start = int(generator.integers(max(1, len(samples) - MIXTURE + 1)))
        piece = _fitted(samples[start : start + MIXTURE], MIXTURE)
        if np.sqrt(np.mean(piece**2)) >= 0.5 * level:
            break
    return piece


def _fitted(samples: np.ndarray, length: int) -> np.ndarray:
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def moved(sounds: Tensor, generator: torch.Generator) -> Tensor:
    """The same sounds earlier or later and at other levels, nothing above full scale; (n, 1, samples)."""
    count, length = len(sounds), sounds.shape[-1]
    starts = torch.randint(0, 2 * SHIFT + 1, (count, 1), generator=generator)
    at = (starts + torch.arange(length))[:, None]
    low, high = GAIN_DB
    gains = 10 ** ((low + (high - low) * torch.rand(count, 1, 1, generator=generator)) / 20)
    return (F.pad(sounds, (SHIFT, SHIFT)).gather(2, at) * gains).clamp(-1, 1)
