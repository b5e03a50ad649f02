"""A dslified network in one file, without pickled code: save() and load().

A .dsl file is a zip archive of two stored members. `weights.safetensors` holds every tensor once. `dslify.json` holds
all the rest: graphs node by node (graph_json.py), layers by their settings (stored_modules.py), and a format number.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from . import __version__
from .errors import StoreError, one_line
from .files import written_whole
from .functional import copied
from .stored_modules import describe, rebuild
from .switch import dsl_layers

FORMAT = 2
_TEXT, _WEIGHTS = "dslify.json", "weights.safetensors"
_AROUND = "around"  # in the meta of a scope's graph that was loaded alone: the state of the model around it
_MOST_TEXT = 2**28  # bytes of JSON; the largest network tried has 5 MB
_EPOCH = (1980, 1, 1, 0, 0, 0)  # so that saving twice gives the same bytes


def save(net: nn.Module, path: str | os.PathLike[str], force: bool = False) -> Path:
    """Write a network from dslify.insert to one file, under a temporary name first, so that no half file is ever seen.

    With a scope, the scope's graph is written and the weights of the model around it. force: replace an existing file.
    Raises StoreError if the file exists, cannot be written, or the network holds something that has no place in it.
    """
    path = Path(path)
    if path.exists() and (path.is_dir() or not force):
        way = "it is a folder" if path.is_dir() else "give --force to replace it, or another name"
        raise StoreError(f"{path} exists; {way}.")
    if not path.parent.is_dir():
        raise StoreError(f"{path}: there is no folder {path.parent}; make it first.")
    scope, graph = _dslified_part(net)
    state = _state_around(net, scope) if scope else {}
    if scope is None and _AROUND in graph.meta:  # a scope's graph that was loaded alone
        scope, state = graph.meta["dslify"]["scope"], graph.meta[_AROUND]
    tensors: dict[str, Tensor] = {}
    described = describe(graph, "", tensors)
    outer = _named_tensors(state, tensors)
    text = {
        "format": FORMAT,
        "dslify": __version__,
        "torch": torch.__version__,
        "scope": scope,
        "net": described,
        "outer": outer,
        "tensors": {name: _tensor_entry(tensor) for name, tensor in tensors.items()},
    }
    try:
        encoded = json.dumps(text, separators=(",", ":")).encode()
        rebuild(json.loads(encoded)["net"], tensors)  # a file that cannot be read must not be written
    except (TypeError, ValueError) as error:
        raise StoreError(f"The network's settings cannot be written as JSON: {error}.") from None
    try:
        weights = safetensors.torch.save(_laid_out(tensors))
    except (ValueError, RuntimeError, KeyError) as error:
        raise StoreError(f"The weights cannot be written: {one_line(error)}.") from None
    _write(path, {_TEXT: encoded, _WEIGHTS: weights})
    return path


def load(path: str | os.PathLike[str], into: nn.Module | None = None) -> nn.Module:
    """A network that save() wrote, in eval mode and trainable, without the source of the model it was made from.

    Of a network with a scope this is the scope's graph alone, whose meta["dslify"]["scope"] says where it belongs (it
    keeps the weights of the model around it, for the next save). into: the model it was cut from, of which a copy with
    the graph at its place and the stored weights is returned.
    Raises StoreError for a file that is damaged, of another format, or holds anything that save() would not write.
    """
    path = Path(path)
    text, data = _read(path)
    with _damage_told(path):
        stored = safetensors.torch.load(data)
        tensors = {name: _made(name, stored, entry) for name, entry in text["tensors"].items()}
        net = rebuild(text["net"], tensors)
        if not isinstance(net, fx.GraphModule) or not dsl_layers(net):
            raise StoreError("it holds no dslified network.")
        net.eval()
        scope, outer = text["scope"], {name: tensors[key] for name, key in text["outer"].items()}
        if into is not None and scope is None:
            raise StoreError("it holds a whole network, so there is nothing to put it into; leave out `into`.")
        if into is not None:
            return _put_into(into, str(scope), net, outer)
        if scope is not None:
            net.meta[_AROUND] = outer
        return net


def _dslified_part(net: nn.Module) -> tuple[str | None, fx.GraphModule]:
    """(scope or None, the graph that holds the DSLayers)."""
    if not dsl_layers(net):
        raise StoreError("The network holds no Dynamic Switch Layer; put one in with dslify.insert(net, at=...).")
    found: list[tuple[str, fx.GraphModule]] = []
    for name, module in net.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, fx.GraphModule) and dsl_layers(module) and not inside:
            found.append((name, module))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise StoreError(f"A file holds one graph with its Dynamic Switch Layers; this network has them in {names}.")
    return found[0][0] or None, found[0][1]


def _state_around(model: nn.Module, scope: str) -> dict[str, Tensor]:
    """The state of a model but for its scope."""
    state = model.state_dict(keep_vars=True).items()
    return {name: value for name, value in state if not name.startswith(f"{scope}.") and isinstance(value, Tensor)}


def _named_tensors(state: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Names -> keys of their tensors, which are added to `tensors` unless they are tied to one in it."""
    keys = {id(tensor): key for key, tensor in tensors.items()}
    names: dict[str, str] = {}
    for name, value in state.items():
        names[name] = keys.setdefault(id(value), f"outer.{name}")
        tensors.setdefault(names[name], value)
    return names


