"""A mask of thresholds lies behind the switch: what it cuts off the gate still reads, in every form of the network."""

import atexit
import io
import shutil
import tempfile
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import dslify
from dslify import quantize
from dslify.conditional import Conditional
from dslify.data import open_data
from dslify.errors import ExportError
from dslify.evaluated import evaluation
from dslify.functional import copied
from dslify.gate import GatedMaskObjective
from dslify.gather import gather, judge
from dslify.int8_report import calibration_feeds
from dslify.onnx_format import check, whole_model
from dslify.onnx_graph import models_of
from dslify.parts import Scored
from dslify.programs import host_graph, programs_of
from dslify.quantize import quantized
from dslify.runtime import Runner
from dslify.sparsity import int8_bytes, mask_words
from dslify.split import write_split
from dslify.switch import DSLayer, dsl_layers, route
from dslify.training_network import training_network
from tests.test_gate import Tones, batches, tones

ENTRIES = 64  # of a segment
CLOSE = 1e-5


class Ahead(nn.Module):
    """Sound (batch, 1, length) -> (batch, 4, length / 4); each answer looks at what follows it too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 12, 5, 2, 2), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv1d(12, 16, 7, 2, 3), nn.ReLU())
        self.last = nn.Conv1d(16, 4, 3, 1, 1)

    def forward(self, sound: Tensor) -> Tensor:
        return self.last(self.middle(self.stem(sound)))


@cache
def made(mask: str = "activation") -> nn.Module:
    """With a mask that is in use and cuts off most of what passes it. Not to be changed."""
    torch.manual_seed(0)
    net = dslify.insert(Ahead().eval(), "stem", 0.25, (sound(1),), mask=mask)
    layer = only(net)
    with torch.no_grad(), route(net, "full"):
        net(sound(16))
        layer.switch.standardise(layer.switch.features(layer.pooled(layer.paths.masked)))
        layer.mask.turn_on(layer.paths.masked)
        layer.mask.weight.copy_(torch.linspace(-0.1, 0.4, 12)[:, None] if mask == "activation" else 0.5)
        net(sound(16, 1))
        layer.threshold.copy_(layer.paths.score.median() + 1e-4)
    return net


def sound(count: int, seed: int = 0, length: int = 4 * ENTRIES) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    level = torch.logspace(-1.5, 0.5, count)[torch.randperm(count, generator=random)]
    return level[:, None, None] * torch.randn(count, 1, length, generator=random)


def only(net: nn.Module) -> DSLayer:
    (layer,) = dsl_layers(net)
    return layer


def entering(net: nn.Module, x: Tensor) -> Tensor:
    """The activation at the cut, before the mask."""
    seen: list[Tensor] = []
    handle = only(net).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0]


def by_hand(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The scores from the activation before the mask, and from the one after it."""
    layer, cut = only(net), entering(net, x)
    with torch.no_grad():
        return tuple(layer.switch(layer.pooled(value)) for value in (cut, layer.mask(cut)))


@pytest.mark.parametrize(("mask", "reads"), [("activation", 0), ("channel", 1)])
@pytest.mark.parametrize("way", ["full", "light", "mixed", "both"])
def test_thresholds_lie_behind_the_switch_and_factors_before_it(mask, reads, way):
    net, x = made(mask), sound(8, 2)
    wanted = by_hand(net, x)
    assert not torch.allclose(*wanted, rtol=0.01), "the mask makes a difference"
    with torch.no_grad(), route(net, way):
        net(x)
    paths = only(net).paths
    assert torch.allclose(paths.score, wanted[reads], rtol=CLOSE)
    assert (paths.masked == 0).float().mean() > 0.5 or mask == "channel"


@pytest.mark.parametrize("mask", ["activation", "channel"])
def test_each_form_scores_as_the_network_does(mask):
    net, x = made(mask), sound(8, 3)
    with torch.no_grad():
        net(x)
    paths, cut = only(net).paths, entering(net, x)
    conditional = Conditional(only(net)).eval()
    with torch.no_grad():
        for scored in (Scored(only(net)), conditional.scored):
            masked, score = scored(cut)
            assert torch.equal(masked, paths.masked)
            assert torch.allclose(score, paths.score, rtol=CLOSE)


