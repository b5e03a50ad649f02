"""Thresholds of gates from what they lose: known scores in, known losses out, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import dslify
from dslify import report
from dslify.calibrate import recorded
from dslify.cli import app
from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.lost import critical
from dslify.samples import Samples
from dslify.switch import DSLayer, Layout, Mask, dsl_layers, route
from tests.test_gate import LENGTH, Tones
from tests.test_report import text

GATES = 3  # channels of the input that hold scores; the next one holds the decision
OMEGA = "yes"


class Known(nn.Module):
    """A gate whose score is a channel of the input."""

    kind = "positive"

    def __init__(self, channel: int):
        super().__init__()
        self.channel = channel

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled[:, :, self.channel].mean(1)


class Decides(nn.Module):
    """(batch, channels, entries) -> logits (batch, 2), class 1 where the channel after the scores is above 0."""

    def forward(self, value: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(value)), value[:, GATES].mean(1)], 1)


class Full(nn.Module):
    """As a DSLayer wants it: a tuple."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, value: Tensor) -> tuple[Tensor]:
        return (self.inside(value),)


class Undefined(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits * float("nan")


class Negative(nn.Module):
    """The constant answer: class 0."""

    def forward(self, value: Tensor) -> tuple[Tensor]:
        return (torch.tensor([[1.0, 0.0]]).expand(len(value), 2),)


def gated(gates: int = 1, *, decides: bool = True) -> nn.Module:
    """Gates inside each other; their scores and the decision are written in the input. decides: answers are logits."""
    net: nn.Module = Decides()
    for channel in reversed(range(gates)):
        full = Full(net)
        parts = Mask((1, GATES + 1, 1)), Known(channel), Negative(), full, [Layout(0)], [Layout(0)], 1
        net = DSLayer(*parts)  # type: ignore[arg-type]
        net.scale.fill_(1.0)
    return nn.Sequential(net, *([] if decides else [nn.Unflatten(1, (1, 2))])).eval()


def data(
    scores: np.ndarray,
    positive: Sequence[bool],
    decided: Sequence[bool] | None = None,
    kinds: Sequence[str] = ("noise",),
    sources: Sequence[str] | None = None,
) -> Samples:
    """scores: (n,) or (n, gates). decided: which samples the whole network takes for positive, all that are unless said
    otherwise. kinds: labels of the negatives, in turns."""
    n = len(positive)
    values = torch.zeros(n, GATES + 1, 4)
    columns = torch.as_tensor(np.asarray(scores, np.float32)).reshape(n, -1)
    values[:, : columns.shape[1]] = columns[:, :, None]
    decided = positive if decided is None else decided
    values[:, GATES] = torch.tensor([1.0 if one else -1.0 for one in decided])[:, None]
    labels = ["yes" if one else kinds[at % len(kinds)] for at, one in enumerate(positive)]
    return open_data(values, labels=labels, sources=sources)


def spread(positives: int, negatives: int, seed: int = 0, gates: int = 1) -> tuple[np.ndarray, list[bool]]:
    """Scores of which most positives' are high, (n, gates), and which samples are positive."""
    random = np.random.default_rng(seed)
    high = random.beta(6, 1.5, (positives, gates))
    low = random.beta(1.2, 6, (negatives, gates))
    return np.concatenate([high, low]), [True] * positives + [False] * negatives


def changed(net: nn.Module, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Really routed: which samples are decided otherwise than by the whole network, and which are stopped; (n,)."""
    inputs = samples.batch(range(len(samples)))
    with torch.no_grad():
        with route(net, "full"):
            full = net(inputs)
        with route(net, "mixed"):
            mixed = net(inputs)
    stopped = (mixed == torch.tensor([1.0, 0.0])).flatten(1).all(1)
    return (full != mixed).flatten(1).any(1).numpy() & (full.argmax(1) != mixed.argmax(1)).numpy(), stopped.numpy()


def test_a_positive_is_lost_only_where_stopping_it_changes_the_decision():
    scores, positive = np.linspace(0.01, 0.99, 100), [at % 2 == 0 for at in range(100)]
    decided = [one and at >= 10 for at, one in enumerate(positive)]  # the five lowest positives are missed anyway
    net, samples = gated(), data(scores, positive, decided, kinds=("noise", "speech"))
    result = dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.1)
    lost, stopped = changed(net, samples)
    assert lost.sum() == 5  # of 50
    assert stopped.sum() == 20  # up to the sixth that would be lost
    assert result.threshold == pytest.approx(scores[20], rel=1e-3)
    assert scores[19] < result.threshold < scores[20]
    assert (result.lost, result.max_lost, result.positive, result.units) == (0.1, 0.1, OMEGA, 50)
    assert (result.n, result.share) == (100, 0.2)
    assert result.negatives_stopped == 0.2
    assert (result.promise, result.delta) == (None, None)
    assert "largest of 2 outputs" in result.how
    assert "a point estimate without a guarantee" in result.how
    assert result.notes == ("5 of 50 positives are answered the same when they are stopped, so they cannot be lost",)


def test_negatives_are_counted_by_label():
    scores, positive = np.linspace(0.01, 0.99, 100), [at >= 50 for at in range(100)]
    kinds = ("noise", "speech")
    scores[:50:2] /= 100  # noise scores lower
    scores[1:50:2] += 0.4
    result = dslify.calibrate(gated(), data(scores, positive, kinds=kinds), positive="!noise,!speech", max_lost=0.02)
    assert result.stopped["noise"] == 1.0
    assert result.stopped["speech"] == pytest.approx((scores[1:50:2] < result.threshold).mean())
    assert 0 < result.stopped["speech"] < 1
    assert result.negatives_stopped == pytest.approx((1 + result.stopped["speech"]) / 2)


def test_without_logits_every_stopped_positive_is_lost():
    scores, positive = np.linspace(0.01, 0.99, 100), [at % 2 == 0 for at in range(100)]
    net, samples = gated(decides=False), data(scores, positive, [False] * 100)
    result = dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.1)
    assert scores[9] < result.threshold < scores[10]
    assert result.lost == 0.1
    assert "counting every positive that is stopped" in result.how


@pytest.mark.parametrize(("positives", "lost"), [(299, 0), (472, 0), (473, 1), (628, 2)])
def test_with_confidence_as_many_may_be_lost_as_the_binomial_tail_allows(positives: int, lost: int):
    scores, positive = spread(positives, 100)
    net, samples = gated(), data(scores, positive)
    result = dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.01, confidence=0.95)
    ordered = np.sort(scores[:positives, 0].astype(np.float32))
    assert ordered[lost] * 0.998 < result.threshold < ordered[lost]
    assert result.lost == pytest.approx(lost / positives)
    assert result.delta == pytest.approx(0.05)
    assert result.promise == f"with 95 % confidence at most 1 % of new positives like these {positives} are lost"


def copied(samples: Samples, copies: int, random: np.random.Generator) -> Samples:
    """Copies of every sample behind them, whose scores differ a little."""
    n = len(samples)
    found = samples.subset(list(range(n)) * (1 + copies))
    values = found.batch(range(len(found)))
    values[n:, :GATES] = (values[n:, :GATES] + torch.from_numpy(random.normal(0, 0.1, (n * copies, 1, 1)))).clamp(0, 1)
    held = replace(found, values=values, index=torch.arange(len(found)))
    numbers = samples.originals * (1 + copies)

    class Copies(Samples):
        @property
        def originals(self) -> tuple[int, ...]:
            return tuple(numbers[at] for at in self.index.tolist())

    return Copies(**{name: getattr(held, name) for name in Samples.__dataclass_fields__})


def test_copies_count_within_their_originals():
    scores, positive = spread(400, 60)
    samples = copied(data(scores, positive), 3, np.random.default_rng(1))
    assert len(samples) == 4 * 460
    net = gated()
    result = dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.01, confidence=0.95)
    lost, _ = changed(net, samples)
    shares = lost.reshape(4, 460)[:, :400].mean(0)
    assert result.units == 400
    assert result.lost == pytest.approx(shares.mean())
    assert 0 < result.lost < 0.01
    assert "like these 400 and 3 varied copies of each are lost" in result.promise
    few = samples.subset([at for at in range(len(samples)) if at % 460 >= 110])  # 290 originals and copies of each
    with pytest.raises(DataError, match=r"from 305 positive samples \(copies count with their originals\) on; got 290"):
        dslify.calibrate(net, few, positive=OMEGA, max_lost=0.01, confidence=0.95)


def test_sources_can_be_what_counts():
    scores, positive = spread(400, 100)
    sources = [f"speaker {at % 80}" if one else f"noise {at}" for at, one in enumerate(positive)]
    net, samples = gated(), data(scores, positive, sources=sources)
    by_sample = dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.05, confidence=0.9)
    assert "the 400 positives come from 80 sources" in by_sample.notes[0]
    by_source = dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.05, confidence=0.9, units="source")
    assert (by_source.units, by_source.unit, by_source.notes) == (80, "source", ())
    assert by_source.threshold < by_sample.threshold
    lost, _ = changed(net, samples)
    assert by_source.lost == pytest.approx(lost[:400].reshape(5, 80).mean())
    assert "new sources like these 80 lose on average at most 5 % of their positives" in by_source.promise
    with pytest.raises(DataError, match="positive sources on; got 80"):
        dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.01, confidence=0.95, units="source")


@pytest.mark.parametrize("weights", [None, (4.0, 1.0, 0.5)])
def test_all_gates_keep_to_one_budget(weights: tuple[float, ...] | None):
    scores, positive = spread(600, 200, gates=3)
    net, samples = gated(3), data(scores, positive)
    result = dslify.calibrate(
        net, samples, positive=OMEGA, max_lost=0.02, confidence=0.9, gate_weights=weights, batch_size=64
    )
    taus = [layer.threshold.item() for layer in dsl_layers(net)]
    assert [one.threshold for one in result.layers] == taus
    odds = np.array(taus) / (1 - np.array(taus))
    np.testing.assert_allclose(odds / odds[2], np.array(weights or (1, 1, 1)) / (weights or (1, 1, 1))[2], rtol=1e-5)
    lost, stopped = changed(net, samples)
    assert lost[:600].sum() == 7  # the largest k with P(Bin(600, 0.02) <= k) <= 0.1
    assert result.lost == pytest.approx(lost[:600].mean())
    assert result.lost == pytest.approx(sum(one.lost or 0.0 for one in result.layers))
    assert result.negatives_stopped == pytest.approx(stopped[600:].mean())
    assert result.negatives_stopped == pytest.approx(sum(one.negatives_stopped or 0.0 for one in result.layers))
    assert [one.n for one in result.layers][:2] == [800, 800 - (scores[:, 0].astype(np.float32) < taus[0]).sum()]
    place = np.sort((scores[:600] / (1 - scores[:600]) / np.array(weights or (1, 1, 1))).min(1))[lost[:600].sum()]
    assert 0.998 * place < odds[2] / (weights or (1, 1, 1))[2] < place  # just under the next that would be lost
    assert "by all 3 gates together" in result.promise
    shown = text(report.calibration(result))
    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split()[0] for line in shown.splitlines()[3:7]] == ["1", "2", "3", "all"]
    assert "promise: with 90 % confidence at most 2 % of new positives" in shown


def test_what_an_earlier_gate_would_save_again_stays_lost():
    """Ways: all full, stopped by the second, stopped by the first; the first one's answer happens to be right."""
    tried = ((False, False), (False, True), (True, None))
    losing = np.array([[False, True, False], [False, True, True], [False, False, False], [False, True, True]])
    place = np.array([[0.7, 0.2], [0.7, 0.2], [0.1, 0.2], [0.3, 0.3]])
    np.testing.assert_array_equal(critical(place, losing, tried), [0.2, 0.2, np.inf, 0.3])


def test_a_curve_has_every_gate_at_every_place(tmp_path: Path):
    scores, positive = spread(120, 80, gates=2)
    net, samples = gated(2), data(scores, positive)
    for suffix in ("csv", "json"):
        file = tmp_path / f"curve.{suffix}"
        dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.05, confidence=0.9, curve=file)
    rows = json.loads(file.read_text())
    with (tmp_path / "curve.csv").open(newline="") as lines:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)] == rows
    assert [row["layer"] for row in rows[:4]] == [1, 2, 1, 2]
    assert (rows[0]["stopped"], rows[0]["lost"]) == (0, 0)
    assert (rows[-1]["stopped"], rows[-1]["lost"], rows[-1]["threshold"]) == (1, 1, 1)
    assert all(row["lost"] < row["lost_bound"] or row["lost_bound"] == 1 for row in rows)
    for row in rows[::20]:
        under = (scores.astype(np.float32) < row["threshold"]).any(1)
        assert (row["lost"], row["stopped"]) == (pytest.approx(under[:120].mean()), pytest.approx(under[120:].mean()))
    kept = [row["threshold"] for row in rows if row["lost_bound"] <= 0.05]
    assert max(kept) <= dsl_layers(net)[0].threshold.item() * 1.001


