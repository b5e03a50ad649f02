"""A light path that inherits no weight: the control that inherited weights are held against."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .functional import op_name, tensor_at
from .layers import LINEAR, find_layers
from .rules import arguments

_OF_A_NORM = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}  # when it is new


@torch.no_grad()
def randomise(light: fx.GraphModule, seed: int) -> None:
    """Draw the weights of a light path anew, in place, as torch scales those of a new layer: uniform up to
    1 / sqrt(fan-in).

    Biases become 0, and norms what a new one has. Other values with one axis (layer scales, tokens) stay. Weights that
    keep the variance behind a ReLU would be no better control: the codec, which has no norms, starts at seven times the
    loss with them and ends at twice of it.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: torch.Size, fan_in: int) -> Tensor:
        return (torch.rand(shape, generator=generator) - 0.5) * (2 * fan_in**-0.5)

    done: set[int] = set()
    for layer in find_layers(light):
        if layer.kind in LINEAR:
            matrices = layer.matrices()
            layer.set(uniform(matrices.shape, matrices.shape[1]).to(matrices), None)
            if layer.bias is not None:
                layer.bias.zero_()
            done |= {id(held) for held in (layer.weight, layer.bias, layer.magnitude)}
    for node in light.graph.nodes:
        if "_norm" in op_name(node) and "_weight_norm" not in op_name(node):
            for name, held in arguments(node).items():
                if name in _OF_A_NORM and isinstance(held, fx.Node) and held.op == "get_attr":
                    value = tensor_at(light, str(held.target)).fill_(_OF_A_NORM[name])
                    done.add(id(value))
    for parameter in light.parameters():
        if id(parameter) not in done and parameter.is_floating_point() and parameter.dim() > 1:
            parameter.copy_(uniform(parameter.shape, parameter[0].numel()))
