"""Accuracy by hand, metrics that the user names, and both from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dslify
from dslify import report
from dslify.accuracy import accuracy_of
from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.measure import evaluate
from dslify.named import named_function
from dslify.observe import collect
from dslify.switch import dsl_layers, route
from tests.cascades import CLASSES, cascade, classifier, sounds
from tests.test_cli import call
from tests.test_report import text

NAMES = ("yes", "no", "up", "down", "left")  # in the order of the logits, which is not the alphabet's
METRICS = """
def level(output, given):
    return output.mean(1)

def broken(output, given):
    raise KeyError("no such thing")

def wrong(output, given):
    return None

number = 3
"""


def classes_of(net: nn.Module) -> Tensor:
    """What the full route answers, with every fourth answer wrong; every class occurs."""
    with torch.no_grad(), route(net, "full"):
        answers = net(sounds()).argmax(1)
    answers[::4] = (answers[::4] + 1 + torch.arange(15) % (CLASSES - 1)) % CLASSES
    assert set(answers.tolist()) == set(range(CLASSES))
    return answers


@pytest.mark.parametrize("kind", ["indices", "names", "names that the network knows"])
def test_accuracy_by_hand(kind: str):
    net = cascade("classifier")
    classes = classes_of(net)
    given = classes.tolist() if kind == "indices" else [NAMES[at] for at in classes]
    if kind == "names that the network knows":
        net.meta["dslify"]["classes"] = list(NAMES)
    data = open_data(sounds(), labels=given, classes=NAMES if kind == "names" else ())
    result = evaluate(net, data, accuracy=True, metric=lambda output, _: output[:, 0], batch_size=7, progress=False)
    right = {}
    for mode in ("full", "light", "mixed"):
        with torch.no_grad(), route(net, mode):
            right[mode] = (net(sounds()).argmax(1) == classes).double()
        assert result[mode].accuracy == pytest.approx(right[mode].mean().item()), mode
        low, high = result[mode].accuracy_interval
        assert low <= result[mode].accuracy <= high
    assert result["full"].accuracy == 0.75
    assert len({result[mode].accuracy for mode in right}) == 3
    shown = text(report.evaluation(result))
    assert "75.0 %" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_random_and_oracle_accuracy_are_put_together_from_the_ways():
    """One layer: the same share at random is a mixture, the oracle takes the samples of smallest difference."""
    classes = classes_of(cascade("classifier"))
    net = dslify.insert(classifier(), at="0", width=0.25, example_inputs=(torch.randn(2, 1, 64),))
    data = open_data(sounds(), labels=classes.tolist())
    seen = collect(net, data, progress=False)
    dsl_layers(net)[0].threshold.fill_(float(np.quantile(seen.score, 0.4)))
    result = evaluate(net, data, accuracy=True, progress=False)
    right = {}
    for mode in ("full", "light"):
        with torch.no_grad(), route(net, mode):
            right[mode] = (net(sounds()).argmax(1) == classes).double().numpy()
    share = result["mixed"].share
    expected = share * right["light"].mean() + (1 - share) * right["full"].mean()
    assert result["random"].accuracy == pytest.approx(expected)
    order = np.argsort(seen.difference)
    count = round(share * len(order))
    chosen = np.concatenate([right["light"][order[:count]], right["full"][order[count:]]])
    assert result["oracle"].accuracy == pytest.approx(chosen.mean())


def test_labels_that_do_not_say_which_class_they_are():
    net, data = cascade("classifier"), sounds()
    few = open_data(data, labels=["yes", "no"] * 30)
    with pytest.raises(DataError, match="2 labels and the network 5 classes"):
        evaluate(net, few, accuracy=True, progress=False)
    many = open_data(data, labels=[at % 7 for at in range(60)])
    with pytest.raises(DataError, match="7 labels and the network 5 classes"):
        evaluate(net, many, accuracy=True, progress=False)
    assert evaluate(net, open_data(data, labels=[at % 2 for at in range(60)]), accuracy=True, progress=False)
    with pytest.raises(DataError, match="no label"):
        evaluate(net, data, accuracy=True, progress=False)
    net.meta["dslify"]["classes"] = ["yes", "maybe", "up", "down", "left"]
    with pytest.raises(DataError, match="'no'"):
        evaluate(net, few, accuracy=True, progress=False)


def test_outputs_that_are_no_logits():
    samples = open_data(torch.randn(3, 4), labels=[0, 1, 1])
    right = accuracy_of(samples)
    assert right({"logits": torch.eye(2)}, None, [0, 2]).tolist() == [True, True]
    for output in (torch.randn(3, 2, 4), torch.randn(2, 2), torch.ones(3, 2, dtype=torch.long), None):
        with pytest.raises(OptionError, match=r"logits of shape \(3, classes\)"):
            right(output, None, [0, 1, 2])
    with pytest.raises(OptionError, match="logits"):
        evaluate(cascade("codec"), open_data(sounds(), labels=[0, 1] * 30), accuracy=True, progress=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_metrics.py").write_text(METRICS)
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    net = cascade("classifier")
    dslify.save(net, tmp_path / "model.dsl")
    np.savez(tmp_path / "test.npz", samples=sounds().numpy(), labels=classes_of(net).numpy())
    return tmp_path


def test_a_named_function(folder: Path):
    level = named_function("own_metrics:level", "--metric")
    assert level(torch.ones(2, 3), None).tolist() == [1, 1]
    for name, words in (
        ("level", "as pkg.mod:function; got 'level'"),
        ("own_metrics:nothing", "cannot be imported"),
        ("no_such_module:level", "cannot be imported"),
        ("own_metrics:number", "is of type int"),
    ):
        with pytest.raises(OptionError, match=words):
            named_function(name, "--metric")
    with pytest.raises(OptionError, match="broken failed \\(KeyError: 'no such thing'\\)"):
        named_function("own_metrics:broken", "--metric")(None, None)


def test_evaluate_from_the_command_line(folder: Path):
    words = ["evaluate", "model.dsl", "--data", "test.npz", "--accuracy", "--metric", "own_metrics:level"]
    found = call(*words, "--json")
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    rows = {row["name"]: row for row in document["rows"]}
    assert rows["full"]["accuracy"] == 0.75
    with torch.no_grad():
        expected = dslify.load(folder / "model.dsl")(sounds()).mean().item()
    assert rows["mixed"]["metric"] == pytest.approx(expected, rel=1e-4)
    assert [layer["layer"] for layer in document["layers"]] == [1, 2]
    assert document["kinds"] == document["layers"][0]["kinds"]
    shown = call(*words)
    assert "75.0 %" in shown.stdout
    assert "metric" in shown.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--metric", "level"), "pkg.mod:function"),
        (("--metric", "own_metrics:broken"), "no such thing"),
        (("--metric", "own_metrics:wrong"), "one number per sample"),
        (("--by", "speaker"), "label, source, all"),
        (("--positive", "1"), "no layer of this network is a gate"),
    ],
)
def test_wrong_words_are_one_sentence(folder: Path, words: tuple[str, ...], said: str):
    found = call("evaluate", "model.dsl", "--data", "test.npz", *words)
    assert found.exit_code == 2
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert "Traceback" not in found.output
