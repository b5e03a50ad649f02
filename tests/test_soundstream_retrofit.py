"""The recipe's retrofit: how the data is divided, the commands it runs, and what it makes of their answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import dslify
from dslify.cli import app
from dslify.errors import DataError, TrainError
from recipes.soundstream import pretrained, retrofit
from recipes.soundstream.retrofit import JUDGED, PARTS, SWITCH_EVERY, divide, task_loss
from recipes.soundstream.variants import summary
from recipes.soundstream.work import Work

RATE = 16_000
COUNTS = {"train": SWITCH_EVERY, "valid": 2, "test": 1}  # recordings of each label


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones and noise, two clips of each recording, as codec16k lays them out."""
    folder = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    rows = []
    for split, count in COUNTS.items():
        for label, level in (("speech", 0.1), ("silence", 0.001)):
            for number, part in ((number, part) for number in range(count) for part in "ab"):
                time = np.arange(int(1.6 * RATE)) / RATE
                tone = np.sin(2 * np.pi * (150 + 40 * number) * time) * (1 + np.sin(4 * time))
                path = Path(split, label, f"{number}{part}.wav")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(folder / path, level * (tone + 0.1 * rng.standard_normal(len(time))), RATE)
                rows.append({"path": path, "split": split, "label": label, "source_id": f"{split}:{label}:{number}"})
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_no_recording_is_in_two_parts(data, tmp_path):
    divide(data, tmp_path)
    parts = {name: rows_of(tmp_path / name / "manifest.csv") for name in PARTS}
    given = {str(data / row["path"]): row for row in rows_of(data / "manifest.csv")}
    apart = ("light", "switch", "valid", "test")
    for name in apart:
        sources = {row["source"] for row in parts[name]}
        others = {row["source"] for other in apart if other != name for row in parts[other]}
        assert sources
        assert not sources & others
    assert sorted(row["path"] for name in apart for row in parts[name]) == sorted(given)
    splits = {name: {given[row["path"]]["split"] for row in parts[name]} for name in apart}
    assert splits == {"light": {"train"}, "switch": {"train"}, "valid": {"valid"}, "test": {"test"}}
    for label in ("speech", "silence"):
        assert parts[label] == [row for row in parts["valid"] if row["label"] == label]


def test_data_that_leaves_a_part_empty_is_named(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.csv is missing"):
        divide(tmp_path, tmp_path / "splits")
    (tmp_path / "manifest.csv").write_text("path,split\na.wav,train\n")
    with pytest.raises(DataError, match="no column label and no column source_id"):
        divide(tmp_path, tmp_path / "splits")
    (tmp_path / "manifest.csv").write_text("path,split,label,source_id\na.wav,train,speech,a\nb.wav,valid,speech,b\n")
    with pytest.raises(DataError, match="leaves nothing for switch"):
        divide(tmp_path, tmp_path / "splits")


def in_this_process(threads: int, command: str, *options: str) -> dict:
    """A command as `retrofit.dslify` runs it, without the seconds that a new process takes."""
    capture = in_this_process.capsys  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as done:
        app([command, *options, "--json"])
    said = capture.readouterr()
    assert done.value.code == 0, said.err
    return json.loads(said.out)


def test_a_retrofit_from_sound_to_thresholds(data, tmp_path, monkeypatch, capsys):
    in_this_process.capsys = capsys  # type: ignore[attr-defined]
    monkeypatch.setattr(retrofit, "dslify", in_this_process)
    for name in ("STEPS", "SWITCH_STEPS", "JOINT_STEPS"):
        monkeypatch.setattr(retrofit, name, 2)
    work = Work(data, tmp_path / "work", seeds=(3,))
    found = retrofit.run(work, ["shallow"], jobs=1)
    assert json.loads((work.folder / "variants.json").read_text()) == found
    one = found["variants"]["shallow"]
    net = work.net("shallow", 3)
    (layer,) = dslify.dsl_layers(net)
    cost = {row.name: row for row in dslify.cost(net)}
    assert one["params"] == cost["light"].params
    assert one["fewer"]["macs"] == pytest.approx(cost["full"].macs / cost["light"].macs)
    assert one["fewer"]["params"] >= 20
    assert one["fewer"]["macs"] >= 12.3
    assert layer.segments is not None
    assert layer.segments.entries == 5120
    thresholds = work.thresholds("shallow", 3)
    assert layer.threshold.item() == pytest.approx(thresholds["speech"])
    assert thresholds["speech"] != thresholds["silence"]
    assert set(one["difference"]) == set(JUDGED)
    assert all(one["difference"][part]["by_seed"]["3"] > 0 for part in JUDGED)
    before = pretrained().state_dict()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items() if name in before)
    file, other = str(work.switched("shallow", 3)), tmp_path / "joint.dsl"
    alone = ("--steps", "0", "--switch-steps", "0", "--segment", "0.64", "--batch-size", "2", "-o", str(other))
    in_this_process(1, "finetune", file, "--data", str(work.folder / "splits" / "light"), *retrofit.together(), *alone)
    after = dslify.load(other, into=pretrained()).state_dict()
    assert not torch.equal(before["decoder.head.weight"], after["decoder.head.weight"]), "the decoder did not learn"


def test_a_command_that_fails_is_told_with_what_it_said():
    with pytest.raises(TrainError, match=r"dslify insert x\.pt --at y --width 2 failed: .*width must be .* got 2"):
        retrofit.dslify(1, "insert", "x.pt", "--at", "y", "--width", "2")


def outcome(light: float, seed: int) -> dict:
    """What retrofit() returns, as far as summary() reads it."""
    kinds = [{"label": label, "spearman": 0.9, "loudness_spearman": 0.8} for label in ("all", "speech")]
    judged = {"kinds": kinds, "rows": [{"name": "full", "difference": 0.0}, {"name": "light", "difference": light}]}
    costs = [{"name": "light", "params": 30, "macs": 100}, {"name": "full", "params": 600, "macs": 1000}]
    ends = {"first": {"light": 1.0}, "last": {"light": light}}
    return {"insert": {"cost": costs}, "phases": {"light": ends}, "judged": dict.fromkeys(JUDGED, judged), "seconds": 1}


def test_a_summary_says_what_holds_and_what_does_not():
    runs = {("narrow", 0): 0.1, ("narrow", 1): 0.2, ("narrow-random", 0): 0.25, ("shallow", 0): 0.3}
    found = summary({key: outcome(light, key[1]) for key, light in runs.items()}, {"light": 7, "switch": 1, "joint": 0})
    narrow = found["variants"]["narrow"]["difference"]["test"]
    assert narrow["value"] == pytest.approx(0.15)
    assert narrow["range"] == [0.1, 0.2]
    assert [(line["holds"], pytest.approx(line["value"])) for line in found["verdict"]] == [
        (True, 20.0), (False, 10.0), (True, 0.15), (False, 0.6),
    ]  # fmt: skip
    assert "random weights" in found["verdict"][-1]["words"]


def test_the_task_loss_is_the_codec_s_own():
    generator = torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(2, 1, 8000, generator=generator)
    assert task_loss(sound, sound, None).item() == pytest.approx(0.0, abs=1e-6)
    output = (0.5 * sound).requires_grad_()
    loss = task_loss(output, sound, None)
    # half of the amplitude: ln 2 of log-mel (a little less by the floor), half of magnitudes, a tenth of half a wave
    assert loss.item() == pytest.approx(0.693 + 0.5 + 0.05, abs=0.03)
    loss.backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
