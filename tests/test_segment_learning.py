"""Layers that route segments: the switch learns, thresholds are set and routings are judged segment by segment."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import dslify
from dslify import training_run
from dslify.cli import app
from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.functional import copied
from dslify.gate import GatedMaskObjective
from dslify.gather import SwitchObjective
from dslify.losses import difference, dsl_loss
from dslify.observe import Observations, collect
from dslify.resampling import spearman
from dslify.samples import QUIETEST_DB, Samples
from dslify.segmented import segment_positions
from dslify.switch import DSLayer, dsl_layers, route
from dslify.training_network import training_network

SEGMENT, COUNT = 256, 6  # samples in a segment, segments in a clip
FRAMES = 16  # of a segment, at the cut and at the output
ROUNDING = 1e-5  # float32 convolutions of windows of another length, relative
TRAINING = {"steps": 60, "switch_steps": 150, "progress": False, "threads": 1}


class Causal(nn.Conv1d):
    """Padded on the left only, (batch, in, time) -> (batch, out, time / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (self.kernel_size[0] - self.stride[0], 0)))


class Listener(nn.Module):
    """Sound (batch, 1, time) -> features (batch, 8, time / 16), cut behind `base`."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(Causal(1, 8, 8, 4), nn.ELU(), Causal(8, 12, 8, 4))
        self.rest = nn.Sequential(
            nn.ELU(), Causal(12, 24, 3), nn.ELU(), Causal(24, 24, 3), nn.ELU(), nn.Conv1d(24, 8, 1)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.base[0].weight, std=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.base(x))


def listener() -> Listener:
    torch.manual_seed(0)
    return Listener().eval()


@cache
def built(width: float | None, count: int, **options: str) -> nn.Module:
    return dslify.insert(listener(), "base", width, (torch.zeros(1, 1, count * SEGMENT),), **options)


def switched(
    route_every: int | None = SEGMENT, width: float | None = 0.25, count: int = COUNT, **options: str
) -> nn.Module:
    net = copied(built(width, count, **options))
    dslify.route_every(net, route_every)
    return net


def only(net: nn.Module) -> DSLayer:
    (layer,) = dsl_layers(net)
    return layer


def sounds(clips: int, seed: int, count: int = COUNT) -> Tensor:
    """(clips, 1, count * SEGMENT): tone and noise. Every clip goes through the same levels, silent to loud, a segment
    each, in an order of its own; so clips as a whole are alike and their segments are not."""
    random = torch.Generator().manual_seed(seed)
    level = 10 ** torch.linspace(-2.5, -0.3, count)[torch.rand(clips, count, generator=random).argsort(1)]
    pitch = 0.02 + 0.2 * torch.rand(clips, count, generator=random)
    share = torch.rand(clips, count, generator=random)
    level, pitch, share = (one.repeat_interleave(SEGMENT, 1) for one in (level, pitch, share))
    tone = (2 * torch.pi * pitch * torch.arange(count * SEGMENT)).sin()
    return (level * (share * torch.randn(level.shape, generator=random) + (1 - share) * tone))[:, None]


def recordings(clips: int = 30, seed: int = 3, count: int = COUNT) -> Samples:
    """Two clips of each source, labelled by turns."""
    labels = ["even" if at % 2 == 0 else "odd" for at in range(clips)]
    sources = [f"recording {at // 2}" for at in range(clips)]
    values = sounds(clips, seed, count)
    return open_data(values, tuple(values.shape[1:]), labels=labels, sources=sources, progress=False)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = switched()
    history = dslify.finetune(net, sounds(96, 1), **TRAINING)
    assert "the switch learned from segments: 144, 6 of each sample" in history.notes
    return net


def continuous(net: nn.Module, values: Tensor) -> tuple[Tensor, Tensor]:
    """The full and the light answer, each to whole clips."""
    with torch.no_grad():
        with route(net, "full"):
            full = net(values)
        with route(net, "light"):
            return full, net(values)


def gaps(net: nn.Module, values: Tensor) -> Tensor:
    """Relative difference of light and full, (clips, segments), by hand."""
    full, light = continuous(net, values)
    return (full - light).abs().unflatten(2, (-1, FRAMES)).mean((1, 3)) / only(net).scale


def really_light(net: nn.Module, values: Tensor) -> Tensor:
    """Which segments go light, (clips, segments)."""
    with torch.no_grad(), route(net, "mixed"):
        net(values)
    paths = only(net).paths
    assert paths is not None
    assert paths.light_taken is not None
    return paths.light_taken.unflatten(0, (len(values), -1))


def rank_correlation(seen: Observations) -> float:
    return float(spearman(seen.score, seen.difference, np.ones((1, len(seen))))[0])


def test_every_segment_is_observed_as_a_sample(trained):
    data = recordings()
    seen = collect(trained, data, batch_size=7, progress=False)
    values = data.batch(range(len(data)))
    assert (len(seen), seen.segments) == (30 * COUNT, COUNT)
    assert seen.labels == tuple(np.repeat(data.labels, COUNT))
    assert seen.sources == tuple(np.repeat(data.sources, COUNT))
    assert seen.difference == pytest.approx(gaps(trained, values).flatten().numpy(), rel=ROUNDING)
    power = values.double().square().reshape(-1, SEGMENT).mean(1)
    assert seen.loudness == pytest.approx(10 * power.log10().numpy())
    with torch.no_grad():
        cut = listener().base(values)
        pieces = cut.unflatten(2, (COUNT, FRAMES)).permute(0, 2, 3, 1).flatten(0, 1)
        assert seen.score == pytest.approx(only(trained).switch(pieces).numpy(), rel=ROUNDING)


def test_a_silent_segment_has_the_lowest_level():
    values = torch.zeros(20, 1, 2 * SEGMENT)
    values[:, :, SEGMENT:] = 0.5
    seen = collect(switched(), open_data(values), progress=False)
    assert seen.loudness.reshape(20, 2).tolist() == [[QUIETEST_DB, pytest.approx(20 * np.log10(0.5))]] * 20


def test_a_share_is_one_of_segments(trained):
    data = recordings()
    result = dslify.calibrate(trained, data, light_share=0.3, progress=False)
    assert (result.n, result.segments, result.sources) == (180, COUNT, 15)
    assert result.share == pytest.approx(0.3)
    assert "54 of 180 segments from 15 sources" in result.how
    assert "the 180 segments come from 15 sources only" in result.notes[0]
    taken = really_light(trained, data.batch(range(30)))
    assert taken.float().mean().item() == pytest.approx(0.3)
    assert taken.any(1).sum() > 20  # by segment, so most clips have some
    assert not taken.all(1).any()


def test_the_measured_mixture_is_the_one_of_both_continuous_answers(trained):
    dslify.calibrate(trained, recordings(), light_share=0.3, progress=False)
    data = recordings(24, seed=4)
    values = data.batch(range(24))
    result = dslify.evaluate(trained, data, batch_size=5, progress=False)
    taken, apart = really_light(trained, values), gaps(trained, values)
    assert 0 < taken.sum() < taken.numel()
    assert result["mixed"].share == pytest.approx(taken.float().mean().item())
    assert result["mixed"].difference == pytest.approx((taken * apart).mean().item(), rel=ROUNDING)
    assert result["light"].difference == pytest.approx(apart.mean().item(), rel=ROUNDING)
    quietest = apart.flatten().sort().values[: int(taken.sum())].sum().item() / apart.numel()
    assert result["oracle"].difference == pytest.approx(quietest, rel=ROUNDING)
    assert (result.n, result.segments, result.sources) == (24 * COUNT, COUNT, 12)
    (everything, even, odd) = result.kinds
    assert (everything.n, even.n, odd.n) == (144, 72, 72)
    assert even.share == pytest.approx(taken[::2].float().mean().item())
    assert any("warm-up" in note for note in result.notes)
    assert not any("put together" in note for note in result.notes)


def test_the_switch_learns_segments_and_not_clips(trained):
    test = open_data(sounds(48, 2))
    by_clip = switched(None)
    dslify.finetune(by_clip, sounds(96, 1), **TRAINING)
    dslify.route_every(by_clip, SEGMENT)
    fine, coarse = (collect(net, test, progress=False) for net in (trained, by_clip))
    assert fine.difference == pytest.approx(coarse.difference, rel=1e-3)  # the light paths learned the same
    assert rank_correlation(fine) > 0.95
    assert rank_correlation(coarse) < 0.5
    assert rank_correlation(fine) > float(spearman(fine.loudness, fine.difference, np.ones((1, len(fine))))[0]) + 0.03


def test_clips_of_one_segment_are_what_they_were_without_segments():
    values = recordings(40, seed=5, count=1)
    found = []
    for segment in (SEGMENT, None):
        net = switched(segment, count=1)
        options = {**TRAINING, "steps": 10, "switch_steps": 20, "patience": 2, "checkpoint_every": 5}
        history = dslify.finetune(net, values, **options)
        threshold = dslify.calibrate(net, values, max_difference=0.2, progress=False)
        result = dslify.evaluate(net, values, lambda output, _: output.square().mean((1, 2)), progress=False)
        net(values.batch(range(40)))
        assert only(net).paths.segments == 1
        losses = [phase.losses for phase in history.phases]
        found.append((losses, threshold, json.dumps(result.to_json()), net.state_dict()))
    (*with_segments, weights), (*without, others) = found
    assert with_segments == without
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_recordings_stay_what_a_guarantee_counts(trained):
    data = recordings(80)
    result = dslify.calibrate(trained, data, max_difference=0.05, guarantee="mean", progress=False)
    assert (result.n, result.units) == (480, 40)
    assert "40, every one counted once" in result.promise
    assert "over all segments" in result.promise
    with pytest.raises(DataError, match=r"at least 19 sources \(segments of one source count once\); got 15"):
        dslify.calibrate(trained, recordings(30), max_difference=0.05, guarantee="mean", progress=False)


def test_few_clips_of_many_segments_are_enough_for_a_share(trained):
    few = recordings(4)
    assert dslify.calibrate(trained, few, light_share=0.5, progress=False).n == 24
    with pytest.raises(DataError, match="at least 20 segments to calibrate on; got 18"):
        dslify.calibrate(trained, few.subset(range(3)), light_share=0.5, progress=False)


def test_a_metric_judges_whole_clips(trained):
    data = recordings(20)
    dslify.calibrate(trained, data, light_share=0.4, progress=False)
    result = dslify.evaluate(trained, data, lambda output, _: output.square().mean((1, 2)), progress=False)
    values = data.batch(range(20))
    full, light = continuous(trained, values)
    with torch.no_grad():
        mixed = trained(values)
    for name, output in (("full", full), ("light", light), ("mixed", mixed)):
        assert result[name].metric == pytest.approx(output.square().mean((1, 2)).mean().item(), rel=ROUNDING)
    assert all(result[name].metric is None for name in ("random", "oracle", "loudness"))
    assert any(note.startswith("metric: of whole samples") for note in result.notes)
    seen = collect(trained, data, routed=True, metric=lambda output, _: output.square().mean((1, 2)), progress=False)
    assert seen.metric["full"] == pytest.approx(full.square().mean((1, 2)).repeat_interleave(COUNT).numpy())
    before = only(trained).threshold.clone()
    with pytest.raises(OptionError, match="routes 6 segments of each one by one"):
        dslify.calibrate(
            trained, data, metric=lambda output, _: output.square().mean((1, 2)), max_metric=0.1, progress=False
        )
    assert torch.equal(only(trained).threshold, before)


@pytest.mark.parametrize("work", ["finetune", "calibrate", "evaluate", "tradeoff"])
def test_a_rest_of_a_segment_is_refused_with_lengths_that_fit(work):
    net, odd = switched(), sounds(24, 6)[:, :, :1100]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    options = {"light_share": 0.5} if work == "calibrate" else {}
    with pytest.raises(
        DataError, match=r"Samples of 1100 entries .* segments of 256, .* samples of 1024 or 1280 entries"
    ):
        getattr(dslify, work)(net, odd, **options, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training


def test_the_command_names_the_seconds_before_it_reads_anything(tmp_path: Path):
    sound = tmp_path / "sound"
    sound.mkdir()
    for at in range(4):
        soundfile.write(sound / f"{at}.wav", sounds(1, at, 48).flatten().numpy(), 8000)
    file = dslify.save(switched(), tmp_path / "net.dsl")
    command = ["calibrate", str(file), "--data", str(sound), "--light-share", "0.5", "--rate", "8000", "--segment"]
    written = file.read_bytes()
    refused = CliRunner().invoke(app, [*command, "0.2"], prog_name="dslify")
    assert refused.exit_code == 2
    assert "Samples of 1600 entries" in refused.stderr
    assert "--segment 0.192 or 0.224" in refused.stderr
    assert refused.stdout == ""
    assert file.read_bytes() == written
    done = CliRunner().invoke(app, [*command, "0.192"], prog_name="dslify")
    assert done.exit_code == 0
    assert "96 of 192 segments from 4 sources" in done.stdout
    assert "light: 50 % of the segments" in done.stdout


def test_layers_that_divide_a_sample_differently_are_refused():
    deep = dslify.insert(switched(None), "rest.1", 0.5, (torch.zeros(1, 1, COUNT * SEGMENT),))
    layers = dsl_layers(deep)
    assert len(layers) == 2
    layers[0].segments = only(switched()).segments
    with pytest.raises(OptionError, match="divide a sample into 1 and 6 segments"):
        dslify.calibrate(deep, recordings(), light_share=0.5, progress=False)


def test_dsl_loss_compares_scores_and_differences_by_segment():
    net, values = switched(), sounds(3, 7)
    layer = only(net)
    net.train()
    net(values)
    found = dsl_loss(net)
    full, light = layer.paths.full[0], layer.paths.light[0]
    pieces = [one.unflatten(2, (COUNT, FRAMES)).transpose(1, 2).flatten(0, 1) for one in (light, full)]
    actual = difference(pieces[:1], pieces[1:], layer.scale, layer.outputs)
    assert actual.shape == layer.paths.score.shape == (3 * COUNT,)
    logs = (layer.paths.score + 1e-3).log(), (actual.detach() + 1e-3).log()
    assert torch.allclose(found.switch, functional.smooth_l1_loss(*logs))
    found.total.backward()
    assert only(net).switch.out.weight.grad.abs().sum() > 0


def test_in_joint_training_what_follows_reads_the_chosen_segments():
    net, values = switched(), sounds(4, 8)
    network = training_network(net, listener(), (values[:2],), routes="mixed", share=0.25)
    output = network(values)
    paths = only(network).paths
    assert paths.score.shape == (4 * COUNT,)
    assert int(paths.light_taken.sum()) == 4 * COUNT // 4
    assert paths.score[paths.light_taken].max() <= paths.score[~paths.light_taken].min()
    full, light = (one[0].unflatten(2, (COUNT, FRAMES)) for one in (paths.full, paths.light))
    taken = paths.light_taken.view(4, 1, COUNT, 1)
    assert torch.equal(output.unflatten(2, (COUNT, FRAMES)), torch.where(taken, light, full))
    assert dsl_loss(network).total.isfinite()


def test_a_gate_learns_the_label_of_a_clip_in_each_of_its_segments():
    net = switched(width=None, mode="gc", light="exit")
    loud = torch.arange(40) % 2 == 1
    values = sounds(40, 9).sign() * torch.where(loud, 0.5, 0.01)[:, None, None]
    data = open_data(values, labels=["loud" if one else "quiet" for one in loud])
    dslify.finetune(net, data, positive="loud", **{**TRAINING, "steps": 0})
    with torch.no_grad():
        net(values)
    score = only(net).paths.score.view(40, COUNT)
    assert ((score > 0.5) == loud[:, None]).float().mean() > 0.99
    objective = GatedMaskObjective(net, [only(net)], None, data, loud)
    with torch.no_grad(), route(net, "both"):
        wrong = GatedMaskObjective(net, [only(net)], None, data, ~loud)
        assert objective(torch.arange(40))[0] < wrong(torch.arange(40))[0]
    only(net).threshold.fill_(0.5)
    found = dslify.evaluate(net, data, positive="loud", progress=False).gating
    assert found is not None
    assert min(found.recall, found.stopped) > 0.98


def test_segments_of_one_clip_stay_together_in_order():
    assert segment_positions(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


def test_the_switch_sees_every_segment_of_its_clips_and_none_of_those_held_out(monkeypatch):
    drawn: list[set[int]] = []

    class Watched(SwitchObjective):
        def forward(self, positions: Tensor) -> Tensor:
            drawn.append(set(positions.tolist()))
            return super().forward(positions)

    monkeypatch.setattr(training_run, "SwitchObjective", Watched)
    options = {**TRAINING, "steps": 0, "switch_steps": 12, "patience": 5, "checkpoint_every": 12}
    dslify.finetune(switched(), sounds(4, 1), switch_data=sounds(20, 2), **options)
    held, learned = drawn[0], set().union(*drawn[1:-1])  # judged before the first step and after the last
    assert drawn[-1] == held
    assert held | learned == set(range(20 * COUNT))
    assert not held & learned
    clips = {at // COUNT for at in held}
    assert len(held) == COUNT * len(clips) == 2 * COUNT
