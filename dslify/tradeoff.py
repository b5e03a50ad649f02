"""What each sample costs on a light path, and the whole trade-off: what every threshold would send light, and risk."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .cascade import parents, ways
from .data import open_data
from .errors import OptionError, StoreError
from .files import written_whole
from .guarantee import expected_bound, profile, upper_bound
from .observe import Metric, Observations, collect_all, collect_routed, plain
from .probe import Judge
from .samples import Samples
from .schedule import device_of
from .segmented import segments_in
from .switch import required_layers
from .thresholds import threshold_after

CONFIDENCE = 0.95  # unless another is asked for
BOUND = 1.0  # a relative difference of 1 is as much as the full output itself
CURVES = (".csv", ".json")  # what a curve is written as, by suffix
ROWS = 200  # of a curve, at most


@dataclass(frozen=True)
class TradeOff:
    """One threshold of one layer, on the samples that reach the layer.

    layer: from 1, outermost first. share: of these samples, that goes light. mean: over sources, of each one's mean
    loss over its samples, those on the full path counting 0. routed: over the sources of which anything goes light, of
    each one's mean loss over what does. A loss is the relative difference, or the metric's excess, cut off at a bound.
    mean_bound: what conformal risk control promises for `mean` at this threshold. routed_bound: what learn-then-test
    promises for `routed`, each threshold by itself; the bound where nothing less can be said.
    """

    layer: int
    threshold: float
    share: float
    mean: float
    routed: float
    mean_bound: float
    routed_bound: float


@dataclass(frozen=True, eq=False)
class Risks:
    """Of every layer: what was seen, and what each sample costs if it goes light there; the samples' sources, (n,).
    Segments that are routed one by one are samples here.

    loss: one (n,) a layer, 0 or more. above: see cascade.parents.
    """

    seen: tuple[Observations, ...]
    loss: tuple[np.ndarray, ...]
    above: tuple[int | None, ...]
    unit: np.ndarray

    def reaching(self, at: int, thresholds: Sequence[float]) -> np.ndarray:
        """The samples that come to a layer under the thresholds of the layers before it, (n,) bool."""
        parent = self.above[at]
        if parent is None:
            return np.ones(len(self.unit), bool)
        return self.reaching(parent, thresholds) & ~(self.seen[parent].score < thresholds[parent])


def measured(net: nn.Module, samples: Samples, metric: Metric | None, batch_size: int, progress: bool | None) -> Risks:
    """One pass over the data. With a metric (smaller is better) a loss is how much larger it is with this layer light
    and every other full than with all full, at least 0; without one it is the relative difference where the layer ends.

    Raises OptionError without a DSLayer, for a metric of another shape or where it would judge several decisions at
    once, DataError for what is not a number.
    """
    above = parents(required_layers(net))
    if metric is not None and (count := segments_in(net, samples.batch([0]).to(device_of(net)))) > 1:
        raise OptionError(
            f"A metric judges whole samples, and this network routes {count} segments of each one by one, so what "
            "one of them costs cannot be told; bound the difference instead (max_difference), or give samples of one "
            "segment."
        )
    if metric is None:
        seen = collect_all(net, samples, batch_size=batch_size, progress=progress)
        loss = tuple(one.difference for one in seen)
    else:
        judges: dict[str, Judge] = {"metric": lambda output, inputs, _: metric(output, inputs)}
        seen, outcomes = collect_routed(net, samples, judges, batch_size=batch_size, progress=progress)
        judged = outcomes.judged["metric"]
        if not np.isfinite(judged).all():
            raise OptionError("The metric gives values that are not finite numbers; one for each sample is expected.")
        alone = {way.index(True): at for at, way in enumerate(ways(above)) if way.count(True) == 1}
        loss = tuple(np.maximum(0.0, judged[:, alone[at]] - judged[:, 0]) for at in range(len(seen)))
    return Risks(seen, loss, above, np.unique(np.array(seen[0].sources), return_inverse=True)[1])


def tradeoff(
    net: nn.Module,
    data: Any,
    *,
    confidence: float = CONFIDENCE,
    bound: float = BOUND,
    metric: Metric | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> tuple[TradeOff, ...]:
    """What every threshold would send light and what that would cost; nothing is set.

    At most 200 thresholds a layer, from none to all, at even shares. A layer inside another one's full path is looked
    at on the samples that the thresholds as they are let through to it. data, metric, bound: as in `calibrate`.
    Raises OptionError for a value out of range or a network without a DSLayer, DataError for no usable data.
    """
    layers = required_layers(net)
    if not 0 < confidence < 1 or not 0 < bound < np.inf:
        raise OptionError(f"confidence lies between 0 and 1 and bound above 0; got {confidence:g} and {bound:g}.")
    samples = open_data(data, net, progress=progress)
    risks = measured(net, samples, metric, batch_size, progress)
    return tabulated(risks, [layer.threshold.item() for layer in layers], 1 - confidence, bound)


def tabulated(risks: Risks, thresholds: Sequence[float], delta: float, bound: float) -> tuple[TradeOff, ...]:
    """The rows of every layer under these thresholds; a layer that nothing reaches has none."""
    rows: list[TradeOff] = []
    for number, (seen, loss) in enumerate(zip(risks.seen, risks.loss, strict=True), 1):
        reached = risks.reaching(number - 1, thresholds)
        if not reached.any():
            continue
        score = seen.score[reached]
        found = profile(np.minimum(loss[reached] / bound, 1.0), score, risks.unit[reached])
        at, ordered = np.unique(np.searchsorted(found.light, np.linspace(0, len(score), ROWS))), np.sort(score)
        risk = (found.mean[at], found.routed[at], expected_bound(found, 1.0)[at], upper_bound(found, at, delta))
        for k, *parts in zip(found.light[at].tolist(), *risk, strict=True):
            mean, routed, mean_bound, routed_bound = (bound * min(float(part), 1.0) for part in parts)
            tau = threshold_after(ordered, k)
            rows.append(TradeOff(number, tau, k / len(score), mean, routed, mean_bound, routed_bound))
    return tuple(rows)


def curve_path(path: str | Path, force: bool = True) -> Path:
    """`path`, if a curve can be written there: told before the work and not after it. Raises OptionError."""
    path = Path(path)
    if path.suffix.lower() not in CURVES:
        raise OptionError(f"curve {path}: the name has to end in {' or '.join(CURVES)}.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptionError(f"curve {path}: nothing can be written there; name a file in a folder that is there.")
    if path.exists() and not force:
        raise OptionError(f"curve {path}: it exists already; give another name, or --force to overwrite it.")
    return path


def write_curve(rows: Sequence[Any], path: Path) -> None:
    """Rows of one dataclass as .csv (a header and a line a row) or .json (a list of objects), whole or not at all.
    Raises StoreError."""
    names = [field.name for field in fields(rows[0])]
    try:
        with written_whole(path) as temporary, temporary.open("w", newline="") as file:
            if path.suffix.lower() == ".json":
                json.dump(plain([asdict(row) for row in rows]), file, indent=1)
            else:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(map(asdict, rows))
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}); make room or name another file.") from error
