"""Thresholds: one pass over data that training has not seen, then where to draw the line.

A sample goes light if and only if its score is under the threshold (DSL, arXiv 2404.04405, section 2.2), so a higher
threshold sends more samples down the light path. Both rules here are point estimates from the samples given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Samples, expected_shape, open_data, show_progress
from .errors import DataError, OptionError, VerifyError
from .losses import comparable, difference, sample_scale
from .switch import DSLayer, Paths, Route, dsl_layers, route
from .train import History

FEWEST = 20  # samples: with fewer, one sample moves the share by more than 5 points
MARGIN = 2.0**-16  # relative: how far above the largest score a threshold lies that sends all samples light

Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Observations:
    """What one pass over the data showed; arrays with one entry per sample, in the data's order.

    score: the switch's prediction. difference: the relative difference of light and full, which it predicts.
    loudness: dB of the sample's root mean square, 0 dB at 1.0.
    labels, sources: what kind of sample it is, and which recording it was cut from.
    taken, mixed: of a really routed run: which samples went light, and their difference from the full output; empty
    without one.
    scale: mean absolute full output, (outputs,), that the differences are relative to. metric: the user's, per sample,
    for "full", "light" and "mixed".
    """

    score: np.ndarray
    difference: np.ndarray
    loudness: np.ndarray
    labels: tuple[str, ...]
    sources: tuple[str, ...]
    scale: Tensor
    taken: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    mixed: np.ndarray = field(default_factory=lambda: np.zeros(0))
    metric: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Calibration:
    """A threshold and how it came about.

    threshold: in units of relative difference, as stored in the layer. how: a sentence.
    n, sources: samples used, and the recordings they were cut from. share: part of them that goes light, 0 to 1.
    mean_difference: over all samples, those on the full path counting 0.
    light_share, max_difference: what was asked for, or None. overlap: samples that training has seen too, None where
    nobody said what it was trained on. notes: what to beware of.
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

    def to_json(self) -> dict[str, Any]:
        return plain(asdict(self))


def calibrate(
    net: nn.Module,
    data: Any,
    light_share: float | None = None,
    max_difference: float | None = None,
    *,
    training: History | str | Path | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Calibration:
    """Set the threshold of a network's DSLayer from data that neither training nor the reported test uses.

    data: all that `open_data` takes: Samples, a folder of audio, a tensor (n, ...), a Dataset ... Give exactly one of
    light_share: part of the samples that shall go light, 0 to 1; samples of equal score stay together, so the nearest
    share that can be had is taken, the smaller of two equally near.
    max_difference: the largest threshold at which the mean relative difference over all samples, those on the full
    path counting 0, stays at or under this bound. A point estimate, not a guarantee.

    training: what finetune returned, or its run folder; samples that it has seen are counted, and a note warns of them.
    A layer whose scale fine-tuning has not measured gets the scale of this data.
    Between two neighbouring scores every threshold routes alike; the middle is taken, so that rounding tips no sample.
    Raises OptionError for a value out of range or a network without exactly one DSLayer, DataError for fewer than 20
    samples, for scores and differences that are not numbers, or for a folder that is no run.
    """
    if (light_share is None) == (max_difference is None):
        given = "neither" if light_share is None else "both"
        raise OptionError(f"Calibration takes exactly one of light_share and max_difference; got {given}.")
    if light_share is not None and not 0 <= light_share <= 1:
        raise OptionError(f"light_share is the part of the samples that goes light, 0 to 1; got {light_share:g}.")
    if max_difference is not None and not 0 < max_difference < math.inf:
        raise OptionError(
            f"max_difference is a mean relative difference above 0, such as 0.05; got {max_difference:g}."
        )
    layer = only_layer(net)
    samples = open_data(data, expected_shape(net), progress=progress)
    count = len(samples)
    if count < FEWEST:
        raise DataError(f"A threshold needs at least {FEWEST} samples to calibrate on; got {count}.")
    overlap = None if training is None else _overlap(samples, training)
    seen = collect(net, samples, batch_size=batch_size, progress=progress)
    ordered, counts = levels(seen.score)
    risk = risk_by_count(seen.score, seen.difference)
    if light_share is not None:
        k = nearest_count(counts, light_share * count)
    else:
        k = largest_count(counts, risk, float(max_difference or 0))
    tau = threshold_after(ordered, k, layer.threshold.dtype)
    layer.threshold.fill_(tau)
    layer.scale.copy_(seen.scale)
    share, mean, sources = k / count, float(risk[k]), len(set(seen.sources))
    if light_share is not None:
        how = (
            f"share: {k} of {count} samples from {sources} sources score under it "
            f"({100 * share:.1f} %, asked for {100 * light_share:.1f} %)"
        )
    else:
        how = (
            f"bounded mean difference: the largest at which the mean over all {count} samples from {sources} sources "
            f"({mean:.4g}) stays within {max_difference:g}, a point estimate without a guarantee for other data"
        )
    notes = []
    if overlap:
        notes.append(f"{overlap} of {count} samples were used in training too, so the switch looks better than it is")
    if sources < FEWEST:
        notes.append(f"the {count} samples come from {sources} sources only; samples of one source are alike")
    return Calibration(tau, how, count, sources, share, mean, light_share, max_difference, overlap, tuple(notes))


def _overlap(samples: Samples, training: History | str | Path) -> int:
    """How many of the samples training has seen, by their fingerprints."""
    if isinstance(training, History):
        known = training.fingerprints
    else:
        path = Path(training) / "data.json"
        try:
            known = frozenset(mark for part in json.loads(path.read_text()).values() for mark in part)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} does not tell what was trained on ({error}); name the folder of a run.") from error
    return sum(mark in known for mark in samples.fingerprints())


