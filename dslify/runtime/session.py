"""ONNX Runtime sessions: one model, its threads, and arrays that are checked before they go in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import ExportError, OptionError, one_line

_ARRAYS = {"float": "float32", "double": "float64"}  # ONNX Runtime's names for what numpy calls otherwise


class Session:
    """A model in ONNX Runtime on the CPU, and how to call it.

    model: a file, or the bytes of one. threads: that it computes with. seconds: spent in all calls so far. Raises
    ExportError without onnxruntime, or when it refuses the model.
    """

    def __init__(self, model: str | Path | bytes, threads: int = 1):
        try:
            import onnxruntime
        except ImportError:
            raise ExportError("Running ONNX needs onnxruntime; install it with pip install 'dslify[onnx]'.") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        named = model if isinstance(model, bytes) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(named, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base
            what = "The model" if isinstance(model, bytes) else str(model)
            raise ExportError(f"{what} cannot be run by ONNX Runtime ({one_line(error)}); export it again.") from None
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self.outputs = tuple(each.name for each in self._session.get_outputs())
        self._wanted = list(self.outputs)
        # What the public method calls after it has checked names in Python, a third of the time of a small model; they
        # are right here.
        self._run = getattr(self._session, "_sess", self._session).run
        self.seconds = 0.0

    def __call__(self, values: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs in order. Values that the model does not take are left out."""
        given = {name: values[name] for name in self.inputs}
        begin = perf_counter()
        found: list[np.ndarray] = self._run(self._wanted, given, None)
        self.seconds += perf_counter() - begin
        return found

    def shapes(self) -> tuple[tuple[int | str, ...], ...]:
        """Of the inputs; a word stands for a size that may vary."""
        return tuple(tuple(each.shape) for each in self._session.get_inputs())

    def named(self, arrays: Sequence[Any]) -> dict[str, np.ndarray]:
        """The inputs by name, checked. Numbers of the same kind are cast. Raises OptionError for what does not fit."""
        inputs = self._session.get_inputs()
        if len(arrays) != len(inputs):
            raise OptionError(f"The model takes {len(inputs)} arrays ({', '.join(self.inputs)}); got {len(arrays)}.")
        found = {}
        for entry, given in zip(inputs, arrays, strict=True):
            array = np.asarray(given)
            kind = entry.type.removeprefix("tensor(").rstrip(")")
            wanted = np.dtype(_ARRAYS.get(kind, kind))
            sizes = " x ".join(map(str, entry.shape))
            fits = len(entry.shape) == array.ndim and all(
                size == have for size, have in zip(entry.shape, array.shape, strict=True) if isinstance(size, int)
            )
            if not fits:
                got = " x ".join(map(str, array.shape)) or "a number"
                raise OptionError(f"The input {entry.name} is an array of {sizes}; got {got}.")
            if array.dtype.kind != wanted.kind:
                raise OptionError(f"The input {entry.name} holds {wanted} numbers; got {array.dtype}.")
            found[entry.name] = np.ascontiguousarray(array, wanted)
        return found
