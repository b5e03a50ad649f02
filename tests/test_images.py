"""Pictures: as timm's and torchvision's own transforms prepare them, from files and from PIL, whatever their kind."""

from __future__ import annotations

import json
import warnings

import numpy
import pytest
import soundfile
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

import dslify
from dslify.data import open_data
from dslify.errors import DataError
from dslify.images import Pixels, fitting, pixels_of, prepared
from dslify.samples import split

SHAPE = (3, 32, 32)
PLAIN = Pixels((0.0,) * 3, (1.0,) * 3)
ROUNDING = 1e-6  # float32 of values of up to about 3


def picture(height: int = 40, width: int = 56, seed: int = 0) -> Image.Image:
    """Smooth colours with noise, so that every kind of resizing gives other values."""
    random = numpy.random.default_rng(seed)
    rows, columns = numpy.mgrid[:height, :width]
    waves = numpy.stack([127 + 80 * numpy.sin((rows * (at + 1) + columns * (3 - at)) / 9) for at in range(3)], axis=2)
    return Image.fromarray((waves + random.integers(-40, 40, waves.shape)).clip(0, 255).astype(numpy.uint8))


@pytest.fixture
def folder(tmp_path):
    """Six pictures of three kinds in two folders, and a broken one."""
    root = tmp_path / "pictures"
    for at, name in enumerate(("cat/a.png", "cat/b.jpg", "cat/c.webp", "dog/a.PNG", "dog/b.bmp", "dog/c.tiff")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=at).save(root / name)
    (root / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    (root / "dog" / "._a.png").write_bytes(b"a file manager's twin")
    return root


def message(*given, **more) -> str:
    with pytest.raises(DataError) as caught:
        open_data(*given, **more)
    assert str(caught.value).endswith(".")
    return str(caught.value)


# Resizing and colours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 56), (71, 33), (32, 32), (20, 24)], ids=str)
@pytest.mark.parametrize(("shape", "crop"), [((3, 32, 32), 0.875), ((3, 32, 32), 1.0), ((3, 24, 36), 0.9)], ids=str)
def test_pictures_become_what_timm_makes_of_them(size, shape, crop, mode, interpolation):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    image = picture(*size)
    theirs = create_transform(
        shape, is_training=False, interpolation=interpolation, mean=mean, std=std, crop_pct=crop, crop_mode=mode
    )
    mine = prepared(image, shape, Pixels(mean, std, interpolation, crop, mode))
    torch.testing.assert_close(torch.from_numpy(mine), theirs(image), rtol=0, atol=ROUNDING)


def test_without_settings_pictures_are_resized_to_imagenet_s_colours():
    theirs = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pixels = fitting(None, 3)
    assert pixels.assumed
    found = torch.from_numpy(prepared(picture(), SHAPE, pixels))
    torch.testing.assert_close(found, theirs(picture()), rtol=0, atol=ROUNDING)


def test_every_mode_of_a_picture_is_read_without_a_warning():
    whole = picture(32, 32)
    grey = numpy.asarray(whole.convert("L"))
    deep = Image.fromarray(grey.astype(numpy.uint16) * 257)
    assert deep.mode == "I;16"
    palette = whole.quantize(64)
    palette.info["transparency"] = bytes(range(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modes = [deep, palette, *(whole.convert(mode) for mode in ("1", "L", "LA", "RGBA", "CMYK", "YCbCr"))]
        found = [prepared(image, SHAPE, PLAIN) for image in modes]
    assert {values.shape for values in found} == {SHAPE}
    numpy.testing.assert_allclose(found[0][0], grey / 255, atol=ROUNDING)
    numpy.testing.assert_allclose(found[3][1], grey / 255, atol=ROUNDING)
    one = prepared(whole, (1, 32, 32), fitting(Pixels((0.5,) * 3, (0.5,) * 3), 1))
    numpy.testing.assert_allclose(one[0], grey / 255, atol=ROUNDING)
    numpy.testing.assert_allclose(prepared(whole, (4, 32, 32), fitting(None, 4))[3], 1)


def test_a_picture_is_turned_as_its_camera_noted(tmp_path):
    noted = Image.Exif()
    noted[0x0112] = 6  # the camera was turned by a quarter
    picture(32, 32).save(tmp_path / "turned.png", exif=noted)
    found = open_data(tmp_path, SHAPE, pixels=PLAIN)[0]
    expected = numpy.asarray(picture(32, 32)).transpose(2, 0, 1) / 255
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).rot90(-1, (1, 2)), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "one mean and one deviation a channel"),
        ({"mean": (), "std": ()}, "one mean and one deviation a channel"),
        ({"mean": ("a",), "std": (1,)}, "one mean and one deviation a channel"),
        ({"mean": (0.5,), "std": (0.0,)}, "Deviations of pictures are above 0"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "Deviations of pictures are above 0"),
        ({"mean": (0.5,), "std": (1.0,), "crop": 1.5}, "the crop is in \\(0, 1\\]"),
        ({"mean": (0.5,), "std": (1.0,), "mode": "top"}, "mode of pictures is one of"),
        ({"mean": (0.5,), "std": (1.0,), "interpolation": "magic"}, "interpolation of pictures is one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(DataError, match=said):
        Pixels(**settings)


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_with_its_labels_sources_and_report(folder):
    samples = open_data(folder, SHAPE, pixels=PLAIN)
    assert samples.names == ("cat/a.png", "cat/b.jpg", "cat/c.webp", "dog/a.PNG", "dog/b.bmp", "dog/c.tiff")
    assert samples.labels == ("cat",) * 3 + ("dog",) * 3
    assert samples.sources == samples.names
    assert samples.classes == ("cat", "dog")
    assert samples.class_indices().tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.from_numpy(prepared(picture(seed=3), SHAPE, PLAIN))
    assert torch.equal(samples[3], expected)
    assert samples.report.read == 6
    ((name, reason),) = samples.report.skipped
    assert name == "dog/broken.png"
    assert reason.startswith("not readable as a picture: ")
    assert samples.report.notes == ("pictures: bilinear, 1 of the side kept (center), mean 0, 0, 0, deviation 1, 1, 1",)
    assert "nothing is known" in open_data(folder, SHAPE).report.notes[0]


def test_one_picture_is_a_folder_of_one(folder):
    samples = open_data(folder / "cat" / "b.jpg", SHAPE)
    assert (samples.labels, samples.sources) == (("cat",), ("b.jpg",))


def test_workers_change_nothing_but_the_time(folder):
    one, other = (open_data(folder, SHAPE, workers=workers) for workers in (0, 2))
    assert one.digest() == other.digest()
    assert (one.names, one.labels, one.report) == (other.names, other.labels, other.report)


def test_a_table_labels_pictures_and_keeps_a_person_s_together(folder):
    names = ("cat/a.png", "cat/b.jpg", "cat/c.webp", "dog/a.PNG", "dog/b.bmp", "dog/c.tiff")
    rows = [f"{name},{'old' if at % 2 else 'new'},anna{at // 2}" for at, name in enumerate(names)]
    (folder / "labels.csv").write_text("\n".join(["path,label,source", *rows]))
    samples = open_data(folder, SHAPE)
    assert samples.labels == ("new", "old") * 3
    parts = split(samples, (0.6, 0.4), seed=1)
    assert not set(parts[0].sources) & set(parts[1].sources)
    assert len(parts[0]) + len(parts[1]) == 6
    assert parts[1].classes == ("new", "old")


def test_of_sound_and_pictures_the_network_chooses(folder):
    soundfile.write(folder / "cat" / "purr.wav", numpy.ones(1600) / 2, 16_000)
    samples = open_data(folder, SHAPE)
    assert len(samples) == 6
    assert "1 files of sound were left out: the network reads pictures" in samples.report.notes
    heard = open_data(folder, (1, 1600), rate=16_000)
    assert heard.names == ("cat/purr.wav[0]",)
    assert "7 files of pictures were left out: the network reads sound" in heard.report.notes


def test_pictures_need_a_network_that_reads_them(folder):
    said = message(folder, (1, 1600))
    assert "the network reads 1x1600 per sample; expected (1, 3 or 4, height, width)" in said
    assert "no input shape is known" in message(folder)
    assert "2x8x8" in message(folder, (2, 8, 8))
    for path in folder.rglob("*.*"):
        if path.name != "broken.png":
            path.unlink()
    assert "holds nothing usable: all 1 were skipped, the first is dog/broken.png" in message(folder, SHAPE)


# What the network knows -----------------------------------------------------------------------------------------------


def test_a_timm_network_says_how_its_pictures_are_prepared():
    net = timm.create_model("mobilenetv3_small_050")
    settings = net.pretrained_cfg
    pixels = pixels_of(torch.nn.Sequential(net))
    assert pixels == Pixels(settings["mean"], settings["std"], settings["interpolation"], settings["crop_pct"])
    assert pixels_of(torch.nn.ReLU()) is None
    config = timm.data.resolve_data_config({}, model=net)
    theirs = create_transform(**config)(picture(300, 260))
    mine = torch.from_numpy(prepared(picture(300, 260), (3, 224, 224), pixels))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


def test_what_was_noted_at_the_surgery_reaches_the_data(folder):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    cut = dslify.insert(net, "2", 0.5, (torch.zeros(2, *SHAPE),))
    notes = cut.meta["dslify"]
    cut.meta["dslify"] = {**notes, "pixels": json.loads(json.dumps(PLAIN.to_json())), "classes": ["dog", "cat"]}
    samples = open_data(folder, cut)
    assert torch.equal(samples[0], open_data(folder, SHAPE, pixels=PLAIN)[0])
    assert samples.class_indices().tolist() == [1, 1, 1, 0, 0, 0]
    cut.meta["dslify"] = {**notes, "pixels": {"mean": [0.5], "std": [0.5], "angle": 3}}
    assert "What the network notes of its pictures is damaged" in message(folder, cut)
