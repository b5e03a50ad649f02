"""Thresholds: one pass over data that training has not seen, then where to draw the line.

A sample goes light if and only if its score is under the threshold (DSL, arXiv 2404.04405, section 2.2), so a higher
threshold sends more samples down the light path. A wanted share and a bounded mean are point estimates from the samples
given; a guarantee holds for new data (see guarantee.py). Gates can be set by what they lose instead (see lost.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx, nn

from .aim import Aim, Guarantee, only_target
from .budget import Budget, Unit
from .calibration import Calibration as Calibration
from .data import open_data
from .errors import DataError, OptionError
from .gate_thresholds import LostPoint, by_lost
from .gate_thresholds import curve as lost_curve
from .kinds import strange_kinds
from .observe import Metric
from .runs import History
from .samples import Samples, raw_bytes
from .schedule import device_of
from .segmented import counted, segments_in
from .switch import DSLayer, required_layers
from .thresholds import risk_by_count, threshold_after
from .tradeoff import BOUND, CONFIDENCE, Risks, TradeOff, curve_path, measured, tabulated, write_curve

FEWEST = 20  # samples: with fewer, one sample moves the share by more than 5 points

Training = History | str | Path


def calibrate(
    net: nn.Module,
    data: Any,
    light_share: float | None = None,
    max_difference: float | None = None,
    *,
    guarantee: Guarantee | None = None,
    confidence: float | None = None,
    bound: float | None = None,
    metric: Metric | None = None,
    max_metric: float | None = None,
    positive: Any = None,
    max_lost: float | None = None,
    units: Unit | None = None,
    gate_weights: Sequence[float] | None = None,
    curve: str | Path | None = None,
    training: Training | Sequence[Training] | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Calibration:
    """Set the thresholds of a network's DSLayers from data that neither training nor the reported test uses.

    data: all that `open_data` takes: Samples, a folder of audio, a tensor (n, ...), a Dataset ... Give exactly one of
    light_share: part of the samples that shall go light, 0 to 1; samples of equal score stay together, so the nearest
    share that can be had is taken, the smaller of two equally near.
    max_difference: the largest threshold at which the mean relative difference over all samples, those on the full
    path counting 0, stays at or under this bound. A point estimate, unless a guarantee is asked for.
    max_metric: the same for a metric of yours, (network output, model input) of a batch -> one error per sample,
    smaller is better: bounded is by how much it is larger on the light path than on the full one, at least 0.

    guarantee: "mean": for new data the mean over all samples is within the bound on average (conformal risk control);
    "routed": with this confidence (0.95) the mean over the samples that go light is (learn-then-test). confidence alone
    means "routed". Both count a loss above `bound` (1) as the bound, and every source once, however many samples were
    cut from it: sources are what has to be like the sources to come.
    max_lost: for gates: the highest thresholds at which at most this share of the positives is lost, by all gates
    together. positive: the labels that these are, as finetune takes them. Lost is a positive that a gate stops if that
    changes the network's decision (the largest of its logits; without logits, every one that is stopped). With a
    confidence the bound holds for new data (risk-controlling prediction sets), else for this data alone. units: what is
    like the positives to come: "sample" (its varied copies count as parts of it; the default) or "source".
    gate_weights: outermost first; with equal ones all gates get one threshold, and a gate of twice the weight stops at
    twice the odds of a positive.
    Of several layers the outermost comes first, and each is set on the samples that reach it: a share holds for these,
    and a bound and 1 - confidence are split evenly over the layers. With a guarantee each layer gets its own part of
    the sources, because thresholds before it, chosen from the same samples, would decide which of them it sees.

    curve: a .csv or .json file for what every threshold would do (see `tradeoff`), replaced if it is there.
    training: what finetune returned, or its run folder, or several; samples that it has seen are counted, and a note
    warns of them. A layer whose scale fine-tuning has not measured gets the scale of this data.
    A layer that routes segments is calibrated on these, so a share is one of segments; whole segments are needed. Their
    recordings stay what is exchangeable with those to come.
    Between two neighbouring scores every threshold routes alike; the middle is taken, so that rounding tips no sample.
    What was found is also kept in the network, and by dslify.save; `recorded` reads it.
    Raises OptionError for a value out of range or a network without a DSLayer, or with other layers than gates for
    max_lost; DataError for fewer than 20 samples at a layer, for fewer sources or positives than a guarantee needs, for
    samples that are no whole segments, for scores and differences that are not numbers, or for a folder that is no run.
    The thresholds are then as they were.
    """
    asked: Aim | Budget
    rows: Sequence[LostPoint | TradeOff]
    if only_target(light_share, max_difference, max_metric, max_lost) == "max_lost":
        _left_out("max_lost counts lost positives", guarantee=guarantee, bound=bound, metric=metric)
        asked = Budget.of(max_lost or 0.0, positive, confidence, units or "sample", gate_weights)
    else:
        _left_out("without max_lost nothing is lost", positive=positive, units=units, gate_weights=gate_weights)
        asked = Aim.of(light_share, max_difference, max_metric, guarantee, confidence, bound, metric is not None)
    layers = required_layers(net)
    file = None if curve is None else curve_path(curve)
    samples = open_data(data, net, progress=progress)
    overlap = None if training is None else _overlap(samples, training)
    delta = 1 - (CONFIDENCE if confidence is None else confidence)
    if isinstance(asked, Budget):
        result, lost = by_lost(net, samples, asked, batch_size, progress)
        scales, rows = lost.scales, () if file is None else lost_curve(lost, delta)
    else:
        result, risks = _by_score(net, layers, samples, asked, metric, batch_size, progress)
        taus, bound = [layer.threshold for layer in result.layers or (result,)], asked.bound or BOUND
        scales = tuple(one.scale for one in risks.seen)
        rows = () if file is None else tabulated(risks, taus, delta, bound)
    beware = strange_kinds(net, samples, positive)
    if overlap:
        seen = f"{overlap} of {len(samples)} samples were used in training too, so the switch looks better than it is"
        beware = (seen, *beware)
    first = tuple(replace(layer, notes=(*beware, *layer.notes)) for layer in result.layers[:1])
    result = replace(result, overlap=overlap, notes=(*beware, *result.notes), layers=(*first, *result.layers[1:]))
    if file is not None:
        write_curve(rows, file)
    for layer, record, scale in zip(layers, result.layers or (result,), scales, strict=True):
        layer.threshold.fill_(record.threshold)
        layer.scale.copy_(scale)
    _keep(net, result)
    return result


def _left_out(why: str, **options: Any) -> None:
    """Raises OptionError for an option that means nothing here."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise OptionError(f"{given[0]} has no meaning here, because {why}; leave it out.")


