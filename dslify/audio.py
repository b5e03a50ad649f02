"""Sound: how a recording of any rate, length and number of channels becomes segments as the network reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import soundfile
import soxr

SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"}
)


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


def read_clip(path: Path, shape: tuple[int, ...], rate: int) -> Clip:
    """Read one file and cut it as `cut_clip` does. A file that cannot be used comes back as a reason; nothing is raised
    for it."""
    if not path.is_file():
        return Clip(reason="no such file")
    try:
        sound, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        why = getattr(error, "error_string", None) or str(error).strip() or type(error).__name__
        return Clip(reason=f"not readable as audio: {why.rstrip('.')}")
    return cut_clip(sound, own_rate, shape, rate)


def cut_clip(sound: numpy.ndarray, own_rate: int, shape: tuple[int, ...], rate: int) -> Clip:
    """Mix, resample and cut a recording into pieces of `shape`, (channels, samples) or (samples,), at `rate` Hz.

    sound: (samples, channels) float32 at `own_rate` Hz. A last piece of at least half the length is completed with
    zeros, a shorter one is left out.
    """
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


def counts(used: Sequence[Clip]) -> dict[str, Any]:
    """What a report says of recordings: seconds, padded, dropped."""
    padded, dropped = (sum(getattr(clip, name) for clip in used) for name in ("padded", "dropped"))
    return {"seconds": round(sum(clip.seconds for clip in used), 3), "padded": padded, "dropped": dropped}


def resampled(used: Sequence[Clip], rate: int) -> tuple[str, ...]:
    """A remark, if recordings were at other rates than `rate` Hz."""
    rates = sorted({clip.rate for clip in used} - {rate})
    return (f"resampled to {rate} Hz from {', '.join(map(str, rates))} Hz",) if rates else ()
