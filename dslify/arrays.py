"""Array files: samples along a first axis, with labels and sources beside them where the format holds several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import DataError, some

NAMES = ("samples", "inputs", "input", "x", "data")
SUFFIXES = frozenset({".npy", ".npz", ".pt", ".pth", ".safetensors"})


def read_arrays(path: Path) -> tuple[Tensor, Any, Any]:
    """(samples, labels, sources) of an array file; the last two may be None."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is no data file; expected audio, a picture or one of {', '.join(sorted(SUFFIXES))}.")
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
    return named_arrays(found if isinstance(found, Mapping) else {NAMES[0]: found}, str(path))


def named_arrays(found: Mapping[str, Any], origin: str) -> tuple[Tensor, Any, Any]:
    """(samples, labels, sources) out of arrays with names; the last two may be None. Raises DataError."""
    arrays = {name: value for name, value in found.items() if name not in ("labels", "sources")}
    name = next((name for name in NAMES if name in arrays), None)
    if name is None and len(arrays) != 1:
        raise DataError(
            f"{origin} holds {some(list(map(str, arrays))) or 'no array'}; expected one array, or one that is named "
            f"{NAMES[0]}."
        )
    values = arrays[name] if name else next(iter(arrays.values()))
    if isinstance(values, numpy.ndarray):
        values = from_numpy(values, origin)
    if not isinstance(values, Tensor):
        raise DataError(
            f"{origin} holds a {type(values).__name__}; expected an array with samples along its first axis."
        )
    return values.float() if values.is_floating_point() else values, found.get("labels"), found.get("sources")


def from_numpy(array: numpy.ndarray, origin: str) -> Tensor:
    """A copy as a tensor, float32 for all floating-point numbers. Raises DataError for what is not numbers."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{origin} has values of type {array.dtype}; expected numbers.")
    wanted = numpy.float32 if array.dtype.kind == "f" else array.dtype  # numpy's default float64 is rarely meant
    return torch.tensor(numpy.ascontiguousarray(array, dtype=wanted))
