"""Makes `demo_sound/`: the few minutes of sound that `dslify demo` trains, calibrates and judges on.

    python recipes/soundstream/make_demo_sound.py            # needs espeak-ng on this machine

Speech comes from a synthesizer, sentence by sentence with pauses between; silence, hum and noise are computed. Every
clip has its own seed, and a source (a voice, or one setting of a generator) lies in one split only. Same espeak-ng
version, same samples.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

RATE = 16_000
FOLDER = Path(__file__).with_name("demo_sound")
SPLITS = ("train", "valid", "test")

Sound = NDArray[np.float64]


@dataclass(frozen=True)
class Voice:
    """One speaker: an espeak-ng voice with a variant, words a minute, pitch (0 to 99), level in dBFS, what is said."""

    voice: str
    speed: int
    pitch: int
    level: float
    text: str


@dataclass(frozen=True)
class Clip:
    """One file to be written: where, what it is, and how to compute it from a generator of random numbers."""

    split: str
    label: str
    source: str
    make: Callable[[np.random.Generator], Sound]


# Sentences end with a full stop; the pause after each is drawn per clip.
VOICES: dict[str, tuple[Voice, ...]] = {
    "train": (
        Voice(
            "en-us+m3", 150, 42, -28, "The kettle is on the stove. It takes about four minutes to boil, so there is "
            "time to cut the bread. Open the window a little.",
        ),
        Voice(
            "en-gb+f2", 165, 55, -30, "A small boat left the harbour at dawn. Its engine was so quiet that we heard "
            "the gulls. By noon the fog had gone.",
        ),
        Voice(
            "en-us+f4", 140, 60, -27, "Please write down three numbers. The first is seven, the second is forty two. "
            "Choose the third.",
        ),
        Voice(
            "en-gb-scotland+m1", 155, 35, -31, "Snow fell on the hills all night. The road was closed until the plough "
            "came through. Nobody minded very much.",
        ),
        Voice(
            "en-gb-x-rp+m7", 175, 48, -29, "The museum opens at ten and closes at six. Visitors leave their bags at "
            "the desk. On the second floor there is a clock with nine hands.",
        ),
        Voice(
            "en-us+klatt2", 150, 50, -27, "Every signal carries some noise. A good filter keeps the shape and drops "
            "the rest. We test with both.",
        ),
        Voice(
            "en-gb-x-gbclan+m5", 160, 30, -26, "Turn left after the bridge. Follow the river for half a mile. The "
            "workshop is the brick building with the green door.",
        ),
    ),
    "valid": (
        Voice(
            "en-us+m8", 145, 40, -29, "The train was late again. People read the same page twice. A child counted "
            "pigeons.",
        ),
        Voice(
            "en-gb+f1", 150, 52, -28, "Bring a coat, it will rain this evening. The shop on the corner sells "
            "umbrellas. They never last.",
        ),
        Voice(
            "en-gb-scotland+f3", 165, 58, -30, "Six strings make a chord. Press them gently, then let go. The last "
            "note should fade by itself.",
        ),
        Voice(
            "en-us-nyc+m2", 170, 45, -27, "The elevator stops on every floor today. Take the stairs if you are in a "
            "hurry. Mind the wet paint.",
        ),
        Voice(
            "en-gb-x-rp+klatt4", 140, 55, -31, "Measure the table before you buy the wood. Then measure it again. "
            "Sharp tools do quiet work.",
        ),
        Voice(
            "en-029+m6", 155, 33, -28, "The lighthouse blinks every twelve seconds. Ships set their course by it. On "
            "clear nights we count along.",
        ),
    ),
    "test": (
        Voice(
            "en-us+f3", 155, 57, -28, "Breakfast is ready. There are eggs, fresh rolls and a jar of honey. Eat while "
            "it is warm.",
        ),
        Voice(
            "en-gb+m4", 150, 38, -29, "The library has moved to the old theatre. Books stand where the stage was. It "
            "is a good place to think.",
        ),
        Voice(
            "en-gb-x-gbcwmd+m6", 165, 46, -27, "A wheel has come loose on the cart. Hold this bolt for a moment. "
            "There, that should do it.",
        ),
        Voice(
            "en-us-nyc+f2", 160, 62, -30, "Four of us share one desk. Two type, one draws, and the fourth looks for "
            "the missing pencil.",
        ),
        Voice(
            "en-gb-scotland+klatt", 145, 44, -29, "The tide turns at half past five. After that the sand path is "
            "under water. Do not cross alone.",
        ),
    ),
}  # fmt: skip

# How many clips of each computed kind; each is a source of its own, with its own setting of the generator.
COUNTS = {
    "train": {"silence": 10, "hum": 6, "noise": 5},
    "valid": {"silence": 10, "hum": 8, "noise": 8},
    "test": {"silence": 8, "hum": 6, "noise": 7},
}
SECONDS = 2  # of every clip that is not speech


def spread(rng: np.random.Generator, part: float, low: float, high: float) -> float:
    """A number within 10 % of the range around `part` (0 to 1) of the way from low to high."""
    return low + (high - low) * float(np.clip(part + rng.uniform(-0.1, 0.1), 0, 1))


def level(sound: Sound, dbfs: float) -> Sound:
    """`sound` scaled to this root mean square in dB of full scale."""
    return sound * (10 ** (dbfs / 20) / np.sqrt(np.mean(sound**2)))


def coloured(rng: np.random.Generator, samples: int, slope: float, dbfs: float) -> Sound:
    """Gaussian noise whose power falls by `slope` dB per octave, flat under 40 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 40.0) / 40.0)
    return level(np.fft.irfft(spectrum * 10 ** (slope * octaves / 20), samples), dbfs)


