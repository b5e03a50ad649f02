"""A whole module out of a pickle: its symbols are held against short lists before torch reads it, with weights_only."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.util
import os
import re
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .errors import LoadError, UntrustedError, one_line, some
from .pickle_symbols import Global, Use, symbols
from .vouched import PYTHON, Written, check_trust, executed, working_folder_first


def _under(prefix: str, names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names.split()}


_REBUILDS = _under(
    "torch._utils", "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_meta_tensor_no_storage"
)
_CALLED = {  # what torch itself and plain containers need; each makes a value and does nothing else
    *_REBUILDS,
    *_under("torch._utils", "_rebuild_parameter _rebuild_parameter_with_state"),
    *_under("torch", "Size device serialization._get_layout"),
    *_under("builtins", "set frozenset slice complex bytearray"),
    *_under("collections", "OrderedDict Counter"),
    "_codecs.encode",
}
_KNOWN_MODULES = re.compile(
    r"torch\.nn\.(modules\.\w+|parallel\.data_parallel)"
    r"|timm\.(layers|models)(\.\w+)*|torchaudio\.(models|transforms)(\.\w+)*"
    r"|torchvision\.(models|ops|transforms)(\.\w+)*|transformers\.models(\.\w+)*\.(modeling|configuration)_\w+"
    r"|transformers\.(activations|backbone_utils|configuration_utils|pytorch_utils|generation\.configuration_utils)"
    r"|dslify\.(switch|guards)"
)
_KNOWN_FUNCTIONS = {  # of tensors, pure
    "torch._C._nn.gelu",
    "torchvision.ops.boxes.box_iou",
    "torchvision.models.optical_flow.raft._pass_through_h",
    *_under("torch.nn.functional", "relu relu6 elu selu silu mish leaky_relu softplus hardswish hardsigmoid"),
    *_under("torch.nn.functional", "tanh sigmoid softmax log_softmax logsigmoid glu"),
    *_under("timm.layers.activations", "gelu gelu_tanh quick_gelu swish mish sigmoid tanh hard_swish hard_sigmoid"),
}
_WRAPPED = "torch.nn.modules.module._WrappedHook"
_KNOWN_VALUES = {"functools.partial", "builtins.slice", "builtins.frozenset", _WRAPPED}
_HOOKS = _under(  # the old weight_norm and spectral_norm: plain values that compute a weight before a forward
    "torch.nn.utils",
    "weight_norm.WeightNorm spectral_norm.SpectralNorm spectral_norm.SpectralNormStateDictHook "
    "spectral_norm.SpectralNormLoadStateDictPreHook",
)
_PACKAGES = ("torch", "torchvision", "torchaudio", "timm", "transformers", "dslify")
_CLOSED = re.compile(r"torch\.(_|distributed|export|fx|hub|jit|multiprocessing|package|serialization|testing|utils).*")
_VALUES = {  # classes that carry settings and no more
    *("PreTrainedConfig", "GenerationConfig", "FeatureInfo"),
    *("BoxCoder", "BoxLinearCoder", "Matcher", "BalancedPositiveNegativeSampler"),  # of torchvision's detectors
}


@dataclasses.dataclass(frozen=True)
class _Admitted:
    """An object that a pickle may name; trusted: the user vouched for the module it was defined in."""

    found: Any
    trusted: bool


def unpickled(path: Path, trust: tuple[str, ...], code: tuple[str | os.PathLike[str], ...]) -> Any:
    """What a torch.save file holds, read with weights_only and with the globals that may be let in."""
    check_trust(trust)
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, own, uses = _wanted(path, file)
        written = executed(code)
        admitted = {}
        strangers = []
        for name in sorted(names - own):
            found = _admit(path, name, trust, written)
            if found is None:
                strangers.append(name)
            else:
                admitted[name] = found
        if strangers:
            raise UntrustedError(_stranger_sentence(path, strangers, trust, bool(code)))
        for use in uses:
            if not _harmless(use, own, admitted, written):
                raise UntrustedError(
                    f"{path} uses {use.what or 'a computed value'} in a way that no saved network needs and that could "
                    "run code; it was not loaded."
                )
        file.seek(0)
        try:
            with torch.serialization.safe_globals([(entry.found, str(name)) for name, entry in admitted.items()]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise LoadError(f"{path} cannot be read: {one_line(error)}.") from None
    trusted = {id(entry.found) for entry in admitted.values() if entry.trusted}
    for value in (content, *(content.values() if isinstance(content, Mapping) else ())):
        if isinstance(value, nn.Module):
            _check_callables(path, value, trusted)
    return content


def _wanted(path: Path, file: BinaryIO) -> tuple[set[Global], set[Global], list[Use]]:
    """The globals a file names, those among them that torch lets in by itself, and the uses of all."""
    try:
        data = torch._C.PyTorchFileReader(file).get_record("data.pkl")  # torch.load's own reader: zips can be ambiguous
        file.seek(0)
        unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        names, uses = symbols(data)
    except Exception as error:
        if "opcode" in str(error) or "operand" in str(error):
            raise LoadError(
                f"{path} holds a pickle of another protocol than torch.save writes by default; save it again with "
                "torch.save(model, path)."
            ) from None
        raise LoadError(f"{path} is damaged: {one_line(error)}.") from None
    if not unsafe <= names:
        raise LoadError(f"{path} is damaged: two ways of reading it differ.")
    return names, names - unsafe, uses


def _vouched(module: str, trust: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in trust)


def _admit(path: Path, name: Global, trust: tuple[str, ...], written: Written) -> _Admitted | None:
    """The object behind a name if it may be let in. Only a module that is let in is imported."""
    for module in written.get(name.module, ()):
        found = vars(module).get(name.name)
        if isinstance(found, (type, types.FunctionType)) and found.__module__ == module.__name__:
            return _Admitted(found, True)
    vouched = _vouched(name.module, trust)
    listed = name in _KNOWN_FUNCTIONS or name in _HOOKS or name in _KNOWN_VALUES
    if name.module in written or not (vouched or listed or _KNOWN_MODULES.fullmatch(name.module)):
        return None
    try:
        if vouched:
            with working_folder_first():
                module = importlib.import_module(name.module)
        else:
            module = importlib.import_module(name.module)
    except Exception as error:
        raise LoadError(
            f"{path} needs {name.module}, which cannot be imported here: {type(error).__name__}: {one_line(error)}."
        ) from None
    found = vars(module).get(name.name)
    if found is None:
        raise LoadError(f"{path} needs {name}, which the installed {name.module.partition('.')[0]} does not have.")
    if listed:
        return _Admitted(found, False)
    if not isinstance(found, (type, types.FunctionType)):
        return None
    home = found.__module__  # a module also holds what it imported: os.system is reachable through many
    if _vouched(home, trust) and home.partition(".")[0] not in _PACKAGES:
        return _Admitted(found, True)
    inside = _KNOWN_MODULES.fullmatch(home) or (_vouched(home, trust) and not _CLOSED.fullmatch(home))
    return _Admitted(found, False) if isinstance(found, type) and inside and _plain_class(found) else None


def _plain_class(kind: type) -> bool:
    """Whether an instance made without its constructor, then given attributes, has run nothing but torch's own code."""
    if hasattr(kind, "__del__"):
        return False
    owner = next((base for base in kind.__mro__ if "__setstate__" in vars(base)), None)
    if owner is not None and not owner.__module__.startswith(("torch.nn.modules.", "timm.layers.")):
        return False
    if issubclass(kind, (enum.Enum, tuple)):
        return True
    values = dataclasses.is_dataclass(kind) or any(base.__name__ in _VALUES for base in kind.__mro__)
    return kind.__new__ is object.__new__ and (issubclass(kind, nn.Module) or values)


