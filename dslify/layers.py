"""The layers of a graph whose weights can be set: linear layers and convolutions as matrices, and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .functional import op_name, tensor_at
from .rules import arguments

LINEAR = ("linear", "addmm", "conv", "transposed")
_KINDS = {
    "linear": "linear", "addmm": "addmm", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv",
    "conv_transpose1d": "transposed", "conv_transpose2d": "transposed", "conv_transpose3d": "transposed",
    "convolution": "conv", "layer_norm": "norm", "group_norm": "norm", "batch_norm": "batch_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A node of the light graph whose weights can be set: weight, and bias where it has one.

    Of a batch_norm these are the running mean and variance. magnitude, dim: of a weight_norm, whose direction `weight`
    then is. axis: of the channels in its value.
    """

    node: fx.Node
    kind: str
    x: fx.Node
    weight: Tensor
    bias: Tensor | None
    axis: int
    groups: int = 1
    magnitude: Tensor | None = None
    dim: int = 0

    def matrices(self, weight: Tensor | None = None) -> Tensor:
        """The weights as (groups, fan-in, outputs of a group)."""
        weight = self.effective() if weight is None else weight
        if self.kind == "addmm":
            return weight[None]
        if self.kind == "transposed":
            return weight.flatten(2).unflatten(0, (self.groups, -1)).movedim(2, 3).flatten(1, 2)
        return weight.flatten(1).unflatten(0, (self.groups, -1)).transpose(1, 2)

    def effective(self) -> Tensor:
        if self.magnitude is None:
            return self.weight
        return torch._weight_norm(self.weight, self.magnitude, self.dim)

    def set(self, matrices: Tensor, bias: Tensor | None) -> None:
        """Write (groups, fan-in, outputs of a group) and (outputs,) back."""
        shape = self.weight.shape
        if self.kind == "addmm":
            weight = matrices[0]
        elif self.kind == "transposed":
            weight = matrices.unflatten(1, (shape[0] // self.groups, -1)).movedim(3, 2).reshape(shape)
        else:
            weight = matrices.transpose(1, 2).reshape(shape)
        self.weight.copy_(weight)
        if self.magnitude is not None:
            self.magnitude.copy_(torch.norm_except_dim(self.weight, 2, self.dim))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


def find_layers(light: fx.GraphModule) -> list[Layer]:
    """The layers whose weights serve that one node alone, in order."""
    readers: dict[int, int] = {}
    for node in light.graph.nodes:
        if node.op == "get_attr" and isinstance(value := tensor_at(light, str(node.target)), Tensor):
            readers[id(value)] = readers.get(id(value), 0) + len(node.users)

    def own(node: Any) -> Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = tensor_at(light, str(node.target))
        return value if readers[id(value)] == 1 and value.is_floating_point() else None

    layers = []
    for node in light.graph.nodes:
        kind = _KINDS.get(op_name(node).split(".")[1]) if op_name(node).startswith("aten.") else None
        if kind is None:
            continue
        a = arguments(node)
        kind = "transposed" if a.get("transposed") else kind
        if kind == "addmm":
            x, matrix, offset = a["mat1"], a["mat2"], a["self"]
        else:
            x, matrix, offset = a["input"], a["weight"], a["bias"]
        magnitude, dim = None, 0
        if kind == "batch_norm":
            matrix, offset = a["running_mean"], a["running_var"]
        if isinstance(matrix, fx.Node) and "_weight_norm" in op_name(matrix) and len(matrix.users) == 1:
            spec = arguments(matrix)
            magnitude, dim, matrix = own(spec["g"]), spec["dim"], spec["v"]
            if magnitude is None:
                continue
        weight, bias = own(matrix), own(offset)
        if weight is None or (offset is not None and bias is None) or (kind == "norm" and weight.dim() > 1):
            continue
        axis = -1 if kind in ("linear", "addmm") or "layer_norm" in op_name(node) else 1
        layers.append(Layer(node, kind, x, weight, bias, axis, a.get("groups", 1), magnitude, dim))
    return layers


def patches(layer: Layer, x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """What the layer reads for its answers at these positions: (positions, groups, fan-in), zeros for padding."""
    if layer.kind in ("linear", "addmm"):
        return x.flatten(0, -2)[at][:, None]
    a = arguments(layer.node)
    batch, *place = torch.unravel_index(at, (y.shape[0], *y.shape[2:]))
    index = torch.zeros_like(at)[:, None]
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, (where, taps) in enumerate(zip(place, layer.weight.shape[2:], strict=True)):
        size, stride, dilation = x.shape[2 + axis], _of(a["stride"], axis), _of(a["dilation"], axis)
        reach = torch.arange(taps, device=at.device) * dilation
        if layer.kind == "transposed":
            came = where[:, None] + _of(a["padding"], axis) - reach
            read, falls = came // stride, came % stride == 0
        else:
            same = dilation * (taps - 1) // 2 if a["padding"] == "same" else 0
            pad = same if isinstance(a["padding"], str) else _of(a["padding"], axis)
            read, falls = where[:, None] * stride - pad + reach, torch.ones((), dtype=torch.bool, device=at.device)
        inside = (inside[:, :, None] & (falls & (read >= 0) & (read < size))[:, None]).flatten(1)
        index = (index[:, :, None] * size + read.clamp(0, size - 1)[:, None]).flatten(1)
    values = x.flatten(2)[batch[:, None], :, index] * inside[..., None]  # (positions, taps, channels)
    return values.transpose(1, 2).reshape(len(at), layer.groups, -1)


def _of(setting: Any, axis: int) -> int:
    """A stride, padding or dilation for one axis: one number may stand for all."""
    return int(setting[min(axis, len(setting) - 1)])
