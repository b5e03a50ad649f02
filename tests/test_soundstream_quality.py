"""How the recipe is judged: clips and their segments, forced routes, ViSQOL, clicks, figures, verdicts, the command."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

import dslify
from dslify.errors import DataError, OptionError
from dslify.losses import difference
from dslify.segments import by_segment
from recipes.soundstream import CUT, SoundStream, evaluate, quality, visqol
from recipes.soundstream.clicks import borders, excess
from recipes.soundstream.clips import NORMAL_DB, Clip, level, read_clips
from recipes.soundstream.findings import aggregated
from recipes.soundstream.listening import MIXED, ROUTES, Listened, listen
from recipes.soundstream.routes import FRAMES, changes, decoded, exactly, heard, largest_gap, layer_of, routed
from recipes.soundstream.verdict import Line, quality_lines
from recipes.soundstream.work import SEGMENT, Work

RATE = 16_000
STAGES = {stage.name: stage for stage in evaluate.STAGES}
PLAIN = [4.73156, 4.65974]  # what visqol-python 3.8.0 gives for pair(), asked itself
FLOAT32 = 1e-5  # of the largest value, as the issue has it
needs_visqol = pytest.mark.skipif(importlib.util.find_spec("visqol") is None, reason="visqol-python is not installed")


def tone(seconds: float, swells: float = 3.0, seed: int = 0) -> np.ndarray:
    """(samples,) float32: harmonics and noise that swell from silence to -14 dB."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(time))
    tones = sum(np.sin(2 * np.pi * 150 * n * time) / n for n in range(1, 12))
    swell = np.sin(np.pi * swells * time / seconds) ** 2
    return (0.1 * swell * (tones + 0.1 * noise) + 1e-4 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    """A codec of random weights, its codebooks filled, with a light path that differs and a switch that varies."""
    torch.manual_seed(0)
    codec = SoundStream()
    with torch.no_grad():
        codec.train()(torch.from_numpy(np.stack([tone(1.0, seed=seed) for seed in range(4)]))[:, None])
    codec.eval()
    example = (torch.randn(1, 1, RATE),)
    made = dslify.insert(codec, CUT, 0.1, example, scope="encoder", route_every=SEGMENT).eval()
    layer = dslify.dsl_layers(made)[0]
    layer.scale.fill_(0.5)
    with torch.no_grad():
        layer.switch.out.weight.mul_(50.0)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sound like codec16k: three files of speech, one of silence, in the test split."""
    rows, stretches = ["path,split,label"], ["path,start_s,end_s,label"]
    for name, kind, seconds in (
        ("a", "speech", 1.5),
        ("b", "speech", 2.0),
        ("c", "speech", 1.28),
        ("d", "silence", 1.1),
    ):
        path = f"test/{kind}/{name}.flac"
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        sound = tone(seconds, seed=ord(name)) * (0.003 if kind == "silence" else 1.0)
        soundfile.write(tmp_path / "data" / path, sound, RATE)
        rows.append(f"{path},test,{kind}")
        if kind == "speech":
            stretches += [f"{path},0.0,0.4,silence", f"{path},0.4,{seconds},speech"]
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "data" / "segments.csv").write_text("\n".join(stretches) + "\n")
    return tmp_path / "data"


def test_a_segment_is_a_pause_where_all_of_it_is_silence(folder):
    clips = {clip.name: clip for clip in read_clips(folder, "test")}
    assert clips["test/speech/a.flac"].places == ("pause", "speech", "speech", "speech", "speech")
    assert clips["test/silence/d.flac"].places == ("",) * 4
    (folder / "segments.csv").write_text("path,start_s,end_s,label\ntest/speech/a.flac,0.1,0.9,silence\n")
    clips = {clip.name: clip for clip in read_clips(folder, "test")}
    # 0.22 of 0.32 s are silence, all of it, 0.26 s, and then none.
    assert clips["test/speech/a.flac"].places == ("edge", "pause", "edge", "speech", "speech")


def test_levels_are_of_segments_and_a_normalised_clip_has_one_level():
    sound = np.concatenate([np.full(SEGMENT, 0.5), np.full(SEGMENT // 4, 0.05)]).astype(np.float32)
    clip = Clip("x", "speech", sound, ("", ""))
    assert clip.segments == 2
    assert clip.levels() == pytest.approx([20 * np.log10(0.5), 20 * np.log10(0.05)], abs=1e-4)
    assert level(clip.normalised().sound) == pytest.approx(NORMAL_DB, abs=1e-4)


def test_a_spliced_embedding_is_what_the_layer_routes(net):
    sound = tone(2.0)  # 7 segments, the last one shorter
    found = heard(net, sound)
    assert found.predicted.shape == found.actual.shape == (7,)
    threshold = float(np.median(found.predicted))
    embedding, light = routed(net, sound, threshold)
    assert (light == (found.predicted < threshold)).all()
    assert 0 < light.sum() < 7
    wanted = found.spliced(light)
    assert (embedding - wanted).abs().max() <= FLOAT32 * wanted.abs().max()
    assert largest_gap(embedding, wanted, light) <= FLOAT32
    assert (embedding - found.full).abs().max() > 1e-2
    # The gap is seen where it is, beside a change of path, and nowhere else.
    border = int(changes(light)[0]) * FRAMES
    wrong = embedding.clone()
    wrong[..., border] += 1.0
    assert largest_gap(wrong, wanted, light) > 1e-2
    assert layer_of(net).threshold.item() == 0.0


def test_the_actual_difference_is_the_one_that_the_switch_is_trained_on(net):
    sound = tone(1.28)  # four whole segments
    found, layer = heard(net, sound), layer_of(net)
    with torch.no_grad(), dslify.route(net, "both"):
        net.embed(torch.from_numpy(sound)[None, None])
    paths = layer.paths
    light, full = (by_segment(layer, values) for values in (paths.light, paths.full))
    wanted = difference(light, full, layer.scale, layer.outputs)
    assert found.actual == pytest.approx(wanted.numpy(), rel=1e-5)
    assert found.predicted == pytest.approx(paths.score.numpy(), rel=1e-5)


def test_a_layer_without_segments_or_scale_is_refused(net):
    layer = layer_of(net)
    held = layer.segments
    layer.segments = None
    try:
        with pytest.raises(OptionError, match="route_every=5120, and has route_every=None"):
            layer_of(net)
    finally:
        layer.segments = held
    layer.scale.zero_()
    try:
        with pytest.raises(OptionError, match="fine-tune it first"):
            layer_of(net)
    finally:
        layer.scale.fill_(0.5)


@pytest.fixture(scope="module")
def clips() -> tuple[Clip, ...]:
    sounds = [("speech", tone(2.0, seed=1)), ("speech", tone(1.5, 5.0, seed=2)), ("silence", 0.01 * tone(1.3, seed=3))]
    places = {"speech": ("pause", "speech", "edge"), "silence": ("",)}
    found = []
    for at, (kind, sound) in enumerate(sounds):
        count = -(-len(sound) // SEGMENT)
        found.append(Clip(f"{kind} {at}", kind, sound, tuple((places[kind] * count)[:count])))
    return tuple(found)


@pytest.fixture(scope="module")
def listened(net, clips) -> Listened:
    scores = np.concatenate([heard(net, clip.sound).predicted for clip in clips])
    return listen(net, {"speech": float(np.quantile(scores, 0.4)), "silence": float(np.median(scores))}, clips, seed=0)


def test_every_control_sends_as_many_segments_light_as_the_switch(clips, listened):
    for kind, threshold in (("speech", "speech"), ("silence", "silence")):
        members = [at for at, clip in enumerate(clips) if clip.kind == kind]

        def taken(route: str, members: list[int] = members) -> np.ndarray:
            return np.concatenate([listened.played[route][at].light for at in members])

        count = taken(MIXED[threshold]).sum()
        assert all(taken(route).sum() == count for route in ("random 1", "random 2", "oracle", "loudness"))
        actual = np.concatenate([listened.heard[at].actual for at in members])
        levels = np.concatenate([clips[at].levels() for at in members])
        if 0 < count < len(actual):
            assert actual[taken("oracle")].max() <= actual[~taken("oracle")].min()
            assert levels[taken("loudness")].max() <= levels[~taken("loudness")].min()
    assert not any(played.light.any() for played in listened.played["full"])
    assert all(played.light.all() for played in listened.played["light"])
    speech = [listened.played[MIXED["speech"]][at].light for at, clip in enumerate(clips) if clip.kind == "speech"]
    assert 0 < np.concatenate(speech).sum() < sum(map(len, speech))


def test_what_is_played_is_the_codecs_sound(net, clips, listened):
    whole = listened.played["full"][0].sound
    with torch.no_grad(), dslify.route(net, "full"):
        wanted = net(torch.from_numpy(clips[0].sound)[None, None])[0, 0].numpy()
    assert np.abs(whole - wanted).max() <= FLOAT32
    assert np.abs(whole - listened.played["light"][0].sound).max() > 1e-3
    assert max(listened.gap) <= FLOAT32
    assert decoded(net, listened.heard[0].full, 1000).shape == (1000,)


def test_exactly_so_many_of_the_smallest():
    assert exactly(2, [3.0, 1.0, 2.0]).tolist() == [False, True, True]
    assert exactly(1, [1.0, 1.0]).tolist() == [True, False]
    assert not exactly(0, [1.0]).any()


def test_a_hard_cut_clicks_and_the_two_sounds_alone_do_not():
    time = np.arange(10 * SEGMENT) / RATE
    full, light = (0.1 * np.sin(2 * np.pi * 200 * time + phase).astype(np.float32) for phase in (0.0, 1.0))
    taken = np.array([False, True] * 5)
    cut = np.where(np.repeat(taken, SEGMENT), light, full)
    fade = np.convolve(np.repeat(taken, SEGMENT).astype(float), np.hanning(801) / np.hanning(801).sum(), "same")
    smooth = (fade * light + (1 - fade) * full).astype(np.float32)
    found = {name: excess([borders(full, sound, light, taken)]) for name, sound in (("cut", cut), ("smooth", smooth))}
    assert found["cut"]["borders"] == 9
    assert found["cut"]["routed over full"]["value"] > 10.0
    assert found["cut"]["routed over own"]["value"] == pytest.approx(found["cut"]["cut over own"]["value"])
    assert found["smooth"]["routed over full"]["value"] < 1.0
    assert found["smooth"]["own over full"]["value"] == pytest.approx(0.0, abs=0.1)
    # Half of the 10 ms are the other sound's, and all of them mid-way.
    assert found["cut"]["apart over inside"]["value"] == pytest.approx(10 * np.log10(0.5), abs=0.5)
    assert excess([borders(full, full, light, np.zeros(10, bool))]) == {"borders": 0}


def measured(listened: Listened, clips: tuple[Clip, ...]) -> tuple[list[Listened], np.ndarray]:
    """Two retrofits and made-up scores: 4 for full, 3.5 for light, in between by share, 0.1 lower in the second."""
    share = np.array([[played.light.mean() for played in listened.played[name]] for name in ROUTES])
    return [listened, listened], np.stack([4.0 - 0.5 * share, 3.9 - 0.5 * share])


@pytest.fixture(scope="module")
def found(clips, listened) -> dict[str, Any]:
    return aggregated(clips, *measured(listened, clips))


def test_the_figures_are_means_of_the_measurements(clips, listened, found):
    speech = found["routes"]["speech"]
    assert speech["full"]["visqol"]["value"] == pytest.approx(3.95)
    assert speech["full"]["visqol"]["by_seed"] == pytest.approx([4.0, 3.9])
    assert found["over"]["speech"]["full over light"]["value"] == pytest.approx(0.5)
    light = [listened.played[MIXED["speech"]][at].light for at in (0, 1)]
    assert speech["mixed"]["share_light"]["value"] == pytest.approx(np.concatenate(light).mean())
    assert speech["random"]["share_light"]["value"] == pytest.approx(np.concatenate(light).mean())
    assert speech["mixed"]["visqol"] == speech["mixed at speech"]["visqol"]
    silence = found["routes"]["silence"]
    assert silence["mixed"]["visqol"] == silence["mixed at silence"]["visqol"]
    assert silence["full"]["visqol"]["interval"] is None  # one file
    pauses = np.concatenate([each[np.array(clips[at].places) == "pause"] for at, each in enumerate(light)])
    assert found["share_at_speech"]["pause"]["value"] == pytest.approx(pauses.mean())
    json.dumps(found)


def test_the_rank_correlation_is_scipys(clips, listened, found):
    stats = pytest.importorskip("scipy.stats")
    found = found["spearman"]
    inside = np.concatenate([np.array(clip.places) == "speech" for clip in clips])
    for name, hears, sounds in (
        ("as recorded", listened.heard, clips),
        ("level-normalised", listened.normal, [clip.normalised() for clip in clips]),
    ):
        actual, predicted = (np.concatenate([getattr(one, what) for one in hears]) for what in ("actual", "predicted"))
        levels = np.concatenate([clip.levels() for clip in sounds])
        for which, values in (("switch", predicted), ("loudness", levels)):
            wanted = stats.spearmanr(values[inside], actual[inside]).statistic
            assert found[name]["speech segments"][which]["value"] == pytest.approx(wanted)
            assert found[name]["all"][which]["value"] == pytest.approx(stats.spearmanr(values, actual).statistic)
    one = found["as recorded"]["all"]
    assert one["switch over loudness"]["value"] == pytest.approx(one["switch"]["value"] - one["loudness"]["value"])
    low, high = one["switch"]["interval"]
    assert low <= one["switch"]["value"] <= high


def test_without_a_gap_nothing_that_needs_one_passes(clips, listened, found):
    heard, mos = measured(listened, clips)
    lines = {line.what: line for line in quality_lines(found)}
    assert lines["speech, ViSQOL: light under full"].holds is True
    assert lines["speech, ViSQOL: mixed over random"].holds is False
    flat = np.full_like(mos, 4.0)
    lines = {line.what: line for line in quality_lines(aggregated(clips, heard, flat))}
    gap = lines["speech, ViSQOL: light under full"]
    assert gap.holds is False
    assert "no gap" in gap.words
    mixed = lines["speech, ViSQOL: mixed under full"]
    assert mixed.holds is None
    assert "no gap" in mixed.to_json()["words"]
    assert lines["routed from continuous at the borders, relative"].holds is True


@pytest.mark.parametrize(
    ("sign", "bound", "by_interval", "holds"),
    [("<=", 1.0, False, False), ("<=", 1.5, False, True), (">=", 1.0, False, True), ("<=", 1.0, True, True),
     ("<=", 0.8, True, False), (">=", 1.6, True, False)],
)  # fmt: skip
def test_a_line_holds_by_its_value_or_where_said_by_its_interval(sign, bound, by_interval, holds):
    line = Line("x", {"value": 1.2, "interval": (0.9, 1.5)}, sign, bound, by_interval=by_interval)
    assert line.holds is holds
    assert line.to_json()["holds"] is holds
    assert Line("x", {"value": None}, sign, bound).holds is None


def pair(name: str = "a tone", outputs: int = 2) -> visqol.Compared:
    """A second of a tone, and the same with more and more noise."""
    sound = tone(1.0)
    noise = np.random.default_rng(1).standard_normal(len(sound)).astype(np.float32)
    return visqol.Compared(name, sound, tuple(sound + 10.0 ** (at - 4) * noise for at in range(outputs)))


@needs_visqol
def test_a_real_score_is_kept_and_the_port_not_asked_again(tmp_path, monkeypatch):
    counted: list[int] = []
    first = visqol.scores([pair()], tmp_path, processes=1, done=counted.append)
    assert 1.0 <= first[0][1] < first[0][0] <= 5.0
    assert sum(counted) == 2
    assert first[0] == pytest.approx(PLAIN, abs=0.01)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the port is asked for what is known")

    monkeypatch.setattr(visqol, "ProcessPoolExecutor", asked)
    assert visqol.scores([pair(), pair()], tmp_path) == first * 2
    for changed in (pair(outputs=3), visqol.Compared("louder", 2 * pair().reference, pair().outputs)):
        with pytest.raises(AssertionError, match="asked for"):
            visqol.scores([changed], tmp_path)
    with pytest.raises(AssertionError, match="asked for"):
        visqol.scores([pair()], tmp_path, mode="speech")
    next(tmp_path.glob("*.json")).write_text("{broken")
    with pytest.raises(AssertionError, match="asked for"):
        visqol.scores([pair()], tmp_path)


def test_sounds_that_have_no_score_are_named(tmp_path):
    sound = tone(1.0)
    with pytest.raises(DataError, match=r"a.flac lasts 0.50 s, and ViSQOL needs 1 s"):
        visqol.Compared("a.flac", sound[:8000], (sound,))
    for odd in (np.zeros_like(sound), np.full_like(sound, np.nan)):
        with pytest.raises(DataError, match=r"a.flac, or what the codec made of it, is all zeros or not finite"):
            visqol.Compared("a.flac", sound, (odd,))
    with pytest.raises(OptionError, match="one of audio, speech; got 'music'"):
        visqol.scores([pair()], tmp_path, mode="music")


def made_up(pairs: Any, cache: Path, done: Any = lambda count: None) -> list[list[float]]:
    """Scores that fall with the distance from the reference, without ViSQOL."""
    found = []
    for one in pairs:
        found.append([5.0 - float(np.abs(one.reference - output).mean()) for output in one.outputs])
        done(len(one.outputs))
    return found


@pytest.fixture
def work(net, folder, tmp_path, monkeypatch) -> Work:
    """The stage `retrofit` done, with the network above for two seeds."""
    monkeypatch.setattr(visqol, "scores", made_up)
    monkeypatch.setattr(visqol, "required", lambda: "0")
    monkeypatch.setattr(Work, "net", lambda self, variant="shallow", seed=0: net)
    made = Work(folder, tmp_path / "work", seeds=(0, 1))
    scores = np.concatenate([heard(net, clip.sound).predicted for clip in read_clips(folder, "test")])
    for seed, share in ((0, 0.3), (1, 0.5)):
        limits = {"speech": float(np.quantile(scores, share)), "silence": float(np.quantile(scores, 0.6))}
        made.write(f"thresholds/shallow-{seed}.json", limits)
    made.write("variants.json", {})
    return made


def test_the_stage_writes_its_figures_rows_and_segments(work, capsys):
    found = quality.run(work)
    assert work.read("quality.json")["routes"].keys() == {"speech", "silence"}
    assert found["files"] == {"silence": 1, "speech": 3}
    assert [line["what"] for line in found["verdict"]] == [line.what for line in quality_lines(found)]
    rows = (work.folder / "quality.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(ROUTES) * 4
    with np.load(work.folder / "quality.npz") as kept:
        segments = found["segments"]["speech"] + found["segments"]["silence"]
        assert kept["actual"].shape == kept["predicted_normal"].shape == kept["light_speech"].shape == (2, segments)
        assert kept["place"].shape == kept["level"].shape == kept["start"].shape == (segments,)
        share = kept["light_speech"][:, kept["kind"] == "speech"].mean()
        assert share == pytest.approx(found["routes"]["speech"]["mixed"]["share_light"]["value"])
        assert list(kept["files"][kept["source"][[0, -1]]]) == ["test/silence/d.flac", "test/speech/c.flac"]
    console = Console(width=120)
    for part in STAGES["quality"].summary(found):
        console.print(part)
    shown = capsys.readouterr().out
    assert "speech, loudness" in shown
    assert "level-normalised, speech segments" in shown


def test_the_stage_says_which_one_has_to_run_first(work):
    (work.folder / "thresholds" / "shallow-1.json").unlink()
    with pytest.raises(DataError, match=r"shallow-1.json is missing; run the stage that writes it"):
        quality.run(work)


class Recorded:
    """Stages that only note that they ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        monkeypatch.setattr(evaluate.Stage, "run", lambda stage, work: self.run(stage, work))
        monkeypatch.setattr(evaluate.Stage, "summary", lambda stage, found: [f"{stage.name} found {found['n']}"])
        monkeypatch.setattr(visqol, "required", lambda: "0")

    def run(self, stage: evaluate.Stage, work: Work) -> dict[str, int]:
        self.ran.append(stage.name)
        path = work.write(stage.output, {"n": len(self.ran)})
        os.utime(path, ns=(10**18 + len(self.ran) * 10**9,) * 2)  # a second apart, on any file system
        return {"n": len(self.ran)}

    def again(self) -> list[str]:
        ran, self.ran = self.ran, []
        return ran


def test_the_command_runs_what_is_not_up_to_date(folder, tmp_path, monkeypatch, capsys):
    stages, work = Recorded(monkeypatch), tmp_path / "work"
    command = ["--data", str(folder), "--work", str(work)]
    old = 10**18
    monkeypatch.setattr(evaluate, "CHECKPOINT", tmp_path / "codec")
    (tmp_path / "codec").touch()
    for path in (tmp_path / "codec", folder / "manifest.csv"):
        os.utime(path, ns=(old, old))

    def settle() -> None:
        os.utime(work / "settings.json", ns=(old, old))

    assert evaluate.main(command) == 0
    assert stages.again() == list(STAGES)
    assert "quality found 2" in capsys.readouterr().out
    settle()
    assert evaluate.main(command) == 0
    assert stages.again() == []
    assert "quality.json is up to date" in capsys.readouterr().out.replace("\n", "")
    assert evaluate.main([*command, "--only", "quality", "--only", "latency", "--again"]) == 0
    assert stages.again() == ["quality", "latency"]
    (work / "downstream.json").unlink()
    os.utime(work / "variants.json", ns=(old + 10**9,) * 2)
    assert evaluate.main([*command, "--only", "downstream"]) == 0
    assert stages.again() == ["downstream"]
    for path in (tmp_path / "codec", folder / "manifest.csv"):
        os.utime(path, ns=(old * 2, old * 2))
        assert evaluate.main(command) == 0
        assert stages.again() == list(STAGES)
        os.utime(path, ns=(old, old))
    settle()
    assert evaluate.main([*command, "--seeds", "0"]) == 0
    assert stages.again() == list(STAGES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "--data nowhere is no folder; a folder with manifest.csv"),
        (["--keywords", "."], "--keywords . has no manifest.csv"),
        (["--seeds", "1", "1"], "--seeds are different numbers from 0 on, got 1 1"),
        (["--seeds", "-1"], "--seeds are different numbers from 0 on, got -1"),
        (["--threads", "0"], "--threads has to be at least 1, got 0"),
        (["--only", "quality"], "is missing; run the stage that writes it"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(visqol, "required", lambda: "0")
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--data", str(folder), "--work", "work", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert arguments[0] == "--only" or not (tmp_path / "work").exists()


def test_without_the_port_the_command_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visqol, "PACKAGE", "no-such-package-of-ours")
    assert evaluate.main(["--data", str(folder), "--work", str(tmp_path / "work")]) == 2
    assert "pip install 'dslify[soundstream]'" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