def _harmless(use: Use, own: set[Global], admitted: Mapping[Global, _Admitted], written: Written) -> bool:
    """Whether a saved network may use a global like this.

    Modules are made without their constructors: those of transformers, called with a crafted configuration, fetch
    kernels. functools.partial and torch's rebuild of a tensor's type call their first argument, so that is checked too.
    Trust in a module lets its classes be called; its functions may be attributes, and run when the network does.
    """
    what = use.what
    if not isinstance(what, Global):
        return use.kind == "state" and what is None
    entry = admitted.get(what, _Admitted(None, False))
    if entry.trusted:
        return use.kind != "call" or isinstance(entry.found, type) or what.module in written
    if what == "functools.partial":
        return use.kind != "new" and isinstance(use.args, tuple) and _applicable(use.args[:1], admitted)
    if use.kind == "state":
        return True
    if use.kind == "new":
        bare = use.args == () or (isinstance(entry.found, type) and issubclass(entry.found, tuple))
        return what not in own and bare
    if what == "torch._tensor._rebuild_from_type_v2":
        rebuilt = use.args[:2] if isinstance(use.args, tuple) else ()
        return len(rebuilt) == 2 and rebuilt[0] in _REBUILDS
    return what in _CALLED or (isinstance(entry.found, type) and issubclass(entry.found, enum.Enum))