def _by_score(
    net: nn.Module,
    layers: Sequence[DSLayer],
    samples: Samples,
    asked: Aim,
    metric: Metric | None,
    batch_size: int,
    progress: bool | None,
) -> tuple[Calibration, Risks]:
    """The record of the outermost layer, with every layer's in it where there are several, and what was seen."""
    aim = asked.split(len(layers))
    count = segments_in(net, samples.batch([0]).to(device_of(net)))
    _enough(len(samples) * count, len(set(samples.sources)), aim, "", counted(count))
    risks = measured(net, samples, metric, batch_size, progress)
    records: list[Calibration] = []
    for at, layer in enumerate(layers):
        used = risks.reaching(at, [record.threshold for record in records])
        if asked.guarantee:
            used &= _first_seen(risks.unit) % len(layers) == at
        where = f" at layer {at + 1} of {len(layers)}" if len(layers) > 1 else ""
        records.append(_record(risks, at, used, layer, aim, where))
    return replace(records[0], layers=tuple(records) if len(records) > 1 else ()), risks


def _record(risks: Risks, at: int, used: np.ndarray, layer: DSLayer, aim: Aim, where: str) -> Calibration:
    """One layer's threshold, from the samples that `used` marks. where: the layer in words. Raises DataError."""
    seen, n = risks.seen[at], int(used.sum())
    units = risks.unit[used]
    sources = len(np.unique(units))
    what = counted(seen.segments)
    _enough(n, sources, aim, where, what)
    score, raw = seen.score[used], risks.loss[at][used]
    loss = aim.cut_off(raw)
    k = aim.count(score, loss, units)
    tau = threshold_after(np.sort(score), k, layer.threshold.dtype)
    risk = aim.risk(score, loss, units, k)
    notes = []
    if aim.guarantee and k == 0:
        notes.append("nothing could be promised for any sample, so none goes light; give more data, or ask for less")
    if cut := int((raw > loss).sum()):
        notes.append(f"{cut} of {n} {what} lose more than {aim.bound:g} on the light path, which counts as that much")
    if sources < FEWEST:
        notes.append(f"the {n} {what} come from {sources} sources only; {what} of one source are alike")
    return Calibration(
        tau,
        aim.how(k, n, sources, risk, what),
        n,
        sources,
        share=k / n,
        mean_difference=float(risk_by_count(seen.score[used], seen.difference[used])[k]),
        light_share=aim.light_share,
        max_difference=None if aim.judged else aim.epsilon,
        notes=tuple(notes),
        max_metric=aim.epsilon if aim.judged else None,
        guarantee=aim.guarantee,
        epsilon=aim.epsilon if aim.guarantee else None,
        delta=aim.delta,
        units=sources if aim.guarantee else None,
        bound=aim.bound,
        promise=aim.promise(sources, sources < n, what),
        risk=None if aim.epsilon is None else risk,
        kind=getattr(layer.switch, "kind", "difference"),
        segments=seen.segments,
    )


