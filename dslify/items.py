"""Items of data sets (tensors, tuples with a label, dicts as Hugging Face gives them) as inputs of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy
import torch
from torch import Tensor

from .arrays import NAMES, from_numpy
from .audio import Clip, counts, cut_clip, resampled
from .errors import DataError, some
from .images import fitting, prepared, readable_shape
from .samples import Collector, Samples, fitted
from .wanted import Wanted
from .workers import fetched

# In the order in which they are looked for: what a processor made is nearer to the network than what it was made of.
VALUES = ("input_values", "pixel_values", "input_features", "input_ids", "audio", "image", "img", "waveform", *NAMES)
LABELS = ("label", "labels", "target")
SOURCES = ("source", "source_id", "speaker_id", "client_id")
_LOWEST_RATE = 4000  # Hz; a whole number below it is no sampling rate


@dataclass(frozen=True)
class Item:
    """One item of a data set, read: its inputs (several where a recording was cut), and what is known of it.

    clip: of a recording, with its length and the reason where it cannot be used. extra: words for what was left out.
    """

    values: tuple[numpy.ndarray | Tensor, ...]  # a tensor on its way between processes needs shared memory of its own
    label: Any = None
    source: Any = None
    clip: Clip | None = None
    extra: str = ""


@dataclass(frozen=True)
class ItemReader:
    """Turns items into inputs of the network; can be sent to another process.

    origin: what the items belong to, for messages. names: of the classes, for labels that are whole numbers.
    """

    origin: str
    wanted: Wanted
    names: tuple[str, ...] = field(default=(), repr=False)

    def __call__(self, at: int, item: Any) -> Item:
        """Raises DataError for an item that holds no input."""
        value, label, source, extra = _taken_apart(item)
        if isinstance(label, (int, numpy.integer)) and 0 <= label < len(self.names):
            label = self.names[label]
        place = f"Item {at} of {self.origin}"
        if (sound := _as_sound(value)) is not None:
            clip = self._cut(*sound, place)
            return Item(() if clip.pieces is None else tuple(clip.pieces), label, source, clip, extra)
        if hasattr(value, "convert") and hasattr(value, "getbands"):  # a PIL image, without importing PIL for others
            value = self._prepared(value, place)
        elif isinstance(value, (list, tuple)) and isinstance(item, Mapping):
            value = numpy.array(value)
        if isinstance(value, numpy.ndarray):
            value = from_numpy(value, place)
        if not isinstance(value, Tensor):
            found = f"has the keys {some(list(map(str, item)))}" if isinstance(item, Mapping) else ""
            wanted = f"a dict with one of {', '.join(VALUES[:6])}" if found else "a tuple of a tensor and a label"
            raise DataError(f"{place} {found or f'is of type {type(item).__name__}'}; expected a tensor, or {wanted}.")
        value = value.detach().cpu()
        return Item((value if value.dtype is torch.bfloat16 else value.numpy(),), label, source, None, extra)

    def _cut(self, sound: numpy.ndarray, own_rate: int, place: str) -> Clip:
        shape = self.wanted.shape
        if shape is None or len(shape) > 2 or not shape:
            found = self.wanted.instead()
            raise DataError(f"{place} is a recording, and {found}; expected (channels, samples) or (samples,).")
        return cut_clip(sound, own_rate, shape, self.wanted.hertz)

    def _prepared(self, image: Any, place: str) -> numpy.ndarray:
        shape = self.wanted.shape
        if shape is None or not readable_shape(shape):
            raise DataError(f"{place} is a picture, and {self.wanted.instead()}; expected (1, 3 or 4, height, width).")
        return prepared(image, shape, fitting(self.wanted.pixels, shape[0]))


def open_items(items: Any, wanted: Wanted, labels: Any, sources: Any) -> Samples:
    """The samples of a data set or an iterable, with these labels and sources instead of its own (None: its own)."""
    origin = f"the given {type(items).__name__}"
    names = class_names(items) if labels is None else ()
    into = Collector(origin, wanted.classes or names)
    reader = ItemReader(origin, wanted, names)
    notes: dict[str, None] = {}
    clips: list[Clip] = []
    # A map-style data set need not raise IndexError at its end, so it is not simply iterated.
    places = has_places(items)
    found = fetched(items, reader, wanted.seed, wanted.workers or 0) if places else map(reader, count(), items)
    for at, item in enumerate(wanted.tracked(found, len(items) if places else None, "reading data")):
        if any(column is not None and at >= len(column) for column in (labels, sources)):
            raise DataError(f"{origin} has more samples than labels or sources were given; expected one a sample.")
        label = item.label if labels is None else labels[at]
        source = sources[at] if sources is not None else at if item.source is None else item.source
        if item.extra:
            notes[item.extra] = None
        if item.clip is not None:
            clips.append(replace(item.clip, pieces=None))
            if item.clip.reason is not None:
                into.skipped.append((f"sample[{at}]", item.clip.reason))
        for piece, value in enumerate(item.values):
            name = f"sample[{at}]" if item.clip is None else f"sample[{at}][{piece}]"
            into.add(fitted(torch.as_tensor(value), wanted.shape, origin), label, source, name)
    used = [clip for clip in clips if clip.reason is None]
    rate = wanted.hertz if used else wanted.rate or 0
    return into.finish(1, (*notes, *resampled(used, wanted.hertz)), rate=rate, **counts(used))


def has_places(items: Any) -> bool:
    """Whether items can be fetched by their place."""
    return hasattr(items, "__len__") and hasattr(items, "__getitem__")


def class_names(items: Any) -> tuple[str, ...]:
    """What a data set calls its classes, in the order of their numbers; () where it does not say.

    Hugging Face: features["label"].names. torchvision: classes. Of a torch Subset: those of its data set.
    """
    while hasattr(items, "dataset") and hasattr(items, "indices"):
        items = items.dataset
    features = getattr(items, "features", None)
    columns = [features[name] for name in LABELS if name in features] if isinstance(features, Mapping) else []
    for names in (*(getattr(column, "names", None) for column in columns), getattr(items, "classes", None)):
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names) if len(set(names)) == len(names) else ()
    return ()


def _taken_apart(item: Any) -> tuple[Any, Any, Any, str]:
    """(value, label, source, words for what was left out) of an item; what it does not have is None."""
    if isinstance(item, Mapping):
        key = next((name for name in VALUES if item.get(name) is not None), None)
        label, source = (
            next((item[name] for name in names if item.get(name) is not None and numpy.ndim(item[name]) == 0), None)
            for names in (LABELS, SOURCES)
        )
        others = [name for name in item if name in VALUES or str(name).endswith("_mask")]
        extra = f"only {key} of each item is used" if others != [key] else ""
        return None if key is None else item[key], label, source, extra
    if not isinstance(item, (tuple, list)) or not item:
        return item, None, None, ""
    if len(item) > 2 and _is_rate(item[1]) and isinstance(item[0], Tensor) and isinstance(item[2], str):
        # torchaudio: (waveform, rate, word or transcript, speaker, ...)
        return {"array": item[0].numpy(), "sampling_rate": item[1]}, item[2], item[3] if len(item) > 3 else None, ""
    label = item[1] if len(item) > 1 and item[1] is not None and numpy.ndim(item[1]) == 0 else None
    extra = "only the first tensor of each item is used" if len(item) > 1 and label is None else ""
    if isinstance(item[0], Mapping):
        value, own, source, words = _taken_apart(item[0])
        return value, own if label is None else label, source, words
    return item[0], label, None, extra


def _as_sound(value: Any) -> tuple[numpy.ndarray, int] | None:
    """((samples, channels) float32, Hz) of a recording as Hugging Face's datasets give it; None for anything else."""
    if isinstance(value, Mapping) and "array" in value and _is_rate(value.get("sampling_rate")):
        sound, rate = numpy.asarray(value["array"], dtype=numpy.float32), int(value["sampling_rate"])
    elif hasattr(value, "get_all_samples"):  # datasets from 4.0 on: torchcodec's decoder
        decoded = value.get_all_samples()
        sound, rate = numpy.asarray(decoded.data, dtype=numpy.float32), int(decoded.sample_rate)
    else:
        return None
    return (sound[:, None] if sound.ndim == 1 else sound.T), rate


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, numpy.integer)) and bool(value >= _LOWEST_RATE)
