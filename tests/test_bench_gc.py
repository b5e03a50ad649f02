"""The benchmark of gates, on a small made data set."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.gate_table import Judge
from benchmarks.gc import main, settings, threshold
from benchmarks.keywords import Training, classes, sounds, trained
from dslify.data import open_data
from dslify.errors import OptionError
from dslify.omega import omega
from dslify.samples import Samples
from recipes.keyword_spotting import KeywordNetwork

RATE = 16_000
COUNTS = {"train": 5, "valid": 5, "test": 4}
LABELS = ("background", "unknown", "down", "up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Words are tones that rise or fall; what is unknown holds its pitch, and the background is noise."""
    whole = tmp_path_factory.mktemp("words")
    random = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    for part, count in COUNTS.items():
        for label in LABELS:
            for at in range(count):
                pitch = random.uniform(900, 1100) + {"up": 900, "down": -900}.get(label, 0) * (time - 0.5)
                tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * np.hanning(RATE)
                sound = 0.02 * random.standard_normal(RATE) + (0.0 if label == "background" else 0.3) * tone
                file = whole / part / label / f"{at}.wav"
                file.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(file, sound, RATE)
    return whole


def table_of(text: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_table(folder, tmp_path, capsys):
    options = ["--at", "blocks.1", "--masks", "activation", "--betas", "0", "0.5", "--training-steps", "20"]
    steps = ["--steps", "25", "--switch-steps", "60", "--epsilon", "0.15"]
    files = ["--cache", str(tmp_path), "--json", str(tmp_path / "gc.json"), "--markdown", str(tmp_path / "gc.md")]
    assert main(["--data", str(folder), *options, *steps, *files]) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "gc.md").read_text()
    rows = table_of(shown)
    assert [(row["depth"], row["mask"], row["beta"]) for row in rows] == [
        ("loudness", "none", ""), ("the whole network", "none", ""), ("1/2", "none", "0"), ("1/2", "activation", "0.5"),
    ]  # fmt: skip
    found = json.loads((tmp_path / "gc.json").read_text())["results"]
    loud, _, plain, sparse = found
    for one in found:
        labels = one["stopped"]
        assert list(labels) == ["background", "unknown", "all negatives"]
        assert labels["all negatives"] == pytest.approx((labels["background"] + labels["unknown"]) / 2)
    assert loud["stopped"]["background"] == 1.0  # which loudness tells by itself
    assert plain["auc"] > 0.9
    assert plain["stopped"]["all negatives"] > 0.5
    assert plain["zeros"] + 0.05 < sparse["zeros"]
    values = plain["dense"] / 2
    for one in (plain, sparse):
        assert one["sent"] == pytest.approx(values / 8 + 2 * values * (1 - one["zeros"]))
        assert 0 < one["macs"] < 1
    assert len(list(tmp_path.glob("network-*.safetensors"))) == 1


