"""The keyword recipe on long sound: where words are, what fires, how far windows go and what was computed for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import dslify
from dslify.counted import executed
from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.functional import copied
from dslify.omega import omega
from dslify.programs import host_graph
from dslify.runtime import wire
from dslify.samples import Samples
from dslify.written import trials
from recipes.keyword_spotting import detection, stream, voice
from recipes.keyword_spotting.data import POSITIVE
from recipes.keyword_spotting.network import LENGTH, RATE
from recipes.keyword_spotting.profiled import early_stop_profile
from recipes.keyword_spotting.soundscape import APART, FADE, JOIN, Soundscape, Word, composed
from recipes.keyword_spotting.timeline import timeline
from recipes.keyword_spotting.windows import computed, one_by_one, passed

HOP = stream.HOP


def clips() -> Samples:
    """Four of each label: noise of several levels, and tones in the middle of a clip."""
    generator = torch.Generator().manual_seed(0)
    labels = [label for label in ("background", "no", "unknown", "yes") for _ in range(4)]
    sound = 0.01 * torch.randn(len(labels), 1, LENGTH, generator=generator)
    time = torch.arange(LENGTH) / RATE
    for at, label in enumerate(labels):
        if label == "background":
            sound[at] *= 1 + at
        else:
            burst = torch.exp(-(((time - 0.5) / 0.12) ** 2))
            sound[at, 0] += 0.3 * burst * torch.sin(6.28 * (200 + 300 * at) * time)
    sources = [f"{label}{at}" for at, label in enumerate(labels)]
    return open_data(sound, (1, LENGTH), labels=labels, sources=sources, progress=False)


WORDS = omega(POSITIVE, ["background", "no", "unknown", "yes"])


def network() -> nn.Module:
    """(batch, 1, LENGTH) -> logits (batch, 3)"""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv1d(1, 6, 320, 160), nn.ReLU())
    blocks = [nn.Sequential(nn.Conv1d(a, b, 3, padding=1), nn.ReLU()) for a, b in ((6, 8), (8, 12))]
    net = nn.Sequential(first, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        net[-1].weight *= 20
        net[-1].bias -= net(clips().values).mean(0)  # so that it answers every class
    return net


@cache
def _scape() -> Soundscape:
    return composed(clips(), WORDS, 1.0, seed=0)


@cache
def _cascade() -> nn.Module:
    net = network()
    for at in ("0", "1"):
        net = dslify.insert(net, at, light="exit", mode="gc", example_inputs=(torch.zeros(1, 1, LENGTH),))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in dslify.dsl_layers(net):
            layer.switch.out.weight.copy_(torch.randn(layer.switch.out.weight.shape, generator=generator))
            layer.light.answer0.fill_(-1.0)  # told from what the network says
        for layer, share in zip(dslify.dsl_layers(net), (0.4, 0.5), strict=True):
            net(_scape().windows(HOP).contiguous())
            score = layer.paths.score.sort().values
            at = round(share * len(score))
            layer.threshold.fill_((score[at - 1] + score[at]) / 2)
    return net


def cascade() -> nn.Module:
    """A network with two gates; 40 % of _scape()'s windows stop at the first, half of the rest at the second."""
    return copied(_cascade())


def test_executed_counts_what_runs_and_transforms_apart():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with executed() as counter:
        a @ b
        torch.fft.rfft(torch.randn(7, 64))
        torch.fft.irfft(torch.randn(2, 33, dtype=torch.complex64))
        torch.fft.fft(torch.randn(64, dtype=torch.complex64))
    assert counter.macs == 3 * 4 * 5
    assert counter.transform_macs == (7 + 2 + 2) * 64 * 6 * 2.5 / 2


def test_words_lie_where_the_sound_says_and_take_their_share():
    data = clips()
    scape = composed(data, WORDS, 2.0, seed=3)
    assert len(scape.sound) == 2 * 60 * RATE
    assert (len(scape.words), len(scape.keywords)) == (12, 6)
    for word in scape.words:
        place = data.sources.index(word.source)
        start = round(word.start * RATE)
        inside = slice(start + FADE, start + LENGTH - FADE)
        assert torch.equal(scape.sound[inside], data[place][0, FADE : LENGTH - FADE])
        assert (word.label, word.keyword) == (data.labels[place], data.labels[place] in ("yes", "no"))
    assert len({word.source for word in scape.keywords}) == 6  # none twice before each of the eight was said
    kinds = scape.kinds(HOP)
    assert len(kinds) == len(scape.windows(HOP)) == (120 - 1) / HOP + 1
    assert (kinds == "keyword").sum() == 6 / HOP  # a middle lies in 1 s of windows


