"""What the network is trained, calibrated and judged on: anything a user has, as one finite list of equal tensors."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler

from .arrays import SUFFIXES as ARRAYS
from .arrays import from_numpy, named_arrays, read_arrays
from .errors import DataError, OptionError, some
from .folders import SUFFIXES as FILES
from .folders import open_files
from .images import Pixels, pixels_of
from .items import has_places, open_items
from .samples import Collector, Samples, expected_classes, expected_shape, fitted, shaped
from .wanted import DEFAULT_RATE as DEFAULT_RATE
from .wanted import Wanted


def open_data(
    source: Any,
    shape: Sequence[int] | nn.Module | None = None,
    *,
    rate: int | None = None,
    labels: Sequence[Any] | str | Path | None = None,
    sources: Sequence[Any] | None = None,
    classes: Sequence[str] = (),
    pixels: Pixels | None = None,
    workers: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Samples:
    """Read `source` once and hold it (in memory up to 2 GiB, then in a temporary file).

    source: a folder of audio or of pictures, or one such file; an array file, first axis = samples (.npy, .npz, .pt,
    .pth or .safetensors, with arrays named samples, labels, sources when there are several); "pkg.mod:factory", called
    without arguments; or from Python a tensor, an array, a dict of arrays, a torch or Hugging Face data set, a
    DataLoader (its data set is read) or any finite iterable. Items are tensors, arrays, PIL images, (one of these,
    label), or dicts (input_values, pixel_values, input_features, input_ids, audio or image; label; speaker_id ...).
    shape: of one sample as the network takes it, without the batch axis, or the dslified network, which knows it. Audio
    and pictures need it: recordings are cut into segments of that length, pictures are resized and cropped. Arrays may
    have other sizes, but not another number of axes.
    rate: of the network in Hz; audio at any other rate is resampled. 16 kHz when not given, and the report says so.
    labels: one a sample for data given from Python or in an array file; for a folder the CSV table to take labels and
    sources from (columns path, label, and source as wanted; see listing.described). sources: one a sample.
    classes: the labels in the order of the network's outputs; as the network or the data set says it, else in order
    (`class_order`). pixels: how pictures are normalised, as the network says it when not given.
    workers: threads that read files, or processes that read a data set's items; 0 reads here, None takes a DataLoader's
    own number. The samples are the same for every number of them. seed: of an item's own random numbers.
    progress: a bar on stderr; None shows it when stderr is a terminal.

    Files that cannot be used (broken, NaN in them) are skipped and listed in `.report.skipped`.
    Raises DataError when nothing usable is left, and for anything that is none of the above.
    """
    if workers is not None and workers < 0:
        raise OptionError(f"workers is a whole number of at least 0; got {workers}.")
    if isinstance(shape, nn.Module):
        classes, pixels = classes or expected_classes(shape), pixels or pixels_of(shape)
        shape = expected_shape(shape)
    expected = None if shape is None else tuple(shape)
    return _open(source, Wanted(expected, rate, pixels, tuple(classes), workers, seed, progress), labels, sources)


def _open(source: Any, wanted: Wanted, labels: Any, sources: Any) -> Samples:
    if isinstance(source, Samples):
        return source
    if isinstance(source, (str, Path)):
        return _open_named(source, wanted, labels, sources)
    if isinstance(labels, (str, Path)):
        raise DataError(f"Labels from the table {labels} belong to a folder of files; give one label a sample.")
    if isinstance(source, DataLoader):
        wanted = replace(wanted, workers=source.num_workers if wanted.workers is None else wanted.workers)
        source = _dataset_of(source)
    if isinstance(source, Mapping):
        source, labels, sources = _from_mapping(source, labels, sources)
    if isinstance(source, numpy.ndarray):
        source = from_numpy(source, "the given array")
    if isinstance(source, Tensor):
        return _open_tensor(source, wanted, labels, sources, "a tensor", "sample")
    if isinstance(source, Iterable) or has_places(source):
        return open_items(source, wanted, labels, sources)
    raise DataError(
        f"Data cannot be of type {type(source).__name__}; expected a folder, a file, pkg.mod:factory, a tensor, a "
        "torch Dataset or an iterable of tensors."
    )


def _open_named(source: str | Path, wanted: Wanted, labels: Any, sources: Any) -> Samples:
    """The samples of a file, of a folder, or of what a factory of this name returns."""
    path = Path(source)
    table = Path(labels) if isinstance(labels, (str, Path)) else None
    if table is not None and not table.is_file():
        raise DataError(f"There is no table of labels {table}; expected a CSV file with the columns path and label.")
    if path.is_dir() or (path.is_file() and path.suffix.lower() in FILES):
        if labels is not None and table is None:
            raise DataError(f"{path} is read file by file; give its labels as a CSV table (columns path and label).")
        return open_files(path, wanted, table)
    if path.is_file():
        if table is not None:
            raise DataError(f"{path} holds arrays; give its labels as an array named labels in it, not in {table}.")
        values, own_labels, own_sources = read_arrays(path)
        labels, sources = (own_labels if labels is None else labels), (own_sources if sources is None else sources)
        return _open_tensor(values, wanted, labels, sources, str(path), path.name)
    named = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", str(source))
    if named is None:
        raise DataError(
            f"No data at {source}: there is no such file or folder; expected a folder of audio or pictures, an array "
            f"file ({', '.join(sorted(ARRAYS))}) or pkg.mod:factory."
        )
    made = _call_factory(*named.groups())
    if isinstance(made, str) and made == str(source):
        raise DataError(f"{source} returned its own name; it has to return the data.")
    return _open(made, wanted, labels, sources)


def _open_tensor(values: Tensor, wanted: Wanted, labels: Any, sources: Any, origin: str, name: str) -> Samples:
    if not values.dim() or not len(values):
        raise DataError(f"{origin} has the shape {shaped(values.shape)}; expected samples along a first axis.")
    columns = []
    for title, column in (("labels", labels), ("sources", sources)):
        if column is not None and len(column) != len(values):
            raise DataError(f"{origin} has {len(values)} samples and {len(column)} {title}; expected one a sample.")
        columns.append(column)
    into = Collector(origin, wanted.classes)
    for at, value in enumerate(values):
        label, source = (None if column is None else column[at] for column in columns)
        into.add(fitted(value, wanted.shape, origin), label, at if source is None else source, f"{name}[{at}]")
    return into.finish(1, rate=wanted.rate or 0)


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


def _dataset_of(loader: DataLoader[Any]) -> Any:
    """The data set that a loader reads, or the part of it that its sampler draws from."""
    if isinstance(loader.sampler, SubsetRandomSampler):
        return Subset(loader.dataset, sorted(loader.sampler.indices))
    return loader.dataset


def _from_mapping(named: Mapping[str, Any], labels: Any, sources: Any) -> tuple[Any, Any, Any]:
    """(samples, labels, sources) of a dict of arrays."""
    if not any(isinstance(value, (Tensor, numpy.ndarray)) for value in named.values()):
        raise DataError(
            f"The given {type(named).__name__} holds {some(list(map(str, named)))} and no arrays; give one part of it, "
            f"such as data[{next(iter(named), 'train')!r}]."
        )
    values, own_labels, own_sources = named_arrays(named, f"the given {type(named).__name__}")
    return values, own_labels if labels is None else labels, own_sources if sources is None else sources
