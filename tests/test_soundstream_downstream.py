"""Downstream tasks of the codec recipe: mixtures by speaker, a probe that learns, routed embeddings, intervals."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import dslify
from dslify.errors import DataError
from recipes.soundstream import CUT, SoundStream, downstream, tasks
from recipes.soundstream.downstream import (
    at_random,
    calibrated,
    compared,
    embedded,
    fit,
    learned,
    routed,
    spliced,
    tried,
)  # fmt: skip
from recipes.soundstream.tasks import Clips, keywords, moved, speakers
from recipes.soundstream.work import SEGMENT, SPEECH_SHARE, Work

RATE = 16_000
FLOAT32 = 1e-5


def write_sound(folder: Path, rows: list[tuple[str, str, str, np.ndarray]]) -> Path:
    """rows: split, label, source, samples -> a folder with manifest.csv."""
    table = []
    for number, (split, label, source, samples) in enumerate(rows):
        path = folder / split / label / f"{number}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, RATE)
        table.append({"path": path.relative_to(folder).as_posix(), "split": split, "label": label, "source_id": source})
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "split", "label", "source_id"])
        writer.writeheader()
        writer.writerows(table)
    return folder


def voice(number: int, seconds: float = 2.5) -> np.ndarray:
    """A tone of its own for every speaker, so that a mixture tells who is in it."""
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.1 * np.sin(2 * np.pi * (200 + 100 * number) * time)).astype(np.float32)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four speakers and four rooms in every split, none in two."""
    noise = np.random.default_rng(0)
    rows = []
    for at, split in enumerate(("train", "valid", "test")):
        for number in range(4):
            rows.append((split, "speech", f"{split}-{number}", voice(4 * at + number)))
            room = (1e-3 * noise.standard_normal(2 * RATE)).astype(np.float32)
            rows.append((split, "silence", f"room-{split}-{number}", room))
    return write_sound(tmp_path_factory.mktemp("sound"), rows)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two words, of 0.9 and 1.1 s."""
    rows = [
        (split, word, f"{split}-{number}", voice(number + 5 * at, 0.9 + 0.2 * at))
        for split in ("train", "valid", "test")
        for at, word in enumerate(("yes", "no"))
        for number in range(3)
    ]
    return write_sound(tmp_path_factory.mktemp("words"), rows)


@pytest.fixture(scope="module")
def switched() -> SoundStream:
    torch.manual_seed(0)
    example = (torch.zeros(1, 1, 4 * SEGMENT),)
    return dslify.insert(
        SoundStream().eval(), CUT, width=0.2, scope="encoder", example_inputs=example, route_every=SEGMENT
    )


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tones_in(mixture: torch.Tensor, count: int) -> set[int]:
    """Which of the voices 0 to count - 1 are in a sound."""
    spectrum = torch.fft.rfft(mixture * torch.hann_window(len(mixture))).abs() / len(mixture)
    at = [round((200 + 100 * number) * len(mixture) / RATE) for number in range(count)]
    return {number for number in range(count) if spectrum[at[number]] > 0.005}


def test_mixtures_hold_as_many_speakers_of_their_own_split_as_they_say(sound, monkeypatch):
    monkeypatch.setattr(tasks, "MIXTURES", {"train": 8, "valid": 8, "test": 8})
    task = speakers(sound)
    for at, split in enumerate(("train", "valid", "test")):
        clips = task.clips[split]
        assert clips.sounds.shape == (32, 1, tasks.MIXTURE)
        assert clips.sounds.abs().max() <= 1.0
        for mixture, people, source in zip(clips.sounds, clips.classes.tolist(), clips.sources, strict=True):
            heard = tones_in(mixture[0], 12)
            assert len(heard) == people
            assert heard <= set(range(4 * at, 4 * at + 4))
            assert source.startswith(split if people else f"room-{split}")
        # every recording leads as often as any other
        assert sorted(map(clips.sources.count, set(clips.sources))) == [2] * 4 + [6] * 4
    again = speakers(sound)
    assert torch.equal(again.clips["test"].sounds, task.clips["test"].sounds)


def test_too_few_speakers_are_a_sentence(tmp_path):
    rows = [("train", kind, f"{kind}{n}", voice(n)) for kind in ("speech", "silence") for n in range(2)]
    with pytest.raises(DataError, match="needs 3 sources of speech for the split 'train'"):
        speakers(write_sound(tmp_path, rows))
    (tmp_path / "manifest.csv").write_text("path,split,label\na,train,speech\n")
    with pytest.raises(DataError, match="has no column source_id"):
        speakers(tmp_path)
    with pytest.raises(DataError, match=r"has no manifest\.csv"):
        keywords(tmp_path / "nowhere")


def test_words_are_one_second_long(words):
    task = keywords(words)
    assert task.classes == ("no", "yes")
    assert task.clips["valid"].sounds.shape == (6, 1, RATE)
    short = task.clips["valid"].sounds[task.classes.index("yes") == task.clips["valid"].classes]
    assert not short[..., int(0.9 * RATE) :].any()
    assert short[..., : int(0.9 * RATE)].abs().amax(-1).min() > 0.05


def test_moved_sounds_are_the_same_at_other_times_and_levels():
    sounds = torch.zeros(50, 1, RATE)
    sounds[..., 8000] = 0.4
    copies = moved(sounds, torch.Generator().manual_seed(0))
    at = copies.argmax(-1).flatten()
    assert at.min() < 8000 - 800
    assert at.max() > 8000 + 800
    assert (at - 8000).abs().max() <= tasks.SHIFT
    peaks = copies.amax((1, 2))
    assert 0.4 * 10 ** (-9 / 20) - 1e-6 <= peaks.min() < 0.2
    assert 0.6 < peaks.max() <= 0.4 * 10 ** (6 / 20) + 1e-6


def test_splicing_is_what_the_layer_does(switched):
    x = 0.3 * torch.randn(5, 1, RATE, generator=torch.Generator().manual_seed(0))  # 3 segments and a rest
    x *= torch.linspace(0.05, 1, RATE)
    (layer,) = dslify.dsl_layers(switched)
    given = {}
    for way in ("light", "full"):
        with dslify.route(switched, way):
            given[way] = embedded(switched, x)
    light, full = given["light"], given["full"]
    layer.threshold.fill_(layer.paths.score.median().item())
    mixed, taken = routed(switched, x)
    assert taken.shape == (5, 4)
    assert 0.3 < taken.float().mean() < 0.7
    assert torch.allclose(spliced(light, full, taken), mixed, atol=FLOAT32)
    assert not torch.allclose(spliced(light, full, ~taken), mixed, atol=1e-2)
    dealt = at_random(taken, torch.Generator().manual_seed(1))
    assert dealt.sum() == taken.sum()
    assert not torch.equal(dealt, taken)


def separable(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings whose third channel is loud in class 1."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 2
    values = torch.randn(count, 8, 50, generator=generator)
    values[:, 2] *= 1 + classes[:, None]
    return values, classes


def test_a_probe_learns_and_keeps_its_best_epoch(monkeypatch):
    monkeypatch.setattr(downstream, "EPOCHS", 6)
    monkeypatch.setattr(downstream, "BATCH", 16)
    train, valid, test = (separable(count, seed) for seed, count in enumerate((256, 64, 64)))
    probe, epoch = fit(train, valid, 2, seed=0)
    assert 1 <= epoch <= 6
    assert not probe.training
    with torch.no_grad():
        assert (probe(test[0]).argmax(1) == test[1]).float().mean() > 0.9
    shuffled, _ = fit((train[0], train[1][torch.randperm(256)]), valid, 2, seed=0)
    with torch.no_grad():
        assert (shuffled(test[0]).argmax(1) == test[1]).float().mean() < 0.8
    again, _ = fit(train, valid, 2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), again.parameters(), strict=True))


def test_differences_are_paired_and_intervals_go_by_source():
    full = np.array([True, True, False, False] * 25)
    mixed = full.copy()
    mixed[:10] = False  # of which 6 were right, all of the first source
    outcome = {"full": full, "light": ~full, "mixed": mixed, "random": mixed}
    sources = [f"s{at // 10}" for at in range(100)]
    found = compared([outcome, outcome], sources)
    assert found["accuracy"]["full"]["value"] == pytest.approx(0.5)
    assert found["difference"]["mixed"]["value"] == pytest.approx(-6 / 100)
    low, high = found["difference"]["mixed"]["interval"]
    assert low < found["difference"]["mixed"]["value"] < high <= 0
    # unpaired, the two accuracies would differ by far more from draw to draw
    wide = found["accuracy"]["light"]["interval"]
    assert found["difference"]["light"]["by_seed"] == [pytest.approx(0.0)] * 2
    assert wide is not None
    one = compared([outcome], ["alone"] * 100)
    assert one["accuracy"]["full"]["interval"] is None


def test_the_stage_writes_both_tasks(sound, words, switched, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MIXTURES", {"train": 4, "valid": 4, "test": 4})
    monkeypatch.setattr(downstream, "EPOCHS", 2)
    work = Work(sound, tmp_path, words, seeds=(0,))
    torch.manual_seed(0)
    monkeypatch.setattr(Work, "codec", SoundStream().eval())
    monkeypatch.setattr(Work, "net", lambda *_: switched)
    (layer,) = dslify.dsl_layers(switched)
    monkeypatch.setattr(downstream, "calibrated", lambda *_: layer.threshold.fill_(1e9))
    found = downstream.run(work)
    assert json.loads((tmp_path / "downstream.json").read_text()) == json.loads(json.dumps(found))
    assert set(found["tasks"]) == {"keywords", "speakers"}
    for task in found["tasks"].values():
        # with this threshold everything goes light, so mixed, random and light are one
        assert task["share_light"] == [1.0]
        assert task["accuracy"]["mixed"] == task["accuracy"]["light"] == task["accuracy"]["random"]
    alone = downstream.run(Work(sound, tmp_path, None, seeds=(0,)))
    assert set(alone["tasks"]) == {"speakers"}


def test_the_threshold_is_set_for_the_share_of_the_tasks_own_segments(switched):
    torch.manual_seed(0)
    sounds = 0.1 * torch.rand(16, 1, 1) * torch.randn(16, 1, RATE)  # three segments and a rest each
    calibrated(switched, sounds)
    _, taken = routed(switched, sounds[..., : 3 * SEGMENT])
    assert taken.float().mean().item() == pytest.approx(SPEECH_SHARE, abs=1 / taken.numel())


def test_probes_learn_from_the_codec_as_it_was(switched, words):
    task = keywords(words)
    torch.manual_seed(0)
    codec = SoundStream().eval()  # the weights of `switched`
    (train, classes), (valid, _) = learned(codec, task)
    assert len(train) == len(classes) == downstream.COPIES * 6
    assert not torch.allclose(train[:6], train[6:12], atol=1e-3)
    with dslify.route(switched, "full"):
        assert torch.allclose(embedded(switched, task.clips["valid"].sounds), valid, atol=FLOAT32)


def test_each_route_gives_the_probe_its_own_embeddings(switched):
    test = Clips(torch.randn(4, 1, RATE), torch.zeros(4, dtype=torch.long), tuple("abcd"))
    (layer,) = dslify.dsl_layers(switched)
    layer.threshold.fill_(1e9)
    seen: list[torch.Tensor] = []

    def probe(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    right, share = tried(switched, probe, test, 0)
    assert share == 1.0
    assert all(column.all() for column in right.values())
    full, light, mixed, random = seen
    assert torch.allclose(light, mixed, atol=FLOAT32)
    assert torch.equal(light, random)
    assert not torch.allclose(light, full, atol=1e-2)