def test_the_background_is_no_loop_and_a_function_of_the_seed():
    first, again, other = (composed(clips(), WORDS, 1.0, seed).sound for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = composed(clips(), WORDS, 2.0, 0).sound.unfold(0, LENGTH, LENGTH)
    equal = (rows[:, None, ::97] == rows[None, :, ::97]).all(2)
    assert equal.sum() == len(rows)
    assert (rows.square().mean(1) > 0).all()
    assert JOIN > 0.2 * RATE


@given(seed=st.integers(0, 2**31), minutes=st.floats(0.5, 3))
@settings(max_examples=12, deadline=None)
def test_words_are_apart_in_every_stream(seed: int, minutes: float):
    scape = composed(clips(), WORDS, minutes, seed)
    starts = np.array([-1.0, *(word.start for word in scape.words), len(scape.sound) / RATE])
    assert (np.diff(starts) >= 1 + APART - 1e-9)[:-1].all()
    assert starts[-1] - starts[-2] >= 1
    assert scape.sound.abs().max() <= 1


def test_streams_that_cannot_be_made_are_refused_in_a_sentence():
    data = clips()
    with pytest.raises(OptionError, match=r"0\.1 minutes with 5% keywords .* no room for at least one"):
        composed(data, WORDS, 0.1, 0)
    with pytest.raises(OptionError, match=r"another share than 0\.4"):
        composed(data, WORDS, 2.0, 0, 0.4)
    with pytest.raises(DataError, match="holds no other word, and a stream is made of all three kinds"):
        composed(data.subset([at for at, label in enumerate(data.labels) if label != "unknown"]), WORDS, 1.0, 0)


@given(count=st.integers(1, 5), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_smoothing_is_the_mean_of_the_last_windows(count: int, n: int, seed: int):
    values = np.random.default_rng(seed).random((n, 3))
    found = detection.smoothed(values, count)
    for at in range(n):
        wanted = np.mean([values[max(0, at - back)] for back in range(count)], axis=0)
        np.testing.assert_allclose(found[at], wanted)


def test_detections_fire_once_and_count_for_one_word_each():
    means = np.zeros((60, 3))
    means[:, 0] = 1
    for at, label, value in ((10, 1, 0.8), (11, 1, 0.9), (13, 1, 0.9), (14, 1, 0.9), (30, 2, 0.7), (45, 1, 0.5)):
        means[at] = 0
        means[at, label] = value
    found = detection.detections(means, ("no", "yes"), 0.6, 0.25, 1)
    assert [(one.time, one.label, one.probability) for one in found] == [
        (3.0, "no", 0.8),
        (4.0, "no", 0.9),  # a refractory time of 1 s after the first
        (8.0, "yes", 0.7),
    ]
    said = (Word(2.9, "no", True, "a"), Word(5.9, "unknown", False, "b"), Word(7.2, "no", True, "c"))
    score = detection.scored(found, Soundscape(torch.zeros(36 * 100 * RATE), said))
    assert score.found == (True, False)
    assert score.right == (True, False, False)
    assert (score.misses, score.false_alarms) == (0.5, 2)
    assert score.alarms_per_hour == pytest.approx(2 / 1.0)
    assert score.by_label() == {"no": [1, 2]}
    assert score.f1 == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))


def test_the_threshold_is_the_best_on_its_stream():
    scape = Soundscape(torch.zeros(20 * RATE), (Word(4.0, "no", True, "a"), Word(12.0, "yes", True, "b")))
    means = np.zeros((77, 3))
    means[:, 0] = 0.1
    means[16, 1], means[48, 2], means[30, 1], means[60, 1] = 0.8, 0.7, 0.5, 0.62
    assert detection.best_threshold(means, ("no", "yes"), scape, 0.25, 1) == 0.7


