"""A sound that comes in pieces is answered as in one call, segment by segment on either path, borders included."""

import atexit
import json
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from torch import nn
from torch.nn import functional

import dslify
from dslify.errors import ExportError, OptionError
from dslify.parts import Scored
from dslify.runtime import Runner, manifest
from dslify.runtime.listening import Paths, segments
from dslify.runtime.stream import Stream
from dslify.switch import dsl_layers, route

EXACT = 1e-5  # of the largest value, over an exact wire
ENTRIES = 64  # of a segment
BOTH = ("causal", "ahead")


class Causal(nn.Module):
    """(batch, 1, length) -> (batch, 4, length / 16); left padding only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 8, 4)
        self.first, self.second = nn.Conv1d(8, 16, 4, 2), nn.Conv1d(16, 16, 5)
        self.last = nn.Conv1d(16, 4, 4, 2)

    def forward(self, sound):
        value = functional.elu(self.stem(functional.pad(sound, (4, 0))))
        value = functional.elu(self.first(functional.pad(value, (2, 0))))
        value = value + functional.elu(self.second(functional.pad(value, (4, 0))))
        return self.last(functional.pad(value, (2, 0)))


class Ahead(nn.Module):
    """(batch, 2, length) -> (batch, 8, length / 2) and (batch, 4, length / 4); padded on both sides everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 12, 5, 2, 2)
        self.middle = nn.Conv1d(12, 16, 7, 2, 3)
        self.wide = nn.ConvTranspose1d(16, 8, 4, 2, 1)
        self.narrow = nn.Conv1d(16, 4, 3, 1, 1)

    def forward(self, sound):
        value = torch.relu(self.middle(torch.relu(self.stem(sound))))
        return self.wide(value), self.narrow(value)


class Made:
    """A network that is routed by segments, and its split export."""

    def __init__(self, name):
        torch.manual_seed(0)
        model, channels = (Causal(), 1) if name == "causal" else (Ahead(), 2)
        example = torch.randn(2, channels, 4 * ENTRIES)
        self.net = dslify.insert(model.eval(), at="stem", width=0.25, example_inputs=(example,))
        (self.layer,) = dsl_layers(self.net)
        with torch.no_grad():
            self.layer.switch.standardise(
                self.layer.switch.features(torch.randn(50, 16, self.layer.mask.weight.numel()))
            )
        dslify.route_every(self.net, ENTRIES)
        root = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        self.folder = root / "parts"
        self.written = dslify.export(self.net, self.folder, split=True, progress=False)
        loud = torch.logspace(-2, 0.5, 24)[torch.randperm(24)].repeat_interleave(ENTRIES)
        self.sound = (torch.randn(1, channels, 24 * ENTRIES) * loud)[..., : -ENTRIES // 3].numpy()

    def whole(self, way, sound=None):
        """The outputs of one call, and the score of each segment."""
        with torch.no_grad(), route(self.net, way):
            found = self.net(torch.from_numpy(self.sound if sound is None else sound))
            masked = self.layer.paths.masked.split(self.layer.segments.frames, 2)
            scores = [Scored(self.layer).score(part).item() for part in masked]
        return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))], scores


made = cache(Made)


def pieces(sound, seed=0):
    """Of random lengths, one of them empty."""
    ends = np.sort(np.random.default_rng(seed).integers(0, sound.shape[-1], 40))
    return np.split(sound, [*ends, ends[-1]], -1)


def joined(results):
    return [np.concatenate(parts, -1) for parts in zip(*(one.outputs for one in results), strict=True)]


def off(found, wanted):
    assert [each.shape for each in found] == [each.shape for each in wanted]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True))


def by_route(one, results):
    """What each segment's path answers there on the whole sound."""
    ways, stream = {way: one.whole(way)[0] for way in ("light", "full")}, Runner(one.folder).manifest.stream
    found = []
    for at, (_, each) in enumerate(stream.outputs):
        size = stream.frames // stream.cut_step * each
        ends = [(place + 1) * size for place in range(len(results) - 1)] + [None]
        parts = [ways[one.route][at][..., place * size : ends[place]] for place, one in enumerate(results)]
        found.append(np.concatenate(parts, -1))
    return found