def test_thresholds_stay_as_they_were_when_it_fails():
    net = gated(2)
    scores, positive = spread(100, 50, gates=2)
    with pytest.raises(DataError, match="got 100"):
        dslify.calibrate(net, data(scores, positive), positive=OMEGA, max_lost=0.01, confidence=0.95)
    with pytest.raises(DataError, match="The network's output is not finite"):
        dslify.calibrate(nn.Sequential(net, Undefined()), data(scores, positive), positive=OMEGA, max_lost=0.1)
    broken = data(scores, positive)
    broken.values[120] = float("nan")
    with pytest.raises(DataError, match="The score or difference of 1 of 150 samples is not a finite number"):
        dslify.calibrate(net, broken, positive=OMEGA, max_lost=0.1)
    assert [layer.threshold.item() for layer in dsl_layers(net)] == [0, 0]


def test_only_gates_can_be_set_by_what_they_lose():
    net, samples = gated(2), data(*spread(40, 40, gates=2))
    dsl_layers(net)[1].switch.kind = "difference"
    with pytest.raises(OptionError, match="layer 2 of 2 has a switch that predicts a difference; give max_difference"):
        dslify.calibrate(net, samples, positive=OMEGA, max_lost=0.1)
    segmented = gated()
    dsl_layers(segmented)[0].segments = object()  # type: ignore[assignment]
    with pytest.raises(OptionError, match="routes segments of them one by one"):
        dslify.calibrate(segmented, samples, positive=OMEGA, max_lost=0.1)


