"""What the network is trained, calibrated and judged on: anything a user has, as one finite list of equal tensors."""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .audio import SUFFIXES, AudioFile, Clip, audio_files, read_clip
from .errors import DataError

DEFAULT_RATE = 16_000  # Hz, said in the report when nothing else was given
MEMORY = 2 << 30  # bytes of samples held in memory; beyond it they go to a temporary file
QUIETEST_DB = -120.0
ARRAY_NAMES = ("samples", "inputs", "input", "x", "data")
ARRAY_SUFFIXES = frozenset({".npy", ".npz", ".pt", ".pth", ".safetensors"})


@dataclass(frozen=True)
class DataReport:
    """What was read.

    read: files, or 1 for an array or a Python object. seconds: of sound, 0 where that means nothing.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Samples(Dataset[Tensor]):
    """A finite list of samples of one shape. Made by `open_data`; nothing in it changes.

    `samples[i]` is one input of the network without its batch axis; `samples.batch([3, 1])` is a fresh batch.
    labels, sources, names: one string a sample. Samples of one source (a file, a speaker) stay together in a split.
    rms_db: (n,), level of each sample in dB re 1, at least QUIETEST_DB: the loudness baseline of the switch.
    """

    values: Tensor = field(repr=False)  # (all, *shape)
    index: Tensor = field(repr=False)  # (n,), rows of values
    labels: tuple[str, ...] = field(repr=False)
    sources: tuple[str, ...] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    rms_db: Tensor = field(repr=False)
    report: DataReport

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> Tensor:
        return self.values[int(self.index[at])]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.values.shape[1:])

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
        return Samples(self.values, self.index[where], labels, sources, names, self.rms_db[where], self.report)

    def fingerprints(self) -> tuple[str, ...]:
        """One hash a sample, of its bytes: equal samples are recognised wherever they come from."""
        return tuple(hashlib.blake2b(raw_bytes(self[at]), digest_size=8).hexdigest() for at in range(len(self)))

    def digest(self) -> str:
        """One hash of all samples in their order."""
        return hashlib.blake2b("".join(self.fingerprints()).encode(), digest_size=16).hexdigest()


def open_data(
    source: Any,
    shape: Sequence[int] | None = None,
    *,
    rate: int | None = None,
    labels: Sequence[Any] | None = None,
    sources: Sequence[Any] | None = None,
    progress: bool | None = None,
) -> Samples:
    """Read `source` once and hold it (in memory up to 2 GiB, then in a temporary file).

    source: a folder of audio or one audio file; an array file, first axis = samples (.npy, .npz, .pt, .pth or
    .safetensors, with arrays named samples, labels, sources when there are several); "pkg.mod:factory", called without
    arguments; or from Python a tensor, an array, a torch Dataset, a DataLoader (its dataset is read) or any finite
    iterable, whose items are tensors or (tensor, label).
    shape: of one sample as the network takes it, without the batch axis (`expected_shape(net)`). Audio needs it: files
    are cut into segments of that length. Arrays may have other sizes, but not another number of axes.
    rate: of the network in Hz; audio at any other rate is resampled. 16 kHz when not given, and the report says so.
    labels, sources: for data given from Python or in an array file, one a sample.
    progress: a bar on stderr; None shows it when stderr is a terminal.

    Files that cannot be used are skipped and listed in `.report.skipped`, and so are samples with NaN or infinities.
    Raises DataError when nothing usable is left, and for anything that is none of the above.
    """
    if isinstance(source, Samples):
        return source
    expected = tuple(shape) if shape is not None else None
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir() or (path.is_file() and path.suffix.lower() in SUFFIXES):
            return _open_audio(path, expected, rate, progress)
        if path.is_file():
            values, own_labels, own_sources = _read_arrays(path)
            labels, sources = (own_labels if labels is None else labels), (own_sources if sources is None else sources)
            return _open_tensor(values, expected, labels, sources, str(path), path.name)
        named = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", str(source))
        if named is None:
            raise DataError(
                f"No data at {source}: there is no such file or folder; expected a folder of audio, an array file "
                f"({', '.join(sorted(ARRAY_SUFFIXES))}) or pkg.mod:factory."
            )
        made = _call_factory(*named.groups())
        if isinstance(made, str) and made == str(source):
            raise DataError(f"{source} returned its own name; it has to return the data.")
        return open_data(made, expected, rate=rate, labels=labels, sources=sources, progress=progress)
    if isinstance(source, DataLoader):
        source = source.dataset
    if isinstance(source, numpy.ndarray):
        source = _from_numpy(source, "the given array")
    if isinstance(source, Tensor):
        return _open_tensor(source, expected, labels, sources, "a tensor", "sample")
    if isinstance(source, Iterable) or (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        return _open_items(source, expected, labels, sources, progress)
    raise DataError(
        f"Data cannot be of type {type(source).__name__}; expected a folder, a file, pkg.mod:factory, a tensor, a "
        "torch Dataset or an iterable of tensors."
    )


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
    for module in net.modules():
        known = getattr(module, "meta", None)
        record = known.get("dslify") if isinstance(known, dict) else None
        if record and record.get("example"):
            return tuple(record["example"][0][0][1:])
    return None


def show_progress(progress: bool | None) -> Progress:
    """A rich progress display on stderr; None shows it when stderr is a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    return Progress(console=console, transient=True, disable=not shown)


