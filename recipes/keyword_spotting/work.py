"""Where the evaluation keeps what it makes, and what all of its stages agree on: the parts of the data, the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import dslify
from dslify.data import open_data
from dslify.omega import Omega, omega
from dslify.samples import Samples
from recipes.stages import WorkFolder

from .checkpoints import FOLDER, read_checkpoint
from .data import POSITIVE, sounds, split_speakers

DEPTHS = {"blocks.0": "1/4", "blocks.1": "1/2", "blocks.2": "3/4"}
HALF = "blocks.1"
MAX_LOST, CONFIDENCE = 0.01, 0.95  # what every threshold promises: keywords of new speakers lost, and how surely
LEARNING_COPIES, CALIBRATION_COPIES = 4, 8  # varied ones of each clip


@dataclass(frozen=True, eq=False)
class Parts:
    """The clips and what they are for, no speaker in two of them.

    learning: the part of train from which networks and gates learn, with varied copies for the gates in `varied`.
    calibration: valid, and the speakers of train that no network has heard, with varied copies. test: for what is
    reported.
    """

    positive: Omega
    learning: Samples
    varied: Samples
    calibration: Samples
    test: Samples


@dataclass(frozen=True)
class Work(WorkFolder):
    """One evaluation. data: clips like kws16k, folder: for everything that is made.

    threads: of torch, in each process. jobs: processes. minutes: of the stream that the gates listen to. checkpoint: of
    the network, the recipe's own where it is None.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    jobs: int = 2
    minutes: float = 30.0
    checkpoint: Path | None = None

    def weights(self, name: str = "convolutional") -> Path:
        """The file of one of the recipe's networks."""
        return self.checkpoint if self.checkpoint and name == "convolutional" else FOLDER / f"{name}.safetensors"

    def network(self, name: str = "convolutional") -> nn.Module:
        """One of the recipe's networks in eval mode, without gates."""
        return read_checkpoint(self.weights(name))[0]

    @cached_property
    def parts(self) -> Parts:
        """Read once. Raises OptionError for a folder without train, valid and test."""
        found = sounds(self.data)
        learning, held = split_speakers(found["train"])
        positive = omega(POSITIVE, found["train"].labels)
        varied = kept(dslify.vary(learning, LEARNING_COPIES))
        calibration = kept(dslify.vary(joined(found["valid"], held), CALIBRATION_COPIES, seed=1))
        return Parts(positive, learning, varied, calibration, found["test"])

    def gate(self, name: str, seed: int = 0) -> Path:
        """The .dsl file of a retrofit."""
        return self.folder / "retrofit" / f"{name}-{seed}.dsl"


@dataclass(frozen=True, eq=False)
class KeptSamples(Samples):
    """Varied copies that are computed once, since every gate reads them. of: the original of each row of `values`."""

    of: tuple[int, ...] = ()

    @property
    def originals(self) -> tuple[int, ...]:
        return tuple(self.of[row] for row in self.index.tolist())


def kept(samples: Samples) -> Samples:
    """The samples, originals first, in memory."""
    values = torch.cat([samples.batch(range(at, min(at + 64, len(samples)))) for at in range(0, len(samples), 64)])
    columns = (samples.labels, samples.sources, samples.names, samples.rms_db, samples.report, samples.classes)
    return KeptSamples(values, torch.arange(len(values)), *columns, of=samples.originals)


def joined(*several: Samples) -> Samples:
    """The samples one after another, as one."""
    return open_data(
        torch.cat([one.batch(range(len(one))) for one in several]),
        several[0].shape,
        labels=[label for one in several for label in one.labels],
        sources=[source for one in several for source in one.sources],
        classes=several[0].classes,
        progress=False,
    )


Task = tuple[Any, ...]
_work: Work | None = None  # of a child process


def each(work: Work, function: Callable[..., Any], tasks: Iterable[Task], words: str) -> list[Any]:
    """`function(work, *task)` of every task, in `work.jobs` processes that read the data once; in the tasks' order.

    function: of a module, so that a process finds it by its name.
    """
    asked = list(tasks)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(words, total=len(asked))
        if min(work.jobs, len(asked)) < 2:
            found = []
            for task in asked:
                found.append(function(work, *task))
                bar.advance(shown)
            return found
        fields = (work.data, work.folder, work.seeds, work.threads, work.jobs, work.minutes, work.checkpoint)
        with ProcessPoolExecutor(min(work.jobs, len(asked)), get_context("spawn"), _begin, fields) as pool:
            running = [pool.submit(_one, function, task) for task in asked]
            try:
                for done in as_completed(running):
                    done.result()
                    bar.advance(shown)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [one.result() for one in running]


def _begin(*fields: Any) -> None:
    global _work
    _work = Work(*fields)
    torch.set_num_threads(_work.threads)


def _one(function: Callable[..., Any], task: Sequence[Any]) -> Any:
    assert _work is not None
    return function(_work, *task)
