"""Calibration from the command line: what is written, kept and read again, and what is refused without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import dslify
from dslify.calibrate import recorded
from dslify.cli import app
from dslify.data import open_data
from dslify.errors import StoreError

N, LENGTH = 120, 16
METRIC = """
def error(output, inputs):
    return output.square().mean((1, 2))

def broken(output):
    return output

many = 3
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 4, 1))

    def forward(self, value: Tensor) -> Tensor:
        return self.two(self.one(value))


def sound(n: int, seed: int) -> Tensor:
    """From quiet to loud, (n, 1, LENGTH)."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, LENGTH, generator=made) * torch.rand(n, 1, 1, generator=made)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model.dsl with its run folder beside it, and data."""
    folder = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(0)
    net = dslify.insert(Net().eval(), "one", 0.3, (torch.randn(2, 1, LENGTH),))
    seen = sound(60, 1)
    dslify.finetune(net, seen, steps=30, switch_steps=30, run_dir=folder / "model.run", progress=False)
    dslify.save(net, folder / "model.dsl")
    np.save(folder / "new.npy", sound(N, 2).numpy())
    np.save(folder / "few.npy", sound(30, 3).numpy())
    np.save(folder / "old.npy", torch.cat([seen[:25], sound(N - 25, 4)]).numpy())
    (folder / "own_metric.py").write_text(METRIC)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, ["calibrate", "model.dsl", *map(str, words)], prog_name="dslify")


def document(*words: Any) -> dict[str, Any]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_promise_is_printed_and_kept_in_the_file(folder: Path) -> None:
    said = call("--data", "new.npy", "--max-difference", 0.4, "--guarantee", "mean").stdout
    assert f"promise: for new samples like these {N}, the mean difference over all samples is at most 0.4" in " ".join(
        said.split()
    )
    assert "(epsilon 0.400, n 120, bound 1.00)" in " ".join(said.split())
    assert "held against what model.run trained on" in said
    kept = recorded(dslify.load("model.dsl"))
    assert kept is not None
    assert (kept["guarantee"], kept["epsilon"], kept["units"], kept["bound"]) == ("mean", 0.4, N, 1.0)
    found = document("--data", "new.npy", "--max-difference", 0.4, "--confidence", 0.8)
    assert (found["guarantee"], found["runs"]) == ("routed", ["model.run"])
    assert found["delta"] == pytest.approx(0.2)
    net = dslify.load("model.dsl")
    kept = recorded(net)
    assert kept is not None
    assert kept == {name: found[name] for name in kept}
    assert kept["promise"].startswith("with 80 % confidence")
    dslify.save(net, "again.dsl")
    assert recorded(dslify.load("again.dsl")) == recorded(net)


def test_what_was_promised_is_forgotten_when_a_weight_or_a_threshold_changes(folder: Path) -> None:
    document("--data", "new.npy", "--light-share", 0.5)
    net = dslify.load("model.dsl")
    (layer,) = dslify.dsl_layers(net)
    assert recorded(net) is not None
    before = layer.threshold.clone()
    layer.threshold.mul_(2)
    assert recorded(net) is None
    layer.threshold.copy_(before)
    assert recorded(net) is not None
    with torch.no_grad():
        next(layer.switch.parameters()).add_(1e-3)
    assert recorded(net) is None
    assert recorded(nn.Linear(2, 2)) is None


def test_runs_beside_the_file_are_found_and_others_named(folder: Path) -> None:
    found = document("--data", "old.npy", "--light-share", 0.5)
    assert found["overlap"] == 25
    assert "25 of 120 samples were used in training too" in found["notes"][0]
    shutil.copytree("model.run", "model.run2")
    assert document("--data", "old.npy", "--light-share", 0.5)["runs"] == ["model.run", "model.run2"]
    shutil.rmtree("model.run2")
    Path("model.run").rename("elsewhere")
    unknown = call("--data", "old.npy", "--light-share", 0.5).stdout
    assert "no run folder beside model.dsl" in unknown
    assert document("--data", "old.npy", "--light-share", 0.5)["overlap"] is None
    assert document("--data", "old.npy", "--light-share", 0.5, "--run-dir", "elsewhere")["overlap"] == 25


