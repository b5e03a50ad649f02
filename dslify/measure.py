"""Is the routing worth it: full, light, mixed, random, oracle and loudness on data that nothing was tuned on.

A mixed figure alone says little: where light equals full, any routing passes. So the same share is also routed at
random, by the true difference (the oracle) and by loudness (the trivial switch for sound); with several layers, each
layer's share of what reaches it. With one layer the oracle is a bound from below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from .accuracy import accuracy_of
from .cost import cost
from .data import open_data
from .errors import OptionError, VerifyError
from .kinds import strange_kinds
from .notes import noted
from .observe import Metric, Observations, Outcomes, collect_routed, plain
from .omega import Omega, omega
from .probe import Judge
from .resampling import ROUNDING, Interval, Resample
from .rivals import Rivals, Row
from .samples import Samples, expected_classes
from .sparsity import mask_words
from .switch import DSLayer, required_layers
from .uses import Gating, Kind, Use, gating, use

EQUAL = 0.01  # mean relative difference of light and full under which any routing passes
FEW_SOURCES = 10  # below, an interval over sources is a rough guess
COMPOSED = 1e-3  # relative: how far a routed batch may be from its samples put together one by one
GROUPS = ("label", "source", "all")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Intervals: 95 %, bootstrap over sources.

    n: samples, or where the layer routes segments these, `segments` of each sample.
    rows: full, light, mixed, random, oracle, loudness. layers: what each layer's switch does, outermost first.
    saved: part of random routing's difference that the switch avoids, 1 - mixed / random; saved_loudness: the same
    against loudness. reach: how far mixed gets from random towards the oracle, 0 to 1. composed: the mixed difference
    put together from the outcomes of the single paths, to hold against the measured one. void: the comparison says
    nothing, `verdict` says why. notes: what to beware of. gating: of all gates together, where it was said what is
    positive: recall is the part of the positives that none of them stops.
    """

    n: int
    sources: int
    rows: tuple[Row, ...]
    layers: tuple[Use, ...]
    saved: float
    saved_interval: Interval
    saved_loudness: float
    saved_loudness_interval: Interval
    reach: float
    composed: float
    void: bool
    verdict: str
    notes: tuple[str, ...]
    seed: int
    gating: Gating | None = None
    segments: int = 1

    @property
    def threshold(self) -> float:
        """Of the first layer."""
        return self.layers[0].threshold

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What the first layer, which every sample reaches, makes of each kind: "all", then every label."""
        return self.layers[0].kinds

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """With `threshold` and `kinds` of the first layer beside `layers`."""
        kinds = [asdict(kind) for kind in self.kinds]
        return plain({"threshold": self.threshold, **asdict(self), "kinds": kinds})


def evaluate(
    net: nn.Module,
    data: Any,
    metric: Metric | None = None,
    *,
    accuracy: bool = False,
    positive: Any = None,
    by: str = "label",
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Run a network's DSLayers at their thresholds over test data, and hold the outcome against other ways to route.

    data: all that `open_data` takes; its labels and sources are used. metric: (network output, model input) of a batch
    -> one number per sample, larger or smaller is better as you like. accuracy: the network's first output is logits,
    (batch, classes), and the labels are class indices or names sorted like the training set's. positive: what a gate
    must not stop, all that `omega` takes: "1-9", "yes,no", a set, a callable. by: what the kinds of samples are:
    "label", "source", or "all" for none. seed: of the bootstrap.
    Segments that are routed one by one are samples of their own, with label and source of the one they are part of;
    metric and accuracy stay those of whole samples, for full, light and mixed.
    Raises OptionError for a network without a DSLayer or with too many (cascade.ways), a metric of another shape, an
    output that is no logits, or `positive` without a gate; DataError for no usable data, labels that do not fit or
    values that are not numbers, or samples that are no whole segments.
    """
    layers = required_layers(net)
    if by not in GROUPS:
        raise OptionError(f"by is one of {', '.join(GROUPS)}; got {by!r}.")
    samples = open_data(data, net, progress=progress)
    chosen = None if positive is None else _positive(net, positive, samples)
    judges: dict[str, Judge] = {} if metric is None else {"metric": lambda output, given, _: metric(output, given)}
    if accuracy:
        judges["accuracy"] = accuracy_of(samples, expected_classes(net))
    labels = {"label": samples.labels, "source": samples.sources, "all": ("",) * len(samples)}[by]
    seen, outcomes = collect_routed(
        net, replace(samples, labels=labels), judges, batch_size=batch_size, progress=progress
    )
    macs = {row.name: float(row.macs) for row in cost(net)} if noted(net, "example") else {}
    switches = [(layer.switch.kind, layer.threshold.item()) for layer in layers]
    wanted = None if chosen is None else chosen.repeat(seen[0].segments)
    found = compare(seen, outcomes, switches, macs, wanted, seed=seed)
    masks = [replace(use, mask=mask_words(layer)) for use, layer in zip(found.layers, layers, strict=True)]
    found = replace(found, layers=tuple(masks))
    notes = (*found.notes, *strange_kinds(net, samples, positive), *(_warm_up(layers) if found.segments > 1 else ()))
    return replace(found, notes=notes)


