"""The modules of a dslified network as JSON, their tensors beside it: describe() and rebuild()."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .errors import StoreError
from .graph_json import decode, encode
from .guards import Guards
from .mask import KINDS, Mask
from .plan import Plan
from .segments import Segments
from .switch import SWITCH_KINDS, DSLayer, Layout, Switch

Kind = TypeVar("Kind", bound=str)
_CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode",
)  # fmt: skip
# Layers without a graph that a light path may consist of: their settings, which are also their constructor's names.
_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Identity: (), nn.ReLU: (), nn.SiLU: (), nn.Tanh: (), nn.Sigmoid: (), nn.ELU: ("alpha",),
    nn.GELU: ("approximate",), nn.Dropout: ("p",), nn.Flatten: ("start_dim", "end_dim"),
    nn.AdaptiveAvgPool1d: ("output_size",), nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Linear: ("in_features", "out_features", "bias"), nn.Conv1d: _CONVOLUTION, nn.Conv2d: _CONVOLUTION,
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
}  # fmt: skip


def describe(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A module as JSON; its tensors go to `tensors`, each under the first name it is met by."""
    if isinstance(module, fx.GraphModule):
        return {"kind": "graph", **encode(module, tensors, prefix, lambda m, p: describe(m, p, tensors))}
    if isinstance(module, Guards):
        return {"kind": "guards", "checks": list(module.checks)}
    if type(module) is DSLayer:
        return _describe_layer(module, prefix, tensors)
    if type(module) is nn.Sequential:
        parts = [describe(child, f"{prefix}{name}.", tensors) for name, child in module.named_children()]
        return {"kind": "sequence", "parts": parts}
    if type(module) in _LAYERS:
        settings = {name: getattr(module, name) for name in _LAYERS[type(module)]}
        if "bias" in settings:
            settings["bias"] = settings["bias"] is not None
        names = _own_names(module, prefix, tensors)
        return {"kind": "layer", "type": type(module).__name__, "settings": settings, "tensors": names}
    where = prefix.rstrip(".") or "The network"
    raise StoreError(f"{where} is a {type(module).__qualname__}, which a .dsl file cannot hold.")