def test_every_window_goes_as_it_would_alone_and_is_charged_for_that():
    net, windows = cascade(), _scape().windows(HOP)[::4]
    found = passed(net, windows, batch=29)
    first, second = dslify.dsl_layers(net)
    sent = [0, 0]
    with torch.no_grad():
        for at in range(len(windows)):
            answer = net(windows[at : at + 1])
            on = not first.paths.light_taken.item()
            further = on and not second.paths.light_taken.item()
            assert found.reached[:, at].tolist() == [True, on]
            assert found.went_on[:, at].tolist() == [on, further]
            assert (found.depth[at], found.stopped[at]) == (on + further, not further)
            np.testing.assert_allclose(found.probabilities[at], answer.softmax(1)[0], atol=1e-5)
            for gate, layer in enumerate((first, second)):
                if found.went_on[gate, at]:
                    sent[gate] += len(wire.encode([layer.paths.masked.numpy()], "int8", [(0, 1)]))
    assert set(found.depth.tolist()) == {0, 1, 2}
    assert found.sent.tolist() == pytest.approx(sent, rel=0.01)  # a value beside zero may round otherwise in a batch
    assert found.macs == pytest.approx(computed(net, found)[0], rel=1e-9)
    whole = passed(network(), windows)
    assert whole.macs == whole.probabilities.shape[0] * sum(
        row.macs for row in dslify.cost(net) if row.name.split()[0] in ("base", "full")
    )
    assert found.macs < whole.macs
    assert not whole.stopped.any()


def test_a_path_that_no_window_takes_costs_nothing():
    net, windows = cascade(), _scape().windows(HOP)[:9]
    rows = {row.name: row for row in dslify.cost(net)}
    dslify.dsl_layers(net)[0].threshold.fill_(2.0)
    found = passed(net, windows)
    assert found.macs == 9 * (rows["base"].macs + rows["switch"].macs)
    assert not found.reached[1].any()
    assert (found.sent == 0).all()
    assert computed(net, found)[1] == 9 * sum(
        4 * row.params + 2 * row.bytes for row in (rows["base"], rows["switch"], rows["light"])
    )


def test_voice_is_loud_against_a_floor_that_follows():
    generator = torch.Generator().manual_seed(0)
    sound = 0.001 * torch.randn(8 * RATE, generator=generator)
    sound[5 * RATE :] *= 30  # another noise: loud at first, the floor after MEMORY
    sound[2 * RATE + 4000 : 2 * RATE + 8000] *= 30  # a word
    quiet, word, change, after = voice.window_scores(sound, np.array([0, 2, 5, 7]) * RATE)
    assert quiet < 6
    assert word == pytest.approx(29.5, abs=3)
    assert change > 20
    assert after < 6
    assert voice.energies(torch.zeros(320)).tolist() == [voice.QUIETEST] * 2


def test_the_voice_threshold_is_the_highest_that_keeps_the_promise():
    scores, none = np.arange(400.0), np.zeros(400, bool)
    assert voice.highest_threshold(scores, none, 0.01, 0.95) == np.inf  # no clip that matters can be lost
    lost = none.copy()
    lost[[50, 60, 70]] = True
    assert voice.highest_threshold(scores, lost, 0.02, 0.95) == 70.0  # under it two are lost, and three are too many
    assert voice.highest_threshold(scores, lost, 0.05, 0.95) == np.inf
    with pytest.raises(DataError, match=r"20 keyword clips cannot promise at most 1\.0% lost"):
        voice.highest_threshold(scores[:20], lost[:20], 0.01, 0.95)


def test_a_network_behind_the_detector_hears_one_window_after_the_other():
    scape, net = _scape(), network()
    windows = scape.windows(HOP)[:40]
    scores = voice.window_scores(scape.sound, np.arange(40) * round(HOP * RATE))
    threshold = float(np.median(scores))
    gated = voice.VoiceGated(net, threshold, HOP, 3)
    with torch.no_grad():
        answers = torch.cat([gated(window[None]) for window in windows])
        expected = torch.where(torch.from_numpy(scores < threshold)[:, None], gated.nothing, net(windows.contiguous()))
    torch.testing.assert_close(answers, expected, atol=1e-5, rtol=1e-4)
    assert 5 < (scores < threshold).sum() < 35


def judged() -> dict:
    data = clips()
    nets = {"ungated": network(), "cascade": cascade()}
    return stream.judged(nets, data, data, seed=0, minutes=1.0, max_lost=0.5, confidence=0.5)


