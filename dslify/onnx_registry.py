"""torch.onnx.export (2.12) reads its 1,500 translations of operators anew for every model, a third of its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block they come from the first reading in this process, where torch still is as this knows it."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    kind: Any = ONNXRegistry
    before = vars(kind).get("from_torchlib")
    if not isinstance(before, classmethod):
        yield
        return

    def from_torchlib(opset_version: int) -> Any:
        return _copy(_first(before.__func__, kind, opset_version))

    kind.from_torchlib = staticmethod(from_torchlib)
    try:
        yield
    finally:
        kind.from_torchlib = before


@cache
def _first(read: Any, kind: Any, opset_version: int) -> Any:
    return read(kind, opset_version)


def _copy(registry: Any) -> Any:
    """The exporter adds the translations of one model to it."""
    own = type(registry)()
    vars(own).update(vars(registry))
    own.functions = {target: list(known) for target, known in registry.functions.items()}
    return own
