"""Pictures: how a file or a PIL image of any size and mode becomes the normalised input that a network expects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from .errors import DataError, one_line
from .notes import noted

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's name by channels of the network's input
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class Pixels:
    """How pictures become inputs: resize, centre crop, then (value / 255 - mean) / std per channel.

    interpolation: "bicubic", "bilinear" ... crop: share of the resized picture's side that is kept; mode: "center"
    keeps the proportions, "squash" does not, "border" shows the whole picture with its surroundings in the mean colour
    (timm's crop_pct and crop_mode). assumed: nothing was known of the network.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop: float = 1.0
    mode: str = "center"
    assumed: bool = False

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std, self.crop)
        known = all(isinstance(one, (int, float)) for one in numbers)
        if not self.mean or len(self.mean) != len(self.std) or not known:
            raise DataError(f"Pictures need one mean and one deviation a channel; got {self.mean} and {self.std}.")
        if min(self.std) <= 0 or not all(map(math.isfinite, numbers)) or not 0 < self.crop <= 1:
            raise DataError(
                f"Deviations of pictures are above 0 and the crop is in (0, 1]; got {self.std} and {self.crop}."
            )
        for name, words in (("mode", ("center", "squash", "border")), ("interpolation", _FILTERS)):
            if getattr(self, name) not in words:
                raise DataError(f"The {name} of pictures is one of {', '.join(words)}; got {getattr(self, name)!r}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        mean, std = (", ".join(f"{one:g}" for one in column) for column in (self.mean, self.std))
        return f"{self.interpolation}, {self.crop:g} of the side kept ({self.mode}), mean {mean}, deviation {std}"


def pixels_of(net: nn.Module) -> Pixels | None:
    """What a network expects of pictures: as noted when it was cut, or by its pretrained_cfg or default_cfg (timm).

    None if nothing is known. Raises DataError for settings that make no sense.
    """
    if known := noted(net, "pixels"):
        try:
            return Pixels(**{**known, "mean": tuple(known["mean"]), "std": tuple(known["std"])})
        except (TypeError, KeyError) as error:
            raise DataError(f"What the network notes of its pictures is damaged ({one_line(error)}).") from error
    for module in net.modules():
        for name in ("pretrained_cfg", "default_cfg"):
            settings = getattr(module, name, None)
            settings = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
            if settings.get("mean") and settings.get("std"):
                return Pixels(
                    tuple(settings["mean"]),
                    tuple(settings["std"]),
                    settings.get("interpolation") or "bilinear",
                    settings.get("crop_pct") or 0.875,  # timm's own default
                    settings.get("crop_mode") or "center",
                )
    return None


def fitting(pixels: Pixels | None, channels: int) -> Pixels:
    """`pixels` if they are for so many channels; else ImageNet's colours for three, values from 0 to 1 for others."""
    if pixels is not None and len(pixels.mean) == channels:
        return pixels
    mean, std = _IMAGENET if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    return Pixels(mean, std, assumed=True)


def readable_shape(shape: tuple[int, ...] | None) -> bool:
    """Whether a sample of this shape can be a picture: (channels, height, width) with 1, 3 or 4 channels."""
    return shape is not None and len(shape) == 3 and shape[0] in MODES


def read_picture(path: Path, shape: tuple[int, ...], pixels: Pixels) -> numpy.ndarray | str:
    """One file as `prepared` gives it, or the reason why it cannot be used; nothing is raised for it."""
    pillow = _pillow()
    if not path.is_file():
        return "no such file"
    try:
        with pillow.open(path) as image:
            return prepared(image, shape, pixels)
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        return f"not readable as a picture: {one_line(error)}"


def prepared(image: Image, shape: tuple[int, ...], pixels: Pixels) -> numpy.ndarray:
    """A PIL image as (channels, height, width) float32 of this shape.

    Turned upright as its camera noted it; palettes, transparency, CMYK and 16-bit grey become what the network reads.
    """
    channels, height, width = shape
    image, pillow = _upright(image, MODES[channels]), _pillow()
    sides = math.floor(height / pixels.crop), math.floor(width / pixels.crop)
    rows, columns = _resized(image.height, image.width, sides, pixels.mode)
    if (rows, columns) != (image.height, image.width):
        image = image.resize((columns, rows), pillow.Resampling[pixels.interpolation.upper()])
    fill = tuple(round(255 * one) for one in pixels.mean)
    canvas = pillow.new(image.mode, (width, height), fill if channels > 1 else fill[0])
    canvas.paste(image, (_start(width, columns), _start(height, rows)))
    values = numpy.asarray(canvas, dtype=numpy.float32).reshape(height, width, channels) / numpy.float32(255)
    mean, std = numpy.array(pixels.mean, numpy.float32), numpy.array(pixels.std, numpy.float32)
    return numpy.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))


def _upright(image: Image, mode: str) -> Image:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers without a known range")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        grey = numpy.asarray(image, dtype=numpy.float32) / 257
        image = _pillow().fromarray(numpy.clip(numpy.round(grey), 0, 255).astype(numpy.uint8))
    if image.mode == "P":  # with transparency it becomes no other mode without a warning
        image = image.convert("RGBA")
    return image.convert(mode)


def _start(length: int, found: int) -> int:
    """Where the middle of `found` begins in `length`, below 0 where it is cropped."""
    return (length - found) // 2 if found < length else -round((found - length) / 2)


def _resized(rows: int, columns: int, sides: tuple[int, int], mode: str) -> tuple[int, int]:
    """The size before the crop, rounded as torchvision and timm do, so that their networks see what they know."""
    if mode == "squash":
        return sides
    ratios = rows / sides[0], columns / sides[1]
    if mode == "center" and sides[0] == sides[1]:
        short, long = sorted((rows, columns))
        other = int(sides[0] * long / short)
        return (sides[0], other) if rows <= columns else (other, sides[0])
    ratio = max(ratios) if mode == "border" else min(ratios)
    return max(1, round(rows / ratio)), max(1, round(columns / ratio))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("Pictures are read with Pillow, which is not installed: pip install pillow.") from error
    return Image
