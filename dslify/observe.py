"""One pass of both paths over data: what the switch said, how far the answers really were apart, how loud it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .capture import evaluating
from .errors import DataError, OptionError, VerifyError
from .losses import comparable, difference, sample_scale
from .samples import Samples, show_progress
from .switch import DSLayer, Paths, Route, required_layers, route

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
    with evaluating(net), torch.no_grad(), show_progress(progress) as bars:
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
    layers = required_layers(net)
    if len(layers) == 1:
        return layers[0]
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
