"""What is known of a threshold: how it was set, from what, and what it promises."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .aim import Guarantee
from .budget import Unit
from .observe import plain


@dataclass(frozen=True)
class Calibration:
    """A threshold and how it came about; of a cascade, the outermost layer's, and every layer's in `layers`.

    threshold: as stored in the layer. kind: what scores are: "difference", predicted relative differences, or
    "positive", probabilities of a positive. how: a sentence.
    n, sources: samples used, and the recordings they were cut from; where segments are routed, n counts these, and
    `segments` how many each sample has. share: part of them that goes light, 0 to 1.
    mean_difference: over these samples, those on the full path counting 0.
    light_share, max_difference, max_metric: what was asked for, or None. overlap: samples that training has seen too,
    None where nobody said what it was trained on. notes: what to beware of.
    guarantee, epsilon, delta, units, bound: what is promised to hold for new data (delta: only for "routed"), from how
    many exchangeable units, with losses cut off at the bound; promise: the same as a sentence. All None without one.
    risk: what epsilon bounds, as measured on these units.

    Of gates that were set by what they lose (None or empty else): positive: the label map. max_lost: asked for, of what
    all gates lose together. lost: over units, the mean share of their positives that are lost. unit: what is counted,
    "sample" (with its varied copies) or "source". negatives_stopped, stopped: part of the negatives, and of each of
    their labels, that is stopped. promise and delta are about all gates; in `layers` lost and stopped are of each one.
    """

    threshold: float
    how: str
    n: int
    sources: int
    share: float
    mean_difference: float
    light_share: float | None = None
    max_difference: float | None = None
    overlap: int | None = None
    notes: tuple[str, ...] = ()
    max_metric: float | None = None
    guarantee: Guarantee | None = None
    epsilon: float | None = None
    delta: float | None = None
    units: int | None = None
    bound: float | None = None
    promise: str | None = None
    risk: float | None = None
    kind: str = "difference"
    layers: tuple[Calibration, ...] = ()
    segments: int = 1
    positive: str | None = None
    max_lost: float | None = None
    lost: float | None = None
    unit: Unit | None = None
    negatives_stopped: float | None = None
    stopped: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return plain(asdict(self))
