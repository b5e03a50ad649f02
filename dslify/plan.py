"""What a surgery did, as a frozen value that prints, compares and goes through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from .axes import AxisMap, Kept, sizes
from .errors import StoreError
from .functional import tensor_at


@dataclass(frozen=True)
class NarrowedTensor:
    """One parameter or buffer of the light path: shapes before and after, and per unchanged axis why it stayed."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    why: tuple[str, ...]


@dataclass(frozen=True)
class Projection:
    """A learned 1x1 projection between the full and the narrow channels of a value at the region's boundary."""

    value: str
    entering: bool
    full_channels: int
    light_channels: int


@dataclass(frozen=True)
class Candidate:
    """A light path that a search for latency looked at: its shares of the full region's MACs and, if it was timed (0 if
    not), of that region's latency."""

    width: float
    depth: float
    macs: float
    share: float = 0.0

    def timed(self, share: float) -> Candidate:
        return replace(self, share=share)


@dataclass(frozen=True)
class LatencyFit:
    """What a search found for a light path that takes at most `target` of the full region's latency, on one thread.

    runtime: "onnxruntime" or "eager". chosen: one of candidates, which are all that were timed, in that order.
    """

    target: float
    runtime: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyFit:
        """The inverse of dataclasses.asdict."""
        candidates = tuple(Candidate(**each) for each in data["candidates"])
        return cls(**{**data, "chosen": Candidate(**data["chosen"]), "candidates": candidates})


@dataclass(frozen=True)
class Plan:
    """The surgery at one cut.

    at, scope, width: as asked (at: inside the scope). dynamic: which axes may vary. crossing: values the region reads
    besides the cut. params, macs: of "base", "full" and "light" (MACs per sample at the example's size, by the rules).
    ledger: operators without a rule, whose axes stayed at full width; distrusted: nodes whose rule did not hold here,
    and why, which are in the ledger too. depth: share of the residual branches' MACs that the light path keeps;
    dropped: branches it does without. why: reasons of at=auto. macs also holds "unprojected": what the light path would
    cost without projections, unless it is separable. light: "narrow" or "separable", or the kind of a light path that
    is no copy (dslify.answers): its width is 0, and it has no projections and no tensors of the region. latency: how
    width and depth were found by latency. separated: of a separable light path, the weights whose convolutions became
    depthwise and pointwise. init: first weights of a copy, "inherited" or "random".
    """

    at: str
    scope: str | None
    width: float
    dynamic: str
    cut_shape: tuple[str, ...]
    crossing: tuple[str, ...]
    params: dict[str, int]
    macs: dict[str, int]
    projections: tuple[Projection, ...]
    tensors: tuple[NarrowedTensor, ...]
    ledger: dict[str, list[str]]
    depth: float = 1.0
    dropped: tuple[str, ...] = ()
    distrusted: dict[str, str] = field(default_factory=dict)
    why: str = ""
    light: str = "narrow"
    seed: int = 0
    latency: LatencyFit | None = None
    separated: tuple[str, ...] = ()
    init: str = "inherited"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of to_json; unknown or missing keys raise StoreError."""
        data = {"latency": None, "separated": (), "init": "inherited", **data}  # which files of before do not have
        known = {entry.name for entry in fields(cls)}
        if set(data) != known:
            odd = ", ".join(sorted(set(data) ^ known))
            raise StoreError(f"The stored plan does not fit this version of dslify: {odd}.")
        lists = {name: tuple(data[name]) for name in ("cut_shape", "crossing", "dropped", "separated")}
        projections = tuple(Projection(**item) for item in data["projections"])
        tensors = tuple(
            NarrowedTensor(item["name"], tuple(item["before"]), tuple(item["after"]), tuple(item["why"]))
            for item in data["tensors"]
        )
        latency = data["latency"] and LatencyFit.from_json(data["latency"])
        return cls(**{**data, **lists, "projections": projections, "tensors": tensors, "latency": latency})


def narrowed(axes: AxisMap, projected: frozenset[int], light: nn.Module) -> tuple[NarrowedTensor, ...]:
    """One row per parameter and buffer of the region, as it is in the light path."""
    rows = []
    for name, terms in axes.parameters.items():
        before = tuple(tensor_at(axes.region, name).shape)
        after = tuple(tensor_at(light, name).shape)
        why = []
        for axis, old, new in zip(terms, before, after, strict=True):
            reasons = [axes.kept_because(atom, projected) for atom in axis.atoms()] if old == new else []
            why.append(next((str(reason) for reason in reasons if reason), ""))
        rows.append(NarrowedTensor(name, before, after, tuple(why)))
    return tuple(rows)


def projections(axes: AxisMap, kept: Kept, projected: frozenset[int]) -> tuple[Projection, ...]:
    size = sizes(kept)
    chosen = [axes.boundaries[at] for at in sorted(projected)]
    return tuple(Projection(b.node.name, b.is_input, b.channels.hint, size(b.channels)) for b in chosen)
