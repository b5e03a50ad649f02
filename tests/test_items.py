"""Data sets of every kind: Hugging Face's dicts, torchvision's pictures, torchaudio's tuples; the order of classes."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset

from dslify.data import open_data
from dslify.errors import DataError, OptionError
from dslify.images import Pixels, prepared
from dslify.samples import class_order, expected_classes, split


def message(*given, **more) -> str:
    with pytest.raises(DataError) as caught:
        open_data(*given, **more)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


class Rows(Dataset):
    """A data set as Hugging Face's library has them: dicts by place, with features."""

    def __init__(self, *rows, names=None):
        self.rows = rows
        self.features = {"label": SimpleNamespace(names=names)} if names else {}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        return self.rows[at]


# Dicts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("input_values", [0.5, -0.5, 0.25], torch.float32),
        ("pixel_values", numpy.ones((3, 2, 2)), torch.float32),
        ("input_features", torch.ones(4, 2), torch.float32),
        ("input_ids", [5, 6, 7], torch.int64),
        ("x", torch.ones(2), torch.float32),
    ],
)
def test_dicts_of_a_processor(key, value, kind):
    samples = open_data(Rows(*({key: value, "label": at, "id": at} for at in range(3)), names=["no", "up", "go"]))
    assert torch.equal(samples[1], torch.as_tensor(value).to(kind))
    assert samples[1].dtype == kind
    assert samples.labels == ("no", "up", "go")
    assert samples.classes == ("no", "up", "go")  # the data set's order, not the alphabet's
    assert samples.class_indices().tolist() == [0, 1, 2]
    assert samples.sources == ("0", "1", "2")
    assert samples.report.notes == ()


def test_dicts_with_more_in_them_than_one_input():
    row = {"input_ids": [1, 2], "attention_mask": [1, 1], "label": "a", "speaker_id": 7}
    samples = open_data(Rows(row, row))
    assert samples.report.notes == ("only input_ids of each item is used",)
    assert samples.sources == ("7", "7")
    both = open_data([({"input_ids": torch.ones(2)}, "b")])
    assert both.labels == ("b",)
    assert open_data(iter([row])).labels == ("a",)


def sound(seconds=0.25, rate=16_000, channels=1):
    time = numpy.arange(round(seconds * rate)) / rate
    wave = 0.5 * numpy.sin(2 * math.pi * 440 * time)
    return wave if channels == 1 else numpy.stack([wave] * channels)


class Decoder:
    """As torchcodec gives a column of sound to datasets from 4.0 on."""

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(sound(0.2, 48_000, channels=2)), sample_rate=48_000)


def test_recordings_in_dicts_are_cut_and_resampled_like_files():
    rows = [
        {"audio": {"array": sound(), "sampling_rate": 16_000, "path": "a.wav"}, "label": 1, "client_id": "ann"},
        {"audio": Decoder(), "label": 0, "client_id": "ben"},
        {"audio": {"array": sound(0.02), "sampling_rate": 16_000}, "label": 0, "client_id": "ben"},
    ]
    samples = open_data(Rows(*rows, names=["quiet", "loud"]), (1, 1600))
    assert samples.names == ("sample[0][0]", "sample[0][1]", "sample[0][2]", "sample[1][0]", "sample[1][1]")
    assert samples.labels == ("loud",) * 3 + ("quiet",) * 2
    assert samples.sources == ("ann",) * 3 + ("ben",) * 2
    report = samples.report
    assert report.skipped == (("sample[2]", "0.02 s is under half a segment (0.10 s)"),)
    assert report.notes == ("resampled to 16000 Hz from 48000 Hz",)
    assert (report.seconds, report.padded) == (0.45, 1)
    torch.testing.assert_close(samples[0][0], torch.from_numpy(sound()[:1600]).float())
    torch.testing.assert_close(samples[4][0, :-200], torch.from_numpy(sound()[1600:3000]).float(), rtol=0, atol=1e-3)
    assert open_data(Rows(rows[0]), (1, 800), rate=8_000)[0].shape == (1, 800)
    assert "Item 0 of the given Rows is a recording, and no input shape is known" in message(Rows(*rows))
    assert "the network reads 3x8x8 per sample" in message(Rows(*rows), (3, 8, 8))


def test_torchaudio_s_tuples():
    items = [(torch.from_numpy(sound()).float()[None], 16_000, "yes", "ann", 0)] * 2
    samples = open_data(items, (1, 1600))
    assert (samples.labels, set(samples.sources)) == (("yes",) * 6, {"ann"})
    assert open_data([(torch.ones(3), 16_000)]).labels == ("16000",)  # a label, for all that is known


