"""The codec recipe: causal, exportable, within its budgets, trained, and trainable to the same numbers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

from dslify.errors import DataError
from recipes.soundstream import CUT, SoundStream, SoundStreamConfig, encoder_costs, pretrained
from recipes.soundstream.adversarial import Critic, codec_losses, critic_loss
from recipes.soundstream.checkpoints import write_tensors
from recipes.soundstream.model import CHECKPOINT, build_encoder
from recipes.soundstream.sound import Sound, find_recordings, training_batch
from recipes.soundstream.spectral import LogMelDistance, ReconstructionLoss, clip_weights, mel_filters
from recipes.soundstream.train import Settings, Trainer, main

# Convolutions choose their blocking by length, which changes the order of float32 sums.
FLOAT32 = 1e-5
RATE = 16_000


@pytest.fixture(scope="module")
def codec() -> SoundStream:
    torch.manual_seed(0)
    return SoundStream().eval()


def harmonics(seconds: float = 1.0, pitch: float = 140.0, level: float = 0.1) -> Tensor:
    """(1, 1, samples): a voiced sound, 20 harmonics falling by 6 dB an octave, with a slow swell."""
    time = torch.arange(int(seconds * RATE)) / RATE
    tones = sum(torch.sin(2 * torch.pi * pitch * n * time) / n for n in range(1, 21))
    return (level * tones * (0.6 + 0.4 * torch.sin(2 * torch.pi * 3 * time))).float()[None, None]


def test_a_frame_sees_no_later_sample(codec):
    frames = 20
    x = harmonics(0.6)
    changed = x.clone()
    changed[..., frames * codec.hop :] = 0.3
    with torch.no_grad():
        before, after = codec.encoder(x), codec.encoder(changed)
        assert torch.allclose(before[..., :frames], after[..., :frames], atol=FLOAT32)
        assert not torch.allclose(before[..., frames], after[..., frames], atol=1e-3)
        before, after = codec.decoder(before), codec.decoder(after)
    same = (frames - 1) * codec.hop  # windows of the decoder reach into the last 20 ms
    assert torch.allclose(before[..., :same], after[..., :same], atol=FLOAT32)
    assert not torch.allclose(before[..., : same + codec.hop], after[..., : same + codec.hop], atol=FLOAT32)


@pytest.mark.parametrize("samples", [640, 16_000, 16_001, 12_345])
def test_the_reconstruction_is_as_long_as_the_sound(codec, samples):
    x = harmonics(2.0)[..., :samples]
    with torch.no_grad():
        codes = codec.encode(x)
        assert codes.shape == (1, -(-samples // 320), codec.config.quantizers)
        y = codec(x)
        assert y.shape == x.shape
        assert torch.allclose(codec.decode(codes)[..., :samples], y, atol=FLOAT32)


def test_the_encoder_exports_with_batch_and_time_dynamic(codec):
    auto = torch.export.Dim.AUTO
    example = harmonics().repeat(2, 1, 1)
    program = torch.export.export(codec.encoder, (example,), dynamic_shapes=({0: auto, 2: auto},), strict=False)
    exported = program.module()
    for batch, samples in [(1, 16_000), (3, 9_999), (2, 640), (5, 20_480)]:
        x = harmonics(2.0)[..., :samples].repeat(batch, 1, 1)
        with torch.no_grad():
            assert torch.equal(exported(x), codec.encoder(x))


def narrowed(config: SoundStreamConfig, width: float) -> SoundStreamConfig:
    """The encoder with every width after the cut shrunk, rounded up to a multiple of 4."""
    border = int(CUT.removeprefix("encoder.block")) + 1
    shrunk = (
        dataclasses.replace(stage, channels=4 * -(-round(stage.channels * width) // 4))
        for stage in config.encoder[border:]
    )
    return dataclasses.replace(config, encoder=(*config.encoder[:border], *shrunk))


def test_the_encoder_keeps_its_budgets():
    costs = encoder_costs()
    base, full = costs["base"], costs["full"]
    assert 4_000 <= base.params <= 6_000
    assert base.mmac_per_second <= 3.0
    assert 60_000 <= full.params <= 70_000
    assert full.mmac_per_second >= 5.2
    light = encoder_costs(narrowed(SoundStreamConfig(), 0.1))["full"]
    assert full.params / light.params >= 20.0
    assert full.mmac_per_second / light.mmac_per_second >= 12.3


def test_costs_count_every_convolution():
    config = SoundStreamConfig()
    encoder = build_encoder(config)
    hooked = 0

    def count(module: torch.nn.Conv1d, _inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal hooked
        hooked += module.weight.numel() * output.shape[-1]

    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(count)
    encoder(torch.zeros(1, 1, RATE))
    costs = encoder_costs(config)
    assert costs["base"].mmac_per_second + costs["full"].mmac_per_second == pytest.approx(hooked / 1e6)
    assert costs["base"].params + costs["full"].params == sum(p.numel() for p in encoder.parameters())


def test_every_cut_point_runs_once_with_one_tensor(codec):
    calls: list[tuple[str, int]] = []
    handles = [
        child.register_forward_hook(lambda _m, _i, output, name=name: calls.append((name, output.ndim)))
        for name, child in codec.encoder.named_children()
    ]
    codec(codec.example_input_array)
    for handle in handles:
        handle.remove()
    assert calls == [(name, 3) for name in ("stem", "block1", "block2", "block3", "head")]
    assert CUT.removeprefix("encoder.") in dict(calls)


def test_strides_that_miss_the_frame_rate_are_refused():
    config = SoundStreamConfig()
    *first, last = config.encoder
    with pytest.raises(ValueError, match="320, got 640"):
        SoundStreamConfig(encoder=(*first, dataclasses.replace(last, stride=4)))
    assert SoundStreamConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_checkpoint_reconstructs_a_voiced_sound():
    codec = pretrained()
    assert not codec.training
    assert CHECKPOINT.stat().st_size < 6_000_000
    x = torch.cat([harmonics(pitch=pitch, level=level) for pitch in (110.0, 200.0) for level in (0.03, 0.1)])
    with torch.no_grad():
        y = codec(x)
    distance = LogMelDistance()
    ours = distance(x, y).mean()
    # The trivial codec knows the long-term spectrum and nothing else: noise of the same power, and silence.
    rms = x.square().mean(dim=2, keepdim=True).sqrt()
    noise = rms * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert ours < 0.75 * distance(x, torch.zeros_like(x)).mean()
    assert ours < 0.5 * distance(x, noise).mean()


def shared_speech() -> Path:
    """Speech of the validation split; the environment variable names the folder that holds codec16k."""
    default = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("DSLIFY_SHARED_DATA", default)) / "codec16k" / "valid" / "speech"


@pytest.mark.skipif(not shared_speech().is_dir(), reason="no codec16k in the folder named by DSLIFY_SHARED_DATA")
def test_the_checkpoint_tells_what_was_said():
    codec = pretrained()
    clips = [soundfile.read(path, dtype="float32")[0][:32_000] for path in sorted(shared_speech().glob("*.flac"))[:6]]
    x = torch.from_numpy(np.stack(clips))[:, None]
    with torch.no_grad():
        y = codec(x)
    distance = LogMelDistance()
    # Another speaker's reconstruction has the same long-term spectrum and level, and the wrong words.
    assert (distance(x, y) < 0.7 * distance(x, y.roll(1, 0))).all()


def test_a_bin_of_the_spectrum_of_a_full_scale_sine_is_one():
    sine = torch.sin(2 * torch.pi * 1000 * torch.arange(RATE) / RATE)[None, None]
    for spectrum in ReconstructionLoss().spectra:
        magnitude, _ = spectrum(sine)
        assert magnitude[0, :, magnitude.shape[-1] // 2].max().item() == pytest.approx(1.0, abs=1e-3)
    # At this many bands the lowest triangles fall between two bins.
    assert torch.allclose(mel_filters(80, 256, RATE).sum(dim=0), torch.ones(80))


def test_silence_does_not_drown_speech_in_the_loss():
    loss = ReconstructionLoss()
    noise = torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(0))

    def pull(level: float) -> float:
        """The largest gradient on a clip that comes out at half its level."""
        output = (0.5 * level * noise).requires_grad_()
        loss(level * noise, output)["mel"].backward()
        return output.grad.abs().max().item()

    # A plain logarithm would pull a hundred times harder.
    assert pull(1e-6) < 10 * pull(1e-4)
    weights = clip_weights(torch.cat([harmonics(level=0.1), harmonics(level=1e-4)]))
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights[0].item() == pytest.approx(5.0 * weights[1].item())
    silent = torch.zeros(1, 1, RATE, requires_grad=True)
    sum(loss(torch.zeros(1, 1, RATE), silent).values()).backward()
    assert torch.isfinite(silent.grad).all()


@pytest.fixture
def sound_folder(tmp_path: Path) -> Path:
    """train/ and valid/, three formats, two rates, stereo, a clip shorter than a crop, and one broken file."""
    root = tmp_path / "sound"
    generator = np.random.default_rng(0)
    for split in ("train", "valid"):
        for label in ("voice", "noise"):
            (root / split / label).mkdir(parents=True)
        voice = harmonics(1.5)[0, 0].numpy()
        soundfile.write(root / split / "voice" / "a.flac", voice, RATE)
        soundfile.write(root / split / "voice" / "b.wav", np.stack([voice, voice], axis=1), 24_000)
        soundfile.write(root / split / "noise" / "c.ogg", 0.01 * generator.standard_normal(3_000), RATE)
        (root / split / "noise" / "broken.wav").write_bytes(b"no sound at all")
    return root


def test_sound_of_any_rate_is_read_and_a_broken_file_is_named(sound_folder):
    sound = Sound(find_recordings(sound_folder, "train"))
    lengths = {sound.recordings[index].path.name: len(samples) for index, samples in sound.usable()}
    assert lengths == {"a.flac": 24_000, "b.wav": 16_000, "c.ogg": 3_000}
    assert [path.name for path, _ in sound.skipped] == ["broken.wav"]
    batch = training_batch(sound, 8, 4_000, np.random.default_rng(0))
    assert batch.shape == (8, 1, 4_000)
    assert batch.abs().max() <= 1.0
    with pytest.raises(DataError, match="does not exist"):
        find_recordings(sound_folder / "nowhere", "train")
    (sound_folder / "list.csv").write_text("path,split,label\ntrain/voice/a.flac,train,v\nvalid/voice/a.flac,valid,v\n")
    assert [r.label for r in find_recordings(sound_folder / "list.csv", "valid")] == ["v"]


FIXED = ["--batch", "6", "--length", "4000", "--save-every", "1", "--seed", "3"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The command sets the number of threads of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train_codec(sound: Path, out: Path, *arguments: str) -> dict[str, Tensor]:
    assert main(["--data", str(sound), "--out", str(out), *FIXED, *arguments]) == 0
    return load_file(out)


@pytest.mark.parametrize("phase", [[], ["--adversarial"]], ids=["spectral", "adversarial"])
def test_an_interrupted_training_ends_with_the_same_numbers(sound_folder, tmp_path, monkeypatch, phase):
    whole = train_codec(sound_folder, tmp_path / "whole.safetensors", "--steps", "3", *phase)
    note = json.loads((tmp_path / "whole.json").read_text())
    assert note["trained"]["steps"] == 3
    assert str(tmp_path) not in json.dumps(note)

    advance = Trainer.advance

    def interrupted(trainer: Trainer, sound: Sound) -> dict[str, float]:
        if trainer.step == 2:
            raise KeyboardInterrupt
        return advance(trainer, sound)

    broken = tmp_path / "broken.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_codec(sound_folder, broken, "--steps", "3", *phase)
    assert not torch.equal(load_file(broken)["encoder.stem.weight"], whole["encoder.stem.weight"])
    resumed = train_codec(sound_folder, broken, "--steps", "3", "--resume", *phase)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_training_starts_from_a_checkpoint_and_says_so(sound_folder, tmp_path):
    out = tmp_path / "started.safetensors"
    started = train_codec(sound_folder, out, "--steps", "1", "--start", str(CHECKPOINT))
    # Adam's first step moves a weight by the learning rate, in the warm-up 1e-3 / 200.
    before = load_file(CHECKPOINT)["encoder.stem.weight"]
    assert 0.0 < (started["encoder.stem.weight"] - before).abs().max() < 1e-5
    origin = json.loads(CHECKPOINT.with_suffix(".json").read_text())["trained"]
    assert json.loads(out.with_suffix(".json").read_text())["trained"]["started_from"] == origin


def test_the_critic_learns_to_tell_and_the_codec_is_drawn_to_the_original():
    torch.manual_seed(0)
    critic = Critic()
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3)
    real, fake = harmonics(0.5).repeat(4, 1, 1), 0.1 * torch.randn(4, 1, 8_000)
    first = critic_loss(critic(real), critic(fake))
    for _ in range(12):
        loss = critic_loss(critic(real), critic(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * first
    judged = critic(real)
    ours, theirs = (codec_losses(judged, critic(sound)) for sound in (real, fake))
    assert ours["feature"] == 0
    assert theirs["feature"] > 0.1
    assert ours["adversarial"] < theirs["adversarial"]


def test_the_critic_joins_after_the_warm_up(sound_folder):
    sound = Sound(find_recordings(sound_folder, "train"))
    trainer = Trainer(SoundStream(), Settings(batch=6, length=8_000, warmup=1, adversarial=True))
    assert "feature" not in trainer.advance(sound)
    assert {"feature", "adversarial", "critic"} <= trainer.advance(sound).keys()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume"], "holds no interrupted run"),
        (["--start", "nothing.safetensors"], "is no checkpoint to start from"),
        (["--batch", "0"], "batch has to be at least 1, got 0"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(sound_folder, tmp_path, capsys, arguments, sentence):
    out = tmp_path / "out" / "codec.safetensors"
    assert main(["--data", str(sound_folder), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not out.parent.exists()


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors({"a": torch.ones(2)}, path)
    monkeypatch.setattr("dslify.files.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_tensors({"a": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
