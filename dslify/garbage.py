"""Python's collector of reference cycles, held back while a graph is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (100_000, 50, 100)  # new objects until a collection of the youngest, and how many of those until an older


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Within the block cycles are looked for rarely: a graph is many small objects that all stay, and each full search
    walks through everything that torch and the user's libraries hold (up to half a second, several times a capture).
    """
    before = gc.get_threshold()
    if 0 < before[0] < _THRESHOLDS[0]:  # 0: never
        gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