def _positive(net: nn.Module, words: Any, samples: Samples) -> np.ndarray:
    """Which samples are positive, (n,) bool."""
    if all(layer.switch.kind != "positive" for layer in required_layers(net)):
        raise OptionError(
            "positive= says what a gate must not stop, and no layer of this network is a gate; put one in with "
            'dslify.insert(net, at=..., mode="gc").'
        )
    known = words if isinstance(words, Omega) else omega(words, samples.labels)
    return known.positive(samples.labels)


def judge(seen: Observations, threshold: float, macs: dict[str, float] | None = None, *, seed: int = 0) -> Evaluation:
    """As `compare`, for the one layer of a network, whose light and full outcomes are in its observations."""
    if not len(seen.taken) == len(seen.mixed) == len(seen):
        raise VerifyError("These observations are not of a routed run; collect them with routed=True.")
    seen = replace(seen, reached=np.ones(len(seen), bool))
    judged = {"metric": np.stack([seen.metric["full"], seen.metric["light"]], 1)} if seen.metric else {}
    measured = {"metric": seen.metric["mixed"]} if seen.metric else {}
    apart = np.stack([np.zeros(len(seen)), seen.difference], 1)
    outcomes = Outcomes((None,), apart, judged, seen.mixed, measured)
    return compare((seen,), outcomes, [("difference", threshold)], macs, seed=seed)