def _put_into(model: nn.Module, scope: str, net: fx.GraphModule, outer: Mapping[str, Tensor]) -> nn.Module:
    try:
        whole = copied(model)
        whole.get_submodule(scope)
        whole.set_submodule(scope, net)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise StoreError(f"its graph belongs at {scope}, where the given model cannot take it: {error}.") from None
    own = _state_around(whole, scope)
    if set(own) != set(outer):
        odd = sorted(set(own) ^ set(outer))
        raise StoreError(
            f"the given model is not the one it was cut from: {', '.join(odd[:3])} is only in one of them."
        )
    shared = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
    with torch.no_grad():
        for name, value in outer.items():
            if own[name].shape != value.shape:
                shapes = f"{tuple(own[name].shape)} in the given model, not {tuple(value.shape)}"
                raise StoreError(f"{name} has the shape {shapes}.")
            if id(value) in shared:  # tied to a tensor of the scope
                path, _, leaf = name.rpartition(".")
                setattr(whole.get_submodule(path), leaf, value)
            else:
                own[name].copy_(value)
                own[name].requires_grad_(value.requires_grad)
    return whole.eval()


def _tensor_entry(tensor: Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"parameter": isinstance(tensor, nn.Parameter), "grad": tensor.requires_grad}
    if not tensor.is_contiguous():  # channels_last: other kernels, other last bits
        strides = tensor.stride()
        entry["order"] = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
    return entry


def _laid_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous in memory order, each in memory of its own."""
    laid_out: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise StoreError(f"{name} has no values (it is on the meta device).")
        order = _tensor_entry(tensor).get("order")
        plain = tensor.detach().permute(order) if order else tensor.detach()
        plain = plain.cpu().contiguous()
        if plain.untyped_storage().data_ptr() in taken:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        laid_out[name] = plain
    return laid_out


def _made(name: str, stored: dict[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    tensor = stored.pop(name).clone()  # memory of its own, aligned as torch aligns it: sums depend on that
    order = entry.get("order")
    if order is not None:
        if sorted(order) != list(range(tensor.dim())):
            raise StoreError(f"the axes of {name} are damaged.")
        tensor = tensor.permute([order.index(axis) for axis in range(tensor.dim())])
    if entry["parameter"]:
        return nn.Parameter(tensor, bool(entry["grad"]))
    return tensor


def _write(path: Path, members: Mapping[str, bytes]) -> None:
    try:
        with (
            written_whole(path, f".{os.getpid()}") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from None


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON, its format checked, and the bytes of the weights."""
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file; a dslified network is written by dslify insert.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if set(members) != {_TEXT, _WEIGHTS} or len(archive.infolist()) != 2:
                raise StoreError(f"{path} is no dslified network: a .dsl file holds {_TEXT} and {_WEIGHTS}.")
            size = path.stat().st_size
            if any(member.compress_type or member.file_size > size for member in members.values()) or (
                members[_TEXT].file_size > _MOST_TEXT
            ):
                raise StoreError(f"{path} would unpack to more than it may; it was not loaded.")
            text = json.loads(archive.read(_TEXT))
            weights = archive.read(_WEIGHTS)
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OSError) as error:
        raise StoreError(f"{path} is damaged or cut short, or no .dsl file ({one_line(error)}).") from None
    found = text.get("format") if isinstance(text, dict) else None
    if found != FORMAT:
        age = "newer" if isinstance(found, int) and found > FORMAT else "other"
        writer = str(text.get("dslify", "an unknown version"))[:20] if isinstance(text, dict) else "an unknown version"
        raise StoreError(
            f"{path} is in format {str(found)[:20]}, written by dslify {writer}; this dslify ({__version__}) reads "
            f"format {FORMAT}: {'install a newer dslify' if age == 'newer' else 'write it again with dslify insert'}."
        )
    return text, weights


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Every way in which a wrong file can trip the reader, as one sentence that names it."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{path} was not loaded: {error}") from None
    except Exception as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {one_line(error)}.") from None
