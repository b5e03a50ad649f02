"""Speech Commands as folders: `python -m recipes.keyword_spotting.download FOLDER` (2.3 GB from its official place).

Writes FOLDER/clips/train, valid and test with a folder for each label, and a manifest.csv whose sources are the
speakers: the words asked for keep their names, every other word is `unknown`, and the recordings of noise are cut into
one-second clips of `background`, a recording in one part alone. Files are linked, not copied, where the disk can.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import track

from dslify.errors import DslifyError, OptionError
from dslify.files import written_whole

from .data import NOISE, PARTS
from .network import LENGTH

WORDS = ("down", "eight", "five", "go", "left", "one", "right", "up", "zero")
SUBSETS = dict(zip(PARTS, ("training", "validation", "testing"), strict=True))
NOISES = "_background_noise_"
UNKNOWN_EACH = 3  # unknown clips of a speaker that are kept, so that they do not outnumber everything else

Clip = tuple[str, str, str, str]  # path in the folder, part, label, source


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="recipes.keyword_spotting.download", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--words", nargs="+", default=list(WORDS), help="the keywords")
    parser.add_argument("--local", type=Path, help="an unpacked Speech Commands folder, instead of downloading")
    given = parser.parse_args(arguments)
    try:
        root = given.local or _downloaded(given.folder)
        count = arranged(root, given.folder / "clips", given.words)
    except (DslifyError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.folder / 'clips'}: {count} clips")
    print(f"next: python -m recipes.keyword_spotting.train --data {given.folder / 'clips'}")
    return 0


def _downloaded(folder: Path) -> Path:
    from torchaudio.datasets import SPEECHCOMMANDS

    folder.mkdir(parents=True, exist_ok=True)
    data = SPEECHCOMMANDS(folder, download=True)
    return folder / Path(data.get_metadata(0)[0]).parents[1]


def arranged(root: Path, folder: Path, words: Sequence[str]) -> int:
    """Make train/, valid/ and test/ of an unpacked Speech Commands; returns how many clips. Raises OptionError."""
    lists = {part: root / f"{SUBSETS[part]}_list.txt" for part in ("valid", "test")}
    wrong = [str(path) for path in lists.values() if not path.is_file()] + [
        str(root / word) for word in words if not (root / word).is_dir()
    ]
    if wrong:
        raise OptionError(
            f"{root} is no unpacked Speech Commands: there is no {wrong[0]}; name the folder that has it."
        )
    if folder.exists():
        raise OptionError(f"{folder} is there already; remove it, or name another folder.")
    named = {line: part for part, path in lists.items() for line in path.read_text().split()}
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        clips = [*_spoken(root, making, set(words), named), *_noise(root, making)]
        with written_whole(making / "manifest.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "split", "label", "source_id"))
            writer.writerows(clips)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return len(clips)


def _spoken(root: Path, folder: Path, words: set[str], named: dict[str, str]) -> Iterator[Clip]:
    files = sorted(path for path in root.glob("*/*.wav") if path.parent.name != NOISES)
    others: dict[str, int] = {}
    for path in track(files, "words", console=Console(stderr=True)):
        word, speaker = path.parent.name, path.name.split("_")[0]
        label = word if word in words else "unknown"
        if label == "unknown":
            others[speaker] = others.get(speaker, 0) + 1
            if others[speaker] > UNKNOWN_EACH:
                continue
        part = named.get(f"{word}/{path.name}", "train")
        place = Path(part) / label / f"{word}_{path.name}"
        _link(path, folder / place)
        yield str(place), part, label, speaker


def _noise(root: Path, folder: Path) -> Iterator[Clip]:
    for at, path in enumerate(sorted((root / NOISES).glob("*.wav"))):
        part = PARTS[at % len(PARTS)]
        sound, rate = soundfile.read(path, dtype="int16")
        for begin in range(0, len(sound) - LENGTH + 1, LENGTH):
            place = Path(part) / NOISE / f"{path.stem}_{begin // LENGTH:03d}.wav"
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / place, np.ascontiguousarray(sound[begin : begin + LENGTH]), rate)
            yield str(place), part, NOISE, path.stem


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


if __name__ == "__main__":
    raise SystemExit(main())
