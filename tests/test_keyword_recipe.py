"""The keyword recipe's evaluation and its one command, on sound that is made here."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

import dslify
from dslify.cli import app
from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.omega import omega
from recipes.keyword_spotting import evaluate, figures, gates, retrofit, rivals, tables
from recipes.keyword_spotting import work as agreed
from recipes.keyword_spotting.checkpoints import build, write_checkpoint
from recipes.keyword_spotting.judge import Judge, shares, spread
from recipes.keyword_spotting.work import Work, joined, kept

RATE = 16_000
COUNTS = {"train": 8, "valid": 8, "test": 4}
LABELS = ("background", "unknown", "down", "up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words are tones that rise or fall; what is unknown holds its pitch, and the background is noise."""
    whole = tmp_path_factory.mktemp("words")
    random = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    rows = []
    for part, count in COUNTS.items():
        for label in LABELS:
            for at in range(count):
                pitch = random.uniform(900, 1100) + {"up": 900, "down": -900}.get(label, 0) * (time - 0.5)
                tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * np.hanning(RATE)
                sound = 0.02 * random.standard_normal(RATE) + (0.0 if label == "background" else 0.3) * tone
                path = Path(part, label, f"{at}.wav")
                (whole / path).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(whole / path, sound, RATE)
                rows.append({"path": path, "label": label, "source_id": f"{part}-{at}"})
    with (whole / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "source_id"])
        writer.writeheader()
        writer.writerows(rows)
    return whole


class Told(nn.Module):
    """Answers the class that a sample's first number names."""

    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.one_hot(value[:, 0].long(), 3).float()