def test_a_trained_network_is_kept_and_found_again(folder, tmp_path):
    train = sounds(folder)["train"]
    positive = omega("up,down", train.labels)
    first = trained(train, positive, Training(steps=2), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    when = file.stat().st_mtime_ns
    again = trained(train, positive, Training(steps=2), tmp_path)
    assert file.stat().st_mtime_ns == when
    assert not again.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    trained(train, positive, Training(steps=1), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def clips(labels: list[str], sources: list[str] | None = None) -> Samples:
    return open_data(torch.randn(len(labels), 4), (4,), labels=labels, sources=sources, progress=False)


def test_the_threshold_keeps_the_bound_for_new_positives():
    """Exchangeable scores: over many draws the expected share of new positives under the threshold is at most epsilon,
    and not far below it."""
    random = np.random.default_rng(0)
    samples = clips(["yes"] * 100 + ["no"] * 100)
    positive = omega("yes", samples.labels)
    lost = []
    for _ in range(300):
        score = random.random(200)
        lost.append(threshold(score, samples, positive, 0.05))  # uniform scores: the share below is the threshold
    error = np.std(lost) / np.sqrt(len(lost))
    assert 0.03 < np.mean(lost) < 0.05 + 2 * error


def test_the_clips_of_one_source_add_no_confidence():
    labels = ["yes"] * 40 + ["no"] * 40
    sources = [str(at % 5) for at in range(80)]
    positive = omega("yes", labels)
    score = np.linspace(0, 1, 80)
    assert threshold(score, clips(labels), positive, 0.1) > 0
    with pytest.raises(OptionError, match=re.escape("keywords of 5 sources; 9 are needed for a bound of 0.1")):
        threshold(score, clips(labels, sources), positive, 0.1)


def test_nothing_may_be_lost_and_the_lowest_positive_is_the_threshold():
    samples = clips(["yes"] * 49 + ["no"] * 3)
    score = np.concatenate([np.linspace(0.4, 0.9, 49), [0.1, 0.2, 0.95]])
    assert threshold(score, samples, omega("yes", samples.labels), 0.02) == pytest.approx(0.4)


def test_what_is_lost_and_stopped_by_hand():
    samples = clips(["yes", "no", "noise", "yes", "noise", "no"])
    judge = Judge(samples, omega("yes,no", samples.labels), 0)
    assert judge.truth.tolist() == [2, 1, 0, 2, 0, 1]
    stopped = np.array([False, False, True, True, False, False])
    score = np.array([0.9, 0.8, 0.1, 0.2, 0.85, 0.7])
    original, mixed = np.array([2, 1, 0, 2, 1, 2]), np.array([2, 1, 0, 0, 1, 1])
    found = judge.result(score, stopped, mixed, original, depth="1/2", mask="none", beta=0.0, threshold=0.3)
    assert found.stopped == {"noise": 0.5, "all negatives": 0.5}
    assert found.recall_lost == 0.0  # one lost, one won
    assert found.accuracy_lost == 0.0
    assert found.auc == pytest.approx((2 + 1 + 1 + 1) / 8)
    worse = judge.result(score, stopped, np.zeros(6), original, depth="", mask="", beta=0.0, threshold=0.3)
    assert worse.recall_lost == pytest.approx(3 / 4)
    assert worse.accuracy_lost == pytest.approx((4 - 2) / 6)


def test_every_setting_once():
    assert list(settings(["channel", "activation"], [0.0, 1.0])) == [
        ("channel", 0.0), ("channel", 1.0), ("activation", 1.0),
    ]  # fmt: skip


def test_classes_put_every_negative_in_the_first():
    samples = clips(["up", "noise", "down", "other", "up"])
    assert classes(samples, omega("up,down", samples.labels)).tolist() == [2, 0, 1, 0, 2]


def test_the_network_reads_one_second():
    network = KeywordNetwork(5).eval()
    assert network(network.example_input_array).shape == (1, 5)
    assert network.front(torch.zeros(2, 1, RATE)).shape == (2, 40, 101)
    low, high = (torch.sin(2 * torch.pi * pitch * torch.arange(RATE) / RATE)[None, None] for pitch in (200.0, 4000.0))
    bands = [network.front(tone).mean(2).argmax().item() for tone in (low, high)]
    assert bands[0] < 8
    assert bands[1] > 25


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "nowhere"], "nowhere has no folder train and no folder valid and no folder test"),
        (["--data", ".", "--json", "no/such/folder.json"], "there is no folder no/such"),
        (["--data", ".", "--epsilon", "0"], "epsilon is a share of the keywords, between 0 and 1; got 0"),
    ],
)
def test_refusals(options, says, capsys):
    assert main(options) == 2
    assert says in capsys.readouterr().err


def test_a_label_that_is_not_there(folder, capsys):
    assert main(["--data", str(folder), "--positive", "left"]) == 2
    assert "'left', and no sample has it" in capsys.readouterr().err