def compare(
    seen: Sequence[Observations],
    outcomes: Outcomes,
    switches: Sequence[tuple[str, float]],
    macs: dict[str, float] | None = None,
    positive: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> Evaluation:
    """The evaluation of one routed pass (observe.collect_routed); pure arithmetic.

    seen: one a layer, outermost first. switches: (kind, threshold) of each. macs: per sample, by the names that cost()
    gives. positive: which samples a gate must not stop, (n,) bool.
    """
    n = len(seen[0])
    names, source = np.unique(np.array(seen[0].sources), return_inverse=True)
    draw = Resample(source, len(names), seed)
    rivals = Rivals(seen, outcomes, draw)
    rows = rivals.rows(macs or {})
    known = {row.name: row.difference for row in rows}
    uses = [
        use(at, kind, threshold, layer, draw, positive)
        for at, (layer, (kind, threshold)) in enumerate(zip(seen, switches, strict=True), 1)
    ]
    mixed, random, oracle = (known[name] for name in ("mixed", "random", "oracle"))
    composed = float((rivals.chances["mixed"] * outcomes.difference).sum(1).mean())
    replicates = draw.means(outcomes.mixed)
    saved, saved_interval = _saved(draw, mixed, random, replicates, rivals.replicates("random"))
    saved_loudness, saved_loudness_interval = _saved(
        draw, mixed, known["loudness"], replicates, rivals.replicates("loudness")
    )
    void, verdict = _verdict(rivals, known["light"], saved, saved_interval)
    gates = [layer.taken for layer, (kind, _) in zip(seen, switches, strict=True) if kind == "positive"]
    return Evaluation(
        n=n,
        sources=len(names),
        rows=rows,
        layers=tuple(uses),
        saved=saved,
        saved_interval=saved_interval,
        saved_loudness=saved_loudness,
        saved_loudness_interval=saved_loudness_interval,
        reach=(random - mixed) / (random - oracle) if random - oracle > ROUNDING else math.nan,
        composed=composed,
        void=void,
        verdict=verdict,
        notes=tuple(_notes(outcomes, draw, mixed, composed, bool(gates) and positive is None, seen[0].segments)),
        seed=seed,
        gating=None if positive is None else gating(np.any(gates, axis=0), np.ones(n, bool), positive, draw),
        segments=seen[0].segments,
    )


def _saved(
    draw: Resample, mixed: float, other: float, mixed_replicates: np.ndarray, other_replicates: np.ndarray
) -> tuple[float, Interval]:
    """1 - mixed / other and its interval; NaN where the other way to route makes no difference."""
    if other <= ROUNDING:
        return math.nan, None
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - mixed / other, draw.interval(1 - mixed_replicates / other_replicates)


def _verdict(rivals: Rivals, light: float, saved: float, interval: Interval) -> tuple[bool, str]:
    if light < EQUAL:
        return True, f"void: light differs from full by {100 * light:.2f} % on average, so any routing would do as well"
    taken = [way for way, chance in zip(rivals.ways, rivals.chances["mixed"].sum(0), strict=True) if chance]
    if len(taken) == 1:
        where = "no sample went light" if not any(taken[0]) else "every sample went light"
        return True, f"void: {where}, so nothing was decided"
    if interval is None:
        return False, f"mixed avoids {100 * saved:.0f} % of random routing's difference; one source gives no interval"
    low, high = interval
    avoided = f"mixed avoids {100 * saved:.0f} % ({100 * low:.0f} to {100 * high:.0f} %) of random routing's difference"
    if low <= 0:
        return False, f"random routing is as good within the interval: {avoided}"
    return False, f"{avoided} at the same share{'s' * (len(rivals.seen) > 1)}"


def _notes(
    outcomes: Outcomes, draw: Resample, mixed: float, composed: float, unjudged: bool, segments: int
) -> Iterator[str]:
    if abs(composed - mixed) > COMPOSED * composed + ROUNDING:
        yield f"routed batches differ from full by {mixed:.4g}, the same samples put together by {composed:.4g}"
    if draw.sources < FEW_SOURCES:
        yield f"intervals come from {draw.sources} sources only and are rough"
    for name, judged in outcomes.judged.items():
        apart = draw.interval(draw.means(judged[:, -1] - judged[:, 0]))
        if apart is None or apart[0] <= 0 <= apart[1]:
            yield f"the {name} does not tell light from full within the interval, so its mixed value says nothing"
    if segments > 1 and outcomes.judged:
        names = " and ".join(outcomes.judged)
        yield f"{names}: of whole samples; other ways to route their segments would each take a run of their own"
    if unjudged:
        yield "a gate is judged by what it stops; say with positive= which labels it must let through"


def _warm_up(layers: Sequence[DSLayer]) -> Iterator[str]:
    for layer in layers:
        if layer.segments is not None and (again := layer.segments.before + layer.segments.after):
            part = 100 * again / layer.segments.frames
            yield (
                f"MACs are without the warm-up of a path that takes over: {again} entries at the cut, {part:.0f} % of "
                "a segment"
            )
