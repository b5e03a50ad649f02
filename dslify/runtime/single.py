"""The one-file model, which branches by itself, with the runner's way of being called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .result import Result, Statistics
from .session import Session

SCORE, LIGHT = "front/score", "threshold/light"  # values inside a model of dslify export, where it offers them


class Single:
    """Runs a model that `dslify export` wrote as one file.

    model: the file, or the bytes of one. The route and the score are told by a model that has them as outputs (see
    dslify.routed.showing). threads: that it computes with. Raises ExportError when ONNX Runtime refuses it.
    """

    def __init__(self, model: str | Path | bytes, threads: int = 1):
        self._session = Session(model, threads)
        self.outputs = tuple(name for name in self._session.outputs if name not in (SCORE, LIGHT))
        self.shapes = self._session.shapes()
        self.statistics = Statistics()

    def run(self, *arrays: Any) -> Result:
        """One call on any number of samples, which go light only if all of them may. Raises OptionError as Runner."""
        found = dict(zip(self._session.outputs, self._session(self._session.named(arrays)), strict=True))
        score, light = (found.pop(name, None) for name in (SCORE, LIGHT))
        answers = tuple(found.values())
        if score is None or light is None:
            return Result(answers, None)
        taken = light.reshape(-1).repeat(len(score))
        return Result(answers, "light" if light.all() else "full", score, taken)

    def stream(self, segments: Iterable[Any]) -> Iterator[Result]:
        """run() on one segment after the other: arrays, or tuples of them. `statistics` counts the latest stream."""
        self.statistics = Statistics()
        for segment in segments:
            result = self.run(*(segment if isinstance(segment, tuple) else (segment,)))
            self.statistics = self.statistics.after(result)
            yield result
