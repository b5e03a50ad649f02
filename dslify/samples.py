"""Samples of one shape in memory, with what is known of each: label, source, loudness, fingerprint."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Dataset

from .errors import DataError, some
from .notes import noted

MEMORY = 2 << 30  # bytes of samples held in memory; beyond it they go to a temporary file
QUIETEST_DB = -120.0
MOST_CLASSES = 1 << 20  # a larger whole number is a name (an identifier, a year ...) and no class index


@dataclass(frozen=True)
class DataReport:
    """What was read.

    read: files, or 1 for an array or a Python object. seconds, rate (Hz): of sound, 0 where that means nothing.
    padded: samples completed with zeros. dropped: rests of files too short to keep. skipped: (name, reason).
    """

    origin: str
    read: int
    samples: int
    seconds: float = 0.0
    padded: int = 0
    dropped: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    rate: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Samples(Dataset[Tensor]):
    """A finite list of samples of one shape. Made by `open_data`; nothing in it changes.

    `samples[i]` is one input of the network without its batch axis; `samples.batch([3, 1])` is a fresh batch.
    labels, sources, names: one string a sample. Samples of one source (a file, a speaker) stay together in a split.
    levels, rms_db: (n,), level of each sample in dB re 1, at least QUIETEST_DB: the loudness baseline of the switch.
    classes: the labels in the order of a classifier's outputs (see `class_order`); subsets keep it whole.
    """

    values: Tensor = field(repr=False)  # (all, *shape)
    index: Tensor = field(repr=False)  # (n,), rows of values
    labels: tuple[str, ...] = field(repr=False)
    sources: tuple[str, ...] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    levels: Tensor = field(repr=False)
    report: DataReport
    classes: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> Tensor:
        return self.values[int(self.index[at])]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.values.shape[1:])

    @property
    def rms_db(self) -> Tensor:
        return self.levels

    @property
    def originals(self) -> tuple[int, ...]:
        """For each sample the number of the original that it is, or is a varied copy of (`vary`); kept by subsets.

        Samples of one number are no independent evidence: they count once wherever something is promised.
        """
        return tuple(self.index.tolist())

    def batch(self, positions: Sequence[int] | Tensor) -> Tensor:
        """(len(positions), *shape), a copy."""
        return self.values.index_select(0, self.index[torch.as_tensor(positions)])

    def subset(self, positions: Sequence[int]) -> Samples:
        """The samples at these positions, in this order; shares the values and the report."""
        chosen = list(positions)
        labels, sources, names = (
            tuple(column[at] for at in chosen) for column in (self.labels, self.sources, self.names)
        )
        where = torch.tensor(chosen, dtype=torch.long)
        return replace(
            self, index=self.index[where], labels=labels, sources=sources, names=names, levels=self.levels[where]
        )

    def class_indices(self, classes: Sequence[str] | None = None) -> Tensor:
        """(n,) int64: where each sample's label stands in `classes`; give the training set's to judge other data.

        Raises DataError for a sample without a label or with one that is not among the classes.
        """
        known = tuple(self.classes if classes is None else classes)
        place = {name: at for at, name in enumerate(known)}
        for label, name in zip(self.labels, self.names, strict=True):
            if label not in place:
                found = f"has the label {label!r}" if label else "has no label"
                raise DataError(
                    f"{self.report.origin}: {name} {found}; expected one of the {len(known)} classes {some(known)}."
                )
        return torch.tensor([place[label] for label in self.labels], dtype=torch.long)

    def fingerprints(self) -> tuple[str, ...]:
        """One hash a sample, of its original's bytes: it is recognised wherever it comes from, and however varied."""
        known = {
            row: hashlib.blake2b(raw_bytes(self.values[row]), digest_size=8).hexdigest()
            for row in dict.fromkeys(self.originals)
        }
        return tuple(known[row] for row in self.originals)

    def digest(self) -> str:
        """One hash of all samples in their order."""
        return hashlib.blake2b("".join(self.fingerprints()).encode(), digest_size=16).hexdigest()


def split(samples: Samples, fractions: Sequence[float], seed: int = 0) -> tuple[Samples, ...]:
    """Divide by source: all samples of one source go to one part. The same seed gives the same parts.

    fractions: shares of the samples, positive, of sum 1. Every label is spread over the parts as evenly as its sources
    allow. The order of the samples is kept inside a part.

    Raises DataError when there are fewer sources than parts.
    """
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise DataError(f"Fractions of a split are positive and sum to 1; got {list(fractions)}.")
    members: dict[str, list[int]] = {}
    for at, source in enumerate(samples.sources):
        members.setdefault(source, []).append(at)
    if len(members) < len(fractions):
        raise DataError(
            f"{samples.report.origin} has {len(members)} source{'s' * (len(members) != 1)} (files or recordings), "
            f"which cannot be split into {len(fractions)} parts; give more files, or separate data for each purpose."
        )
    shuffled = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    order = [list(members)[at] for at in shuffled]
    order.sort(key=lambda source: samples.labels[members[source][0]])  # stable: random within a label
    held = [0] * len(fractions)
    of_label: dict[str, list[int]] = {}
    parts: list[list[int]] = [[] for _ in fractions]
    for place, source in enumerate(order):
        inside = of_label.setdefault(samples.labels[members[source][0]], [0] * len(fractions))
        empty = [part for part in range(len(parts)) if not parts[part]]
        # The last sources are owed to parts that have none yet; otherwise the part that lacks most takes the source.
        allowed = empty if len(empty) >= len(order) - place else range(len(parts))

        def lack(part: int, inside: list[int] = inside) -> tuple[float, float]:
            due = fractions[part]
            return due * (sum(inside) + 1) - inside[part], due * (sum(held) + 1) - held[part]

        chosen = max(allowed, key=lack)
        parts[chosen] += members[source]
        inside[chosen] += len(members[source])
        held[chosen] += len(members[source])
    return tuple(samples.subset(sorted(part)) for part in parts)