MADE = """
from tests.test_gate import tones


def few():
    return tones(400)[0]
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with a gate that has learned nothing."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("lost") / "gated.dsl"
    dslify.save(dslify.insert(Tones().eval(), "first", light="exit", mode="gc"), file)
    return file


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.dsl").write_bytes(prepared.read_bytes())
    (tmp_path / "made_tones.py").write_text(MADE)
    np.save(tmp_path / "bare.npy", np.zeros((40, 1, LENGTH), np.float32))
    return tmp_path


def call(*words: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", "model.dsl", *words], prog_name="dslify")


ASKED = "--data made_tones:few --positive high --max-lost 0.05"


def test_the_command_sets_keeps_and_tells(folder: Path):
    found = call(*f"{ASKED} --confidence 0.9 --curve curve.csv --json".split())
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    net = dslify.load("model.dsl")
    assert told["threshold"] == dsl_layers(net)[0].threshold.item() > 0
    assert told["max_lost"] == 0.05
    assert told["lost"] <= 0.05
    assert list(told["stopped"]) == ["low"]
    kept = recorded(net)
    assert kept is not None
    assert (kept["promise"], kept["lost"]) == (told["promise"], told["lost"])
    assert recorded(dslify.load("model.dsl")) == kept
    assert Path("curve.csv").read_text().startswith("layer,threshold,stopped,lost,lost_bound")
    shown = call(*f"{ASKED} --units source --gate-weights 2".split())
    assert shown.exit_code == 0, shown.output
    assert "set by lost positives (high): the highest at which at most 5 % are lost" in " ".join(shown.stdout.split())


REFUSED = {
    "nothing to lose": (ASKED.replace("0.05", "0"), "max-lost must be above 0 and below 1; got 0."),
    "all to lose": (ASKED.replace("0.05", "1"), "max-lost must be above 0 and below 1; got 1."),
    "no number": (ASKED.replace("0.05", "few"), "got 'few'."),
    "no positives named": ("--data made_tones:few --max-lost 0.05", "say which labels these are"),
    "positives that are not there": (ASKED.replace("high", "loud"), "no sample has it; the labels are high, low"),
    "no labels": ("--data bare.npy --positive high --max-lost 0.05", "40 of 40 samples have no label"),
    "positives without a loss": ("--data made_tones:few --light-share 0.5 --positive high", "positive has no meaning"),
    "units without a loss": ("--data made_tones:few --light-share 0.5 --units source", "units has no meaning here"),
    "two aims": (f"{ASKED} --light-share 0.5", "exactly one of light_share, max_difference, max_metric, max_lost"),
    "another promise": (f"{ASKED} --guarantee mean", "guarantee has no meaning here, because max_lost counts"),
    "a bound": (f"{ASKED} --bound 2", "bound has no meaning here"),
    "units of another word": (f"{ASKED} --units clip", "units is one of sample, source; got 'clip'."),
    "weights of other gates": (f"{ASKED} --gate-weights 1,2", "it has 1; got 2."),
    "a weight of nothing": (f"{ASKED} --gate-weights 0", "numbers above 0, one for each gate; got 0."),
    "certainty": (f"{ASKED} --confidence 1", "confidence must be above 0 and below 1; got 1."),
    "too few": (f"{ASKED.replace('0.05', '0.01')} --confidence 0.95", "from 299 positive samples"),
    "too few to see": (ASKED.replace("0.05", "0.001"), "from 1000 positive samples"),
    "a curve of another kind": (f"{ASKED} --curve curve.txt", "end in .csv or .json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_and_nothing_written(name: str, folder: Path):
    words, expected = REFUSED[name]
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = call(*words.split())
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert expected in result.stderr
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
