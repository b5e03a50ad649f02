"""What a fine-tuning run is asked for, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import OptionError
from .output_losses import Kinds

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ENDS = 10  # losses at the ends of a curve are means over this many steps


@dataclass(frozen=True)
class Options:
    """What a run is made of, besides data and network. Raises OptionError."""

    steps: int
    switch_steps: int
    batch_size: int
    lr: float
    alpha: float
    beta: float
    anchor: float
    seed: int
    fit: bool
    cache_bytes: int
    loss: Kinds = "l1"
    weights: tuple[float, ...] | None = None
    precision: str = "32-true"
    accumulate: int = 1
    patience: int | None = None
    joint_steps: int = 0
    joint_lr: float = 3e-4

    @property
    def light_end(self) -> int:
        """The run's step after which the switch phase begins."""
        return self.joint_steps + self.steps

    @property
    def end(self) -> int:
        return self.light_end + self.switch_steps

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise OptionError(f"precision is one of {', '.join(PRECISIONS)}; got {self.precision!r}.")
        for name in ("batch_size", "accumulate", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is at least 1; got {value}.")
        for name in ("steps", "switch_steps", "joint_steps", "cache_bytes"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is 0 or more; got {getattr(self, name)}.")
        for name in ("lr", "joint_lr", "alpha", "beta", "anchor"):
            value, positive = getattr(self, name), name not in ("beta", "anchor")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise OptionError(f"{name} is a {'positive' if positive else 'non-negative'} number; got {value}.")


@dataclass(frozen=True)
class Phase:
    """One phase's curves. losses: unweighted parts and the weighted `total`, a value a step. seconds: of its steps."""

    name: str
    losses: dict[str, tuple[float, ...]]
    seconds: float

    @property
    def steps(self) -> int:
        return len(self.losses.get("total", ()))

    def first(self, name: str = "total") -> float:
        """Mean of the first ENDS steps (of half the curve, if shorter)."""
        values = self.losses[name]
        return sum(values[: self._ends()]) / self._ends()

    def last(self, name: str = "total") -> float:
        """Mean of the last ENDS steps (of half the curve, if shorter)."""
        values = self.losses[name]
        return sum(values[-self._ends() :]) / self._ends()

    def _ends(self) -> int:
        return max(1, min(ENDS, self.steps // 2))


@dataclass(frozen=True)
class History:
    """What finetune() did.

    phases: "joint", "light" and "switch", those that ran. scale: per layer and output, mean absolute full output.
    unseen: mean relative difference between light and full on the switch's data, which the light path was not fitted
    to; None without a switch phase. cached: the fast path was used. fitted: a light path started from a least-squares
    fit. kept: with early stopping, the step of each phase whose weights were kept, out of all that ran. data: of
    "light" and "switch" each: samples, originals (fewer where copies are among them), sources, a digest, and how many
    samples have each label. fingerprints: a hash of every sample seen (not part of the JSON;
    data.json in the run folder).
    """

    phases: tuple[Phase, ...]
    scale: tuple[tuple[float, ...], ...]
    unseen: float | None
    cached: bool
    fitted: bool
    options: dict[str, Any]
    data: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    kept: dict[str, int] = field(default_factory=dict)
    resumed_at: int | None = None
    run_dir: str | None = None
    fingerprints: frozenset[str] = field(default=frozenset(), repr=False)

    def to_json(self) -> dict[str, Any]:
        phases = [
            {"name": phase.name, "steps": phase.steps, "seconds": round(phase.seconds, 3), "losses": phase.losses,
             "first": {name: phase.first(name) for name in phase.losses},
             "last": {name: phase.last(name) for name in phase.losses}}
            for phase in self.phases
        ]  # fmt: skip
        rest = {name: value for name, value in asdict(self).items() if name not in ("phases", "fingerprints")}
        return {"phases": phases, **rest}


def phases_of(lines: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """The curves of a history with one line a step."""
    found = []
    for name in dict.fromkeys(line["phase"] for line in lines):
        own = [line for line in lines if line["phase"] == name]
        parts = [part for part in own[0] if part not in ("step", "phase", "lr", "seconds", "held_out")]
        found.append(Phase(name, {part: tuple(line[part] for line in own) for part in parts}, own[-1]["seconds"]))
    return tuple(found)
