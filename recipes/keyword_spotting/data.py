"""One-second clips of spoken words: folders with train/, valid/ and test/, and who may be heard in which part."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dslify.data import open_data
from dslify.errors import OptionError
from dslify.omega import Omega
from dslify.samples import Samples, split

from .network import LENGTH, RATE

PARTS = ("train", "valid", "test")
POSITIVE = "!background,!unknown"  # the labels that must not be stopped
NOISE = "background"  # the label of what is mixed into other clips
CALIBRATION = 0.25  # share of train's speakers that neither network nor gate learns from: they set thresholds
SPLIT_SEED = 0  # of that division; the checkpoints were trained with it


def sounds(folder: Path) -> dict[str, Samples]:
    """One-second clips of train, valid and test. Raises OptionError for a folder without them."""
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        raise OptionError(f"{folder} has no folder {' and no folder '.join(missing)}; expected train, valid and test.")
    return {name: open_data(folder / name, (1, LENGTH), rate=RATE) for name in PARTS}


def split_speakers(train: Samples, share: float = CALIBRATION, seed: int = SPLIT_SEED) -> tuple[Samples, Samples]:
    """(what is learned from, what calibrates besides valid), no source in both.

    A promise of at most 1 % lost at 95 % confidence takes 298 keyword clips of which none is lost, as (1 - 0.01)^298 is
    0.05; with twice as many a clip may be, and one that is labelled wrong does not decide everything.
    """
    learning, calibration = split(train, (1 - share, share), seed)
    return learning, calibration


def words_of(samples: Samples, omega: Omega) -> list[str]:
    """The positive labels in the order of their classes, 1 and up."""
    return [label for label in sorted(set(samples.labels)) if omega.positive([label])[0]]


def classes(samples: Samples, omega: Omega) -> Tensor:
    """The class of each sample: 0 for every negative, then the positive labels in alphabetical order; (n,)."""
    place = {label: 1 + at for at, label in enumerate(words_of(samples, omega))}
    return torch.tensor([place.get(label, 0) for label in samples.labels])


def noises(samples: Samples, omega: Omega) -> Tensor:
    """Sounds to mix in: those labelled NOISE, else every negative; (n, 1, samples)."""
    found = [at for at, name in enumerate(samples.labels) if name == NOISE]
    return samples.batch(found or [at for at, one in enumerate(omega.positive(samples.labels)) if not one])