def levels(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted scores, and every number of samples that a threshold can send light (equal scores go together)."""
    ordered = np.sort(score)
    rises = np.flatnonzero(np.diff(ordered) > 0) + 1
    return ordered, np.concatenate([[0], rises, [len(ordered)]])


def nearest_count(counts: np.ndarray, wanted: float) -> int:
    """The entry of `counts` nearest to `wanted`; of two equally near, the smaller (less goes light)."""
    return int(counts[np.argmin(np.abs(counts - wanted))])


def risk_by_count(score: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Entry k: the mean difference over all n samples when the k of lowest score go light; (n + 1,).

    It never falls as k grows, because no difference is negative.
    """
    by_score = difference[np.argsort(score, kind="stable")]
    return np.concatenate([[0.0], np.cumsum(by_score)]) / len(score)


def largest_count(counts: np.ndarray, risk: np.ndarray, bound: float) -> int:
    """The largest entry of `counts` whose risk is at or under `bound`; no sample light is always within it."""
    return int(counts[risk[counts] <= bound][-1])


def threshold_after(ordered: np.ndarray, k: int, dtype: torch.dtype = torch.float32) -> float:
    """A threshold, exact in `dtype`, above the first k of the sorted scores and not above the next one."""

    def stored(value: float) -> float:
        return torch.tensor(value, dtype=dtype).item()

    if k == 0:
        return stored(min(0.0, float(ordered[0])))
    below = float(ordered[k - 1])
    if k < len(ordered):
        above = float(ordered[k])
        middle = stored((below + above) / 2)
        return middle if below < middle <= above else stored(above)
    least = torch.tensor(below, dtype=dtype).nextafter(torch.tensor(math.inf, dtype=dtype)).item()
    return max(least, stored(below + abs(below) * MARGIN))


def collect(
    net: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 32,
    routed: bool = False,
    metric: Metric | None = None,
    progress: bool | None = None,
) -> Observations:
    """Run both paths of a network's one DSLayer over the samples; note score, difference and loudness of each sample.

    routed: run every batch a second time with route "mixed" and note what really came out.
    metric: called with (network output, model input) of a batch, returns one number per sample.
    progress: a bar on stderr; None shows one where stderr is a terminal.
    Raises OptionError without exactly one DSLayer, DataError for unusable samples, scores or differences.
    """
    layer = only_layer(net)
    if not layer.routable:  # its samples can only be routed one by one
        batch_size = 1
    device = layer.threshold.device
    batches = [range(at, min(at + batch_size, len(samples))) for at in range(0, len(samples), batch_size)]
    columns: list[dict[str, np.ndarray]] = []
    with _evaluating(net), torch.no_grad(), show_progress(progress) as bars:
        bar = bars.add_task("measuring both paths", total=len(samples))
        scale = _scale(net, layer, (samples.batch(batch).to(device) for batch in batches))
        for batch in batches:
            columns.append(_look(net, layer, scale, samples.batch(batch).to(device), routed, metric))
            bars.advance(bar, len(batch))
    table = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    for name in ("score", "difference"):
        bad = np.count_nonzero(~np.isfinite(table[name]))
        if bad:
            raise DataError(
                f"The {name} of {bad} of {len(samples)} samples is not a finite number; "
                "look for NaN in the data and in the network's weights."
            )
    return Observations(
        table["score"],
        table["difference"],
        samples.rms_db.double().numpy(),
        samples.labels,
        samples.sources,
        scale,
        taken=table.get("taken", np.zeros(0)).astype(bool),
        mixed=table.get("mixed", np.zeros(0)),
        metric={name.removeprefix("metric "): column for name, column in table.items() if name.startswith("metric ")},
    )


def _scale(net: nn.Module, layer: DSLayer, batches: Iterator[Tensor]) -> Tensor:
    """The layer's stored scale, or where an output of it was never measured, the one of this data; (outputs,)."""
    rows: list[Tensor] = []
    for inputs in batches:
        _, full = _run(net, layer, "full", inputs)
        known = zip(full, layer.outputs, layer.scale, strict=True)
        if not any(scale == 0 and comparable(value, layout) for value, layout, scale in known):
            return layer.scale.clone()
        rows.append(sample_scale(full, layer.outputs))
    return torch.cat(rows).mean(0).to(layer.scale)


def _look(
    net: nn.Module, layer: DSLayer, scale: Tensor, inputs: Tensor, routed: bool, metric: Metric | None
) -> dict[str, np.ndarray]:
    """The columns of one batch."""
    size = len(inputs)
    columns: dict[str, np.ndarray] = {}

    def apart(region: tuple[Any, ...], full: tuple[Any, ...]) -> np.ndarray:
        return _column(difference(region, full, scale, layer.outputs), size, "The Dynamic Switch Layer")

    def judge(name: str, output: Any) -> None:
        if metric is not None:
            columns[f"metric {name}"] = _column(metric(output, inputs), size, "The metric")

    output, full = _run(net, layer, "both", inputs)
    paths = _paths(layer)
    columns["score"] = _column(paths.score, size, "The Dynamic Switch Layer")
    columns["difference"] = apart(paths.light or (), full)
    judge("full", output)
    if routed or metric is not None:
        output, region = _run(net, layer, "mixed", inputs)
        columns["taken"] = _column(_paths(layer).light_taken, size, "The Dynamic Switch Layer")
        columns["mixed"] = apart(region, full)
        judge("mixed", output)
    if metric is not None:
        judge("light", _run(net, layer, "light", inputs)[0])
    return columns


def _run(net: nn.Module, layer: DSLayer, mode: Route, inputs: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The network's output on one route, and what left the DSLayer.

    Raises VerifyError where the forward does not reach the layer.
    """
    left: list[tuple[Any, ...]] = []

    def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        # What follows the layer may work in place on what left it.
        left.append(tuple(value.clone() if isinstance(value, Tensor) else value for value in values))

    handle = layer.register_forward_hook(keep)
    try:
        with route(net, mode):
            output = net(inputs)
    finally:
        handle.remove()
    if not left:
        raise VerifyError("The network ran without reaching its Dynamic Switch Layer, so nothing can be measured.")
    return output, left[-1]


def _paths(layer: DSLayer) -> Paths:
    if layer.paths is None:
        raise VerifyError("The Dynamic Switch Layer kept nothing of its last forward, so nothing can be measured.")
    return layer.paths


def only_layer(net: nn.Module) -> DSLayer:
    """The one DSLayer of a network. Raises OptionError for none or several."""
    layers = dsl_layers(net)
    if len(layers) == 1:
        return layers[0]
    if not layers:
        raise OptionError("This network holds no Dynamic Switch Layer; put one in with dslify.insert(net, at=...).")
    raise OptionError(f"This network holds {len(layers)} Dynamic Switch Layers; only one can be measured at a time.")


def plain(value: Any) -> Any:
    """A result as JSON can hold it: numpy numbers become Python's, and what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _column(value: Any, size: int, what: str) -> np.ndarray:
    """One number per sample as float64, (size,)."""
    array = torch.as_tensor(value).detach().double().cpu().numpy()
    if array.shape != (size,):
        raise OptionError(
            f"{what} must give one number per sample, shape ({size},) for {size} samples; got shape {array.shape}."
        )
    return array


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in net.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
