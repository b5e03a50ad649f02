"""Varied copies: what they are, that they stay the same, and what training, calibration and commands make of them."""

import json

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import dslify
from dslify.cli import app
from dslify.data import open_data
from dslify.errors import DataError, OptionError, TrainError
from dslify.kinds import strange_kinds
from dslify.samples import Samples, split
from dslify.vary import FAR, FASTEST, LOUDER, QUIETER, SHIFT, SLOWEST, SoundVariation, VariedSamples

RATE = 16_000
LENGTH = 1600
QUICK = {"steps": 2, "switch_steps": 60, "batch_size": 8, "threads": 1, "progress": False}


class Tones(nn.Module):
    """Sound (batch, 1, LENGTH) -> logits (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(1, 8, 33, 16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv1d(8, 12, 5, 2), nn.ReLU())
        self.out = nn.Linear(12, 3)
        self.example_input_array = torch.zeros(1, 1, LENGTH)

    def forward(self, sound: Tensor) -> Tensor:
        return self.out(self.second(self.first(sound)).mean(2))


def gated() -> nn.Module:
    torch.manual_seed(0)
    return dslify.insert(Tones().eval(), "first", light="exit", mode="gc")


def sounds(labels: str = "up up go background", each: int = 12, seed: int = 0, channels: int = 1) -> Samples:
    """Tones in noise, the pitch by label; every source says each label once."""
    random = np.random.default_rng(seed)
    names = labels.split() * each
    time = np.arange(LENGTH) / RATE
    pitch = {"up": 2500.0, "go": 1500.0, "unknown": 700.0}
    values = [
        0.3 * np.sin(2 * np.pi * (pitch.get(name, 0.0) * time + random.uniform())) * (name in pitch)
        + 0.02 * random.standard_normal((channels, LENGTH))
        for name in names
    ]
    sources = [f"{seed}-{at // len(labels.split())}" for at in range(len(names))]
    return open_data(
        np.array(values, np.float32), (channels, LENGTH), labels=names, sources=sources, rate=RATE, progress=False
    )


# Copies ---------------------------------------------------------------------------------------------------------------


def test_copies_follow_their_originals():
    samples = sounds()
    found = dslify.vary(samples, 3)
    count = len(samples)
    assert len(found) == 4 * count
    assert found.report.samples == 4 * count
    assert "48 samples and 3 varied copies of each" in found.report.notes
    assert found.originals == tuple(range(count)) * 4
    assert (found.labels, found.sources, found.classes) == (samples.labels * 4, samples.sources * 4, samples.classes)
    assert found.names[count] == f"{samples.names[0]} (copy 1)"
    assert torch.equal(found.batch(range(count)), samples.batch(range(count)))
    copies = [found[place] for place in range(0, 4 * count, count)]
    assert all(one.shape == samples.shape and one.dtype == torch.float32 for one in copies)
    assert all(not torch.equal(one, other) for at, one in enumerate(copies) for other in copies[:at])
    assert dslify.vary(samples, 0) is samples


def test_a_copy_is_the_same_whenever_and_beside_whatever_it_is_read():
    samples = sounds()
    found = dslify.vary(samples, 3, seed=5)
    at = 2 * len(samples) + 7
    copy = found[at]
    assert torch.equal(found.batch([1, at, 90])[1], copy)
    assert torch.equal(dslify.vary(samples, 2, seed=5)[at], copy)
    assert not torch.equal(dslify.vary(samples, 3, seed=6)[at], copy)
    part = found.subset([at, 7])
    assert part.originals == (7, 7)
    assert torch.equal(part[0], copy)
    assert torch.equal(part[1], samples[7])
    one, other = split(found, (0.5, 0.5))
    assert not set(one.originals) & set(other.originals)
    assert sorted(one.originals + other.originals) == sorted(found.originals)


def test_fingerprints_are_the_originals_and_the_digest_knows_all_that_varies_a_copy():
    samples = sounds()
    found = dslify.vary(samples, 2)
    assert found.fingerprints() == samples.fingerprints() * 3
    digests = {
        each.digest()
        for each in (
            samples, found, dslify.vary(samples, 1), dslify.vary(samples, 2, seed=1), found.subset(range(50)),
            dslify.vary(samples, 2, noises=torch.randn(3, 1, 500)), dslify.vary(samples, 2, noises=samples),
        )
    }  # fmt: skip
    assert len(digests) == 7
    assert dslify.vary(samples, 2).digest() == found.digest()


def test_levels_are_the_copies_own():
    found = dslify.vary(sounds(), 1)
    loud = 10 * torch.log10(found.batch(range(len(found))).double().square().mean((1, 2)))
    torch.testing.assert_close(found.rms_db.double(), loud, rtol=0, atol=1e-3)
    assert torch.equal(found.subset([60, 3]).rms_db, found.rms_db[[60, 3]])


# Sound ----------------------------------------------------------------------------------------------------------------


def impulse(length: int = RATE) -> Samples:
    sound = torch.zeros(1, 1, length)
    sound[0, 0, length // 2 - 10 : length // 2 + 11] = torch.hann_window(21, periodic=False) / 2
    return open_data(sound, rate=RATE, progress=False)


def test_sound_moves_by_up_to_a_tenth_of_a_second_and_its_level_by_what_is_said():
    found = dslify.vary(impulse(), 100, noises=torch.zeros(1, 1, 5))  # a silent noise adds nothing
    sound = found.batch(range(1, 101))[:, 0]
    moved = (sound.argmax(1) - RATE // 2) / RATE
    assert moved.abs().max() <= SHIFT + 2 / RATE
    assert moved.min() < -0.9 * SHIFT
    assert moved.max() > 0.9 * SHIFT
    gain = 20 * (2 * sound.amax(1)).log10()
    assert QUIETER - 0.2 < gain.min() < QUIETER + 1
    assert LOUDER - 1 < gain.max() < LOUDER + 0.01


def test_speed_changes_the_pitch_by_up_to_a_tenth():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(RATE) / RATE)[None, None]
    found = dslify.vary(open_data(tone, rate=RATE, progress=False), 60, noises=torch.zeros(1, 1, 5))
    window = torch.hann_window(RATE)
    pitch = torch.fft.rfft(found.batch(range(1, 61))[:, 0] * window).abs().argmax(1)
    assert 1000 * SLOWEST - 2 <= pitch.min() < 1000 * SLOWEST + 25
    assert 1000 * FASTEST - 25 < pitch.max() <= 1000 * FASTEST + 2


def test_noise_lies_zero_to_25_decibels_below_in_half_of_the_copies():
    noise = torch.sin(2 * torch.pi * 5000 * torch.arange(700) / RATE)[None, None]  # 700 samples: it has to go round
    silence = torch.zeros(1, 1, 5)
    found, clean = (dslify.vary(impulse(), 100, noises=each).batch(range(1, 101)) for each in (noise, silence))
    power = clean.square().mean((1, 2)) / (found - clean).square().mean((1, 2))  # of the same copies but for the noise
    heard = power.isfinite()
    ratio = 10 * power[heard].log10()
    assert 30 < len(ratio) < 70
    assert -0.1 < ratio.min() < 3
    assert FAR - 3 < ratio.max() < FAR + 0.1


def test_noise_comes_from_the_background_that_there_is_or_is_made():
    samples = sounds()
    found = dslify.vary(samples, 1)
    assert isinstance(found, VariedSamples)
    assert isinstance(found.how, SoundVariation)
    assert isinstance(found.how.noises, Samples)
    assert set(found.how.noises.labels) == {"background"}
    assert any("noise of the 12 labelled background" in note for note in found.report.notes)
    made = dslify.vary(sounds("up go"), 1)
    assert any("noise that was made" in note for note in made.report.notes)
    power = torch.fft.rfft(made.how.noises[:, 0]).abs().square()
    low, high = power[:, 1:80].mean(1), power[:, 400:].mean(1)
    assert low[0] / high[0] < 3
    assert low[-1] / high[-1] > 1000


def test_sound_of_two_channels_without_channels_and_silent():
    stereo = dslify.vary(sounds("up go", channels=2), 2)
    assert stereo.batch(range(len(stereo))).shape == (72, 2, LENGTH)
    flat = open_data(torch.randn(3, LENGTH), rate=RATE, progress=False)
    assert dslify.vary(flat, 2)[4].shape == (LENGTH,)
    silent = dslify.vary(open_data(torch.zeros(2, 1, LENGTH), progress=False), 8)
    assert silent.batch(range(18)).abs().max() == 0
    assert any("varied as sound at 16000 Hz" in note for note in silent.report.notes)


def test_copies_are_not_louder_than_the_data_allows():
    loud = open_data(torch.ones(2, 1, LENGTH).mul(0.95), rate=RATE, progress=False)
    assert dslify.vary(loud, 20).batch(range(42)).abs().max() == 1
    louder = open_data(torch.ones(2, 1, LENGTH) * 30_000, rate=RATE, progress=False)  # 16-bit numbers, say
    assert dslify.vary(louder, 20).batch(range(42)).abs().max() == 30_000


# Other data -----------------------------------------------------------------------------------------------------------


def mirrored(batch: Tensor, generator: torch.Generator) -> Tensor:
    """A variation of pictures, named on the command line."""
    return batch.flip(-1) if torch.rand((), generator=generator) < 0.5 else batch + 1


def wrong(batch: Tensor, generator: torch.Generator) -> Tensor:
    return batch[..., :-1]


def test_a_function_of_ones_own_varies_anything():
    pictures = open_data(torch.arange(96.0).reshape(2, 3, 4, 4), progress=False)
    found = dslify.vary(pictures, 10, with_=mirrored)
    either = [(torch.equal(found[at], pictures[at % 2].flip(-1)), torch.equal(found[at], pictures[at % 2] + 1))
              for at in range(2, 22)]  # fmt: skip
    assert all(one != other for one, other in either)
    assert {True, False} == {one for one, _ in either}
    assert torch.equal(found.batch(range(22))[5], found[5])
    other = dslify.vary(pictures, 10, with_=lambda batch, _: batch)
    assert other.digest() != found.digest()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (wrong, "made 1x3x4x3 torch.float32 of a batch of 1x3x4x4"),
        (lambda batch, generator: None, "made NoneType of a batch"),
        (lambda batch, generator: batch / 0, "not finite"),
        (lambda batch, generator: 1 / 0, "division by zero"),
    ],
)
def test_a_function_that_does_not_fit_is_named(function, words):
    found = dslify.vary(open_data(torch.ones(2, 3, 4, 4), progress=False), 1, with_=function)
    with pytest.raises(OptionError, match="variation") as caught:
        found[3]
    assert words in str(caught.value)


def test_what_cannot_be_varied_is_refused():
    samples = sounds()
    for refused, words in (
        (lambda: dslify.vary(open_data(torch.ones(2, 3, 32, 32), progress=False), 1), "3x32x32 .* no sound"),
        (lambda: dslify.vary(open_data(torch.ones(2, 40, 2000), progress=False), 1), "40x2000 .* no sound"),
        (lambda: dslify.vary(open_data(torch.ones(2, 2000, dtype=torch.long), progress=False), 1), "no sound"),
        (lambda: dslify.vary(samples, 1, noises=torch.zeros(4, 2, 100)), "4 noises are 2x100"),
        (lambda: dslify.vary(samples, 1, noises=torch.zeros(0, 1, 100)), "0 noises"),
        (lambda: dslify.vary(dslify.vary(samples, 1), 1), "copies already"),
    ):
        with pytest.raises(DataError, match=words):
            refused()
    with pytest.raises(OptionError, match="0 or more; got -1"):
        dslify.vary(samples, -1)
    with pytest.raises(OptionError, match="noises are mixed into sound"):
        dslify.vary(samples, 1, noises=samples, with_=mirrored)


# Training and calibration ---------------------------------------------------------------------------------------------


def test_a_run_on_copies_goes_on_bit_for_bit_and_only_on_the_same_copies(tmp_path):
    samples = sounds()
    whole, resumed = gated(), gated()
    history = dslify.finetune(whole, dslify.vary(samples, 2), positive="!background", beta=0.1, **QUICK)
    light = history.data["light"]
    assert light["samples"] == 3 * light["originals"]
    assert light["labels"]["up"] == 2 * light["labels"]["go"]
    given = {"positive": "!background", "beta": 0.1, "run_dir": tmp_path / "run", "checkpoint_every": 20, **QUICK}
    dslify.finetune(resumed, dslify.vary(samples, 2), **given)
    (tmp_path / "run" / "checkpoints" / "final.pt").unlink()
    (tmp_path / "run" / "checkpoints" / "step-000060.pt").unlink(missing_ok=True)
    (tmp_path / "run" / "checkpoints" / "step-000062.pt").unlink(missing_ok=True)
    resumed = gated()
    again = dslify.finetune(resumed, dslify.vary(samples, 2), resume=True, **given)
    assert again.resumed_at == 40
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    saved = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert saved == {name: part["labels"] for name, part in history.data.items()}
    marks = json.loads((tmp_path / "run" / "data.json").read_text())
    assert len(marks["light"]) == light["originals"]
    with pytest.raises(TrainError, match="copies was"):
        dslify.finetune(gated(), dslify.vary(samples, 3), resume=True, **given)
    with pytest.raises(TrainError, match="light_data was"):
        dslify.finetune(gated(), dslify.vary(samples, 2, seed=1), resume=True, **given)


def test_gates_warn_of_kinds_that_they_were_not_shown(tmp_path):
    net = gated()
    history = dslify.finetune(net, sounds("up up go background"), positive="up", **QUICK)
    other = sounds("up go unknown background", seed=1)
    expected = (
        "training saw no 'unknown' among its negatives, and 12 of these 36 negatives are such: expect the gate to let "
        "them through"
    )
    assert history.data["switch"]["labels"].keys() == {"background", "go", "up"}
    dslify.save(net, tmp_path / "net.dsl")
    net = dslify.load(tmp_path / "net.dsl")
    for each in (other, dslify.vary(other, 2)):
        assert dslify.calibrate(net, each, light_share=0.5, progress=False).notes[0] == expected
    assert expected in dslify.evaluate(net, other, positive="up", progress=False).notes
    assert not [note for note in dslify.calibrate(net, sounds(seed=1), light_share=0.5).notes if "training saw" in note]
    dslify.finetune(net, other, positive="up", **QUICK)
    assert strange_kinds(net, other) == ()


def test_positives_that_a_gate_was_not_shown_and_labels_of_which_nobody_knows():
    net = gated()
    dslify.finetune(net, sounds("up go background"), positive="!background", **QUICK)
    other = sounds("up unknown background", seed=1)
    (note,) = strange_kinds(net, other)
    assert note.startswith("training saw no 'unknown' among its positives, and 12 of these 24 positives are such")
    assert note.endswith("expect the gate to stop them")
    (note,) = strange_kinds(net, other, "up")  # what is asked now counts, not what training was told
    assert "no 'unknown' among its negatives, and 12 of these 24 negatives" in note
    (note,) = strange_kinds(net, sounds("up go background", seed=1), "up")
    assert "no 'go' among its negatives" in note
    dslify.finetune(net, sounds("up go background"), positive=lambda label: label == "up", **QUICK)
    (note,) = strange_kinds(net, other)
    assert note.startswith("training saw no 'unknown', and 12 of these 36 samples are such")
    assert strange_kinds(nn.Sequential(), other) == ()


# Commands -------------------------------------------------------------------------------------------------------------


def write(folder, samples: Samples):
    for at, label in enumerate(samples.labels):
        path = folder / label / f"{at}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples[at][0].numpy(), RATE)
    return folder


def command(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="dslify")


def test_the_commands_vary(tmp_path):
    file = dslify.save(gated(), tmp_path / "net.dsl")
    train, other = (write(tmp_path / name, sounds(each=10, seed=seed)) for seed, name in enumerate(("train", "valid")))
    learn = ("finetune", file, "--data", train, "--positive", "!background", "--steps", 2, "--switch-steps", 3)
    found = command(*learn, "--copies", 2, "--noise", other / "background", "--switch-data", other, "--threads", 1)
    assert found.exit_code == 0, found.output
    assert found.output.count("40 samples and 2 varied copies of each") == 2
    assert "light: 120 samples (40 and varied copies of them) from 40 sources" in found.output
    assert f"noise of {other / 'background'}" in found.output
    found = command("calibrate", file, "--data", other, "--light-share", 0.5, "--copies", 1, "--json")
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["n"] == document["read"][0]["samples"] == 80
    before = file.read_bytes()
    for words, told in (
        (("--copies", "-1"), "copies must be a whole number"),
        (("--noise", other), "add --copies 8"),
        (("--vary", "tests.test_vary:mirrored"), "add --copies 8"),
        (("--copies", 1, "--vary", "tests.test_vary:wrong"), "tests.test_vary:wrong made 1x1x1599"),
        (("--copies", 1, "--vary", "no.such:thing"), "--vary no.such:thing cannot be imported"),
    ):
        refused = command(*learn, *words, "--run-dir", tmp_path / "refused")
        assert refused.exit_code == 2
        assert told in refused.output
        assert refused.output.splitlines()[-1].endswith(".")
    assert file.read_bytes() == before
    assert not (tmp_path / "refused").exists()