class _Collector:
    """Takes samples one after another and turns them into Samples at the end."""

    def __init__(self, origin: str):
        self.origin = origin
        self.memory = bytearray()
        self.file: Any = None
        self.kind: tuple[tuple[int, ...], torch.dtype] | None = None
        self.rows: list[tuple[str, str, str, float]] = []  # label, source, name, level
        self.skipped: list[tuple[str, str]] = []

    def add(self, value: Tensor, label: Any, source: Any, name: str) -> None:
        if value.is_floating_point() and not torch.isfinite(value).all():
            self.skipped.append((name, "holds NaN or infinite values"))
            return
        kind = (tuple(value.shape), value.dtype)
        if self.kind is None:
            self.kind = kind
        if kind != self.kind:
            raise DataError(
                f"{self.origin}: {name} is {_shaped(value.shape)} {value.dtype} and the ones before are "
                f"{_shaped(self.kind[0])} {self.kind[1]}; samples of one shape and type are expected."
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
        self.rows.append((_text(label), _text(source), name, _level(value)))

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
        return Samples(values, torch.arange(len(labels)), labels, sources, names, torch.tensor(levels), report)


def _open_audio(path: Path, shape: tuple[int, ...] | None, rate: int | None, progress: bool | None) -> Samples:
    if shape is None or len(shape) > 2 or not shape:
        found = "no input shape is known" if shape is None else f"the network reads {_shaped(shape)} per sample"
        raise DataError(
            f"Audio in {path} is cut into segments of the network's input, and {found}; expected (channels, samples) "
            "or (samples,), such as --input 1x1x16000, or give arrays of the features that the network reads."
        )
    if path.is_dir():
        files, notes = audio_files(path)
    else:
        files, notes = [AudioFile(path, path.name, path.resolve().parent.name, path.name)], ()
    wanted = rate or DEFAULT_RATE
    if rate is None:
        notes = (*notes, f"the network is taken to read {DEFAULT_RATE} Hz; give the rate if it does not")
    into = _Collector(str(path))
    clips: list[Clip] = []
    whole = 0
    for file in _tracked(files, "reading sound", progress):
        clip = read_clip(file, shape, wanted)
        clips.append(replace(clip, pieces=None))
        if clip.pieces is None:
            into.skipped.append((file.name, clip.reason or ""))
            continue
        whole += len(clip.pieces) - clip.padded
        for at, piece in enumerate(clip.pieces):
            into.add(torch.from_numpy(piece), file.label, file.source, f"{file.name}[{at}]")
    longest = max(clip.seconds for clip in clips)
    if not whole and longest > 0:
        raise DataError(
            f"The audio in {path} is shorter than a segment: the longest of {len(files)} files has {longest:.2f} s and "
            f"the network reads {shape[-1] / wanted:.2f} s; give longer files, or a network with a shorter input."
        )
    used = [clip for clip in clips if clip.reason is None]
    rates = sorted({clip.rate for clip in used} - {wanted})
    if rates:
        notes = (*notes, f"resampled to {wanted} Hz from {', '.join(map(str, rates))} Hz")
    return into.finish(
        len(used),
        notes,
        seconds=round(sum(clip.seconds for clip in used), 3),
        padded=sum(clip.padded for clip in used),
        dropped=sum(clip.dropped for clip in used),
    )


def _open_tensor(
    values: Tensor, shape: tuple[int, ...] | None, labels: Any, sources: Any, origin: str, name: str
) -> Samples:
    if not values.dim() or not len(values):
        raise DataError(f"{origin} has the shape {_shaped(values.shape)}; expected samples along a first axis.")
    columns = []
    for title, column in (("labels", labels), ("sources", sources)):
        if column is not None and len(column) != len(values):
            raise DataError(f"{origin} has {len(values)} samples and {len(column)} {title}; expected one a sample.")
        columns.append(column)
    into = _Collector(origin)
    for at, value in enumerate(values):
        label, source = (None if column is None else column[at] for column in columns)
        into.add(_fitted(value, shape, origin), label, at if source is None else source, f"{name}[{at}]")
    return into.finish(1)


def _open_items(items: Any, shape: tuple[int, ...] | None, labels: Any, sources: Any, progress: bool | None) -> Samples:
    origin = f"the given {type(items).__name__}"
    into = _Collector(origin)
    extra = False
    for at, item in enumerate(_tracked(_each(items), "reading data", progress)):
        value, label = item, None
        if isinstance(item, (tuple, list)) and len(item):
            value = item[0]
            second = item[1] if len(item) > 1 else None
            if second is not None and numpy.ndim(second) == 0:
                label = second
            extra = extra or (len(item) > 1 and label is None)
        if isinstance(value, numpy.ndarray):
            value = _from_numpy(value, origin)
        if not isinstance(value, Tensor):
            raise DataError(
                f"Item {at} of {origin} is of type {type(item).__name__}; expected a tensor, or a tuple of a tensor "
                "and a label."
            )
        label = label if labels is None else labels[at]
        into.add(_fitted(value, shape, origin), label, at if sources is None else sources[at], f"sample[{at}]")
    return into.finish(1, ("only the first tensor of each item is used",) if extra else ())


def _each(items: Any) -> Iterator[Any]:
    """A map-style dataset need not raise IndexError at its end, so it is not simply iterated."""
    if hasattr(items, "__len__") and hasattr(items, "__getitem__"):
        return (items[at] for at in range(len(items)))
    return iter(items)


def _fitted(value: Tensor, shape: tuple[int, ...] | None, origin: str) -> Tensor:
    """`value` with the channel axis of size 1 that many arrays leave out; refuses another number of axes."""
    if shape is None or value.dim() == len(shape):
        return value
    if value.dim() == len(shape) - 1 and shape[0] == 1:
        return value.unsqueeze(0)
    raise DataError(
        f"{origin} has samples of shape {_shaped(value.shape)}, and the network reads {_shaped(shape)} per sample; "
        f"expected {len(shape)} axes."
    )


def _read_arrays(path: Path) -> tuple[Tensor, Any, Any]:
    """(samples, labels, sources) of an array file; the last two may be None."""
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise DataError(f"{path} is no data file; expected audio or one of {', '.join(sorted(ARRAY_SUFFIXES))}.")
    try:
        if suffix in (".npy", ".npz"):
            with path.open("rb") as file:  # numpy leaves a file open that it cannot read
                found = numpy.load(file, allow_pickle=False)
                found = dict(found) if suffix == ".npz" else found
        elif suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # each format has its own errors, and a damaged file can raise nearly any
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{path} cannot be read as an array file ({reason[:160].rstrip('.')}); expected plain arrays."
        ) from error
    labels = sources = None
    if isinstance(found, dict):
        labels, sources = found.get("labels"), found.get("sources")
        arrays = {name: value for name, value in found.items() if name not in ("labels", "sources")}
        name = next((name for name in ARRAY_NAMES if name in arrays), None)
        if name is None and len(arrays) != 1:
            raise DataError(
                f"{path} holds {', '.join(map(str, arrays)) or 'no array'}; expected one array, or one that is named "
                f"{ARRAY_NAMES[0]}."
            )
        found = arrays[name] if name else next(iter(arrays.values()))
    if isinstance(found, numpy.ndarray):
        found = _from_numpy(found, str(path))
    if not isinstance(found, Tensor):
        raise DataError(f"{path} holds a {type(found).__name__}; expected an array with samples along its first axis.")
    return found.float() if found.is_floating_point() else found, labels, sources


