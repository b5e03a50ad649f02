"""What a user can get wrong, through the command line: one sentence, exit code 2, nothing written, nothing run."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from torch import nn
from typer.testing import CliRunner

from dslify.cli import app
from tests.zoo import ZOO

RATE = 16_000
LENGTH = ZOO["autoencoder"].shape[-1]  # samples in a segment of the network under test
NETS = """
from torch import nn


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.again(self.again(self.first(x))))


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.pair, self.last = nn.Linear(8, 8), Pair(), nn.Linear(4, 8)

    def forward(self, x):
        left, right = self.pair(self.first(x))
        return self.last(left) + self.last(right)


class Pair(nn.Module):
    def forward(self, x):
        return (x * 2).chunk(2, -1)
"""


def sound(seconds: float, seed: int = 0) -> numpy.ndarray:
    return 0.1 * numpy.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(numpy.float32)


class Runs:
    """Leaves a file behind if anybody unpickles it."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, ("was_run", "w")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user may have it: models, a dslified one, and data good and bad."""
    folder = tmp_path_factory.mktemp("prepared")
    torch.save(ZOO["autoencoder"].build(), folder / "model.pt")
    (folder / "nets_under_test.py").write_text(NETS)
    (folder / "text.pt").write_text("no model at all\n" * 100)
    (folder / "empty.pt").touch()
    (folder / "cut_short.pt").write_bytes((folder / "model.pt").read_bytes()[:20_000])
    torch.save({"weight": torch.zeros(3)}, folder / "weights.pt")
    (folder / "old.svg").write_text("<svg/>")
    (folder / "good.svg").mkdir()
    _foreign(folder / "foreign.pt")
    with (folder / "runs.pt").open("wb") as file:
        pickle.dump(Runs(), file)
    torch.save(Runs(), folder / "runs_too.pt")
    for name, files in {
        "good": {f"{at}.flac": sound(LENGTH / RATE * 8, at) for at in range(4)},
        "short": {f"{at}.flac": sound(LENGTH / RATE * 0.6, at) for at in range(4)},
        "shortest": {"a.flac": sound(LENGTH / RATE * 0.1)},
        "nan": {"a.wav": numpy.full(LENGTH, numpy.nan, numpy.float32)},
        "empty": {},
    }.items():
        (folder / name).mkdir()
        for file_name, samples in files.items():
            subtype = "FLOAT" if file_name.endswith("wav") else None
            soundfile.write(folder / name / file_name, samples, RATE, subtype=subtype)
    (folder / "text").mkdir()
    (folder / "text" / "notes.txt").write_text("no sound")
    (folder / "broken").mkdir()
    (folder / "broken" / "a.wav").write_bytes(b"RIFF but not really")
    arrays = numpy.zeros((30, 1, LENGTH), numpy.float32)
    arrays[7, 0, 5] = numpy.nan
    numpy.save(folder / "nan.npy", arrays)
    numpy.save(folder / "other_shape.npy", numpy.zeros((30, 3, 8, 8), numpy.float32))
    numpy.save(folder / "few.npy", sound(3 * LENGTH / RATE).reshape(3, 1, LENGTH))
    done = CliRunner().invoke(
        app, ["insert", str(folder / "model.pt"), "--at", "encoder.block3", "--input", "1x1x4096"]
    )
    assert done.exit_code == 0, done.output
    (folder / "damaged.dsl").write_bytes((folder / "model.dsl").read_bytes()[:-500])
    return folder


def _foreign(path: Path) -> None:
    """A pickled network whose class lives in a module that nobody vouched for."""
    module = types.ModuleType("stranger")
    kind = type("Net", (nn.Sequential,), {"__module__": "stranger"})
    module.Net = kind  # type: ignore[attr-defined]
    sys.modules["stranger"] = module
    try:
        torch.save(kind(nn.Linear(4, 4)), path)
    finally:
        del sys.modules["stranger"]


