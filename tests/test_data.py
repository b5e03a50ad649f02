"""open_data(): every kind of source, what is skipped, what is refused, and splits by source."""

from __future__ import annotations

import math
import sys

import numpy
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dslify.samples
from dslify.data import open_data
from dslify.errors import DataError
from dslify.samples import QUIETEST_DB, expected_shape, split

SHAPE = (1, 1600)  # 0.1 s at 16 kHz
QUANTUM = 2.0**-15  # one step of a 16-bit file
# A tone at a third of the band passes the resampler's filter; away from the ends it is right to 16-bit accuracy.
RESAMPLED = 1e-3


def tone(seconds: float, rate: int = 16_000, pitch: float = 440.0, channels: int = 1) -> numpy.ndarray:
    time = numpy.arange(round(seconds * rate)) / rate
    return numpy.stack([0.5 * numpy.sin(2 * math.pi * pitch * (at + 1) * time) for at in range(channels)], axis=1)


def write(path, sound, rate=16_000, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, rate, **more)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three good files (0.25 s, 0.24 s at 48 kHz stereo, 0.1 s) and three bad ones."""
    root = tmp_path / "sounds"
    write(root / "speech" / "a.wav", tone(0.25))
    write(root / "speech" / "b.flac", tone(0.24, 48_000, channels=2), 48_000)
    write(root / "hum" / "c.ogg", tone(0.1))
    (root / "hum" / "broken.wav").write_bytes(b"no sound at all")
    write(root / "hum" / "nan.wav", numpy.full(3200, numpy.nan), subtype="FLOAT")
    write(root / "hum" / "short.wav", tone(0.04))
    (root / "notes.txt").write_text("not audio")
    (root / "hum" / "._c.ogg").write_bytes(b"a file manager's twin")
    return root


def message(*given, **more) -> str:
    with pytest.raises(DataError) as caught:
        open_data(*given, **more)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


# Folders of audio -----------------------------------------------------------------------------------------------------


def test_a_folder_becomes_segments_in_a_fixed_order(folder):
    samples = open_data(folder, SHAPE, rate=16_000)
    assert samples.names == ("hum/c.ogg[0]", *(f"speech/a.wav[{k}]" for k in range(3)), "speech/b.flac[0]",
                             "speech/b.flac[1]")  # fmt: skip
    assert samples.labels == ("hum",) + ("speech",) * 5
    assert samples.sources == ("hum/c.ogg",) + ("speech/a.wav",) * 3 + ("speech/b.flac",) * 2
    assert samples[0].shape == SHAPE
    assert samples[0].dtype == torch.float32
    assert samples.batch([4, 1]).shape == (2, *SHAPE)
    assert torch.equal(samples.batch([4, 1])[1], samples[1])


def test_segments_hold_the_sound_and_the_last_half_is_completed(folder):
    samples = open_data(folder / "speech", SHAPE, rate=16_000)
    expected = torch.from_numpy(tone(0.25)).T.float()
    found = torch.cat([samples[0], samples[1], samples[2]], dim=1)
    torch.testing.assert_close(found[:, :4000], expected, rtol=0, atol=QUANTUM)
    assert not found[:, 4000:].any()


def test_the_report_counts_what_happened(folder):
    report = open_data(folder, SHAPE, rate=16_000).report
    assert (report.read, report.samples, report.padded, report.dropped) == (3, 6, 1, 1)
    assert (report.seconds, report.rate) == (pytest.approx(0.59), 16_000)
    skipped = dict(report.skipped)
    assert list(skipped) == ["hum/broken.wav", "hum/nan.wav", "hum/short.wav"]
    assert skipped["hum/broken.wav"].startswith("not readable as audio: ")
    assert skipped["hum/nan.wav"] == "holds NaN or infinite samples"
    assert skipped["hum/short.wav"] == "0.04 s is under half a segment (0.10 s)"
    assert report.notes == ("resampled to 16000 Hz from 48000 Hz",)
    assert report.to_json()["skipped"][1] == ("hum/nan.wav", "holds NaN or infinite samples")


def test_an_assumed_rate_is_said(folder):
    assert "taken to read 16000 Hz" in open_data(folder, SHAPE).report.notes[0]


def test_resampling_and_mixing_to_mono(tmp_path):
    write(tmp_path / "in" / "x.wav", tone(0.2, 48_000, channels=2), 48_000)
    found = open_data(tmp_path / "in", SHAPE, rate=16_000)
    expected = torch.from_numpy(tone(0.2, 16_000, channels=2).mean(1)).float()
    got = torch.cat([found[0], found[1]], dim=1)[0]
    torch.testing.assert_close(got[200:-200], expected[200:-200], rtol=0, atol=RESAMPLED)


def test_more_channels_and_none(tmp_path):
    write(tmp_path / "in" / "mono.wav", tone(0.1))
    write(tmp_path / "in" / "stereo.wav", tone(0.1, channels=2))
    write(tmp_path / "in" / "three.wav", tone(0.1, channels=3))
    samples = open_data(tmp_path / "in", (2, 1600), rate=16_000)
    assert torch.equal(samples[0][0], samples[0][1])
    assert not torch.equal(samples[1][0], samples[1][1])
    assert samples.report.skipped == (("three.wav", "has 3 channels, 2 or 1 expected"),)
    assert open_data(tmp_path / "in", (1600,), rate=16_000)[0].shape == (1600,)


def test_a_single_file_is_a_folder_of_one(folder):
    samples = open_data(folder / "speech" / "a.wav", SHAPE, rate=16_000)
    assert (len(samples), samples.labels[0], set(samples.sources)) == (3, "speech", {"a.wav"})


def test_level_of_each_sample(tmp_path):
    sound = numpy.concatenate([tone(0.1), numpy.zeros((1600, 1))])
    write(tmp_path / "in" / "x.wav", sound)
    levels = open_data(tmp_path / "in", SHAPE, rate=16_000).rms_db
    assert levels[0].item() == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.01)
    assert levels[1].item() == QUIETEST_DB


def test_a_manifest_chooses_files_and_gives_labels_and_sources(folder):
    (folder / "manifest.csv").write_text(
        "path,label,source_id\nspeech/b.flac,voice,anna\nhum/c.ogg,,\nhum/gone.wav,hum,x\n", encoding="utf-8-sig"
    )
    samples = open_data(folder, SHAPE, rate=16_000)
    assert samples.labels == ("voice", "voice", "hum")
    assert samples.sources == ("anna", "anna", "hum/c.ogg")
    assert samples.report.skipped == (("hum/gone.wav", "no such file"),)
    assert "4 files are not listed in manifest.csv" in samples.report.notes[0]


def test_a_manifest_one_folder_up_gives_labels_and_sources_only(folder):
    (folder.parent / "manifest.csv").write_text("path,label,source_id\nsounds/speech/a.wav,voice,anna\nelse.wav,x,y\n")
    samples = open_data(folder, SHAPE, rate=16_000)
    assert len(samples) == 6
    assert (samples.labels[1], samples.sources[1]) == ("voice", "anna")
    assert (samples.labels[0], samples.sources[0]) == ("hum", "hum/c.ogg")


def test_folders_without_usable_sound(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in message(tmp_path / "empty", SHAPE)
    assert "No data at" in message(tmp_path / "none", SHAPE)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    assert "holds 1 files (.txt) and none is audio" in message(tmp_path / "text", SHAPE)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.PNG").write_text("")
    assert "are resized to the network's input, and the network reads 1x1600" in message(tmp_path / "pictures", SHAPE)
    (folder / "hum" / "c.ogg").unlink()
    (folder / "hum" / "short.wav").unlink()
    said = message(folder / "hum", SHAPE)
    assert "holds nothing usable: all 2 were skipped, the first is broken.wav (not readable as audio: " in said


@pytest.mark.parametrize("seconds", [0.04, 0.09], ids=["under half", "over half"])
def test_data_shorter_than_a_segment(tmp_path, seconds):
    write(tmp_path / "in" / "x.wav", tone(seconds))
    said = message(tmp_path / "in", SHAPE, rate=16_000)
    assert f"the longest of 1 files has {seconds:.2f} s and the network reads 0.10 s" in said


def test_audio_needs_a_network_that_reads_it(folder):
    assert "no input shape is known" in message(folder)
    assert "the network reads 3x8x8 per sample" in message(folder, (3, 8, 8))


def test_many_samples_go_to_a_temporary_file(folder, monkeypatch):
    held = open_data(folder, SHAPE, rate=16_000)
    monkeypatch.setattr(dslify.samples, "MEMORY", 10_000)
    spilled = open_data(folder, SHAPE, rate=16_000)
    assert spilled.digest() == held.digest()
    assert torch.equal(spilled.batch(range(6)), held.batch(range(6)))


# Arrays ---------------------------------------------------------------------------------------------------------------


def test_array_files_of_every_kind(tmp_path):
    values = torch.randn(5, 2, 3)
    numpy.save(tmp_path / "x.npy", values.double().numpy())
    numpy.savez(tmp_path / "x.npz", samples=values.numpy(), labels=numpy.array(list("abcde")), sources=[0, 0, 1, 1, 2])
    torch.save(values, tmp_path / "x.pt")
    save_file({"only": values}, tmp_path / "x.safetensors")
    for suffix in ("npy", "npz", "pt", "safetensors"):
        samples = open_data(tmp_path / f"x.{suffix}", (2, 3))
        assert torch.equal(samples.batch(range(5)), values), suffix
        assert samples.values.dtype == torch.float32
    samples = open_data(str(tmp_path / "x.npz"))
    assert samples.labels == tuple("abcde")
    assert samples.sources == ("0", "0", "1", "1", "2")
    assert samples.names[2] == "x.npz[2]"


def test_nan_in_an_array_is_refused_by_the_name_of_its_sample(tmp_path):
    values = torch.randn(4, 2)
    values[1, 0] = float("nan")
    torch.save(values, tmp_path / "x.pt")
    assert message(tmp_path / "x.pt") == "x.pt[1] holds NaN or infinite values; mend that sample or leave it out."
    assert message(torch.full((4, 2), float("inf"))).startswith("sample[0] holds NaN or infinite values")


class Hostile:
    ran = False

    def __reduce__(self):
        return setattr, (Hostile, "ran", True)


def test_array_files_that_cannot_be_used(tmp_path):
    torch.save({"samples": Hostile()}, tmp_path / "evil.pt")
    numpy.save(tmp_path / "evil.npy", numpy.array([Hostile()], dtype=object), allow_pickle=True)
    for name in ("evil.pt", "evil.npy"):
        assert "cannot be read as an array file" in message(tmp_path / name)
    assert not Hostile.ran
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 20)
    for name in ("torn.npz", "torn.safetensors"):
        assert "cannot be read as an array file" in message(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list; expected an array" in message(tmp_path / "list.pt")
    numpy.savez(tmp_path / "two.npz", a=numpy.ones(2), b=numpy.ones(2))
    assert "holds a, b; expected one array" in message(tmp_path / "two.npz")
    numpy.save(tmp_path / "words.npy", numpy.array(["a", "b"]))
    assert "expected numbers" in message(tmp_path / "words.npy")
    (tmp_path / "x.txt").write_text("")
    assert "is no data file" in message(tmp_path / "x.txt")
    assert "expected samples along a first axis" in message(torch.zeros(()))
    assert "expected samples along a first axis" in message(torch.zeros(0, 3))
    assert "4 samples and 3 labels" in message(torch.zeros(4, 3), labels=[1, 2, 3])


def test_a_missing_channel_axis_is_put_in_and_other_ranks_are_refused():
    assert open_data(torch.zeros(3, 100), (1, 100))[0].shape == (1, 100)
    assert open_data(torch.zeros(3, 1, 200), (1, 100))[0].shape == (1, 200)
    assert "samples of shape 100, and the network reads 2x100" in message(torch.zeros(3, 100), (2, 100))


# Python objects -------------------------------------------------------------------------------------------------------


class Endless(Dataset):
    """Has a length, and never raises IndexError."""

    def __len__(self):
        return 3

    def __getitem__(self, at):
        return torch.full((2,), float(at)), "even" if at % 2 == 0 else "odd"


def test_datasets_loaders_and_iterables():
    samples = open_data(Endless())
    assert samples.labels == ("even", "odd", "even")
    assert samples.batch([2]).tolist() == [[2.0, 2.0]]
    loader = DataLoader(TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6)), batch_size=4, shuffle=True)
    samples = open_data(loader)
    assert samples.batch(range(6)).tolist() == torch.arange(12.0).view(6, 2).tolist()
    assert samples.labels == tuple("012345")
    assert len(open_data(torch.ones(2) for _ in range(4))) == 4
    assert open_data([numpy.ones(2), numpy.zeros(2)])[1].tolist() == [0.0, 0.0]
    assert open_data(samples) is samples
    pairs = open_data([(torch.ones(2), torch.ones(5))] * 3)
    assert pairs.report.notes == ("only the first tensor of each item is used",)
    whole = open_data(torch.ones(2, 3, dtype=torch.long))
    assert whole[0].dtype == torch.long


def test_python_objects_that_cannot_be_used():
    assert "Data cannot be of type int" in message(3)
    assert "Item 0 of the given list is of type str" in message(["a"])
    assert "the given list is empty" in message([])
    said = message([torch.ones(2), torch.ones(3)])
    assert "sample[1] is 3 torch.float32 and the ones before are 2 torch.float32" in said


def test_factories(tmp_path, monkeypatch):
    (tmp_path / "my_data_for_test.py").write_text(
        "import torch\n"
        "class Box:\n"
        "    def made():\n"
        "        return torch.ones(2, 3)\n"
        "def broken():\n"
        "    raise OSError('disk on fire')\n"
        "def itself():\n"
        "    return 'my_data_for_test:itself'\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert open_data("my_data_for_test:Box.made")[0].tolist() == [1.0, 1.0, 1.0]
    assert "OSError: disk on fire" in message("my_data_for_test:broken")
    assert "AttributeError" in message("my_data_for_test:gone")
    assert "ModuleNotFoundError" in message("no_such_module_here:gone")
    assert "returned its own name" in message("my_data_for_test:itself")
    assert sys.path == before
    del sys.modules["my_data_for_test"]


# Splits and identity --------------------------------------------------------------------------------------------------


def labelled(count=200, per_source=4):
    return open_data(
        torch.arange(float(count)).view(count, 1),
        labels=["rare" if at < 16 else "common" for at in range(count)],
        sources=[at // per_source for at in range(count)],
    )


def test_a_split_is_by_source_spreads_labels_and_repeats():
    parts = split(labelled(), (0.5, 0.25, 0.25), seed=3)
    owned = [set(part.sources) for part in parts]
    assert not owned[0] & owned[1]
    assert not owned[0] & owned[2]
    assert not owned[1] & owned[2]
    assert [len(part) for part in parts] == [100, 52, 48]
    assert [part.labels.count("rare") for part in parts] == [8, 4, 4]
    values = sorted(value for part in parts for value in part.batch(range(len(part))).flatten().tolist())
    assert values == list(range(200))
    again = split(labelled(), (0.5, 0.25, 0.25), seed=3)
    assert [part.sources for part in again] == [part.sources for part in parts]
    assert split(labelled(), (0.5, 0.5), seed=4)[0].sources != split(labelled(), (0.5, 0.5), seed=5)[0].sources


def test_every_part_gets_a_source_and_too_few_are_refused():
    assert [len(part) for part in split(labelled(12), (0.98, 0.01, 0.01))] == [4, 4, 4]
    with pytest.raises(DataError, match=r"has 3 sources .* cannot be split into 4 parts"):
        split(labelled(12), (0.25,) * 4)
    for fractions in ((0.5, 0.6), (1.5, -0.5), ()):
        with pytest.raises(DataError, match="positive and sum to 1"):
            split(labelled(12), fractions)


def test_subsets_share_values_and_keep_their_columns():
    samples = labelled()
    part = samples.subset([5, 150]).subset([1])
    assert (part[0].item(), part.labels, part.sources, part.names) == (150, ("common",), ("37",), ("sample[150]",))
    assert part.rms_db[0] == samples.rms_db[150]
    assert samples.originals == tuple(range(len(samples)))
    assert part.originals == (150,)


def test_fingerprints_know_samples_again():
    one, other = open_data(torch.randn(4, 3)), open_data(torch.randn(4, 3))
    again = open_data(one.batch([2, 3]))
    assert again.fingerprints() == one.fingerprints()[2:]
    assert not set(other.fingerprints()) & set(one.fingerprints())
    assert one.digest() != one.subset([1, 0, 2, 3]).digest()


def test_expected_shape_comes_from_the_surgery_s_notes():
    net = torch.nn.Sequential(torch.nn.Identity())
    assert expected_shape(net) is None
    net[0].meta = {"dslify": {"example": [[[1, 1, 16000], "float32"]]}}
    assert expected_shape(net) == (1, 16000)