def _applicable(first: tuple[Any, ...], admitted: Mapping[Global, _Admitted]) -> bool:
    name = first[0] if first else None
    if not isinstance(name, Global) or name not in admitted:
        return False
    return name.module.startswith("torch.nn.modules.") or name in _KNOWN_FUNCTIONS or admitted[name].trusted


def _check_callables(path: Path, model: nn.Module, vouched: set[int]) -> None:
    """Refuse hooks, and attributes in the place of methods: both would be called by the first forward."""
    seen: set[int] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        if id(module) in seen or not isinstance(module, nn.Module):
            continue
        seen.add(id(module))
        children = vars(module).get("_modules")
        if not isinstance(children, dict):
            raise LoadError(f"{path} holds a {type(module).__name__} without its parts; save the network again.")
        pending.extend(children.values())
        for key, value in vars(module).items():
            kind = type(value)
            if "hooks" in key and isinstance(value, Mapping):
                for hook in value.values():
                    hook = vars(hook).get("hook") if _full_name(type(hook)) == _WRAPPED else hook
                    called = type(hook)
                    allowed = _full_name(called) in _HOOKS or isinstance(hook, bool)
                    if not allowed and not {id(called), id(hook)} & vouched:
                        raise UntrustedError(
                            f"{path} has a module with a hook, {called.__qualname__}; it was not loaded."
                        )
            elif (
                callable(value)
                and (callable(getattr(type(module), key, None)) or key == "_compiled_call_impl")
                and not {id(kind), id(value)} & vouched
            ):
                raise UntrustedError(f"{path} replaces the method {key} of {type(module).__name__}; it was not loaded.")


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _stranger_sentence(path: Path, names: list[Global], trust: tuple[str, ...], code_given: bool) -> str:
    mine = [name for name in names if name.module == "__main__"]
    never = [
        name
        for name in names
        if (name.module.partition(".")[0] in PYTHON and name not in mine)
        or (name.module.partition(".")[0] in _PACKAGES and not name.name.lstrip("_")[:1].isupper())  # a function
        or _CLOSED.fullmatch(name.module)
        or _vouched(name.module, trust)
    ]
    if never:
        return (
            f"{path} asks for {some(never)}, with which a file could run anything; it was not loaded. If it is your "
            "own network, save its state_dict instead, and give --arch pkg.mod:factory."
        )
    ways = []
    if mine:
        ways.append(f"--code {'with the file' if code_given else 'FILE.py, the script'} that defines them")
    roots = sorted({name.module for name in names if name not in mine})
    ways += [f"--trust {root}" for root in roots[:3]]
    return f"{path} asks for {some(names)}, which dslify does not know; if you trust them, say {' '.join(ways)}."
