"""Convolutions of a light path as depthwise and pointwise ones, started from the weights that they replace.

    (out, in, *kernel)      ->      depthwise (in, 1, *kernel), then pointwise (out, in, 1 ...)

As in MobileNets (arXiv 1704.04861): kernel + out weights for each input channel instead of kernel * out. A channel's
weights, a matrix (out, kernel), become an outer product; the nearest one in the sense of least squares is that of the
first singular vectors. The stride, padding and dilation are the depthwise convolution's, the bias the pointwise one's.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .functional import op_name, put_tensor
from .layers import Layer, find_layers
from .rules import arguments

aten = torch.ops.aten
_PLAIN = {"conv1d": aten.conv1d.default, "conv2d": aten.conv2d.default, "conv3d": aten.conv3d.default}
_PLACES = ("stride", "padding", "dilation")
DEPTHWISE = "depthwise"


@torch.no_grad()
def separate(light: fx.GraphModule) -> tuple[str, ...]:
    """Replace in place every convolution with one group where two are fewer weights; returns the weights' names.

    light: a graph whose parameters are its own. A weight keeps its name, and its node, as the pointwise convolution;
    the depthwise one's is beside it. Convolutions whose weight serves other nodes too, or is computed (weight_norm),
    stay as they are.
    """
    replaced = []
    for layer in find_layers(light):
        kind = op_name(layer.node).split(".")[1]
        outputs, taps = layer.weight.shape[0], math.prod(layer.weight.shape[2:])
        if kind not in _PLAIN or layer.groups != 1 or layer.magnitude is not None or outputs + taps >= outputs * taps:
            continue
        replaced.append(_replace(light, layer, kind))
    light.recompile()
    return tuple(replaced)


def _replace(light: fx.GraphModule, layer: Layer, kind: str) -> str:
    a = arguments(layer.node)
    name = str(a["weight"].target)
    path = name.rpartition(".")[0]
    beside = f"{path}.{DEPTHWISE}" if path else f"{name}_{DEPTHWISE}"
    depthwise, pointwise = nearest(layer.weight)
    with light.graph.inserting_before(layer.node):
        read = light.graph.create_node("get_attr", beside)
        settings = {setting: a[setting] for setting in _PLACES}
        groups = layer.weight.shape[1]
        spread = light.graph.call_function(
            cast(Any, layer.node.target), (a["input"], read, None), {**settings, "groups": groups}
        )
    put_tensor(light, beside, nn.Parameter(depthwise))
    put_tensor(light, name, nn.Parameter(pointwise))
    layer.node.target, layer.node.args, layer.node.kwargs = _PLAIN[kind], (spread, a["weight"], a["bias"]), {}
    return name


def nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise (in, 1, *kernel) and pointwise (out, in, 1 ...) weights, of equal norm in each input channel, whose
    products are nearest to (out, in, *kernel)."""
    channels = weight.double().flatten(2).transpose(0, 1)  # (in, out, kernel)
    left, strength, right = torch.linalg.svd(channels, full_matrices=False)
    root = strength[:, 0].sqrt()[:, None]
    depthwise = (right[:, 0] * root).reshape(weight.shape[1], 1, *weight.shape[2:])
    pointwise = (left[:, :, 0] * root).T.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    return depthwise.to(weight.dtype).contiguous(), pointwise.to(weight.dtype).contiguous()
