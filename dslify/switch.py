"""Switch, and the layer that holds it with a mask: where the network is cut, and which path an input takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import OptionError
from .layout import Layout
from .mask import Mask
from .segments import Segments, routed

Route = Literal["full", "light", "mixed", "both"]
ROUTES: tuple[Route, ...] = ("full", "light", "mixed", "both")
SwitchKind = Literal["difference", "positive"]
SWITCH_KINDS: tuple[SwitchKind, ...] = ("difference", "positive")
_ALONE = tuple(torch.tensor([light]) for light in (False, True))  # light_taken of a single sample


class Switch(nn.Module):
    """Scores every sample from moments over the free axes (mean, deviation, mean magnitude of each channel); a sample
    goes light iff score < threshold.

    A small MLP. kind "difference": predicts how far the light answer would be from the full one; softplus, so the score
    is non-negative, in the units of the relative difference (DSL, arXiv 2404.04405). kind "positive": a gate, which
    needs labels; sigmoid, the probability that the sample is positive and not to be stopped (GC, arXiv 2303.08970).
    Deviations and magnitudes enter as logarithms, because the difference spans orders of magnitude between silence and
    speech. The magnitude is what a difference, itself a mean of magnitudes, goes with most closely.

    channels: size of the channel axis of the cut. hidden: width of the MLP. Raises OptionError for another kind.
    """

    MOMENTS = 3  # of each channel
    FLOOR = 1e-5  # of a deviation or magnitude, before its logarithm
    offset: Tensor
    spread: Tensor

    def __init__(self, channels: int, hidden: int = 16, kind: SwitchKind = "difference"):
        super().__init__()
        if kind not in SWITCH_KINDS:
            raise OptionError(f"The kind of a switch is one of {', '.join(SWITCH_KINDS)}; got {kind!r}.")
        self.kind = kind
        self.hidden = nn.Linear(self.MOMENTS * channels, hidden)
        self.out = nn.Linear(hidden, 1)
        self.register_buffer("offset", torch.zeros(self.MOMENTS * channels))
        self.register_buffer("spread", torch.ones(self.MOMENTS * channels))

    def extra_repr(self) -> str:
        return self.kind

    def features(self, value: Tensor) -> Tensor:
        """(batch, entries, channels) -> (batch, 3 channels), not standardised."""
        mean = value.mean(1, keepdim=True)
        variance = (value - mean).square_().mean(1)  # on the CPU torch 2.12's own takes up to ten times as long
        deviation = (variance + self.FLOOR**2).sqrt()
        magnitude = value.abs().mean(1) + self.FLOOR
        return torch.cat([mean.squeeze(1), deviation.log(), magnitude.log()], dim=1)

    def standardise(self, features: Tensor) -> None:
        """Fix offset and spread of the features from a sample of them, (n, 3 channels)."""
        self.offset.copy_(features.mean(0))
        self.spread.copy_(features.std(0, correction=0).clamp_min(1e-3))

    def forward(self, value: Tensor) -> Tensor:
        """(batch, entries, channels) -> (batch,)"""
        return self.score(self.features(value))

    def score(self, features: Tensor) -> Tensor:
        """The predicted difference, or the probability, from the features: (batch, 3 channels) -> (batch,)"""
        normal = (features - self.offset) / self.spread
        found = self.out(functional.silu(self.hidden(normal))).squeeze(1)
        return functional.softplus(found) if self.kind == "difference" else found.sigmoid()


@dataclass(frozen=True)
class Paths:
    """What the last forward of a DSLayer saw. Outputs are tuples, one entry per value that leaves the region.

    masked: the activation after the mask. read: the one that the switch read. score: (batch,). light_taken: (batch,)
    bool, which samples went light. full, light: None for a path that did not run on the whole batch. original: the full
    path on the unmasked activation, only in training while the mask is being trained (the anchor needs it). segments:
    in each sample; score and light_taken have one entry for each of them, (batch * segments,), those of a sample one
    after the other.
    """

    masked: Tensor
    read: Tensor
    score: Tensor
    light_taken: Tensor | None = None
    full: tuple[Any, ...] | None = None
    light: tuple[Any, ...] | None = None
    original: tuple[Any, ...] | None = None
    segments: int = 1


class DSLayer(nn.Module):
    """The Dynamic Switch Layer: mask + switch + light + full + routing, one node of the network's graph.

    A call takes the activation at the cut and the crossing values and returns what the region returns: one value, or
    a tuple where several leave it. light and full: modules from (cut, *crossing) to a tuple.

    inputs, outputs: Layouts of (cut, *crossing) and of the outputs. channel_axis: of the cut.
    plan: what the surgery did (dslify.insert), or None. threshold: buffer, in units of the switch's score; 0 (never
    light) until calibrated. scale: buffer, one per output, the mean absolute full output; 0 until measured. segments:
    the pieces in which a long sequence is routed (dslify.route_every), None to route whole samples.
    unmasked: whether the switch reads the activation before the mask. It does where the mask holds thresholds: what
    those cut off tells a negative from a positive too. Factors lie in front of the switch, as in the paper.
    """

    mask: Mask
    switch: Switch
    light: nn.Module
    full: nn.Module
    threshold: Tensor
    scale: Tensor

    def __init__(
        self,
        mask: Mask,
        switch: Switch,
        light: nn.Module,
        full: nn.Module,
        inputs: Sequence[Layout],
        outputs: Sequence[Layout],
        channel_axis: int,
        routable: bool = True,
        plan: Any = None,
    ):
        super().__init__()
        self.mask, self.switch, self.light, self.full = mask, switch, light, full
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.channel_axis = channel_axis
        self.routable = routable
        self.plan = plan
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("scale", torch.zeros(len(self.outputs)))
        self.segments: Segments | None = None
        self.unmasked = mask.kind == "activation"
        self.route: Route | None = None
        self.paths: Paths | None = None

    def extra_repr(self) -> str:
        return f"threshold={self.threshold.item():.4g}, route={self.route or 'mixed in eval, both in training'}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "paths": None}  # tensors of a graph cannot be copied

    def switch_input(self, cut: Tensor, masked: Tensor) -> Tensor:
        """Which of the two the switch reads: the activation before the mask, or after it."""
        return cut if self.unmasked else masked

    def pooled(self, value: Tensor) -> Tensor:
        """switch_input() as the switch takes it: (batch, entries, channels).

        With segments one row for each, (batch * segments, entries, channels). Raises OptionError where the last one
        would be shorter than the others; `scores` reads that one too.
        """
        layout = self.inputs[0]
        first = value.movedim((layout.axis or 0, self.channel_axis), (0, -1))
        batch = first.shape[0] // layout.per_sample
        if self.segments is not None:
            batch *= self.segments.whole(value)
        return first.reshape(batch, -1, first.shape[-1])

    def scores(self, read: Tensor) -> Tensor:
        """The switch's score of every sample, or of every segment: (batch * segments,). read: from switch_input()."""
        if self.segments is None or not (odd := self.segments.remainder(read)):
            return self.switch(self.pooled(read))  # type: ignore[no-any-return]
        axis = self.segments.axis
        parts = read.split([read.shape[axis] - odd, odd], axis)
        first, last = (self.switch(self.pooled(part)) for part in parts)
        return torch.cat([first.view(len(last), -1), last[:, None]], 1).flatten()

    def forward(self, cut: Tensor, *crossing: Any) -> Any:
        route = self.route or ("both" if self.training else "mixed")
        masked = self.mask(cut)
        inputs = (masked, *crossing)
        if self.training and torch.is_grad_enabled():
            inputs = tuple(map(_contiguous, inputs))
        read = self.switch_input(cut, masked)
        score = self.scores(read)
        if route == "mixed":
            outputs, paths = self._mixed(inputs, read, score)
            self.__dict__["paths"] = paths  # nn.Module's own way takes longer than an operator
            return outputs[0] if len(outputs) == 1 else outputs
        paths = Paths(masked, read, score, segments=self._segments(masked))
        if route in ("light", "both"):
            paths = replace(paths, light=self.light(*inputs))
        if route in ("full", "both"):
            paths = replace(paths, full=self.full(*inputs))
        outputs = (paths.light if route == "light" else paths.full) or ()
        if route == "both" and self.mask.weight.requires_grad and torch.is_grad_enabled():
            with torch.no_grad():
                paths = replace(paths, original=self.full(cut, *crossing))
        self.paths = paths
        return outputs[0] if len(outputs) == 1 else outputs

    def _mixed(self, inputs: tuple[Any, ...], read: Tensor, score: Tensor) -> tuple[tuple[Any, ...], Paths]:
        """Each sample, or each segment, on its own path; a path that none takes does not run."""
        taken, chosen = self._chosen(score)
        paths = Paths(inputs[0], read, score, taken, segments=self._segments(inputs[0]))
        if all(chosen):
            light = self.light(*inputs)
            return light, replace(paths, light=light)
        if not any(chosen):
            full = self.full(*inputs)
            return full, replace(paths, full=full)
        if self.segments is not None and paths.segments > 1:
            return routed(self.segments, (self.full, self.light), inputs, chosen, self.inputs, self.outputs), paths
        at_light, at_full = (
            torch.tensor([at for at, goes in enumerate(chosen) if goes is way], device=taken.device)
            for way in (True, False)
        )
        batch = len(chosen)
        light = self.light(*self._part(inputs, at_light, batch))
        full = self.full(*self._part(inputs, at_full, batch))
        merged = [
            self._merge(layout, mine, theirs, at_light, at_full)
            for layout, mine, theirs in zip(self.outputs, light, full, strict=True)
        ]
        return tuple(merged), paths

    def _segments(self, masked: Tensor) -> int:
        return 1 if self.segments is None else self.segments.count(masked)

    def _chosen(self, score: Tensor) -> tuple[Tensor, list[bool]]:
        """Which samples go light, as a tensor and as a list."""
        if score.is_cpu and score.numel() == 1:  # Python compares faster than an operator
            light = score.item() < self.threshold.item()
            return _ALONE[light], [light]
        taken = score < self.threshold
        if not self.routable:  # samples cannot be told apart: the batch goes light only if each one may
            taken = taken.all().expand_as(taken)
        return taken, taken.tolist()  # the only wait for the device

    def _part(self, inputs: tuple[Any, ...], index: Tensor, batch: int) -> list[Any]:
        return [layout.take(value, index, batch) for layout, value in zip(self.inputs, inputs, strict=True)]

    @staticmethod
    def _merge(layout: Layout, light: Any, full: Any, light_index: Tensor, full_index: Tensor) -> Any:
        if layout.axis is None or not isinstance(full, Tensor):
            return full
        shape = list(full.shape)
        shape[layout.axis] = (len(light_index) + len(full_index)) * layout.per_sample
        whole = full.new_empty(shape)
        return layout.put(layout.put(whole, full, full_index), light.to(full.dtype), light_index)