def test_pictures_of_a_data_set():
    class Folder(list):
        classes = ("dog", "cat")

    image = Image.fromarray(numpy.arange(192, dtype=numpy.uint8).reshape(8, 8, 3))
    pixels = Pixels((0.5,) * 3, (0.5,) * 3)
    expected = torch.from_numpy(prepared(image, (3, 4, 4), pixels))
    samples = open_data(Folder([(image, 0), (image, 1)]), (3, 4, 4), pixels=pixels)
    assert torch.equal(samples[1], expected)
    assert (samples.labels, samples.classes) == (("dog", "cat"), ("dog", "cat"))
    assert torch.equal(open_data(Rows({"image": image, "label": 0}), (3, 4, 4), pixels=pixels)[0], expected)
    part = open_data(Subset(Folder([(image, 0), (image, 1)]), [1]), (3, 4, 4))
    assert (part.labels, part.class_indices().tolist()) == (("cat",), [1])
    assert "Item 0 of the given list is a picture, and no input shape is known" in message([image])


def test_items_and_dicts_that_cannot_be_used():
    assert "Item 0 of the given Rows has the keys text, label; expected a tensor, or a dict with" in message(
        Rows({"text": "hello", "label": 1})
    )
    assert "holds train, test and no arrays; give one part of it, such as data['train']" in message(
        {"train": Rows({"x": 1}), "test": Rows({"x": 1})}
    )
    assert "expected numbers" in message(Rows({"input_ids": ["a"]}))
    assert "has more samples than labels or sources were given" in message([torch.ones(2)] * 3, labels=[1])

    class Broken(Rows):
        def __getitem__(self, at):
            raise OSError("disk on fire")

    for workers in (0, 1):
        assert "Item 0 of the data cannot be read (OSError: disk on fire)" in message(Broken(1), workers=workers)


def test_a_dict_of_arrays():
    samples = open_data({"samples": torch.ones(3, 2), "labels": ["a", "b", "a"], "sources": [1, 1, 2]})
    assert (samples.labels, samples.sources) == (("a", "b", "a"), ("1", "1", "2"))
    assert open_data({"only": numpy.zeros((2, 4))})[0].shape == (4,)


# Workers --------------------------------------------------------------------------------------------------------------


class Drawn(Dataset):
    """Draws its items, as augmentation does."""

    def __len__(self):
        return 7

    def __getitem__(self, at):
        drawn = [random.random(), numpy.random.rand(), torch.rand(()).item(), at]
        return {"input_values": drawn, "label": f"class {at % 2}"}


def test_samples_do_not_depend_on_the_number_of_workers():
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    found = [open_data(Drawn(), workers=workers, seed=3) for workers in (0, 2)]
    assert found[0].digest() == found[1].digest()
    assert found[0].labels == found[1].labels
    assert found[0].batch(range(7))[:, 3].tolist() == list(range(7))
    assert len(found[0].batch(range(7))[:, :3].unique()) == 21
    assert open_data(Drawn(), seed=4).digest() != found[0].digest()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    with pytest.raises(OptionError, match="workers is a whole number of at least 0; got -1"):
        open_data(Drawn(), workers=-1)


def test_a_loader_s_workers_and_its_part_of_the_data():
    data = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6))
    loader = DataLoader(data, batch_size=2, sampler=SubsetRandomSampler([4, 1]), num_workers=1)
    samples = open_data(loader)
    assert samples.labels == ("1", "4")
    assert samples.digest() == open_data(loader, workers=0).digest()


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ("b a b c", "a b c"),
        ("10 9 2", "0 1 2 3 4 5 6 7 8 9 10"),  # numbers are the places of the outputs, whichever occur
        ("007 1", "007 1"),
        ("2 two", "2 two"),
        ("99999999999999999999 1", "1 99999999999999999999"),
        ("-1 1", "-1 1"),
        ("²", "²"),
        ("", ""),
    ],
)
def test_the_order_of_classes(labels, classes):
    assert class_order([*labels.split(), ""]) == tuple(classes.split())


def test_class_indices_of_other_data_follow_the_training_s_classes():
    train = open_data(torch.zeros(4, 2), labels=["up", "no", "go", "no"])
    assert train.class_indices().tolist() == [2, 1, 0, 1]
    assert train.class_indices().dtype == torch.int64
    test = open_data(torch.zeros(2, 2), labels=["up", "no"])
    assert test.class_indices(train.classes).tolist() == [2, 1]
    assert open_data(torch.zeros(2, 2), labels=["up", "no"], classes=train.classes).class_indices().tolist() == [2, 1]
    assert split(train, (0.5, 0.5))[1].classes == train.classes
    with pytest.raises(DataError, match=r"a tensor: sample\[1\] has the label 'x'; expected one of the 3 classes go"):
        open_data(torch.zeros(2, 2), labels=["up", "x"], classes=train.classes).class_indices()
    with pytest.raises(DataError, match=r"sample\[0\] has no label"):
        open_data(torch.zeros(2, 2)).class_indices()


def test_a_network_says_its_classes():
    net = torch.nn.Sequential(torch.nn.Identity())
    assert expected_classes(net) == ()
    net[0].meta = {"dslify": {"classes": ["yes", "no"]}}
    assert open_data(torch.zeros(1, 2), net, labels=["no"]).class_indices().tolist() == [1]