def in_turns(runner, sound, ways, seed=0):
    """Each segment on a given path."""
    found, left = [], iter(ways)
    runner.threshold = np.inf if next(left) == "light" else -np.inf
    for result in runner.listen(pieces(sound, seed)):
        found.append(result)
        runner.threshold = np.inf if next(left, "full") == "light" else -np.inf
    return found


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("way", ["light", "full"])
def test_the_answers_to_pieces_are_those_of_one_call(name, way):
    one = made(name)
    wanted, scores = one.whole(way)
    for number, seed in (("fp32", 0), ("none", 1)):
        found = list(Runner(one.folder, number=number).listen(pieces(one.sound, seed), route=way))
        assert len(found) == 24
        assert off(joined(found), wanted) < EXACT
        assert {result.route for result in found} == {way}
        assert np.allclose([result.score[0] for result in found], scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_every_segment_is_answered_as_its_path_does_on_the_whole_sound(name):
    one = made(name)
    ways = np.where(np.random.default_rng(3).random(24) < 0.5, "light", "full")
    found = in_turns(Runner(one.folder, number="fp32"), one.sound, ways)
    assert [result.route for result in found] == list(ways)
    wanted = by_route(one, found)
    assert off(joined(found), wanted) < EXACT
    cold = Runner(one.folder, number="fp32")
    cold.manifest = replace(cold.manifest, stream=replace(cold.manifest.stream, cut_before=0))
    assert off(joined(in_turns(cold, one.sound, ways)), wanted) > 1e-3, "without a warm-up the borders are others"


def test_the_score_decides():
    one = made("causal")
    scores = one.whole("full")[1]
    runner = Runner(one.folder, float(np.median(scores)), number="fp32")
    found = list(runner.listen([one.sound]))
    assert [result.route == "light" for result in found] == [score < runner.threshold for score in scores]
    assert runner.statistics.light == 12
    assert off(joined(found), by_route(one, found)) < EXACT


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("length", [33, 40, 63, 64, 65, 67, 100, 128, 131])
def test_a_short_sound_ends_as_in_one_call(name, length):
    one = made(name)
    sound = one.sound[..., 300 : 300 + length]
    found = list(Runner(one.folder, number="none").listen(np.split(sound, [length // 2], -1), route="full"))
    assert off(joined(found), one.whole("full", sound)[0]) < EXACT


@pytest.mark.parametrize("length", [1, 11])
def test_a_sound_that_is_too_short_for_the_network_is_named(length):
    with pytest.raises(OptionError, match="too short"):
        list(Runner(made("causal").folder).listen([made("causal").sound[..., :length]]))
    assert not list(Runner(made("causal").folder).listen([]))


@pytest.mark.parametrize(("name", "delay"), [("causal", 0), ("ahead", 4 * 2 + 1)])
def test_a_segment_is_answered_once_all_is_there_that_it_sees(name, delay):
    one = made(name)
    runner = Runner(one.folder, number="none")
    given = 0

    def entries():
        nonlocal given
        for given in range(1, 3 * ENTRIES + 1):
            yield one.sound[..., given - 1 : given]

    times = [given for _ in runner.listen(entries(), route="full")]
    assert times[:2] == [ENTRIES + delay, 2 * ENTRIES + delay]
    changed = one.sound.copy()  # what comes after the delay changes nothing
    changed[..., ENTRIES + delay :] += 1
    first = [one.whole("full", sound)[0][0][..., : ENTRIES // 16] for sound in (one.sound, changed)]
    assert off(*[[each] for each in first]) == 0


def test_full_is_sent_what_it_has_not_got():
    one = made("causal")
    runner = Runner(one.folder, number="fp32")
    stream = runner.manifest.stream
    frame = 4 * 8  # bytes of a frame of 8 channels
    ways = ["full", "full", "light", "full", "light", "light", "full", "full"] + ["light"] * 16
    found = in_turns(runner, one.sound, ways)
    extra = [0, 0, None, stream.warmup, None, None, stream.warmup, 0]
    for result, more in zip(found, extra, strict=False):
        if more is None:
            assert (result.bytes_sent, result.bytes_dense) == (0, stream.frames * frame)
        else:
            assert result.bytes_dense == (stream.frames + more) * frame == 4 * result.bytes_int8
            assert 0 < result.bytes_sent < result.bytes_dense + 40
    everything = one.sound.shape[-1] // 4 * frame
    assert runner.statistics.bytes_always == everything
    assert runner.statistics.bytes_dense == (5 * stream.frames + 2 * stream.warmup) * frame
    runner.number = "none"
    assert {result.bytes_sent for result in runner.listen([one.sound], "full")} == {0}
    runner.number = "fp16"
    assert EXACT / 100 < off(joined(runner.listen([one.sound], "full")), one.whole("full")[0]) < 2e-3


def test_the_big_processor_is_woken_and_sent_to_sleep():
    one, heard = made("causal"), []
    runner = Runner(one.folder, on_wake=lambda: heard.append("wake"), on_sleep=lambda: heard.append("sleep"))
    in_turns(runner, one.sound, ["light", "full", "full", "light", "full"] + ["light"] * 18 + ["full"])
    assert heard == ["wake", "sleep"] * 3
    assert runner.statistics.wakes == 3
    assert runner.statistics.light == 20
    assert runner.seconds > 0


def test_whole_inputs_are_still_decided_as_a_whole():
    one = made("causal")
    runner = Runner(one.folder, number="fp32")
    sound = one.sound[..., : 5 * ENTRIES]
    found = runner.run(sound, route="full")
    assert found.score.shape == (1,)
    assert off(found.outputs, one.whole("full", sound)[0]) < EXACT
    assert len(list(runner.stream([sound, sound]))) == 2


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 2, 9), np.float32), np.zeros((9,), np.float32), np.zeros((1, 1, 9), int)]
)
def test_pieces_that_do_not_fit_are_named(wrong):
    runner = Runner(made("causal").folder)
    with pytest.raises(OptionError, match="1 x any"):
        list(runner.listen([wrong]))


def test_a_folder_without_a_stream_says_what_to_do(tmp_path):
    folder = shutil.copytree(made("causal").folder, tmp_path / "parts")
    text = json.loads((folder / manifest.NAME).read_text())
    assert text["format"] == 1
    del text["stream"], text["files"]["stream"]
    (folder / manifest.NAME).write_text(json.dumps(text))
    (folder / "stream.onnx").unlink()
    old = Runner(folder)
    assert old.run(made("causal").sound).route == "full"
    with pytest.raises(OptionError, match="route_every"):
        next(old.listen([made("causal").sound]))


def test_a_damaged_front_part_is_refused(tmp_path):
    folder = shutil.copytree(made("causal").folder, tmp_path / "parts")
    (folder / "stream.onnx").write_bytes(b"another")
    with pytest.raises(ExportError, match=r"stream\.onnx"):
        Runner(folder)


def test_an_export_of_one_length_says_that_it_cannot_listen(tmp_path):
    written = dslify.export(made("causal").net, tmp_path / "parts", split=True, dynamic=False, progress=False)
    assert any("cannot listen" in note for note in written.notes)
    assert Runner(tmp_path / "parts").manifest.stream is None
    assert "stream" in made("causal").written.errors


convolution = some.tuples(some.integers(1, 4), some.integers(0, 4), some.integers(0, 5), some.integers(0, 4))


@settings(max_examples=60, deadline=None)
@given(convolution, convolution, some.integers(1, 3), some.lists(some.integers(1, 90), min_size=1, max_size=6))
@example((1, 0, 0, 0), (4, 1, 0, 1), 1, [1, 63])  # the last segment, short, looks back further than full was sent
@example((1, 0, 0, 0), (2, 1, 0, 0), 1, [61])
def test_windows_are_exact_for_any_strides_and_paddings(base, region, blocks, lengths):
    def layer(stride, more, left, right):
        """A convolution as (call, step, before, after)."""
        kernel = stride + more
        weight = torch.randn(1, 1, kernel, dtype=torch.float64)
        left, right = min(left, kernel - 1), min(right, max(0, more - min(left, kernel - 1)))

        def call(value):
            return functional.conv1d(
                functional.pad(torch.from_numpy(value), (left, right)), weight, stride=stride
            ).numpy()

        return call, stride, left, max(0, kernel - left - stride)

    (front, step, before, after), (path, cut_step, cut_before, cut_after) = layer(*base), layer(*region)
    frames = blocks * cut_step
    around = (2, frames, cut_step, cut_before, cut_after)
    stream = Stream(2, frames * step, step, before, after, *around, ((2, 1),))
    sound = np.random.default_rng(0).standard_normal((1, 1, sum(lengths)))
    try:
        wanted = path(front(sound))
    except RuntimeError:  # shorter than a kernel
        return

    def heard(entries, first, last):
        found = front(entries)[..., first:last]
        return found, found[..., :frames].mean(2)

    ears = Paths(stream, *[lambda value: [path(value)]] * 2, lambda value: (value, value.size))
    chunks = np.split(sound, np.cumsum(lengths)[:-1], -1)
    answers = [ears.answer(one, light=bool(one.place % 3 == 1))[0][0] for one in segments(stream, chunks, heard)]
    assert np.allclose(np.concatenate(answers, -1), wanted, atol=1e-9)