def _describe_layer(layer: DSLayer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if type(layer.mask) is not Mask or type(layer.switch) is not Switch:
        kinds = f"{type(layer.mask).__qualname__} and {type(layer.switch).__qualname__}"
        raise StoreError(f"{prefix.rstrip('.')} has {kinds} for mask and switch, which a .dsl file cannot hold.")
    full = describe(layer.full, f"{prefix}full.", tensors)
    return {
        "kind": "dsl",
        "full": full,
        "light": describe(layer.light, f"{prefix}light.", tensors),
        "inputs": [[place.axis, place.per_sample, place.scales] for place in layer.inputs],
        "outputs": [[place.axis, place.per_sample, place.scales] for place in layer.outputs],
        "channel_axis": layer.channel_axis,
        "routable": layer.routable,
        "mask": {"kind": layer.mask.kind},
        "switch": {"kind": layer.switch.kind, "unmasked": layer.unmasked},
        "segments": layer.segments.to_json() if layer.segments is not None else None,
        "plan": layer.plan.to_json() if layer.plan is not None else None,
        "tensors": _own_names(layer, prefix, tensors, ("light", "full")),
    }


def rebuild(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The inverse of describe()."""
    match data["kind"]:
        case "graph":
            return decode(data, tensors, lambda inner: rebuild(inner, tensors))
        case "guards":
            return Guards([str(check) for check in data["checks"]])
        case "sequence":
            return nn.Sequential(*(rebuild(part, tensors) for part in data["parts"]))
        case "dsl":
            names = data["tensors"]
            hidden, width = tensors[names["switch.hidden.weight"]].shape
            mask_shape = tensors[names["mask.weight"]].shape
            if mask_shape[data["channel_axis"]] != width // Switch.MOMENTS:
                channels = width // Switch.MOMENTS
                raise StoreError(
                    f"the mask of shape {tuple(mask_shape)} does not fit the switch of {channels} channels."
                )
            mask_kind = _kind_of(data, "mask", KINDS)
            switch_kind = _kind_of(data, "switch", SWITCH_KINDS)
            light, full = rebuild(data["light"], tensors), rebuild(data["full"], tensors)
            with torch.device("meta"):  # the stored tensors come in their place; no random numbers are drawn
                layer = DSLayer(
                    Mask(mask_shape, mask_kind),
                    Switch(width // Switch.MOMENTS, hidden, switch_kind),
                    light,
                    full,
                    [Layout(*place) for place in data["inputs"]],
                    [Layout(*place) for place in data["outputs"]],
                    int(data["channel_axis"]),
                    bool(data["routable"]),
                    None if data["plan"] is None else Plan.from_json(data["plan"]),
                )
            layer.unmasked = bool(data.get("switch", {}).get("unmasked", False))  # in files of before it never was
            if data.get("segments") is not None:  # files of before do not say it
                layer.segments = _segments(data["segments"], layer)
            _put(layer, names, tensors, ("light", "full"))
            return layer
        case "layer":
            kind = next((kind for kind in _LAYERS if kind.__name__ == data["type"]), None)
            if kind is not None and set(data["settings"]) == set(_LAYERS[kind]):
                with torch.device("meta"):
                    made = kind(**data["settings"])
                _put(made, data["tensors"], tensors)
                return made
    raise StoreError(f"it holds a part of an unknown kind ({str(data.get('type', data['kind']))[:50]}).")


def _segments(data: Mapping[str, Any], layer: DSLayer) -> Segments:
    found = Segments.from_json(data)
    if (len(found.inputs), len(found.outputs)) != (len(layer.inputs), len(layer.outputs)):
        raise StoreError("its segments belong to a region with other inputs or outputs.")
    return found


def _kind_of(data: Mapping[str, Any], part: str, kinds: Sequence[Kind]) -> Kind:
    """The kind of a layer's mask or switch; the first one where a file does not say it, as older files do not."""
    kind = data[part]["kind"] if part in data else kinds[0]
    if kind not in kinds:
        raise StoreError(f"it holds a {part} of an unknown kind ({str(kind)[:50]}).")
    return kind


def _own_tensors(module: nn.Module, without: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(dotted name, owner, name there, tensor) of a layer's tensors, those below the children `without` left out."""
    for path, owner in module.named_modules():
        if path.partition(".")[0] not in without:
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is not None:
                    yield (f"{path}.{name}" if path else name), owner, name, tensor


def _own_names(
    module: nn.Module, prefix: str, tensors: dict[str, Tensor], without: tuple[str, ...] = ()
) -> dict[str, str]:
    keys = {id(tensor): key for key, tensor in tensors.items()}
    names = {}
    for full, _, _, tensor in _own_tensors(module, without):
        names[full] = keys.setdefault(id(tensor), prefix + full)
        tensors.setdefault(names[full], tensor)
    return names


def _put(
    module: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor], without: tuple[str, ...] = ()
) -> None:
    """Give a layer the stored tensors in place of its own; raises StoreError unless they match one to one."""
    own = list(_own_tensors(module, without))
    if {full for full, *_ in own} != set(names):
        raise StoreError(f"a {type(module).__name__} in it has other tensors than this version of dslify knows.")
    for full, owner, name, old in own:
        new = tensors[names[full]]
        if new.shape != old.shape or isinstance(new, nn.Parameter) != isinstance(old, nn.Parameter):
            raise StoreError(f"{full} has the shape {tuple(new.shape)} where {tuple(old.shape)} belongs.")
        table: dict[str, Any] = owner._parameters if isinstance(new, nn.Parameter) else owner._buffers
        table[name] = new