def judge_of(original: list[int], labels: list[str]) -> Judge:
    values = torch.tensor(original, dtype=torch.float32)[:, None].repeat(1, 4)
    samples = open_data(
        values, (4,), labels=labels, sources=[str(at // 2) for at in range(len(labels))], progress=False
    )
    return Judge(Told(), samples, omega("no,yes", labels))


def test_what_is_lost_and_stopped_by_hand():
    judge = judge_of([2, 1, 0, 2, 1, 2], ["yes", "no", "noise", "yes", "noise", "no"])
    assert judge.truth.tolist() == [2, 1, 0, 2, 0, 1]
    stopped, answer = np.array([0, 0, 1, 2, 0, 0]), np.array([2, 1, 0, 0, 1, 1])
    score = np.array([0.9, 0.8, 0.1, 0.2, 0.85, 0.7])
    note = judge.note(stopped, answer, score, thresholds=(0.3,), macs=(1.01, 0.25, 0.5), zeros=0.75).to_json()
    assert note["stopped"] == "001200"
    assert note["answer"] == "210011"
    assert note["auc"] == pytest.approx((2 + 1 + 1 + 1) / 8)
    found = judge.figures([json.loads(json.dumps(note))])
    value = {name: one["value"] for name, one in found.items()}
    assert value["noise stopped"] == value["negatives stopped"] == 0.5
    assert value["keywords stopped"] == 0.25
    assert value["keywords lost"] == 0.0  # one lost, one won
    assert value["accuracy lost"] == 0.0
    assert value["bytes"] == pytest.approx(1 / 8 + 1 / 4)
    assert value["macs stopped"] == pytest.approx((0.25 + 0.5) / 2)
    worse = judge.note(stopped, np.zeros(6), score, macs=(1.01, 0.25, 0.5)).to_json()
    both = judge.figures([note, worse])["keywords lost"]
    assert both["by_seed"] == [0.0, pytest.approx(3 / 4)]
    assert both["range"] == [0.0, pytest.approx(3 / 4)]
    assert both["value"] == pytest.approx(3 / 8)
    low, high = both["interval"]
    assert low <= both["value"] <= high


def test_a_figure_that_one_seed_lacks_is_none():
    assert spread([1.0, None])["value"] is None
    assert spread([1.0, 3.0]) == {"value": 2.0, "range": [1.0, 3.0], "by_seed": [1.0, 3.0]}
    assert spread([2.0])["range"] is None


def chain() -> nn.Module:
    """(batch, 1, 64) -> logits (batch, 3)"""
    torch.manual_seed(0)
    parts = [nn.Conv1d(1, 4, 4, 2), nn.ReLU(), nn.Conv1d(4, 6, 4, 2), nn.ReLU(), nn.Conv1d(6, 8, 4, 2), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def test_a_stopped_clip_costs_what_lies_before_its_gate():
    net, sound = chain(), torch.randn(12, 1, 64)
    for at in ("1", "3"):
        net = dslify.insert(net, at, light="exit", mode="gc", example_inputs=(sound,))
    layers = dslify.dsl_layers(net)
    labels = ["yes", "no", "noise"] * 4
    samples = open_data(sound, (1, 64), labels=labels, progress=False)
    judge = Judge(chain(), samples, omega("no,yes", labels))
    rows = {row.name: row.macs for row in dslify.cost(net)}
    whole = rows["base"] + rows["full"] + rows["full 2"]
    on, first, second = shares(net)
    assert first == (rows["base"] + rows["switch"]) / whole
    assert second == (rows["base"] + rows["switch"] + rows["full"] + rows["switch 2"]) / whole
    assert on == (whole + rows["switch"] + rows["switch 2"]) / whole
    with torch.no_grad():
        net(sound)
    middle = layers[0].paths.score.median().item()
    layers[0].threshold.fill_(middle)
    layers[1].threshold.fill_(2.0)
    note = judge.gated(net)
    assert set(note.stopped) == {"1", "2"}
    assert note.stopped.count("1") == int((layers[0].paths.score < middle).sum())
    layers[0].threshold.fill_(2.0)
    assert set(judge.gated(net).stopped) == {"1"}, "the second gate's last batch was counted"
    layers[0].threshold.fill_(0.0)
    layers[1].threshold.fill_(0.0)
    note = judge.gated(net)
    assert set(note.stopped) == {"0"}
    assert judge.figures([note.to_json()])["accuracy lost"]["value"] == 0


def test_the_threshold_of_a_rival_keeps_the_promise(monkeypatch):
    """Uniform scores of keywords that are all lost below the threshold: it is the share that is lost."""
    labels = ["yes"] * 400 + ["no"] * 100
    samples = open_data(torch.zeros(500, 4), (4,), labels=labels, progress=False)
    score = np.random.default_rng(0).random(500)
    words = omega("yes", labels)
    monkeypatch.setattr(rivals, "MAX_LOST", 0.05)
    tau = rivals.threshold(score, np.ones(500, bool), samples, words)
    lost = (score[:400] < tau).sum()
    assert lost == 12  # the most of 400 whose binomial tail at 0.05 is at most 0.05
    assert (score < rivals.threshold(score, np.zeros(500, bool), samples, words)).all()
    with pytest.raises(DataError, match="are too few to promise at most 0"):
        rivals.threshold(score[:40], np.ones(40, bool), samples.subset(range(40)), words)


def test_copies_are_computed_once_and_keep_their_originals():
    sound = 0.1 * torch.randn(4, 1, 2000)
    one, two = (open_data(part, (1, 2000), labels=["background", "yes"], progress=False) for part in sound.split(2))
    both = joined(one, two)
    assert torch.equal(both.batch(range(4)), sound)
    assert both.sources == (*one.sources, *two.sources)
    varied = dslify.vary(both, 2, seed=3)
    found = kept(varied)
    assert torch.equal(found.batch(range(12)), varied.batch(range(12)))
    assert found.originals == varied.originals
    assert found.subset([9, 2]).originals == (1, 2)
    assert found.fingerprints() == varied.fingerprints()


def test_the_curve_of_a_score_by_hand(monkeypatch):
    judge = judge_of([2, 1, 0, 2, 0, 0], ["yes", "no", "noise", "yes", "noise", "no"])
    monkeypatch.setattr(figures, "MOST", 0.5)
    score = np.array([0.9, 0.4, 0.1, 0.6, 0.6, 0.2])  # the last keyword is no gate's to lose; a tie goes on
    assert figures.curve(judge, score).tolist() == [0.5, 0.5, 1.0]


def test_the_cut_nearest_to_half_is_taken():
    def point(path: str, base: int, block: bool = True, **fields: Any) -> dict[str, Any]:
        return {"path": path, "base_macs": base, "region_macs": 100 - base, "block": block, "reason": "",
                "crossing": [], **fields}  # fmt: skip

    points = [point("a", 20), point("a.conv", 50, False), point("b", 45, crossing=["a"]), point("c", 61), point("d", 0)]
    assert retrofit.halfway({"cut_points": points}) == "c"
    assert retrofit.halfway({"cut_points": points[1:2]}) == "a.conv"
    with pytest.raises(DataError, match="no place for a gate"):
        retrofit.halfway({"cut_points": [point("head", 100), point("x", 40, reason="it is used twice")]})


def test_speakers_that_set_thresholds_teach_nothing(folder, tmp_path):
    asked = retrofit.Retrofit("x.pt", folder, tmp_path, speakers=0.25)
    learning, calibration = retrofit.divided(asked)
    assert learning == ("--data", str(folder), "--labels", str(tmp_path / "learning.csv"))
    rows = {
        name: list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        for name in ("learning", "calibration")
    }
    sources = {name: {row["source"] for row in own} for name, own in rows.items()}
    assert not sources["learning"] & sources["calibration"]
    assert {f"valid-{at}" for at in range(8)} < sources["calibration"]
    assert all((folder / row["path"]).is_file() for own in rows.values() for row in own)
    read = open_data(folder, (1, RATE), labels=tmp_path / "calibration.csv", rate=RATE, progress=False)
    assert calibration[-1] == str(tmp_path / "calibration.csv")
    assert len(read) == len(rows["calibration"]) == (8 + 2) * len(LABELS)


def in_this_process(capsys: pytest.CaptureFixture[str]) -> Any:
    """A command as `commands.dslify` runs it, without the seconds that a new process takes."""

    def call(threads: int, command: str, *options: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as done:
            app([command, *options, "--json"])
        said = capsys.readouterr()
        assert done.value.code == 0, said.err
        return json.loads(said.out)

    return call


def stranger() -> nn.Module:
    """A depthwise separable network that the recipe does not know, for a second of sound."""

    def block(channels: int, out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(channels, channels, 5, 2, 2, groups=channels), nn.Conv1d(channels, out, 1),
            nn.BatchNorm1d(out), nn.ReLU(),
        )  # fmt: skip

    torch.manual_seed(0)
    front = nn.Sequential(nn.Conv1d(1, 8, 32, 64), nn.ReLU())
    return nn.Sequential(front, block(8, 48), block(48, 64), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 3))


def test_one_command_gives_a_strangers_network_a_gate(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    torch.save(stranger().eval(), tmp_path / "words.pt")
    monkeypatch.setattr(retrofit, "dslify", in_this_process(capsys))
    told = ["--data", str(folder), "--out", str(tmp_path / "out"), "--max-lost", "0.3", "--confidence", "0.9"]
    small = ["--steps", "20", "--switch-steps", "120", "--copies", "1", "--input", "1x1x16000", "--beta", "0.01"]
    assert retrofit.main([str(tmp_path / "words.pt"), *told, *small]) == 0
    found = json.loads((tmp_path / "out" / "retrofit.json").read_text())
    assert found["cuts"] == ["1"]
    net = dslify.load(tmp_path / "out" / "words.dsl")
    (layer,) = dslify.dsl_layers(net)
    assert layer.switch.kind == "positive"
    assert layer.mask.kind == "activation"
    assert layer.threshold.item() == pytest.approx(found["calibrate"]["threshold"])
    assert "90 % confidence at most 30 %" in found["calibrate"]["promise"]
    assert Path(found["exported"]).is_file()
    shown = {row["name"]: row for row in found["evaluate"]["rows"]}
    assert shown["mixed"]["macs"] < 1.02 * shown["full"]["macs"]
    kinds = {kind["label"]: kind["share"] for kind in found["evaluate"]["kinds"]}
    said = " ".join(capsys.readouterr().out.split())
    assert f"background 4 {100 * kinds['background']:.0f} %" in said
    assert "up (keyword)" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no.pt", "--data", "nowhere"], "--data nowhere has no folder train and no folder valid"),
        (["no.pt", "--speakers", "1"], "--speakers is a share of train's speakers, from 0 to below 1; got 1"),
        (["no.pt", "--out", "file"], "--out file is a file"),
    ],
)
def test_a_retrofit_that_cannot_be_is_one_sentence(folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert retrofit.main(["--data", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """One depth, one seed, a few steps, and a network of random weights."""
    torch.manual_seed(0)
    network = build("convolutional", 3)
    record = {"network": "convolutional", "classes": ["", "down", "up"]}
    write_checkpoint(network.state_dict(), tmp_path / "network.safetensors", record)
    monkeypatch.setattr(agreed, "LEARNING_COPIES", 1)
    monkeypatch.setattr(agreed, "CALIBRATION_COPIES", 1)
    for name, value in {"DEPTHS": {"blocks.1": "1/2"}, "BETAS": (0.0, gates.MAIN_BETA), "LOOSER": (0.5,), "STEPS": 4,
                        "SWITCH_STEPS": 40, "MAX_LOST": 0.3}.items():  # fmt: skip
        monkeypatch.setattr(gates, name, value)
    monkeypatch.setattr(gates, "pairwise", lambda shares: [(0.0, shares[0])])
    return Work(folder, tmp_path / "work", (0,), jobs=1, checkpoint=tmp_path / "network.safetensors")


def test_gates_from_sound_to_tables(work):
    found = gates.run(work)
    assert json.loads((work.folder / "gates.json").read_text()) == json.loads(json.dumps(found))
    assert [(row["depth"], row["beta"]) for row in found["gates"]] == [("1/2", 0.0), ("1/2", gates.MAIN_BETA)]
    calibration = found["clips"]["calibration"]
    assert calibration["keywords"] == 2 * calibration["sources"]
    assert 8 < calibration["sources"] < 16
    assert found["clips"]["test"] == {"clips": 16, "originals": 16, "keywords": 8, "sources": 4}
    for row in found["gates"]:
        (note,) = row["notes"]
        assert len(note["stopped"]) == 16
        net = dslify.load(work.gate(gates.name_of(row["at"], row["beta"])))
        assert dslify.dsl_layers(net)[0].threshold.item() == pytest.approx(note["thresholds"][0])
        assert "at most 30 %" in note["calibration"]["promise"]
    assert found["verdict"][0]["what"] == "accuracy without gates"
    text = tables.PAGE.text({name: found if name == "gates" else None for name in tables.PAGE.stages})
    assert f"| **1/2, beta {gates.MAIN_BETA:g}** |" in text
    assert "| 1/2, at most 50 % lost |" in text
    assert "`python -m recipes.keyword_spotting.evaluate --only rivals`" in text
    columns = next(line for line in text.splitlines() if line.startswith("| gate | threshold"))
    rows = [line for line in text.splitlines() if line.startswith("| 1/2, beta 0 ")]
    assert rows[0].count("|") == columns.count("|")


def test_tables_come_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{evaluate.BEGIN}\nold\n{evaluate.END}\nafter\n")
    page, drawn = tmp_path / "runs" / "tables.md", tmp_path / "runs" / "figures" / "timeline.png"
    drawn.parent.mkdir(parents=True)
    drawn.write_bytes(b"picture")
    page.write_text("# Title\n\nfirst\n\n## Part\n\nrows\n")
    evaluate.into_readme(page.parent, readme)
    assert (tmp_path / "figures" / "timeline.png").read_bytes() == b"picture"
    text = f"before\n{evaluate.BEGIN}\nfirst\n\n### Part\n\nrows\n{evaluate.END}\nafter\n"
    assert readme.read_text() == text
    page.write_text("# Title\n\nnew\n")
    evaluate.into_readme(page.parent, readme)
    assert "rows" not in readme.read_text()
    readme.write_text("no markers")
    with pytest.raises(OptionError, match="lacks <!-- tables -->"):
        evaluate.into_readme(page.parent, readme)
    assert readme.read_text() == "no markers"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "--data nowhere has no folder train and no folder valid and no folder test"),
        (["--seeds", "1", "1"], "--seeds are different numbers from 0 on, got 1 1"),
        (["--jobs", "0"], "--jobs is at least 1 and --minutes above 0; got 0 and"),
        (["--checkpoint", "none.safetensors"], "--checkpoint none.safetensors is no file"),
        (["--only", "rivals"], "gates.json is missing; run the stage that writes it"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--data", str(folder), "--work", "work", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert arguments[0] == "--only" or not (tmp_path / "work").exists()
