"""Networks with several Dynamic Switch Layers: which lies inside which, and the ways that a sample can take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import OptionError
from .switch import DSLayer

Way = tuple[bool | None, ...]  # one entry a layer, outermost first: went light (True), went full, or did not reach it
MOST_WAYS = 32  # through a network's layers that are tried one by one


def parents(layers: Sequence[DSLayer]) -> tuple[int | None, ...]:
    """For every layer the innermost other one whose full path holds it; None for a layer that every sample reaches.

    layers: as dsl_layers gives them, outermost first.
    """
    insides = [set(layer.full.modules()) for layer in layers]
    holders = [[above for above in range(at) if layer in insides[above]] for at, layer in enumerate(layers)]
    return tuple(found[-1] if found else None for found in holders)


def ways(parents: Sequence[int | None]) -> tuple[Way, ...]:
    """Every way through the layers: all full first, light wherever it can be last.

    A nest of k layers has k + 1 of them, k layers one after the other have 2 to the power of k. Raises OptionError for
    more than MOST_WAYS.
    """
    found: list[Way] = [()]
    for parent in parents:
        found = [
            (*way, entry)
            for way in found
            for entry in ((False, True) if parent is None or way[parent] is False else (None,))
        ]
        if len(found) > MOST_WAYS:
            raise OptionError(
                f"There are more than {MOST_WAYS} ways through the {len(parents)} Dynamic Switch Layers of this "
                "network; that many cannot be held against each other."
            )
    return tuple(found)


@contextmanager
def forced(layers: Sequence[DSLayer], way: Way) -> Iterator[None]:
    """Within the block, every sample takes this way."""
    before = [layer.route for layer in layers]
    for layer, light in zip(layers, way, strict=True):
        layer.route = "light" if light else "full"
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.route = old
