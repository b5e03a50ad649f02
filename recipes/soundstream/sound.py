"""Recordings -> training crops: any folder or manifest of sound, any sampling rate, mono at the codec's rate."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from dslify.errors import DataError

SUFFIXES = (".wav", ".flac", ".ogg")
# Recordings are kept in memory as they are first read, up to this many bytes; the rest is read again each time.
CACHE_BYTES = 1 << 29


@dataclass(frozen=True)
class Recording:
    """One file. label: the folder below the root, or the manifest's column; "" without either."""

    path: Path
    label: str


def find_recordings(source: Path, split: str) -> list[Recording]:
    """The recordings of one split, in a fixed order.

    source: a folder, of which the subfolder named like the split is taken where there is one; or a CSV file with the
    column `path`, relative to the file, and optionally `split` and `label`.
    Raises DataError where there is no such source, or nothing in it.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: give a folder or a CSV manifest of {', '.join(SUFFIXES)} files")
    if source.is_file():
        found = _from_manifest(source, split)
    else:
        root = source / split if (source / split).is_dir() else source
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = [Recording(path, path.relative_to(root).parts[0] if path.parent != root else "") for path in files]
    if not found:
        raise DataError(f"{source} has no {', '.join(SUFFIXES)} file for the split {split!r}")
    return found


def _from_manifest(source: Path, split: str) -> list[Recording]:
    with source.open(newline="") as file:
        rows = csv.DictReader(file)
        if "path" not in (rows.fieldnames or ()):
            raise DataError(f"{source} has no column 'path': it has to be a CSV file with a header")
        return [
            Recording(source.parent / row["path"], row.get("label") or "")
            for row in rows
            if row.get("split") in (None, split)
        ]


def libritts(root: Path, subset: str) -> list[Recording]:
    """LibriTTS through torchaudio, downloaded into `root` where it is not there yet.

    Only torchaudio's index of the files is used: its own reader needs torchcodec.
    """
    try:
        from torchaudio.datasets import LIBRITTS
    except ImportError as error:
        raise DataError("LibriTTS needs torchaudio: pip install 'dslify[zoo]', or give --data FOLDER") from error
    root.mkdir(parents=True, exist_ok=True)
    LIBRITTS(root, url=subset, download=True)
    files = sorted((root / "LibriTTS" / subset).rglob("*.wav"))
    return [Recording(path, "speech") for path in files]


@dataclass
class Sound:
    """Samples of recordings, read when first asked for.

    skipped: (path, reason) of every file that could not be used, found as they are met.
    """

    recordings: list[Recording]
    sample_rate: int = 16_000
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    _cache: dict[int, np.ndarray] = field(default_factory=dict)
    _cached_bytes: int = 0

    def read(self, index: int) -> np.ndarray | None:
        """One recording as float32 (samples,), or None where it cannot be used: see `skipped`."""
        if index in self._cache:
            kept = self._cache[index]
            return kept.astype(np.float32) / 32767.0 if len(kept) else None
        path = self.recordings[index].path
        try:
            samples = _read_mono(path, self.sample_rate)
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            # Remembered as empty, so that the file is tried and named once.
            samples = np.empty(0, np.float32)
            if path not in (known for known, _ in self.skipped):
                self.skipped.append((path, str(error)))
        # Half the memory, and the very samples where the file has 16 bits.
        kept = (samples.clip(-1, 1) * 32767.0).round().astype(np.int16)
        if self._cached_bytes + kept.nbytes <= CACHE_BYTES:
            self._cache[index] = kept
            self._cached_bytes += kept.nbytes
        return kept.astype(np.float32) / 32767.0 if len(kept) else None

    def usable(self) -> Iterator[tuple[int, np.ndarray]]:
        """(index, samples) of every recording that can be read."""
        for index in range(len(self.recordings)):
            samples = self.read(index)
            if samples is not None:
                yield index, samples

    def crop(self, length: int, generator: np.random.Generator) -> np.ndarray:
        """`length` samples from a random place of a random recording; short recordings are filled up with zeros."""
        for _ in range(100):
            samples = self.read(int(generator.integers(len(self.recordings))))
            if samples is not None:
                start = int(generator.integers(max(1, len(samples) - length + 1)))
                piece = samples[start : start + length]
                return np.pad(piece, (0, length - len(piece)))
        path, reason = self.skipped[-1]
        raise DataError(f"100 recordings in a row cannot be used; the last one is {path}: {reason}")


def _read_mono(path: Path, sample_rate: int) -> np.ndarray:
    """(samples,) float32 at `sample_rate`, the mean over the channels; ValueError where nothing usable is in it."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ValueError("values that are not finite")
    if not len(mono):
        raise ValueError("no samples")
    return mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate)


def training_batch(sound: Sound, size: int, length: int, generator: np.random.Generator) -> Tensor:
    """(size, 1, length): random crops, three in ten mixed with a second one, each at a random level.

    Levels move by -18 to +6 dB, a second source lies 0 to 15 dB under the first; nothing is louder than full scale.
    """
    batch = []
    for _ in range(size):
        crop = sound.crop(length, generator)
        if generator.random() < 0.3:
            other = sound.crop(length, generator)
            under = 10.0 ** (-generator.uniform(0.0, 15.0) / 20.0)
            crop = crop + other * np.float32(under * _rms(crop) / max(_rms(other), 1e-4))
        crop = crop * np.float32(10.0 ** (generator.uniform(-18.0, 6.0) / 20.0))
        batch.append(crop / max(1.0, float(np.abs(crop).max())))
    return torch.from_numpy(np.stack(batch).astype(np.float32))[:, None]


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def fixed_clips(sound: Sound, length: int, limit: int = 96) -> tuple[Tensor, list[str]]:
    """The middle `length` samples of up to `limit` recordings, spread over all: (clips, 1, length) and their labels."""
    clips, labels = [], []
    step = max(1, -(-len(sound.recordings) // limit))
    for index in range(0, len(sound.recordings), step):
        samples = sound.read(index)
        if samples is None:
            continue
        start = max(0, (len(samples) - length) // 2)
        piece = samples[start : start + length]
        clips.append(np.pad(piece, (0, length - len(piece))))
        labels.append(sound.recordings[index].label)
    if not clips:
        raise DataError("none of the recordings for validation can be used")
    return torch.from_numpy(np.stack(clips))[:, None], labels
