"""The keyword recipe's networks, what training does to their clips, and a run that was interrupted."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from dslify.errors import OptionError, TrainError
from dslify.omega import omega
from dslify.samples import Samples
from recipes.keyword_spotting import augment, train
from recipes.keyword_spotting.checkpoints import build, pretrained, read_checkpoint
from recipes.keyword_spotting.data import POSITIVE, classes, sounds, split_speakers
from recipes.keyword_spotting.download import arranged
from recipes.keyword_spotting.network import BANDS, FLOOR, LENGTH, RATE, LogMel, mel_filters

SAME = 1e-4  # of log-mel values around 1, computed in groups against one product
LABELS = ("go", "left", "background", "unknown")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tones: a word is a pitch, a speaker a level."""
    root = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    rows = []
    for part, speakers in (("train", 8), ("valid", 2), ("test", 2)):
        for at, label in enumerate(LABELS):
            for speaker in range(speakers):
                path = root / part / label / f"{speaker}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                tone = np.sin(np.arange(LENGTH) * (0.05 + 0.1 * at)) * 0.1 * (1 + speaker)
                soundfile.write(path, (tone + 0.01 * random.standard_normal(LENGTH)).clip(-1, 1), RATE)
                rows.append((path.relative_to(root / part), label, f"{part}{speaker}"))
        with (root / part / "manifest.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "source_id"), *rows])
        rows = []
    return root


@pytest.mark.parametrize("name", ["convolutional", "transformer"])
def test_networks_answer_every_clip_alone(name):
    torch.manual_seed(0)
    network = build(name, 4).eval()
    assert 50_000 <= sum(one.numel() for one in network.parameters()) <= 100_000
    clips = torch.randn(3, 1, LENGTH)
    with torch.no_grad():
        together, alone = network(clips), torch.cat([network(clip[None]) for clip in clips])
    assert together.shape == (3, 4)
    assert torch.allclose(together, alone, atol=1e-5)


def test_an_unknown_network_is_named():
    with pytest.raises(OptionError, match="convolutional, transformer"):
        pretrained("recurrent")


def test_bands_in_groups_are_those_of_one_product():
    front, sound = LogMel(), torch.randn(2, 1, LENGTH) * 0.1
    spectrum = torch.stft(
        sound[:, 0], 512, 320, window=front.window, center=True, pad_mode="constant", return_complex=True
    )
    wanted = ((mel_filters() @ spectrum.abs().square() + FLOOR).log() + 3) / 4
    assert torch.allclose(front(sound), wanted, atol=SAME)
    assert sum((high - low) * 8 for low, high in front.ranges) < mel_filters().numel() / 4


def test_variation_without_change_is_the_clip_and_others_are_not():
    generator = torch.Generator().manual_seed(0)
    sound = torch.sin(torch.arange(LENGTH) * 0.1)[None, None] * 0.5
    still = augment._moved(sound, torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    assert torch.allclose(still, sound, atol=2e-3)  # positions of a grid in single precision
    moved = augment._moved(sound, torch.ones(1, 1, 1), torch.full((1, 1, 1), 100.0))
    assert torch.allclose(moved[..., :-100], sound[..., 100:], atol=2e-3)
    many = augment.varied(sound.expand(50, 1, -1), torch.randn(3, 1, LENGTH), generator)
    assert many.abs().max() <= 1
    assert len({round(float(one.square().mean()), 6) for one in many}) > 40
    again = augment.varied(sound.expand(50, 1, -1), torch.randn(3, 1, LENGTH), torch.Generator().manual_seed(1))
    assert not torch.allclose(many, again)


def test_other_words_are_backwards_or_joined_and_never_the_word():
    sound = torch.randn(16, 1, LENGTH)
    made = augment.other_words(sound, torch.arange(16) % 2, torch.Generator().manual_seed(0))
    backwards = [torch.equal(one, clip.flip(1)) for one, clip in zip(made, sound, strict=True)]
    assert 0 < sum(backwards) < 16
    for one, clip, turned in zip(made, sound, backwards, strict=True):
        assert not torch.equal(one, clip)
        assert turned or torch.equal(one[:, : LENGTH // 3], clip[:, : LENGTH // 3])


def test_blanks_are_bands_and_stretches_of_the_mean():
    frames = torch.randn(20, BANDS, 51)
    blanked = augment.blanked(frames, torch.Generator().manual_seed(0))
    changed = blanked != frames
    assert 0.05 < changed.float().mean() < 0.6
    rows, columns = changed.all(2, keepdim=True), changed.all(1, keepdim=True)
    assert torch.equal(changed, (rows | columns).expand_as(changed))


def test_no_speaker_is_on_both_sides(folder):
    data = sounds(folder)
    learning, calibration = split_speakers(data["train"])
    assert isinstance(learning, Samples)
    assert len(calibration)
    assert not set(learning.sources) & set(calibration.sources)
    assert len(learning) + len(calibration) == len(data["train"])
    assert classes(data["train"], omega(POSITIVE, data["train"].labels)).unique().tolist() == [0, 1, 2]


def test_an_interrupted_run_ends_as_an_unbroken_one(folder, tmp_path, capsys, monkeypatch):
    asked = ["--data", str(folder), "--steps", "4", "--batch", "8", "--other", "2", "--save-every", "2"]
    assert train.main([*asked, "--output", str(tmp_path / "whole.safetensors")]) == 0
    advance = train.Trainer.advance

    def stopping(self, *given):
        if self.step == 3:
            raise TrainError("stopped")
        return advance(self, *given)

    broken = tmp_path / "broken.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "advance", stopping)
        assert train.main([*asked, "--output", str(broken)]) == 2
    assert not broken.exists()
    assert train.main([*asked, "--output", str(broken), "--resume", "--rate", "1"]) == 2
    assert "has rate" in capsys.readouterr().err
    assert train.main([*asked, "--output", str(broken), "--resume"]) == 0
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(broken)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    network, record = read_checkpoint(broken)
    assert record["classes"] == ["no keyword", "go", "left"]
    assert not network.training
    taught = [*asked, "--network", "transformer", "--teacher", str(broken)]
    assert train.main([*taught, "--output", str(tmp_path / "small.safetensors")]) == 0
    assert json.loads((tmp_path / "small.json").read_text())["trained"]["teacher"] == "broken.safetensors"


def test_speech_commands_become_folders_with_speakers(tmp_path):
    root, sound = tmp_path / "speech", np.zeros(LENGTH)
    for path in ("go/a_nohash_0.wav", "go/b_nohash_0.wav", "cat/a_nohash_0.wav", "go/c_nohash_0.wav"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / path, sound, RATE)
    (root / "_background_noise_").mkdir()
    for at in range(3):
        soundfile.write(root / "_background_noise_" / f"{at}.wav", np.zeros(2 * LENGTH + 5), RATE)
    (root / "validation_list.txt").write_text("go/b_nohash_0.wav\n")
    with pytest.raises(OptionError, match="testing_list"):
        arranged(root, tmp_path / "clips", ["go"])
    assert not (tmp_path / "clips").exists()
    (root / "testing_list.txt").write_text("go/c_nohash_0.wav\n")
    assert arranged(root, tmp_path / "clips", ["go"]) == 4 + 6
    data = sounds(tmp_path / "clips")
    assert {name: sorted(part.labels) for name, part in data.items()} == {
        "train": ["background"] * 2 + ["go", "unknown"],
        "valid": ["background"] * 2 + ["go"],
        "test": ["background"] * 2 + ["go"],
    }
    assert set(data["train"].sources) == {"a", "0"}
    with pytest.raises(OptionError, match="there already"):
        arranged(root, tmp_path / "clips", ["go"])
