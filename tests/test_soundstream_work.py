"""Where the codec's evaluation keeps its files: whole or not at all, found again, and told where one is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import dslify
from dslify.errors import DataError
from dslify.switch import dsl_layers, route
from recipes.soundstream import CUT, SoundStream
from recipes.soundstream import work as agreed
from recipes.soundstream.work import MAIN, SEGMENT, SILENCE_SHARE, SPEECH_SHARE, Work


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "sound", tmp_path / "runs")


def test_what_is_written_is_read_again(work):
    content = {"speech": 0.125, "rows": [1, None, "käse"], "inner": {"0.3": True}}
    path = work.write("quality/first.json", content)
    assert path == work.folder / "quality" / "first.json"
    assert work.read("quality/first.json") == content
    assert path.read_text().endswith("}\n")
    work.write("quality/first.json", {"speech": 0.5})
    assert work.read("quality/first.json") == {"speech": 0.5}
    assert [file.name for file in path.parent.iterdir()] == ["first.json"]


def test_what_cannot_be_written_leaves_the_file_as_it_was(work, monkeypatch):
    path = work.write("latency.json", {"ms": 3})
    with pytest.raises(TypeError):
        work.write("latency.json", {"ms": torch.zeros(2)})
    assert work.read("latency.json") == {"ms": 3}

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        work.write("latency.json", {"ms": 4})
    assert json.loads(path.read_text()) == {"ms": 3}


def test_a_missing_file_is_named_with_the_way_out(work):
    with pytest.raises(DataError, match=r"runs/downstream\.json is missing; run the stage that writes it"):
        work.read("downstream.json")
    with pytest.raises(DataError, match=r"thresholds/narrow-2\.json is missing"):
        work.thresholds("narrow", 2)


def test_thresholds_are_those_of_one_retrofit(work):
    work.write(f"thresholds/{MAIN}-0.json", {"speech": 1, "silence": 2.5})
    work.write(f"thresholds/{MAIN}-1.json", {"speech": 0.25, "silence": 0.5})
    assert work.thresholds() == {"speech": 1.0, "silence": 2.5}
    assert isinstance(work.thresholds()["speech"], float)
    assert work.thresholds(seed=1) == {"speech": 0.25, "silence": 0.5}


def test_every_retrofit_has_a_file_of_its_own(work):
    files = {work.switched(variant, seed) for variant in (MAIN, "narrow") for seed in work.seeds}
    assert len(files) == 6
    assert all(file.suffix == ".dsl" and file.is_relative_to(work.folder) for file in files)
    assert work.switched() == work.switched(MAIN, 0)


def test_an_evaluation_is_fixed_once_it_has_begun(work):
    with pytest.raises(dataclasses.FrozenInstanceError):
        work.seeds = (5,)


def test_the_codec_with_a_retrofit_keeps_its_own_quantizer_and_decoder(work, monkeypatch):
    torch.manual_seed(0)
    codec = SoundStream().eval()
    codec.quantizer(torch.randn(2, 600, codec.config.embedding))  # codebooks start from the first data
    monkeypatch.setattr(agreed, "pretrained", lambda: codec)
    sound = torch.randn(1, 1, 4 * SEGMENT, generator=torch.Generator().manual_seed(1)) * 0.1
    net = dslify.insert(
        codec, CUT, 0.1, scope="encoder", depth=0.01, example_inputs=(sound,), route_every=SEGMENT, seed=3
    )
    dsl_layers(net)[0].threshold.fill_(0.5)
    work.switched("narrow", 1).parent.mkdir(parents=True)
    dslify.save(net, work.switched("narrow", 1))
    found = work.net("narrow", 1)
    assert not found.training
    assert found.decoder.state_dict().keys() == codec.decoder.state_dict().keys()
    assert dsl_layers(found)[0].threshold.item() == 0.5
    with torch.no_grad():
        found(sound)
        assert dsl_layers(found)[0].paths.segments == 4
        with route(found, "full"):
            assert torch.allclose(found(sound), codec(sound), atol=1e-5)
        with route(found, "light"):
            assert not torch.allclose(found(sound), codec(sound), atol=1e-3)


def test_a_segment_is_whole_frames_of_the_codec():
    codec = SoundStream()
    assert SEGMENT % codec.hop == 0
    assert codec.encoder(torch.zeros(1, 1, SEGMENT)).shape[-1] == SEGMENT // codec.hop == 16
    assert 0 < SPEECH_SHARE < SILENCE_SHARE < 1