def _enough(n: int, sources: int, aim: Aim, where: str, what: str) -> None:
    """Raises DataError where n samples from so many sources are too few for any threshold, or for the guarantee."""
    if n < FEWEST:
        way = " Give more data, or let less go light before." if where else ""
        raise DataError(f"A threshold needs at least {FEWEST} {what} to calibrate on; got {n}{where}.{way}")
    if sources < aim.needs:
        once = f" ({what} of one source count once)" if sources < n else ""
        raise DataError(
            f"A guarantee of {aim.epsilon:g} takes at least {aim.needs} sources{once}; got {sources}{where}. Give more "
            "data, or ask for less."
        )


def _first_seen(unit: np.ndarray) -> np.ndarray:
    """The samples' sources numbered in the order of the data, so that every n-th source is spread over it."""
    _, first, back = np.unique(unit, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[back]


def _overlap(samples: Samples, training: Training | Sequence[Training]) -> int:
    """How many of the samples training has seen, by their fingerprints."""
    known: set[str] = set()
    for run in (training,) if isinstance(training, (History, str, Path)) else training:
        known |= run.fingerprints if isinstance(run, History) else _fingerprints(Path(run) / "data.json")
    return sum(mark in known for mark in samples.fingerprints())


def _fingerprints(path: Path) -> frozenset[str]:
    try:
        return frozenset(mark for part in json.loads(path.read_text()).values() for mark in part)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} does not tell what was trained on ({error}); name the folder of a run.") from error


def _noting(net: nn.Module) -> fx.GraphModule | None:
    """The outermost graph that notes what was done to it."""
    graphs = (module for module in net.modules() if isinstance(module, fx.GraphModule))
    return next((graph for graph in graphs if "dslify" in graph.meta), None)


def _digest(graph: nn.Module) -> str:
    """One hash of all weights, thresholds included."""
    found = hashlib.blake2b(digest_size=8)
    for name, value in sorted(graph.state_dict().items()):
        found.update(name.encode() + raw_bytes(value))
    return found.hexdigest()


def _keep(net: nn.Module, result: Calibration) -> None:
    graph = _noting(net)
    if graph is not None:
        graph.meta["dslify"]["calibration"] = {**result.to_json(), "weights": _digest(graph)}


def recorded(net: nn.Module) -> dict[str, Any] | None:
    """How the thresholds of a network were set, as Calibration.to_json gives it; None where they were not, or where a
    weight or a threshold has changed since, so that nothing that was found or promised holds any more.
    """
    graph = _noting(net)
    found = graph.meta["dslify"].get("calibration") if graph is not None else None
    if not isinstance(found, dict) or graph is None or found.get("weights") != _digest(graph):
        return None
    return {name: value for name, value in found.items() if name != "weights"}
