"""Reading with several workers: what comes out, and its order, is the same for every number of them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from .errors import DataError, DslifyError, one_line

AHEAD = 4  # results per worker that may wait for their turn
TOGETHER = 16  # items that one message of a process holds
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def read_ahead(read: Callable[[_In], _Out], items: Iterable[_In], workers: int) -> Iterator[_Out]:
    """`read` of every item in their order, by so many threads (0: this one).

    For files: decoders of sound and pictures leave Python's lock while they work.
    """
    if not workers:
        yield from map(read, items)
        return
    waiting: deque[Future[_Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def fetched(items: Sequence[Any], prepare: Callable[[int, Any], Any], seed: int, workers: int) -> Iterator[Any]:
    """`prepare(at, items[at])` for at = 0, 1, ..., by so many processes (0: this one).

    Random numbers that an item draws (of Python, numpy's global generator or torch) depend on the seed and its place
    alone. Raises DataError for whatever an item's own code raises.
    """
    dataset = _Seeded(items, prepare, seed, TOGETHER if workers else 1)
    if not workers:
        held = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        try:
            yield from _opened(dataset[at] for at in range(len(dataset)))
        finally:
            random.setstate(held[0])
            numpy.random.set_state(held[1])
            torch.set_rng_state(held[2])
        return
    loader = DataLoader(
        dataset,
        batch_size=None,  # lists of items, as they are: a batch would have to be of one shape, and of tensors
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=AHEAD,
        generator=torch.Generator(),  # else it draws from torch's own, and what follows would depend on the workers
    )
    yield from _opened(loader)


class _Seeded(Dataset[list[Any]]):
    """Items that are functions of their place, several at a time."""

    def __init__(self, items: Sequence[Any], prepare: Callable[[int, Any], Any], seed: int, together: int):
        self.items, self.prepare, self.seed, self.together = items, prepare, seed, together

    def __len__(self) -> int:
        return -(-len(self.items) // self.together)

    def __getitem__(self, at: int) -> list[Any]:
        first = at * self.together
        return [self._one(at) for at in range(first, min(first + self.together, len(self.items)))]

    def _one(self, at: int) -> Any:
        """The item, or the error that its code raised: an exception would lose its class on the way out of a worker."""
        mixed = numpy.random.SeedSequence([self.seed, at]).generate_state(1)[0].item()
        random.seed(mixed)
        numpy.random.seed(mixed)
        torch.default_generator.manual_seed(mixed)  # torch.manual_seed does a millisecond's work for GPUs
        try:
            return self.prepare(at, self.items[at])
        except DslifyError as error:
            return error
        except Exception as error:  # the user's own code: told as one sentence
            return DataError(f"Item {at} of the data cannot be read ({type(error).__name__}: {one_line(error)}).")


def _as_it_is(item: Any) -> Any:
    return item


def _opened(lists: Iterable[list[Any]]) -> Iterator[Any]:
    for item in chain.from_iterable(lists):
        if isinstance(item, DslifyError):
            raise item
        yield item