def test_all_systems_are_judged_on_one_stream():
    found = judged()
    json.dumps(found, allow_nan=False)
    assert list(found["systems"]) == ["ungated", "cascade", "voice activity", "random at the share of cascade"]
    ungated, gated, detector, random = found["systems"].values()
    assert (ungated["macs_share"], ungated["seconds_share"], ungated["energy_share"]) == (1, 1, 1)
    assert ungated["stopped_all"] == 0
    assert gated["stopped_all"] == pytest.approx(0.7, abs=0.02)
    assert gated["macs_computed_share"] == pytest.approx(gated["macs_share"], rel=1e-9)
    assert 0 < gated["macs_share"] < 1
    assert gated["macs_share_with_transform"] == gated["macs_share"]  # this network has no transform
    assert [gate["reached"] for gate in gated["gates"]] == [1.0, gated["gates"][0]["went_on"]]
    assert 0 < gated["energy_share"] < 1
    assert random["stopped_all"] == gated["stopped_all"]
    assert (random["macs_share"], random["seconds_share"]) == (gated["macs_share"], None)
    energies = RATE * HOP / (ungated["macs_per_window"])
    assert detector["macs_share"] == pytest.approx(1 - detector["stopped_all"] + energies, rel=1e-6)
    for row in found["systems"].values():
        assert row["said"] == 3 == sum(said for _, said in row["missed_by_label"].values())
        assert row["misses"] == sum(missed for missed, _ in row["missed_by_label"].values()) / 3
        assert row["false_alarms_per_hour"] == pytest.approx(60 * row["false_alarms"])


def test_a_run_without_the_ungated_network_is_refused():
    data = clips()
    with pytest.raises(OptionError, match='has to be "ungated", without a gate; got cascade'):
        stream.judged({"cascade": cascade()}, data, data)


def test_networks_take_turns_when_they_are_timed():
    class Slow(nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.name = name

        def forward(self, window: Tensor) -> Tensor:
            order.append(self.name)
            return window

    order: list[str] = []
    seconds = one_by_one({"a": Slow("a"), "b": Slow("b")}, torch.zeros(6, 1, 4), rounds=3)
    assert order == ["a", "b", *"aabb" * 3]
    assert all(value > 0 for value in seconds.values())


def test_the_timeline_is_a_picture_of_the_minute(tmp_path: Path):
    decision = stream.Decision(("no", "yes"), 0.3)
    told = timeline(tmp_path / "new" / "minute.png", cascade(), network(), clips(), decision, minutes=1.0)
    assert 0 < told["macs_share"] < 1
    assert told["keywords"] >= 2
    pixels = np.asarray(Image.open(tmp_path / "new" / "minute.png").convert("L"))
    assert pixels.shape[0] > 400
    assert pixels.std() > 20


def test_files_are_tried_with_thresholds_that_a_sure_gate_cannot_cross_by_rounding():
    net = cascade()
    with torch.no_grad():
        for layer in dslify.dsl_layers(net):
            layer.switch.out.bias.fill_(-40.0)  # a runtime's sigmoid does not tell such scores from 0
    for trial in trials(host_graph(net)[1]):
        for layer, threshold in trial.thresholds.items():
            if threshold:  # 0 for a gate that this way does not reach
                net(*trial.inputs)
                first = dslify.dsl_layers(net)[0]
                assert layer is not first or abs(threshold - first.paths.score.item()) > 5e-7


def test_the_profile_lists_nothing_behind_the_gate_that_stopped():
    net, windows = cascade(), _scape().windows(HOP)
    depth = passed(net, windows).depth
    sounds = {str(gates): windows[int(np.flatnonzero(depth == gates)[0])][None].contiguous() for gates in range(3)}
    found = early_stop_profile(net, sounds, timed=2)
    assert [found[name]["gate"] for name in ("0", "1", "2")] == [1, 2, None]
    for gates, row in enumerate(found.values()):
        ran = {part for part, names in row["ran"].items() if names}
        assert row["after_gate"] == []
        assert {f"full {at}" for at in range(1, 3) if at <= gates} == {part for part in ran if part.startswith("full")}
        assert "front" in ran
        assert row["ms"] > 0
    assert any("conv" in name.lower() for name in found["2"]["ran"]["full 2"])
