"""ViSQOL (arXiv 2004.09584) of many sounds: the pure-Python port visqol-python, in child processes, never twice.

The port gives the scores of the original within rounding in audio mode. With numba it is five times as fast, with the
same scores; its first use compiles for half a minute. Every score is kept, under a hash of both signals, the mode and
the version of the port.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from dslify.errors import DataError, OptionError
from dslify.files import written_whole

PACKAGE = "visqol-python"
RATE = 16_000
SHORTEST = 1.0  # seconds: ViSQOL compares stretches of 0.9 s
PROCESSES = 2

Mode = Literal["audio", "speech"]
MODES: dict[Mode, int] = {"audio": 48_000, "speech": 16_000}  # the sampling rate that each is made for

Sound = NDArray[np.float32]


@dataclass(frozen=True)
class Compared:
    """One sound, and what codecs made of it; each (samples,), 16 kHz. name: of the sound, for errors."""

    name: str
    reference: Sound
    outputs: tuple[Sound, ...]

    def __post_init__(self) -> None:
        if len(self.reference) < SHORTEST * RATE:
            raise DataError(
                f"{self.name} lasts {len(self.reference) / RATE:.2f} s, and ViSQOL needs {SHORTEST:g} s; leave it out."
            )
        for sound in (self.reference, *self.outputs):
            if not np.isfinite(sound).all() or not sound.any():
                raise DataError(
                    f"{self.name}, or what the codec made of it, is all zeros or not finite, of which ViSQOL has no "
                    "score; leave it out."
                )


def required() -> str:
    """The version of the port. Raises OptionError where it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        raise OptionError(
            f"ViSQOL needs {PACKAGE}, which is not installed; pip install 'dslify[soundstream]'."
        ) from error


def scores(
    pairs: Sequence[Compared],
    cache: Path,
    mode: Mode = "audio",
    processes: int = PROCESSES,
    done: Callable[[int], Any] = lambda count: None,
) -> list[list[float]]:
    """MOS-LQO, 1 to 5, of every output of every pair, in their order.

    cache: folder in which scores are kept, one file for each reference. done: called with the number of scores that
    have just become known. Raises OptionError without the port, and for another mode.
    """
    if mode not in MODES:
        raise OptionError(f"The mode of ViSQOL is one of {', '.join(MODES)}; got {mode!r}.")
    salt = f"{PACKAGE} {required()} {mode}"
    cache.mkdir(parents=True, exist_ok=True)
    known: list[dict[str, float]] = []
    asked: dict[int, dict[str, Sound]] = {}
    for at, pair in enumerate(pairs):
        known.append(_read(_place(cache, salt, pair.reference)))
        outputs = {_hash(sound): sound for sound in pair.outputs}
        missing = {key: sound for key, sound in outputs.items() if key not in known[at]}
        done(sum(_hash(sound) not in missing for sound in pair.outputs))
        if missing:
            asked[at] = missing
    if asked:
        context = get_context("spawn")
        stop = context.Event()
        with ProcessPoolExecutor(min(processes, len(asked)), context, _alone, (stop, os.getpid())) as pool:
            try:
                # The longest first, so that no process is left alone with it at the end.
                order = sorted(asked, key=lambda at: -len(pairs[at].reference) * len(asked[at]))
                jobs = {pool.submit(_measure, pairs[at].reference, list(asked[at].values()), mode): at for at in order}
                for job in as_completed(jobs):
                    at = jobs[job]
                    known[at] |= dict(zip(asked[at], _finite(pairs[at].name, job.result()), strict=True))
                    _write(_place(cache, salt, pairs[at].reference), known[at])
                    done(sum(_hash(sound) in asked[at] for sound in pairs[at].outputs))
            except BaseException:
                stop.set()  # else leaving the block waits for what the processes are at
                raise
    return [[found[_hash(sound)] for sound in pair.outputs] for found, pair in zip(known, pairs, strict=True)]


def _hash(sound: Sound) -> str:
    return blake2b(np.ascontiguousarray(sound, np.float32).tobytes(), digest_size=12).hexdigest()


def _place(cache: Path, salt: str, reference: Sound) -> Path:
    return cache / f"{blake2b(f'{salt} {_hash(reference)}'.encode(), digest_size=12).hexdigest()}.json"


def _read(path: Path) -> dict[str, float]:
    """The scores that are known, by the hash of the output; none where the file cannot be read."""
    try:
        found = json.loads(path.read_text())
        return {key: float(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, known: dict[str, float]) -> None:
    with written_whole(path, f".{os.getpid()}") as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def _finite(name: str, found: list[float]) -> list[float]:
    if not all(map(math.isfinite, found)):
        raise DataError(f"ViSQOL has no score for what the codec made of {name}; leave that sound out.")
    return found


def _alone(stop: Event, parent: int) -> None:
    """In a child: one thread, no word at Ctrl-C, and an end when it is told to or the parent is gone."""
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while not stop.wait(2.0) and os.getppid() == parent:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _measure(reference: Sound, outputs: Sequence[Sound], mode: Mode) -> list[float]:
    """In a child: the scores of outputs of one reference."""
    from visqol import VisqolApi

    api = VisqolApi()
    # Speech mode by the exponential mapping: the lattice that the original takes by default needs another runtime.
    api.create(mode=mode, use_lattice_model=False)
    manager: Any = api._manager
    manager.spect_builder = _Remembering(manager.spect_builder)
    rate = MODES[mode]

    def resampled(sound: Sound) -> NDArray[np.float64]:
        return soxr.resample(sound.astype(np.float64), RATE, rate)

    first = resampled(reference)
    return [float(api.measure_from_arrays(first, resampled(output), rate).moslqo) for output in outputs]


class _Remembering:
    """A builder of spectrograms that builds none twice: the reference's, whole and in pieces, are those of every output
    that is compared with it (a third of the time)."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.known: dict[bytes, Any] = {}

    def build(self, signal: Any, window: Any) -> Any:
        key = blake2b(signal.data.tobytes(), digest_size=16).digest()
        if key not in self.known:
            self.known[key] = self.builder.build(signal, window)
        return self.known[key]