def expected_shape(net: nn.Module) -> tuple[int, ...] | None:
    """Shape of one sample as a dslified network was captured with, without the batch axis; None if unknown."""
    example = noted(net, "example")
    return tuple(example[0][0][1:]) if example else None


def expected_classes(net: nn.Module) -> tuple[str, ...]:
    """The classes that a dslified network was trained with, in the order of its outputs; () where that is unknown."""
    return tuple(map(str, noted(net, "classes") or ()))


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes of these labels in the order that a classifier's outputs are taken to have.

    Names are sorted, as torchvision does it with class folders. Whole numbers are class indices already, so the
    classes are all numbers up to the largest, whichever of them occur. Samples without a label ("") add none.
    """
    names = sorted(set(labels) - {""})
    if all(name.isascii() and name.isdigit() and str(int(name[:9])) == name for name in names):
        most = max((int(name) for name in names), default=-1)
        if most < MOST_CLASSES:
            return tuple(map(str, range(most + 1)))
    return tuple(names)


def show_progress(progress: bool | None) -> Progress:
    """A rich progress display on stderr; None shows it when stderr is a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    return Progress(console=console, transient=True, disable=not shown)


class Collector:
    """Takes samples one after another and turns them into Samples at the end.

    classes: in the order that is known of them; () puts the labels in order.
    """

    def __init__(self, origin: str, classes: Sequence[str] = ()):
        self.origin = origin
        self.classes = tuple(classes)
        self.memory = bytearray()
        self.file: Any = None
        self.kind: tuple[tuple[int, ...], torch.dtype] | None = None
        self.rows: list[tuple[str, str, str, float]] = []  # label, source, name, level
        self.skipped: list[tuple[str, str]] = []

    def add(self, value: Tensor, label: Any, source: Any, name: str) -> None:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise DataError(f"{name} holds NaN or infinite values; mend that sample or leave it out.")
        kind = (tuple(value.shape), value.dtype)
        if self.kind is None:
            self.kind = kind
        if kind != self.kind:
            raise DataError(
                f"{self.origin}: {name} is {shaped(value.shape)} {value.dtype} and the ones before are "
                f"{shaped(self.kind[0])} {self.kind[1]}; samples of one shape and type are expected."
            )
        raw = raw_bytes(value)
        if self.file is None and len(self.memory) + len(raw) > MEMORY:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed in finish)
            self.file.write(self.memory)
            self.memory = bytearray()
        if self.file is None:
            self.memory += raw
        else:
            self.file.write(raw)
        self.rows.append((as_text(label), as_text(source), name, level(value)))

    def finish(self, read: int, notes: Iterable[str] = (), **counts: Any) -> Samples:
        if self.kind is None:
            if not self.skipped:
                raise DataError(f"{self.origin} is empty; at least one sample is expected.")
            name, reason = self.skipped[0]
            raise DataError(
                f"{self.origin} holds nothing usable: all {len(self.skipped)} were skipped, the first is {name} "
                f"({reason})."
            )
        shape, dtype = self.kind
        if self.file is None:
            flat = torch.frombuffer(self.memory, dtype=dtype)
        else:
            self.file.flush()
            flat = torch.from_numpy(numpy.memmap(self.file, dtype=numpy.uint8, mode="r+")).view(dtype)
            self.file.close()  # the mapping keeps the unnamed file alive
        labels, sources, names, levels = zip(*self.rows, strict=True)
        report = DataReport(self.origin, read, len(labels), skipped=tuple(self.skipped), notes=tuple(notes), **counts)
        values = flat.view(len(labels), *shape)
        index, level = torch.arange(len(labels)), torch.tensor(levels)
        classes = self.classes or class_order(labels)
        return Samples(values, index, labels, sources, names, level, report, classes)


def fitted(value: Tensor, shape: tuple[int, ...] | None, origin: str) -> Tensor:
    """`value` with the channel axis of size 1 that many arrays leave out; refuses another number of axes."""
    if shape is None or value.dim() == len(shape):
        return value
    if value.dim() == len(shape) - 1 and shape[0] == 1:
        return value.unsqueeze(0)
    raise DataError(
        f"{origin} has samples of shape {shaped(value.shape)}, and the network reads {shaped(shape)} per sample; "
        f"expected {len(shape)} axes."
    )


def raw_bytes(value: Tensor) -> bytes:
    """A tensor's contents, for hashing and writing."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def level(value: Tensor) -> float:
    """Root mean square in dB re 1, at least QUIETEST_DB."""
    power = value.double().square().mean().item() if value.numel() else 0.0
    return max(QUIETEST_DB, 10 * math.log10(power)) if power > 0 else QUIETEST_DB


def as_text(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.item()
    return "" if value is None else str(value)


def shaped(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