def listing(folder: Path) -> dict[str, str]:
    """Every file with a hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in files
    }


TRAIN = "finetune model.dsl --steps 2 --switch-steps 2 --data"
# The command, and words that its sentence has to hold.
CASES = {
    "missing file": ("inspect nothing.pt", ["nothing.pt", "no such file"]),
    "missing dsl file": ("evaluate nothing.dsl --data good", ["nothing.dsl"]),
    "no model": ("insert text.pt --at layer", ["text.pt", "no model file"]),
    "empty file": ("inspect empty.pt", ["empty.pt", "empty"]),
    "cut short": ("inspect cut_short.pt", ["cut_short.pt"]),
    "weights only": ("inspect weights.pt", ["weights.pt", "--arch"]),
    "a folder": ("inspect good", ["good", "folder"]),
    "the working folder": ("insert . --at 0 -o new.dsl", ["folder"]),
    "foreign class": ("insert foreign.pt --at 0", ["stranger.Net", "--trust"]),
    "pickle that runs code": ("insert runs.pt --at 0", ["runs.pt"]),
    "archive that runs code": ("insert runs_too.pt --at 0", ["runs_too.pt", "open"]),
    "trust that cannot be had": ("inspect foreign.pt --trust stranger", ["stranger"]),
    "unknown name": ("inspect timm:resnet81", ["resnet81", "nearest"]),
    "unknown family": ("inspect keras:resnet18", ["keras:resnet18"]),
    "damaged dsl": ("evaluate damaged.dsl --data good", ["damaged.dsl"]),
    "dsl that is none": ("evaluate model.pt --data good", ["model.pt"]),
    "unknown cut": (
        "insert model.pt --at encoder.blok3 --input 1x1x4096 -o new.dsl",
        ["encoder.blok3", "encoder.block3", "nearest"],
    ),
    "cut called twice": (
        "insert nets_under_test:Twice --at again --input 1x8",
        ["again", "2 times", "one tensor"],
    ),
    "cut with two values": (
        "insert nets_under_test:Split --at pair --input 1x8",
        ["pair", "2 values", "one tensor"],
    ),
    "cut at the end": ("insert model.pt --at decoder.block4 --input 1x1x4096 -o new.dsl", ["last value", "nothing"]),
    "unknown scope": ("insert model.pt --at 0 --scope nowhere --input 1x1x4096 -o new.dsl", ["nowhere", "encoder"]),
    "width 0": ("insert model.pt --at encoder.block3 --width 0 -o new.dsl", ["width", "above 0 and at most 1; got 0."]),
    "width 1.5": ("insert model.pt --at encoder.block3 --width 1.5 -o new.dsl", ["width", "got 1.5."]),
    "width abc": ("insert model.pt --at encoder.block3 --width abc -o new.dsl", ["width", "got 'abc'."]),
    "width nan": ("insert model.pt --at encoder.block3 --width nan -o new.dsl", ["width", "got nan."]),
    "cost 1": ("insert model.pt --at encoder.block3 --cost 1 -o new.dsl", ["cost", "below 1; got 1."]),
    "width and cost": ("insert model.pt --at encoder.block3 --width 1 --cost 0.1 -o new.dsl", ["width", "cost"]),
    "depth 0": ("insert model.pt --at encoder.block3 --depth 0 -o new.dsl", ["depth", "above 0 and at most 1; got 0."]),
    "depth 1.5": ("insert model.pt --at encoder.block3 --depth 1.5 -o new.dsl", ["depth", "got 1.5."]),
    "depth abc": ("insert model.pt --at encoder.block3 --depth abc -o new.dsl", ["depth", "got 'abc'."]),
    "auto without a cut that saves": (
        "insert nets_under_test:Twice --at auto --input 1x8 -o new.dsl --width 1",
        ["--at auto", "of 3 modules 1 can be cut at", "dslify inspect"],
    ),
    "auto and to": (
        "insert model.pt --at auto --to decoder.block1 --input 1x1x4096 -o new.dsl",
        ["--at auto", "--to", "name the cut"],
    ),
    "levels 0": ("inspect model.pt --levels 0", ["levels", "at least 1; got 0."]),
    "levels abc": ("inspect model.pt --levels abc", ["levels", "'abc'"]),
    "inspect at width 2": ("inspect model.pt --width 2", ["width", "above 0 and at most 1; got 2."]),
    "inspect at no width": ("inspect model.pt --width wide", ["width", "'wide'"]),
    "picture of another kind": ("inspect model.pt --picture p.gif", ["p.gif", ".svg, .png or .html"]),
    "picture without a suffix": ("inspect model.pt --picture plot", ["plot", ".svg"]),
    "picture in no folder": ("inspect model.pt --picture nowhere/p.svg", ["nowhere/p.svg", "no folder"]),
    "picture in a file": ("inspect model.pt --picture model.pt/p.svg", ["model.pt/p.svg", "no folder"]),
    "picture that is there": ("inspect model.pt --picture old.svg", ["old.svg", "exists", "--force"]),
    "picture over a folder": ("inspect model.pt --picture good.svg --force", ["good.svg", "exists"]),
    "picture of a dsl file": ("inspect model.dsl --picture p.svg", ["--picture", "model.dsl", "cut already"]),
    "inspect a network, explained": ("inspect model.pt --explain", ["--explain", "insert", "model.pt"]),
    "input of an unknown name": (
        "inspect nets_under_test:Twice --input y=1x8",
        ["'y'", "its inputs are x"],
    ),
    "input named twice": ("inspect nets_under_test:Twice --input x=1x8,x=1x8", ["'x'", "once"]),
    "input without a name": ("inspect nets_under_test:Twice --input x=1x8,1x8", ["1x8", "no name"]),
    "input of an odd name": ("inspect nets_under_test:Twice --input =1x8", ["''", "name"]),
    "unknown mask": ("insert model.pt --at encoder.block3 --mask odd --input 1x1x4096 -o new.dsl", ["mask", "'odd'"]),
    "input of other channels": ("insert model.pt --at encoder.block3 --input 1x2x4096 -o new.dsl", ["1x2x4096"]),
    "input that is no shape": ("insert model.pt --at encoder.block3 --input 1xyx3 -o new.dsl", ["1xyx3"]),
    "input of size 0": ("insert model.pt --at encoder.block3 --input 1x1x0 -o new.dsl", ["1x1x0"]),
    "file is there": ("insert model.pt --at encoder.block3 --input 1x1x4096", ["model.dsl", "exists", "--force"]),
    "no folder": (f"{TRAIN} nowhere", ["nowhere"]),
    "empty folder": (f"{TRAIN} empty", ["empty"]),
    "folder without sound": (f"{TRAIN} text", ["text", "none is audio"]),
    "broken sound only": (f"{TRAIN} broken", ["a.wav", "not readable"]),
    "shorter than a segment": (f"{TRAIN} short", ["short", "segment"]),
    "far shorter than a segment": (f"{TRAIN} shortest", ["short", "segment"]),
    "NaN in sound": (f"{TRAIN} nan", ["a.wav", "NaN"]),
    "NaN in arrays": (f"{TRAIN} nan.npy", ["nan.npy[7]", "NaN"]),
    "NaN when judging": ("evaluate model.dsl --data nan.npy", ["nan.npy[7]", "NaN"]),
    "arrays of another rank": (f"{TRAIN} other_shape.npy", ["other_shape.npy", "3x8x8", "1x4096"]),
    "no switch folder": (f"{TRAIN} good --switch-data nowhere", ["nowhere"]),
    "steps in words": ("finetune model.dsl --data good --steps many", ["steps", "'many'"]),
    "negative learning rate": ("finetune model.dsl --data good --lr -1", ["lr", "above 0; got -1."]),
    "nothing to resume": (f"{TRAIN} good --resume", ["resume"]),
    "two aims": ("calibrate model.dsl --data good --light-share 1 --max-difference 1", ["both"]),
    "no aim": ("calibrate model.dsl --data good", ["neither"]),
    "share over 1": ("calibrate model.dsl --data good --light-share 1.2", ["light-share", "got 1.2."]),
    "too few to calibrate": ("calibrate model.dsl --data few.npy --light-share 0.5", ["20", "3"]),
    "unknown rows": ("evaluate model.dsl --data good --by colour", ["label", "'colour'"]),
    "demo over other files": ("demo --output good", ["good", "--output"]),
    "demo over a file": ("demo --output model.pt", ["model.pt", "--output"]),
    "unknown command": ("insrt model.pt", ["insrt", "insert", "--help"]),
    "unknown option": ("insert model.pt --att encoder", ["--att", "--help"]),
    "no --at": ("insert model.pt", ["--at", "dslify insert --help"]),
    "no value": ("insert model.pt --at", ["--at"]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_one_sentence_and_nothing_written(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, words = CASES[name]
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    before = listing(folder)
    result = CliRunner().invoke(app, command.split(), prog_name="dslify")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    assert [word for word in words if word not in result.stderr] == [], result.stderr
    assert listing(folder) == before


def test_three_nearest_cuts_are_offered(prepared: Path) -> None:
    argv = ["insert", str(prepared / "model.pt"), "--at", "encoder.blok3", "--input", "1x1x4096", "-o", "new.dsl"]
    result = CliRunner().invoke(app, argv)
    offered = result.stderr.rpartition("nearest cut points are ")[2].strip().rstrip(".").split(", ")
    assert len(offered) == 3
    assert "encoder.block3" in offered
    assert len(set(offered)) == 3


def test_broken_file_among_good_ones_is_named_skipped_and_counted(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared / "good", data)
    (data / "broken.flac").write_bytes(b"fLaC and then nothing of the kind")
    result = CliRunner().invoke(app, ["evaluate", str(prepared / "model.dsl"), "--data", str(data)])
    assert result.exit_code == 0, result.output
    assert "32 samples from 4 files" in result.stdout
    assert "skipped 1:" in result.stdout
    assert "broken.flac" in result.stdout


def test_errors_leave_stdout_to_the_document(prepared: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(prepared / "text.pt"), "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
