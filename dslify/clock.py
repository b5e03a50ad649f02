"""Times of calls, taken in turn in one run, so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from time import perf_counter, perf_counter_ns
from typing import Any, TypeVar

from .errors import OptionError

LEAST = 5  # rounds, however slow the calls

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timed:
    """Seconds that one call took: the median and the 90th percentile of `count` calls."""

    p50: float
    p90: float
    count: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Streamed(Timed):
    """The same for a stream of calls that is run again and again. mean: seconds a call, over the stream's places, each
    by the median of the calls in that place: it counts dear and cheap calls as they come, and no interruption.
    """

    mean: float


def timed(call: Call, seconds: float = 1.0, warmup: int = 3) -> Timed:
    """The times of one call, as `interleaved` takes them."""
    return interleaved({"": call}, seconds, warmup)[""]


def interleaved(
    calls: Mapping[Name, Call],
    seconds: float = 2.0,
    warmup: int = 3,
    gone: Callable[[float], None] | None = None,
) -> dict[Name, Timed]:
    """Run the calls in turn for `seconds` in all, at least LEAST times each, and give the times of each by name.

    Every round runs each call once, in an order of its own (by a fixed seed), so that none always follows the same
    other one. Ratios of medians from one such run are what can be compared; how many threads a call uses is the
    caller's. warmup: rounds that are not counted. gone: called between the rounds with the share of the time that is
    over. Raises OptionError without calls or time.
    """
    found = streamed({name: (call,) for name, call in calls.items()}, seconds, warmup, gone)
    return {name: Timed(one.p50, one.p90, one.count) for name, one in found.items()}


def streamed(
    streams: Mapping[Name, Sequence[Call]],
    seconds: float = 2.0,
    warmup: int = 1,
    gone: Callable[[float], None] | None = None,
) -> dict[Name, Streamed]:
    """As `interleaved`, of streams: a round runs each stream once, its calls one right after the other."""
    if not streams or not all(streams.values()) or not 0 < seconds < math.inf or warmup < 0:
        raise OptionError(
            f"A measurement needs calls, a time above 0 s and a warm-up of 0 rounds or more; got {len(streams)} names "
            f"with {sum(map(len, streams.values()))} calls, {seconds:g} s and {warmup} rounds."
        )
    found: dict[Name, list[list[int]]] = {name: [] for name in streams}
    order, shuffle = list(streams), random.Random(0).shuffle
    for _ in range(warmup):
        for call in chain.from_iterable(streams.values()):
            call()
    with _uncollected():
        begin = perf_counter()
        rounds, over = 0, 0.0
        while rounds < LEAST or over < seconds:
            shuffle(order)
            for name in order:
                found[name].append(_once(streams[name]))
            rounds, over = rounds + 1, perf_counter() - begin
            if gone is not None:
                gone(min(1.0, over / seconds))
    return {name: _summary(times) for name, times in found.items()}


def _once(calls: Sequence[Call]) -> list[int]:
    """Nanoseconds of each call of a stream."""
    times = []
    for call in calls:
        start = perf_counter_ns()
        call()
        times.append(perf_counter_ns() - start)
    return times


def _summary(rounds: Sequence[Sequence[int]]) -> Streamed:
    every = list(chain.from_iterable(rounds))
    places = [quantile(times, 0.5) for times in zip(*rounds, strict=True)]
    mean = sum(places) / len(places)
    return Streamed(quantile(every, 0.5) * 1e-9, quantile(every, 0.9) * 1e-9, len(every), mean * 1e-9)


def quantile(values: Sequence[float], share: float) -> float:
    """Of some values, with a line between the two that lie nearest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within the block Python does not look for reference cycles: that would hit some call at random."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