def _from_numpy(array: numpy.ndarray, origin: str) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{origin} has values of type {array.dtype}; expected numbers.")
    wanted = numpy.float32 if array.dtype.kind == "f" else array.dtype  # numpy's default float64 is rarely meant
    return torch.tensor(numpy.ascontiguousarray(array, dtype=wanted))


def _call_factory(module: str, name: str) -> Any:
    try:
        sys.path.insert(0, str(Path.cwd()))  # a console script does not see the folder that it is started in
        try:
            target: Any = importlib.import_module(module)
        finally:
            sys.path.remove(str(Path.cwd()))
        for part in name.split("."):
            target = getattr(target, part)
        return target()
    except Exception as error:  # whatever the user's code raises is told as one sentence, with it as the cause
        raise DataError(
            f"{module}:{name} gave no data ({type(error).__name__}: {str(error).rstrip('.')}); expected an importable "
            "function without arguments that returns a tensor or a dataset."
        ) from error


def _tracked(items: Any, text: str, progress: bool | None) -> Iterator[Any]:
    """`items`, with a bar on stderr."""
    with show_progress(progress) as bar:
        yield from bar.track(items, total=len(items) if hasattr(items, "__len__") else None, description=text)


def raw_bytes(value: Tensor) -> bytes:
    """A tensor's contents, for hashing and writing."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _level(value: Tensor) -> float:
    power = value.double().square().mean().item() if value.numel() else 0.0
    return max(QUIETEST_DB, 10 * math.log10(power)) if power > 0 else QUIETEST_DB


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.item()
    return "" if value is None else str(value)


def _shaped(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