class Parts:
    """The network routed by segments, its programs, and its split export."""

    def __init__(self) -> None:
        self.net = copied(made())
        dslify.route_every(self.net, ENTRIES)
        self.graph = host_graph(self.net)[1]
        self.programs = programs_of(self.graph)
        self.models = models_of(self.programs)
        self.root = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, self.root, ignore_errors=True)
        self.split = write_split(self.models, self.programs, self.graph, self.root / "parts")
        self.runner = Runner(self.root / "parts", number="fp32")


parts = cache(Parts)


def test_a_split_network_scores_before_the_mask_and_sends_what_follows_it():
    net, runner = parts().net, parts().runner
    for one in sound(6, 4, ENTRIES).split(1):
        unmasked, masked = by_hand(net, one)
        found = runner.run(one.numpy(), route="full")
        assert found.score == pytest.approx(unmasked.item(), rel=CLOSE)
        assert abs(found.score - masked.item()) > 1e-3
        assert found.bytes_sent < 0.7 * 4 * only(net).paths.masked.numel(), "the zeros are not sent"


def test_a_sound_that_goes_on_is_scored_before_the_mask_and_answered_as_in_one_call():
    net, runner = parts().net, parts().runner
    loud = torch.logspace(-1, 0.5, 13).repeat_interleave(ENTRIES)
    x = (sound(1, 5, 13 * ENTRIES) * loud)[..., : -ENTRIES // 3]
    with torch.no_grad(), route(net, "full"):
        whole = net(x)
        scores = only(net).paths.score
    assert scores.std() > 0.01
    runner.threshold = -1.0
    found = list(runner.listen(np.split(x.numpy(), [100, 300, 301], -1)))
    assert np.concatenate([one.score for one in found]) == pytest.approx(scores.numpy(), rel=CLOSE)
    heard = torch.from_numpy(np.concatenate([one.outputs[0] for one in found], -1))
    assert (heard - whole).abs().max() < CLOSE * whole.abs().max()


def test_one_file_decides_before_the_mask(monkeypatch):
    """Its check tries every way with thresholds just beyond the network's scores."""
    subject = parts()
    whole = whole_model(subject.programs, subject.models, subject.graph)
    layer = only(subject.net)
    monkeypatch.setattr(layer, "segments", None)  # one file decides for a whole call
    assert max(check(whole, subject.programs, subject.graph, dynamic=False).errors.values()) < CLOSE
    monkeypatch.setattr(layer, "unmasked", False)
    with pytest.raises(ExportError, match="differs"):
        check(whole, subject.programs, subject.graph, dynamic=False)


def test_int8_parts_score_before_the_mask(monkeypatch, tmp_path):
    subject = parts()
    monkeypatch.setattr(quantize, "_judged", lambda report, *_: replace(report, quality_db=99.0, latency_ratio=0.5))
    feeds = calibration_feeds(subject.graph, subject.programs.inputs, count=8).feeds
    models, (front, *_) = quantized(subject.models, feeds)
    assert front.kept
    done = write_split(models, subject.programs, subject.graph, tmp_path / "int8", tolerance=None)
    assert 0 < done.errors["score"] < 0.02
    assert 0 < done.errors["stream"] < 0.2


def test_a_program_decides_before_the_mask(tmp_path):
    net, x = made(), sound(1, 7)
    unmasked, masked = by_hand(net, x)
    middle = (unmasked + masked).item() / 2
    changed = copied(net)
    only(changed).threshold.fill_(middle)
    program = torch.export.load(dslify.export(changed, tmp_path / "net.pt2", dynamic=False, progress=False).files[0])
    with torch.no_grad(), route(net, "light" if unmasked < middle else "full"):
        assert torch.allclose(program.module()(x), net(x), atol=CLOSE)


@pytest.mark.parametrize(("mask", "reached"), [("activation", False), ("channel", True)])
def test_what_a_gate_learns_moves_factors_and_no_thresholds(mask, reached):
    net = dslify.insert(Tones().eval(), "first", light="exit", mode="gc", mask=mask)
    layer = only(net)
    samples, positive = tones(24)
    _, tables = gather(net, [layer], batches, samples, 10**8, masks_train=True)
    layer.mask.weight.requires_grad_(True)
    layer.switch.requires_grad_(True)
    for kept in (tables, None):
        objective = GatedMaskObjective(net.train(), [layer], kept, samples, positive)
        gate, penalty, _ = objective(torch.arange(24))
        weight = torch.autograd.grad(gate, layer.mask.weight, retain_graph=True, allow_unused=True)[0]
        assert (weight is not None and bool(weight.any())) is reached
        assert torch.autograd.grad(gate, layer.switch.out.weight, retain_graph=True)[0].any()
        assert torch.autograd.grad(penalty, layer.mask.weight)[0].any()


def test_features_that_are_computed_once_are_those_before_the_mask():
    net, x = made(), sound(8, 8)
    samples = open_data(x, (1, 4 * ENTRIES), progress=False)
    net.train()
    (features,), _ = judge(net, [only(net)], batches, samples)
    net.eval()
    layer = only(net)
    assert torch.allclose(features, layer.switch.features(layer.pooled(entering(net, x))), atol=CLOSE)


def test_a_joint_network_scores_as_the_network_does():
    net, x = made(), sound(4, 9)
    joint = training_network(net, Ahead(), (x,))
    joint(x)
    (trained,) = dsl_layers(joint)
    assert torch.allclose(trained.paths.score, by_hand(net, x)[0], rtol=CLOSE)


def test_a_file_keeps_what_the_switch_reads_and_one_of_before_read_the_masked_value(tmp_path):
    net, x = made(), sound(4, 10)
    file = dslify.save(net, tmp_path / "net.dsl")
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert members["dslify.json"].count(b',"unmasked":true') == 1
    old = tmp_path / "old.dsl"
    with zipfile.ZipFile(old, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b',"unmasked":true', b""))
    for path, wanted in zip((file, old), by_hand(net, x), strict=True):
        again = dslify.load(path)
        with torch.no_grad():
            again(x)
        assert torch.allclose(only(again).paths.score, wanted, rtol=CLOSE)


