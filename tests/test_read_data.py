"""Data on the command line: tables of labels, workers, pictures, and reports on what was read and skipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

import dslify
from dslify.cli import app
from dslify.console import Output, read_data
from dslify.errors import OptionError
from dslify.images import Pixels

LENGTH = 400  # samples of the network's input, 25 ms at 16 kHz
SEGMENTS = 8  # in each recording
NAMES = ("a", "b", "c", "d")


def call(*argv: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in argv], prog_name="dslify")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four recordings of eight segments each, a broken one, and a table that labels three of the five."""
    random = numpy.random.default_rng(0)
    root = tmp_path / "sounds"
    root.mkdir()
    for name in NAMES:
        soundfile.write(root / f"{name}.wav", random.uniform(-0.5, 0.5, SEGMENTS * LENGTH), 16_000)
    (root / "broken.wav").write_bytes(b"no sound")
    (tmp_path / "table.csv").write_text("path,label,source\na.wav,up,ann\nb.wav,down,ann\nbroken.wav,down,ben\n")
    return root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Flatten(), nn.Linear(LENGTH, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    cut = dslify.insert(net, "2", 0.5, (torch.zeros(2, 1, LENGTH),))
    return dslify.save(cut, tmp_path / "net.dsl")


def test_a_table_labels_the_rows_of_an_evaluation(folder, file, tmp_path):
    words = ["evaluate", file, "--data", folder, "--rate", 16_000, "--labels", tmp_path / "table.csv", "--json"]
    found = [call(*words, "--workers", workers) for workers in (0, 2)]
    assert [result.exit_code for result in found] == [0, 0], found[0].output
    one, other = (json.loads(result.stdout) for result in found)
    assert one["n"] == 2 * SEGMENTS
    assert {kind["label"] for kind in one["kinds"]} >= {"up", "down"}
    (report,) = one["read"]
    ((name, reason),) = report["skipped"]
    assert name == "broken.wav"
    assert reason.startswith("not readable as audio")
    assert "2 files are not listed in table.csv and were left out" in report["notes"]
    assert one["read"] == other["read"]
    assert one["kinds"] == other["kinds"]


def test_every_command_takes_tables_and_workers(folder, file, tmp_path):
    data = ["--data", folder, "--rate", 16_000, "--labels", tmp_path / "table.csv", "--workers", 1]
    (tmp_path / "table.csv").write_text("path,label\na.wav,up\nb.wav,down\nc.wav,up\n")
    trained = call("finetune", file, *data, "--steps", 2, "--switch-steps", 2, "--json")
    assert trained.exit_code == 0, trained.output
    assert [report["samples"] for report in json.loads(trained.stdout)["read"]] == [3 * SEGMENTS]
    calibrated = call("calibrate", file, *data, "--light-share", 0.5, "--json")
    assert calibrated.exit_code == 0, calibrated.output
    assert json.loads(calibrated.stdout)["read"][0]["samples"] == 3 * SEGMENTS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--labels", "gone.csv"], "There is no table of labels gone.csv"),
        (["--labels", "torn.csv"], "torn.csv has the columns file, label; a 'path' column is expected"),
        (["--workers", "many"], "workers must be a whole number of at least 0; got 'many'"),
        (["--workers", "-1"], "workers must be a whole number of at least 0; got -1"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_changes_nothing(folder, file, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Path("torn.csv").write_text("file,label\na.wav,up\n")
    before = file.read_bytes(), sorted(tmp_path.iterdir())
    for command, options in (("finetune", ()), ("calibrate", ("--light-share", 0.5)), ("evaluate", ())):
        result = call(command, file, "--data", folder, *options, *words)
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")
    assert (file.read_bytes(), sorted(tmp_path.iterdir())) == before


def test_notes_on_pictures_are_kept_in_the_file_and_used(tmp_path):
    layers = nn.Linear(3 * 64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    cut = dslify.insert(nn.Sequential(nn.Flatten(), *layers), "2", 0.5, (torch.zeros(2, 3, 8, 8),))
    pixels = Pixels((0.5,) * 3, (0.25,) * 3, "bicubic")
    cut.meta["dslify"] = {**cut.meta["dslify"], "pixels": pixels.to_json(), "classes": ["cat", "ant"]}
    (tmp_path / "pictures" / "ant").mkdir(parents=True)
    Image.new("RGB", (9, 8), (255, 0, 128)).save(tmp_path / "pictures" / "ant" / "a.png")
    net = dslify.load(dslify.save(cut, tmp_path / "net.dsl"))
    out = Output(as_json=True, quiet=False)
    samples = read_data(net, str(tmp_path / "pictures"), None, None, out)
    assert samples[0][:, 4, 4].tolist() == pytest.approx([2, -2, (128 / 255 - 0.5) / 0.25], abs=1e-6)
    assert samples.class_indices().tolist() == [1]
    assert out.read == [samples.report.to_json()]
    with pytest.raises(OptionError, match="--segment is for sound, and the network reads 3x8x8 per sample"):
        read_data(net, str(tmp_path / "pictures"), None, 0.5, out)