def _contiguous(value: Any) -> Any:
    """On the CPU torch 2.12.1 crashes in group_norm's backward for a channels_last input that needs no gradient, which
    a value from a frozen base is."""
    return value.contiguous() if isinstance(value, Tensor) and not value.requires_grad else value


def dsl_layers(net: nn.Module) -> tuple[DSLayer, ...]:
    """Every DSLayer of a network, outermost first."""
    return tuple(module for module in net.modules() if isinstance(module, DSLayer))


def required_layers(net: nn.Module) -> tuple[DSLayer, ...]:
    """dsl_layers(net). Raises OptionError when there is none."""
    layers = dsl_layers(net)
    if not layers:
        raise OptionError("This network holds no Dynamic Switch Layer; put one in with dslify.insert(net, at=...).")
    return layers


@contextmanager
def route(net: nn.Module, mode: Route) -> Iterator[nn.Module]:
    """Send everything down one path within the block: "full", "light", "mixed" (per sample) or "both" (returns full).

    Raises OptionError for another word, or for a network without a DSLayer.
    """
    if mode not in ROUTES:
        raise OptionError(f"route is one of {', '.join(ROUTES)}; got {mode!r}.")
    layers = required_layers(net)
    before = [layer.route for layer in layers]
    for layer in layers:
        layer.route = mode
    try:
        yield net
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.route = old
