"""What the network is trained, calibrated and judged on: anything a user has, as one finite list of equal tensors."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from .audio import SUFFIXES, AudioFile, Clip, audio_files, read_clip
from .errors import DataError
from .samples import (
    Collector,
    Samples,
    shaped,
    show_progress,
)

DEFAULT_RATE = 16_000  # Hz, said in the report when nothing else was given
ARRAY_NAMES = ("samples", "inputs", "input", "x", "data")
ARRAY_SUFFIXES = frozenset({".npy", ".npz", ".pt", ".pth", ".safetensors"})


def open_data(
    source: Any,
    shape: Sequence[int] | None = None,
    *,
    rate: int | None = None,
    labels: Sequence[Any] | None = None,
    sources: Sequence[Any] | None = None,
    progress: bool | None = None,
) -> Samples:
    """Read `source` once and hold it (in memory up to 2 GiB, then in a temporary file).

    source: a folder of audio or one audio file; an array file, first axis = samples (.npy, .npz, .pt, .pth or
    .safetensors, with arrays named samples, labels, sources when there are several); "pkg.mod:factory", called without
    arguments; or from Python a tensor, an array, a torch Dataset, a DataLoader (its dataset is read) or any finite
    iterable, whose items are tensors or (tensor, label).
    shape: of one sample as the network takes it, without the batch axis (`expected_shape(net)`). Audio needs it: files
    are cut into segments of that length. Arrays may have other sizes, but not another number of axes.
    rate: of the network in Hz; audio at any other rate is resampled. 16 kHz when not given, and the report says so.
    labels, sources: for data given from Python or in an array file, one a sample.
    progress: a bar on stderr; None shows it when stderr is a terminal.

    Files of sound that cannot be used (broken, NaN in them) are skipped and listed in `.report.skipped`.
    Raises DataError when nothing usable is left, and for anything that is none of the above.
    """
    if isinstance(source, Samples):
        return source
    expected = tuple(shape) if shape is not None else None
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir() or (path.is_file() and path.suffix.lower() in SUFFIXES):
            return _open_audio(path, expected, rate, progress)
        if path.is_file():
            values, own_labels, own_sources = _read_arrays(path)
            labels, sources = (own_labels if labels is None else labels), (own_sources if sources is None else sources)
            return _open_tensor(values, expected, labels, sources, str(path), path.name)
        named = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", str(source))
        if named is None:
            raise DataError(
                f"No data at {source}: there is no such file or folder; expected a folder of audio, an array file "
                f"({', '.join(sorted(ARRAY_SUFFIXES))}) or pkg.mod:factory."
            )
        made = _call_factory(*named.groups())
        if isinstance(made, str) and made == str(source):
            raise DataError(f"{source} returned its own name; it has to return the data.")
        return open_data(made, expected, rate=rate, labels=labels, sources=sources, progress=progress)
    if isinstance(source, DataLoader):
        source = source.dataset
    if isinstance(source, numpy.ndarray):
        source = _from_numpy(source, "the given array")
    if isinstance(source, Tensor):
        return _open_tensor(source, expected, labels, sources, "a tensor", "sample")
    if isinstance(source, Iterable) or (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        return _open_items(source, expected, labels, sources, progress)
    raise DataError(
        f"Data cannot be of type {type(source).__name__}; expected a folder, a file, pkg.mod:factory, a tensor, a "
        "torch Dataset or an iterable of tensors."
    )


def _open_audio(path: Path, shape: tuple[int, ...] | None, rate: int | None, progress: bool | None) -> Samples:
    if shape is None or len(shape) > 2 or not shape:
        found = "no input shape is known" if shape is None else f"the network reads {shaped(shape)} per sample"
        raise DataError(
            f"Audio in {path} is cut into segments of the network's input, and {found}; expected (channels, samples) "
            "or (samples,), such as --input 1x1x16000, or give arrays of the features that the network reads."
        )
    if path.is_dir():
        files, notes = audio_files(path)
    else:
        files, notes = [AudioFile(path, path.name, path.resolve().parent.name, path.name)], ()
    wanted = rate or DEFAULT_RATE
    if rate is None:
        notes = (*notes, f"the network is taken to read {DEFAULT_RATE} Hz; give the rate if it does not")
    into = Collector(str(path))
    clips: list[Clip] = []
    whole = 0
    for file in _tracked(files, "reading sound", progress):
        clip = read_clip(file, shape, wanted)
        clips.append(replace(clip, pieces=None))
        if clip.pieces is None:
            into.skipped.append((file.name, clip.reason or ""))
            continue
        whole += len(clip.pieces) - clip.padded
        for at, piece in enumerate(clip.pieces):
            into.add(torch.from_numpy(piece), file.label, file.source, f"{file.name}[{at}]")
    longest = max(clip.seconds for clip in clips)
    if not whole and longest > 0:
        raise DataError(
            f"The audio in {path} is shorter than a segment: the longest of {len(files)} files has {longest:.2f} s and "
            f"the network reads {shape[-1] / wanted:.2f} s; give longer files, or a network with a shorter input."
        )
    used = [clip for clip in clips if clip.reason is None]
    rates = sorted({clip.rate for clip in used} - {wanted})
    if rates:
        notes = (*notes, f"resampled to {wanted} Hz from {', '.join(map(str, rates))} Hz")
    return into.finish(
        len(used),
        notes,
        seconds=round(sum(clip.seconds for clip in used), 3),
        padded=sum(clip.padded for clip in used),
        dropped=sum(clip.dropped for clip in used),
    )


def _open_tensor(
    values: Tensor, shape: tuple[int, ...] | None, labels: Any, sources: Any, origin: str, name: str
) -> Samples:
    if not values.dim() or not len(values):
        raise DataError(f"{origin} has the shape {shaped(values.shape)}; expected samples along a first axis.")
    columns = []
    for title, column in (("labels", labels), ("sources", sources)):
        if column is not None and len(column) != len(values):
            raise DataError(f"{origin} has {len(values)} samples and {len(column)} {title}; expected one a sample.")
        columns.append(column)
    into = Collector(origin)
    for at, value in enumerate(values):
        label, source = (None if column is None else column[at] for column in columns)
        into.add(_fitted(value, shape, origin), label, at if source is None else source, f"{name}[{at}]")
    return into.finish(1)


def _open_items(items: Any, shape: tuple[int, ...] | None, labels: Any, sources: Any, progress: bool | None) -> Samples:
    origin = f"the given {type(items).__name__}"
    into = Collector(origin)
    extra = False
    for at, item in enumerate(_tracked(_each(items), "reading data", progress)):
        value, label = item, None
        if isinstance(item, (tuple, list)) and len(item):
            value = item[0]
            second = item[1] if len(item) > 1 else None
            if second is not None and numpy.ndim(second) == 0:
                label = second
            extra = extra or (len(item) > 1 and label is None)
        if isinstance(value, numpy.ndarray):
            value = _from_numpy(value, origin)
        if not isinstance(value, Tensor):
            raise DataError(
                f"Item {at} of {origin} is of type {type(item).__name__}; expected a tensor, or a tuple of a tensor "
                "and a label."
            )
        label = label if labels is None else labels[at]
        into.add(_fitted(value, shape, origin), label, at if sources is None else sources[at], f"sample[{at}]")
    return into.finish(1, ("only the first tensor of each item is used",) if extra else ())


def _each(items: Any) -> Iterator[Any]:
    """A map-style dataset need not raise IndexError at its end, so it is not simply iterated."""
    if hasattr(items, "__len__") and hasattr(items, "__getitem__"):
        return (items[at] for at in range(len(items)))
    return iter(items)


def _fitted(value: Tensor, shape: tuple[int, ...] | None, origin: str) -> Tensor:
    """`value` with the channel axis of size 1 that many arrays leave out; refuses another number of axes."""
    if shape is None or value.dim() == len(shape):
        return value
    if value.dim() == len(shape) - 1 and shape[0] == 1:
        return value.unsqueeze(0)
    raise DataError(
        f"{origin} has samples of shape {shaped(value.shape)}, and the network reads {shaped(shape)} per sample; "
        f"expected {len(shape)} axes."
    )


def _read_arrays(path: Path) -> tuple[Tensor, Any, Any]:
    """(samples, labels, sources) of an array file; the last two may be None."""
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise DataError(f"{path} is no data file; expected audio or one of {', '.join(sorted(ARRAY_SUFFIXES))}.")
    try:
        if suffix in (".npy", ".npz"):
            with path.open("rb") as file:  # numpy leaves a file open that it cannot read
                found = numpy.load(file, allow_pickle=False)
                found = dict(found) if suffix == ".npz" else found
        elif suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # each format has its own errors, and a damaged file can raise nearly any
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{path} cannot be read as an array file ({reason[:160].rstrip('.')}); expected plain arrays."
        ) from error
    labels = sources = None
    if isinstance(found, dict):
        labels, sources = found.get("labels"), found.get("sources")
        arrays = {name: value for name, value in found.items() if name not in ("labels", "sources")}
        name = next((name for name in ARRAY_NAMES if name in arrays), None)
        if name is None and len(arrays) != 1:
            raise DataError(
                f"{path} holds {', '.join(map(str, arrays)) or 'no array'}; expected one array, or one that is named "
                f"{ARRAY_NAMES[0]}."
            )
        found = arrays[name] if name else next(iter(arrays.values()))
    if isinstance(found, numpy.ndarray):
        found = _from_numpy(found, str(path))
    if not isinstance(found, Tensor):
        raise DataError(f"{path} holds a {type(found).__name__}; expected an array with samples along its first axis.")
    return found.float() if found.is_floating_point() else found, labels, sources


def _from_numpy(array: numpy.ndarray, origin: str) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{origin} has values of type {array.dtype}; expected numbers.")
    wanted = numpy.float32 if array.dtype.kind == "f" else array.dtype  # numpy's default float64 is rarely meant
    return torch.tensor(numpy.ascontiguousarray(array, dtype=wanted))


def _call_factory(module: str, name: str) -> Any:
    try:
        sys.path.insert(0, str(Path.cwd()))  # a console script does not see the folder that it is started in
        try:
            target: Any = importlib.import_module(module)
        finally:
            sys.path.remove(str(Path.cwd()))
        for part in name.split("."):
            target = getattr(target, part)
        return target()
    except Exception as error:  # whatever the user's code raises is told as one sentence, with it as the cause
        raise DataError(
            f"{module}:{name} gave no data ({type(error).__name__}: {str(error).rstrip('.')}); expected an importable "
            "function without arguments that returns a tensor or a dataset."
        ) from error


def _tracked(items: Any, text: str, progress: bool | None) -> Iterator[Any]:
    """`items`, with a bar on stderr."""
    with show_progress(progress) as bar:
        yield from bar.track(items, total=len(items) if hasattr(items, "__len__") else None, description=text)
