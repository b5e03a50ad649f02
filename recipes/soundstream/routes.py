"""A clip on the paths of a switched codec: both whole, as the switch routes it, and with a path forced on each segment.

Routing by segments gives what each path answers on the whole sound (dslify.segments), so any choice of paths is had by
splicing the embeddings of the two. `routed` is the real thing, and the evaluation compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dslify import route
from dslify.errors import OptionError
from dslify.switch import DSLayer, required_layers
from recipes.soundstream.model import HOP, SoundStream
from recipes.soundstream.work import SEGMENT

FRAMES = SEGMENT // HOP  # of the embedding, in a segment

Light = NDArray[np.bool_]  # (segments,), which of them take the light path


@dataclass(frozen=True)
class Heard:
    """What one network makes of one clip. full, light: embeddings of the whole clip, (1, channels, frames).

    predicted: the switch's score of every segment, (segments,). actual: the relative difference that it predicts, as
    `dslify.losses.difference` has it: mean |light - full| over the segment, by the layer's scale.
    """

    full: Tensor
    light: Tensor
    predicted: NDArray[np.float64]
    actual: NDArray[np.float64]

    def spliced(self, light: Light) -> Tensor:
        """The embedding with these segments from the light path and the others from the full one."""
        frames = torch.from_numpy(np.repeat(light, FRAMES))[: self.full.shape[-1]]
        return torch.where(frames, self.light, self.full)


def layer_of(net: nn.Module) -> DSLayer:
    """The layer of a codec that routes by segments of SEGMENT samples. Raises OptionError for any other network."""
    layer, *others = required_layers(net)
    entries = layer.segments.entries if layer.segments is not None else None
    if others or entries != SEGMENT:
        found = f"{1 + len(others)} layers" if others else f"route_every={entries}"
        raise OptionError(f"The codec is to have one layer with route_every={SEGMENT}, and has {found}; insert again.")
    if layer.scale.item() == 0:
        raise OptionError("The layer of the codec has no scale of differences yet; fine-tune it first.")
    return layer


def _codec(net: nn.Module) -> SoundStream:
    return cast(SoundStream, net)  # whatever has been put into it


@torch.no_grad()
def heard(net: nn.Module, sound: NDArray[np.float32]) -> Heard:
    """Both paths on the whole sound, (samples,)."""
    layer, x = layer_of(net), torch.from_numpy(sound)[None, None]
    found = {}
    for path in ("full", "light"):
        with route(net, path):
            found[path] = _codec(net).embed(x)
    scores = layer.paths.score if layer.paths is not None else torch.empty(0)
    gaps = (found["light"] - found["full"]).abs().mean(1)[0]  # of every frame
    by_segment = [piece.mean().item() for piece in gaps.split(FRAMES)]
    actual = np.array(by_segment) / layer.scale[0].item()
    return Heard(found["full"], found["light"], scores.double().numpy(), actual)


@torch.no_grad()
def routed(net: nn.Module, sound: NDArray[np.float32], threshold: float) -> tuple[Tensor, Light]:
    """The embedding as the layer itself routes it at this threshold, and which segments went light."""
    layer = layer_of(net)
    before = layer.threshold.clone()
    layer.threshold.fill_(threshold)
    try:
        with route(net, "mixed"):
            embedding = _codec(net).embed(torch.from_numpy(sound)[None, None])
    finally:
        layer.threshold.copy_(before)
    paths = layer.paths
    if paths is None or paths.light_taken is None:
        raise OptionError("The network did not run its layer; a codec whose embed() runs the encoder is expected.")
    return embedding, paths.light_taken.numpy().copy()


@torch.no_grad()
def decoded(net: nn.Module, embedding: Tensor, samples: int) -> NDArray[np.float32]:
    """What the codec says after its quantizer and decoder, (samples,)."""
    quantized = _codec(net).quantizer(embedding.transpose(1, 2))[0]
    return _codec(net).decoder(quantized.transpose(1, 2))[0, 0, :samples].numpy()


def largest_gap(embedding: Tensor, wanted: Tensor, light: Light) -> float:
    """Of a routed embedding from the continuous one in the segments beside every change of path: the largest absolute
    difference, relative to the largest value there is; 0 where the path never changes."""
    beside = _beside(changes(light), len(light))
    frames = torch.from_numpy(np.repeat(beside, FRAMES))[: wanted.shape[-1]]
    gaps = (embedding - wanted).abs()[..., frames]
    return gaps.max().item() / wanted.abs().max().item() if gaps.numel() else 0.0


def changes(light: Light) -> NDArray[np.int64]:
    """Segments that begin on another path than the one before ended on."""
    return np.flatnonzero(light[1:] != light[:-1]) + 1


def _beside(borders: NDArray[np.int64], segments: int) -> Light:
    marked = np.zeros(segments, bool)
    marked[borders] = marked[borders - 1] = True
    return marked


def exactly(count: int, order: Sequence[float] | NDArray[np.float64]) -> Light:
    """The `count` entries with the smallest values; equal values go by their place."""
    light = np.zeros(len(order), bool)
    light[np.argsort(np.asarray(order), kind="stable")[:count]] = True
    return light