def rain(rng: np.random.Generator, samples: int, drops_per_second: float, dbfs: float) -> Sound:
    """Short decaying bursts at random times over a bed of soft noise."""
    sound = coloured(rng, samples, -2, -20)
    for _ in range(int(drops_per_second * samples / RATE)):
        length = int(rng.uniform(0.002, 0.012) * RATE)
        start = int(rng.integers(samples - length))
        burst = rng.standard_normal(length) * np.exp(-np.arange(length) / length * 5)
        sound[start : start + length] += burst * rng.lognormal(-1.5, 0.8)
    return level(sound, dbfs)


def silence(rng: np.random.Generator, part: float) -> Sound:
    """Room tone from -56 dBFS down to -94 dBFS, which in 16 bits is zeros and ones; loud ones may be dull."""
    dbfs = spread(rng, part, -94, -56)
    return coloured(rng, SECONDS * RATE, rng.uniform(-6, 0) if dbfs > -75 else 0.0, dbfs)


def hum(rng: np.random.Generator, part: float) -> Sound:
    """Twenty harmonics of the mains with random phases, the even ones stronger as in a transformer, on a floor."""
    time = np.arange(SECONDS * RATE) / RATE
    frequency, fall = rng.choice([50.0, 60.0]) + rng.uniform(-0.05, 0.05), rng.uniform(0.8, 1.8)
    sound = np.zeros(len(time))
    for number in range(1, 21):
        strength = (1.0 if number % 2 == 0 or number == 1 else 0.4) / number**fall
        sound += strength * np.sin(2 * np.pi * number * frequency * time + rng.uniform(0, 2 * np.pi))
    return level(sound, spread(rng, part, -52, -40)) + coloured(rng, len(sound), -3, -84)


def noise(rng: np.random.Generator, part: float, kind: str) -> Sound:
    """White, pink or brown noise, or rain, -50 to -40 dBFS."""
    samples, dbfs = SECONDS * RATE, spread(rng, part, -50, -40)
    if kind == "rain":
        return rain(rng, samples, rng.uniform(60, 300), dbfs)
    slope = {"white": 0.0, "pink": -3.0, "brown": -6.0}[kind]
    return coloured(rng, samples, slope + rng.uniform(-1, 0.5), dbfs)


def speak(voice: Voice, sentence: str) -> Sound:
    """One sentence from espeak-ng at 16 kHz, without the silence around it."""
    command = ["espeak-ng", "-v", voice.voice, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout", sentence]
    wave = subprocess.run(command, check=True, capture_output=True).stdout
    sound, rate = soundfile.read(io.BytesIO(wave), dtype="float64")
    loud = np.flatnonzero(np.abs(sound) > 1e-3)
    return soxr.resample(sound[loud[0] : loud[-1] + 1], rate, RATE)


def speech(rng: np.random.Generator, voice: Voice) -> Sound:
    """The voice's sentences with pauses of 0.4 to 1.2 s, over the faint noise of a room; whole seconds long."""
    parts: list[Sound] = []
    for sentence in voice.text.split(". "):
        parts += [np.zeros(int(rng.uniform(0.4, 1.2) * RATE)), speak(voice, sentence.rstrip(".") + ".")]
    talk = np.concatenate(parts[1:])
    before = int(rng.uniform(0.15, 0.4) * RATE)
    seconds = -(-(len(talk) + before + RATE // 4) // RATE)
    sound = np.zeros(seconds * RATE)
    sound[before : before + len(talk)] = level(talk, voice.level)
    return sound + coloured(rng, len(sound), -3, -72)


def clips() -> list[Clip]:
    """Everything that the folder holds, in order."""
    made: list[Clip] = []
    for split in SPLITS:
        for voice in VOICES[split]:
            made.append(Clip(split, "speech", voice.voice.replace("+", "_"), partial(speech, voice=voice)))
        for label, count in COUNTS[split].items():
            for at in range(count):
                part = at / (count - 1)
                if label == "noise":
                    kind = ("white", "rain", "pink", "brown")[at % 4]
                    made.append(Clip(split, label, f"{split}_{kind}{at + 1}", partial(noise, part=part, kind=kind)))
                else:
                    make = {"silence": silence, "hum": hum}[label]
                    made.append(Clip(split, label, f"{split}_{label}{at + 1}", partial(make, part=part)))
    return made


def make(folder: Path) -> list[dict[str, str]]:
    """Write every clip as 16-bit FLAC and manifest.csv; returns the manifest's rows."""
    rows = []
    for clip in clips():
        rng = np.random.default_rng(zlib.crc32(f"{clip.label}/{clip.source}".encode()))
        path = Path(clip.split, clip.label, f"{clip.source}.flac")
        sound = clip.make(rng)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / path, sound, RATE, subtype="PCM_16", compression_level=1.0)
        rows.append(
            {
                "path": path.as_posix(),
                "split": clip.split,
                "label": clip.label,
                "source_id": f"{clip.label}:{clip.source}",
                "seconds": f"{len(sound) / RATE:.3f}",
            }
        )
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the demo's sound.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write (default: demo_sound beside this)")
    folder = parser.parse_args().output
    if shutil.which("espeak-ng") is None:
        print(
            "error: espeak-ng is not installed; install it, for example with `apt install espeak-ng`.", file=sys.stderr
        )
        return 2
    for split in SPLITS:
        shutil.rmtree(folder / split, ignore_errors=True)
    rows = make(folder)
    megabytes = sum((folder / row["path"]).stat().st_size for row in rows) / 1e6
    print(f"{len(rows)} files, {sum(float(row['seconds']) for row in rows):.0f} s, {megabytes:.2f} MB in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