def test_an_evaluation_says_which_mask_there_is_and_what_a_positive_sends():
    net = dslify.insert(Tones().eval(), "first", light="exit", mode="gc", mask="activation")
    layer = only(net)
    samples, positive = tones(40)
    x = samples.batch(range(40))
    assert mask_words(layer) == "8 thresholds on the activation, behind the switch, not in use yet"
    with torch.no_grad():
        layer.mask.turn_on(entering(net, x))
        layer.mask.weight.add_(0.1)
        net(x)
        layer.threshold.copy_(layer.paths.score.median() + 1e-6)
        net(x)
    on = positive & ~layer.paths.light_taken
    assert 0 < on.sum() < positive.sum()
    share = (layer.paths.masked[on] == 0).float().mean().item()
    count = layer.paths.masked[0].numel()
    found = dslify.evaluate(net, samples, positive="high", progress=False)
    gating = found.layers[0].gating
    assert gating.zeros == pytest.approx(share)
    assert gating.dense == count
    assert gating.sent == pytest.approx(count * (1 - share) + count / 8)
    shown = Console(file=io.StringIO(), width=200)
    shown.print(evaluation(found))
    text = shown.file.getvalue()
    assert f"{100 * share:.0f} % of the values at the cut are zero" in text
    assert "mask: 8 thresholds on the activation, behind the switch, on average 0." in text
    assert int8_bytes(800, 0.0) == 800, "a bitmap that saves nothing is not sent"