def test_a_named_metric_and_a_curve(folder: Path) -> None:
    words = ["--data", "new.npy", "--metric", "own_metric:error", "--max-metric", 0.05, "--curve", "curve.json"]
    found = document(*words)
    assert found["max_metric"] == 0.05
    rows = json.loads(Path("curve.json").read_text())
    assert [rows[0]["share"], rows[-1]["share"]] == [0, 1]
    assert found["threshold"] in [pytest.approx(row["threshold"]) for row in rows]
    refused = call(*words)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "--force" in refused.stderr
    assert document(*words, "--force")["threshold"] == found["threshold"]


def test_several_folders_of_training_from_python(folder: Path) -> None:
    net, old = dslify.load("model.dsl"), open_data("old.npy", (1, LENGTH))
    for training in ("model.run", ["model.run", "model.run"]):
        assert dslify.calibrate(net, old, light_share=0.5, training=training).overlap == 25


CALIBRATE = "--data new.npy --max-difference 0.1"
REFUSED = {
    "three aims": (f"{CALIBRATE} --light-share 0.5 --max-metric 1", "exactly one"),
    "no aim": ("--data new.npy --guarantee mean", "neither"),
    "a share with a promise": ("--data new.npy --light-share 0.5 --guarantee mean", "give max_difference"),
    "an unknown promise": (f"{CALIBRATE} --guarantee all", "one of mean, routed; got 'all'."),
    "confidence on average": (f"{CALIBRATE} --guarantee mean --confidence 0.9", "takes no confidence"),
    "confidence over 1": (f"{CALIBRATE} --confidence 95", "confidence must be above 0 and below 1; got 95."),
    "confidence in words": (f"{CALIBRATE} --confidence high", "got 'high'."),
    "a bound below the aim": (f"{CALIBRATE} --confidence 0.9 --bound 0.05", "bound has to be larger"),
    "a bound of nothing": (f"{CALIBRATE} --bound 2", "leave it out"),
    "too few": ("--data few.npy --max-difference 0.05 --confidence 0.95", "at least 68 sources; got 30"),
    "too few on average": ("--data few.npy --max-difference 0.02 --guarantee mean", "at least 49 sources; got 30"),
    "a metric that is none": ("--data new.npy --max-metric 1 --metric own_metric:many", "cannot be called"),
    "a metric that fails": (
        "--data new.npy --max-metric 1 --metric own_metric:broken",
        "broken failed (TypeError",
    ),
    "a metric of no module": ("--data new.npy --max-metric 1 --metric nowhere:error", "cannot be imported"),
    "a metric without a form": ("--data new.npy --max-metric 1 --metric error", "pkg.mod:function"),
    "a metric without a limit": (f"{CALIBRATE} --metric own_metric:error", "go together"),
    "a limit without a metric": ("--data new.npy --max-metric 1", "go together"),
    "a curve of another kind": (f"{CALIBRATE} --curve curve.txt", "end in .csv or .json"),
    "a curve nowhere": (f"{CALIBRATE} --curve no/curve.csv", "nothing can be written there"),
    "a folder that is no run": (f"{CALIBRATE} --run-dir .", "name the folder of a run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_and_nothing_written(name: str, folder: Path) -> None:
    words, expected = REFUSED[name]
    before = listing(folder)
    result = call(*words.split(), "--curve", "curve.csv") if "--curve" not in words else call(*words.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert expected in result.stderr
    after = listing(folder)
    assert {path: content for path, content in after.items() if "__pycache__" not in path} == before


def test_a_curve_that_cannot_be_written_changes_no_threshold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dslify.files.os.fsync", full)
    before = listing(folder)
    refused = call(*CALIBRATE.split(), "--curve", "curve.csv")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: curve.csv cannot be written (No space left on device)")
    assert refused.stderr.count("\n") == 1
    assert listing(folder) == before
    net = dslify.load("model.dsl")
    with pytest.raises(StoreError, match="cannot be written"):
        dslify.calibrate(net, "new.npy", light_share=0.5, curve="curve.csv")
    assert dslify.dsl_layers(net)[0].threshold == 0
