"""A file or a name -> an nn.Module in eval mode. Nothing is imported or called because a file says so.

Two kinds of files carry code: pickles call what they name, and torch.export archives hold pickles, libraries and
strings that torch evaluates. Here a pickle is read as symbols first, what it would call is held against short lists,
and only then torch reads it, with weights_only. Of an archive torch reads a copy that holds nothing which can run.
"""

from __future__ import annotations

import _compat_pickle
import ast
import dataclasses
import difflib
import enum
import importlib
import importlib.util
import inspect
import io
import json
import logging
import os
import pickletools
import re
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from .errors import LoadError, StoreError, UntrustedError
from .example_inputs import example_inputs_for as example_inputs_for  # public here: dslify.load.example_inputs_for
from .graph_json import FUNCTIONS, check_path, identifier, operator_named, tree_spec

NAMES = "timm:resnet18, torchvision:resnet18, torchaudio:wav2vec2_base or pkg.mod:factory"
_SUFFIXES = {".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors", ".dsl", ".onnx", ".pkl", ".tar", ".zip"}
_SEED = 0  # of random weights, so that a name means the same network each time


def load_model(
    source: str | os.PathLike[str] | nn.Module,
    *,
    trust: Sequence[str] = (),
    code: Sequence[str | os.PathLike[str]] = (),
    arch: str | None = None,
) -> nn.Module:
    """The network behind a file or a name, on the CPU and in eval mode. A module is given back as it is.

    source: "model.pt" (a whole module saved by torch.save), "model.pt2" (torch.export), weights ("model.pth",
    "model.safetensors") together with `arch`, or a name: "timm:resnet18", "torchvision:resnet18",
    "torchaudio:wav2vec2_base", "pkg.mod:factory" (called without arguments). Names give random weights;
    "timm:resnet18?pretrained" downloads them.
    trust: modules ("pkg.mod") whose classes a pickle may use besides those of torch, torchvision, torchaudio, timm,
    transformers and dslify; they are imported. code: Python files to execute, whose classes stand in for the pickle's
    `__main__` and for the file's own name. arch: a name, the network that takes the weights.

    Raises UntrustedError for a file that wants more than it was trusted with, LoadError for anything else.
    """
    if isinstance(source, nn.Module):
        return source
    text = os.fspath(source)
    path = Path(text)
    if path.exists() or path.suffix in _SUFFIXES or (os.sep in text and ":" not in text):
        return _from_file(path, tuple(trust), tuple(code), arch)
    if arch is not None:
        raise LoadError(f"--arch gives the network to weights in a file, but {text} is a name and no file.")
    return _named(text)


def _from_file(
    path: Path, trust: tuple[str, ...], code: tuple[str | os.PathLike[str], ...], arch: str | None
) -> nn.Module:
    if not path.exists():
        raise LoadError(f"{path}: there is no such file. Give a file such as model.pt, or a name: {NAMES}.")
    if path.is_dir():
        raise LoadError(f"{path} is a folder; give the file inside that holds the model, such as {path / 'model.pt'}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise LoadError(f"{path} is empty (0 bytes); save the model again.")
    if path.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < size):
        return _fill(path, _safetensors(path), arch)
    if head.startswith(b"PK\x03\x04"):
        return _from_zip(path, trust, code, arch)
    if head.startswith(b"\x80"):
        return _fill(path, _old_format(path), arch)
    raise LoadError(f"{path} is no model file: it is neither a torch.save nor a torch.export nor a safetensors file.")


def _from_zip(
    path: Path, trust: tuple[str, ...], code: tuple[str | os.PathLike[str], ...], arch: str | None
) -> nn.Module:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise LoadError(f"{path} is damaged or cut short ({_one_line(error)}); copy or save it again.") from None
    if sum(member.file_size for member in members) > 2 * path.stat().st_size + 2**24:
        raise LoadError(
            f"{path} would unpack to far more than its own size, which no model file does; it was not loaded."
        )
    names = {member.filename.partition("/")[2] for member in members}
    if any(member.filename == "dslify.json" for member in members):
        raise LoadError(f"{path} is a dslified network already; read it with dslify.load, not as a plain model.")
    if "archive_format" in names:
        if arch is not None:
            raise LoadError(f"{path} holds the network itself, so --arch has nothing to say; drop it.")
        return _exported(path)
    if any(member.filename == "serialized_exported_program.json" for member in members):
        raise LoadError(f"{path} was exported by PyTorch 2.7 or older; export it again with torch.export.save.")
    if "constants.pkl" in names:
        raise LoadError(
            f"{path} is a TorchScript archive, whose code dslify cannot cut; save the module itself with "
            "torch.save(model, ...) or export it with torch.export.save."
        )
    if "data.pkl" not in names:
        raise LoadError(
            f"{path} is a zip archive, but no model file: it holds neither data.pkl nor an exported program."
        )
    return _model_in(path, _unpickled(path, trust, code), arch)


# Names


def _named(text: str) -> nn.Module:
    family, _, name = text.partition(":")
    if family in ("timm", "torchvision", "torchaudio"):
        name, question, option = name.partition("?")
        if question and option != "pretrained":
            raise LoadError(
                f"{text}: after the question mark only pretrained is known, as in {family}:{name}?pretrained."
            )
        build: Callable[[], Any] = _zoo(family, name, bool(question))
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        build = _factory(text)
    else:
        raise LoadError(f"{text}: there is no such file, and it is no name of a network. Names look like {NAMES}.")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(_SEED)
        try:
            model = build()
        except LoadError:
            raise
        except (Exception, SystemExit) as error:
            raise LoadError(f"{text} could not be built: {type(error).__name__}: {_one_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{text} gives a {type(model).__name__}, not a torch.nn.Module.")
    return model.eval()


def _zoo(family: str, name: str, pretrained: bool) -> Callable[[], Any]:
    try:
        package = importlib.import_module(family)
    except ImportError:
        raise LoadError(f"{family}:{name} needs {family}, which is not installed; pip install {family}.") from None
    if family == "timm":
        if package.is_model(name):
            return lambda: package.create_model(name, pretrained=pretrained)
        known = package.list_models()
    elif family == "torchvision":
        known = package.models.list_models()
        if name in known:
            builder = package.models.get_model_builder(name)
            options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
            if "weights_backbone" in inspect.signature(builder).parameters:
                options["weights_backbone"] = None  # its default would be downloaded
            return lambda: builder(**options)
    elif pretrained:
        bundles = {key: value for key, value in vars(package.pipelines).items() if hasattr(value, "get_model")}
        if name in bundles:
            return lambda: bundles[name].get_model()
        known = list(bundles)
    else:
        makers = {key: value for key, value in vars(package.models).items() if inspect.isfunction(value)}
        if name in makers:
            needed = [
                parameter.name
                for parameter in inspect.signature(makers[name]).parameters.values()
                if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            ]
            if needed:
                raise LoadError(
                    f"torchaudio:{name} needs {', '.join(needed[:3])}; write a function without arguments that builds "
                    "it, and name that: pkg.mod:factory."
                )
            return makers[name]
        known = list(makers)
    near = difflib.get_close_matches(name, known, 3, cutoff=0.3)
    raise LoadError(
        f"{family} knows no model called {name}" + (f"; the nearest are {', '.join(near)}." if near else ".")
    )


def _factory(text: str) -> Callable[[], Any]:
    module_name, _, name = text.partition(":")

    def build() -> Any:
        with _working_folder_first():
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                    raise
                raise LoadError(
                    f"{text}: there is no module {error.name}; run dslify in the folder that holds it, or install it."
                ) from None
            if not hasattr(module, name):
                near = difflib.get_close_matches(name, [key for key in vars(module) if key[0] != "_"], 3, 0.3)
                raise LoadError(f"{text}: {module_name} has no {name}; it has {', '.join(near) or 'nothing like it'}.")
            made = getattr(module, name)
            return made if isinstance(made, nn.Module) else made()

    return build


@contextmanager
def _working_folder_first(folder: str | None = None) -> Iterator[None]:
    """The working folder (or `folder`) on sys.path while what the user named is imported."""
    entry = folder or os.getcwd()
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


# Weights


def _model_in(path: Path, content: Any, arch: str | None) -> nn.Module:
    """The module inside what a file held, or `arch` with the weights that it held."""
    if isinstance(content, Mapping):
        wrapped = [content[key] for key in ("model", "net", "module", "ema", "state_dict") if key in content]
        content = next((value for value in wrapped if isinstance(value, nn.Module)), content)
    if not isinstance(content, nn.Module):
        return _fill(path, content, arch)
    if arch is not None:
        raise LoadError(f"{path} holds the network itself, so --arch has nothing to say; drop it.")
    try:
        return (content.module if isinstance(content, nn.DataParallel) else content).eval()
    except Exception as error:
        raise LoadError(f"{path} holds a {type(content).__name__} that is damaged: {_one_line(error)}.") from None


def _fill(path: Path, content: Any, arch: str | None) -> nn.Module:
    state = _state(content)
    if state is None:
        found = f"one tensor of shape {'x'.join(map(str, content.shape))}" if isinstance(content, Tensor) else ""
        if isinstance(content, Mapping):
            found = f"a dict with {', '.join(map(repr, list(content)[:5])) or 'nothing in it'}"
        raise LoadError(
            f"{path} holds {found or f'a {type(content).__name__}'}, and neither a network nor its weights."
        )
    if arch is None:
        raise LoadError(
            f"{path} holds weights only ({len(state)} tensors); say which network they belong to, with "
            "--arch timm:resnet18 or --arch pkg.mod:factory."
        )
    model = _named(arch)
    own = model.state_dict()
    for prefix in ("module.", "_orig_mod.", "model."):  # DataParallel, torch.compile, Lightning
        if state and all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or unexpected:
        differences = [
            f"{word} {_some(keys)}" for word, keys in (("lacks", missing), ("has besides", unexpected)) if keys
        ]
        raise LoadError(f"{path} does not fit {arch}: it {' and '.join(differences)}.")
    try:
        model.load_state_dict(state)
    except Exception as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "").strip().rstrip(".")
        raise LoadError(f"{path} does not fit {arch}: {reason}.") from None
    return model


def _state(content: Any) -> dict[str, Any] | None:
    """The state dict in what a file held, one level deep at most."""
    if not isinstance(content, Mapping):
        return None
    for inner in (
        content,
        *(content.get(key) for key in ("state_dict", "model_state_dict", "model", "net", "weights")),
    ):
        if isinstance(inner, Mapping) and inner and all(isinstance(key, str) for key in inner):
            values = [value for key, value in inner.items() if not key.endswith("_extra_state")]
            if values and all(isinstance(value, Tensor) for value in values):
                return dict(inner)
    return None


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise LoadError(f"{path} is no readable safetensors file: {_one_line(error)}.") from None


def _old_format(path: Path) -> Any:
    """The weights in a file from before PyTorch 1.6; never a whole module."""
    again = f'open it where it was made and save it again with torch.save(model, "{path.name}")'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise LoadError(f"{path} is a pickle that is not in today's torch.save format; {again}.") from None


# Pickles


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
_PYTHON = {*sys.stdlib_module_names, *_compat_pickle.IMPORT_MAPPING}  # with Python 2's names
_VALUES = {  # classes that carry settings and no more
    *("PreTrainedConfig", "GenerationConfig", "FeatureInfo"),
    *("BoxCoder", "BoxLinearCoder", "Matcher", "BalancedPositiveNegativeSampler"),  # of torchvision's detectors
}
_OPCODES_THAT_PUSH = {
    *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1", "BININT2"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"),
}


class _Name(str):
    """A global that a pickle names, as "module.name"."""

    def __new__(cls, module: str, name: str) -> _Name:
        self = super().__new__(cls, f"{module}.{name}")
        self.module, self.name = module, name
        return self

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Made:
    """The result of calling or constructing a global; what: the global, or None for anything else."""

    what: Any


@dataclasses.dataclass(frozen=True)
class _Admitted:
    """An object that a pickle may name; trusted: the user vouched for the module it was defined in."""

    found: Any
    trusted: bool


_Written = Mapping[str, list[types.ModuleType]]  # the user's own files, by the names a pickle may know them by


@dataclasses.dataclass(frozen=True)
class _Use:
    """What a pickle does with a global: "call" it, "new" without its constructor, or set its "state"."""

    kind: str
    what: Any
    args: Any


def symbols(data: bytes) -> tuple[set[_Name], list[_Use]]:
    """Every global that a pickle names and every use it makes of one, found without importing or calling anything.

    Raises ValueError for an opcode that torch's own weights_only reader would not take either.
    """
    names: set[_Name] = set()
    uses: list[_Use] = []
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "GLOBAL":
                module, _, attribute = arg.partition(" ")
                if (module, attribute) in NAME_MAPPING:  # Python 2 names, as torch maps them
                    module, attribute = NAME_MAPPING[module, attribute]
                else:
                    module = IMPORT_MAPPING.get(module, module)
                stack.append(_Name(module, attribute))
                names.add(stack[-1])
            case "NEWOBJ" | "REDUCE":
                args, what = stack.pop(), stack.pop()
                uses.append(_Use("new" if opcode.name == "NEWOBJ" else "call", what, args))
                stack.append(_Made(what))
            case "BUILD":
                state = stack.pop()
                uses.append(_Use("state", stack[-1].what if isinstance(stack[-1], _Made) else None, state))
            case "BINPERSID":
                stack[-1] = None
            case "APPEND":
                stack.pop()
            case "SETITEM":
                del stack[-2:]
            case "APPENDS" | "SETITEMS":
                stack = marks.pop()
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE":
                items, stack = tuple(stack), marks.pop()
                stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_TUPLE":
                stack.append(())
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "PROTO" | "STOP":
                pass
            case name if name in _OPCODES_THAT_PUSH:
                stack.append(None)
            case name:
                raise ValueError(f"pickle opcode {name}")
    return names, uses


def _unpickled(path: Path, trust: tuple[str, ...], code: tuple[str | os.PathLike[str], ...]) -> Any:
    """What a torch.save file holds, read with weights_only and with the globals that may be let in."""
    _check_trust(trust)
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, own, uses = _wanted(path, file)
        written = _executed(code)
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
            raise LoadError(f"{path} cannot be read: {_one_line(error)}.") from None
    trusted = {id(entry.found) for entry in admitted.values() if entry.trusted}
    for value in (content, *(content.values() if isinstance(content, Mapping) else ())):
        if isinstance(value, nn.Module):
            _check_callables(path, value, trusted)
    return content


def _wanted(path: Path, file: BinaryIO) -> tuple[set[_Name], set[_Name], list[_Use]]:
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
        raise LoadError(f"{path} is damaged: {_one_line(error)}.") from None
    if not unsafe <= names:
        raise LoadError(f"{path} is damaged: two ways of reading it differ.")
    return names, names - unsafe, uses


def _vouched(module: str, trust: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in trust)


def _admit(path: Path, name: _Name, trust: tuple[str, ...], written: _Written) -> _Admitted | None:
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
            with _working_folder_first():
                module = importlib.import_module(name.module)
        else:
            module = importlib.import_module(name.module)
    except Exception as error:
        raise LoadError(
            f"{path} needs {name.module}, which cannot be imported here: {type(error).__name__}: {_one_line(error)}."
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


def _harmless(use: _Use, own: set[_Name], admitted: Mapping[_Name, _Admitted], written: _Written) -> bool:
    """Whether a saved network may use a global like this.

    Modules are made without their constructors: those of transformers, called with a crafted configuration, fetch
    kernels. functools.partial and torch's rebuild of a tensor's type call their first argument, so that is checked too.
    Trust in a module lets its classes be called; its functions may be attributes, and run when the network does.
    """
    what = use.what
    if not isinstance(what, _Name):
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


def _applicable(first: tuple[Any, ...], admitted: Mapping[_Name, _Admitted]) -> bool:
    name = first[0] if first else None
    if not isinstance(name, _Name) or name not in admitted:
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


def _executed(code: tuple[str | os.PathLike[str], ...]) -> _Written:
    """The modules made of the user's files, by the names that a pickle may know them by."""
    made: dict[str, list[types.ModuleType]] = {}
    for file in code:
        path = Path(file)
        if not path.is_file():
            raise LoadError(f"--code {path}: there is no such file.")
        name = f"dslify_code_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise LoadError(f"--code {path} is no Python file; its name has to end in .py.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and copies look their module up there
        try:
            with _working_folder_first(str(path.resolve().parent)):
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a script without the __main__ guard may exit
            del sys.modules[name]
            raise LoadError(f"--code {path} failed: {type(error).__name__}: {_one_line(error)}.") from error
        for key in ("__main__", path.stem):
            made.setdefault(key, []).append(module)
    return made


def _check_trust(trust: tuple[str, ...]) -> None:
    for name in trust:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise LoadError(f"--trust takes the name of a module, such as package.module; got {name!r}.")
        if name.partition(".")[0] in _PYTHON:
            raise LoadError(
                f"--trust {name}: no network lives in Python's own library, whose functions can do anything."
            )


def _stranger_sentence(path: Path, names: list[_Name], trust: tuple[str, ...], code_given: bool) -> str:
    mine = [name for name in names if name.module == "__main__"]
    never = [
        name
        for name in names
        if (name.module.partition(".")[0] in _PYTHON and name not in mine)
        or (name.module.partition(".")[0] in _PACKAGES and not name.name.lstrip("_")[:1].isupper())  # a function
        or _CLOSED.fullmatch(name.module)
        or _vouched(name.module, trust)
    ]
    if never:
        return (
            f"{path} asks for {_some(never)}, with which a file could run anything; it was not loaded. If it is your "
            "own network, save its state_dict instead, and give --arch pkg.mod:factory."
        )
    ways = []
    if mine:
        ways.append(f"--code {'with the file' if code_given else 'FILE.py, the script'} that defines them")
    roots = sorted({name.module for name in names if name not in mine})
    ways += [f"--trust {root}" for root in roots[:3]]
    return f"{path} asks for {_some(names)}, which dslify does not know; if you trust them, say {' '.join(ways)}."


# Exported programs


_UNREAD_KEYS = {"nn_module_stack", "torch_version"}
_QUOTABLE = re.compile(r"[\w ,.:;<>()+*=/-]*")  # torch puts text inputs between quotes in the source of its guards
_PATH_KEYS = {"parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn", "path_name"}
_DROPPED_KEYS = {"stack_trace", "source_fn_stack", "torch_fn", "custom", "from_node", "treespec_namedtuple_fields"}
_SYMPY = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|ModularIndexing|FloorDiv|CleanDiv|CeilDiv|Where"
    r"|(Ceil|Floor|Trunc|Round)ToInt|TruncToFloat|RoundDecimal|ToFloat|IntTrueDiv|FloatTrueDiv|PowByNatural|FloatPow"
    r"|LShift|RShift|Identity|Eq|Ne|Equality|Unequality|(Strict)?(Less|Greater)Than|And|Or|Not|min|max|abs|int|float|round"
)
_ARITHMETIC = (ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")


def _exported(path: Path) -> nn.Module:
    """ep.module() of an archive, after a copy of it that holds only raw tensors and vetted descriptions.

    torch.export.load would unpickle payloads and example inputs, load compiled libraries, and evaluate strings of the
    program (sympy expressions, guards, tree specs that name modules). The example inputs end up on the module, as
    `example_input_array` and `example_kwargs`.
    """
    from torch.export.pt2_archive import PT2ArchiveWriter

    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, PT2ArchiveWriter(buffer) as writer:
            format_file = next(name for name in archive.namelist() if name.endswith("/archive_format"))
            root = format_file.removesuffix("archive_format")
            program = _vetted(json.loads(archive.read(f"{root}models/model.json")))
            writer.write_bytes("models/model.json", json.dumps(program).encode())
            example = _example(archive.read(f"{root}data/sample_inputs/model.pt"))
            again = io.BytesIO()
            torch.save(example, again)
            writer.write_bytes("data/sample_inputs/model.pt", again.getvalue() if example else b"")
            for kind in ("weights", "constants"):
                config = json.loads(archive.read(f"{root}data/{kind}/model_{kind}_config.json"))
                writer.write_bytes(f"data/{kind}/model_{kind}_config.json", json.dumps(_vetted(config)).encode())
                for file in _payloads(config["config"]):
                    writer.write_bytes(f"data/{kind}/{file}", archive.read(f"{root}data/{kind}/{file}"))
    except StoreError as error:
        raise UntrustedError(f"{path} was not loaded: {error}") from None
    except (KeyError, StopIteration) as error:
        raise LoadError(f"{path} is no archive of torch.export.save: {_one_line(error)}.") from None
    except Exception as error:
        raise LoadError(f"{path} is a damaged torch.export archive: {_one_line(error)}.") from None
    buffer.seek(0)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch logs tracebacks of what is one sentence here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(buffer).module()
    except Exception as error:
        raise LoadError(f"{path} cannot be read by PyTorch {torch.__version__}: {_one_line(error)}.") from None
    finally:
        logging.disable(disabled)
    _own_memory(module)
    for child in module.modules():
        child.training = False  # .eval() of an exported module raises
    if example is not None:
        module.__dict__.update(example_input_array=example[0], example_kwargs=example[1])
    return module


def _payloads(config: Mapping[str, Any]) -> set[str]:
    for name, payload in config.items():
        if payload["use_pickle"] is not False or not _PAYLOAD.fullmatch(payload["path_name"]):
            raise StoreError(f"{name[:100]} is stored as a pickle, which can run code.")
    return {payload["path_name"] for payload in config.values()}


def _vetted(data: Any, key: str = "") -> Any:
    """The description of a program or of its weights, every string in it known to be harmless where it stands.

    Raises StoreError. Devices become the CPU, and what only served debugging is left out.
    """
    match data:
        case dict() if key in ("device", "as_device"):
            return {"type": "meta" if data.get("type") == "meta" else "cpu", "index": None}
        case dict():
            for name in data:
                check_path(name)
            if "custom_obj" in data or "as_custom_obj" in data:
                raise StoreError("it holds a custom object, which can run code.")
            return {name: _vetted(value, name) for name, value in data.items() if name not in _DROPPED_KEYS}
        case list():
            return [_vetted(value, key) for value in data]
        case str() if key in ("in_spec", "out_spec"):
            tree_spec(data, arguments=key == "in_spec")
        case str() if key in ("target", "as_operator"):
            short = data.removeprefix("torch.ops.").replace("_operator.", "operator.")
            if short not in FUNCTIONS:
                operator_named(short)
        case str() if key in ("expr_str", "guards_code"):
            _check_expression(data)
        case str() if key in ("name", "as_name", "forward_arg_names", "verifiers"):
            identifier(data or "empty")
        case str() if key in _PATH_KEYS:
            check_path(data or "empty")
        case str() if key in ("as_string", "as_strings") and _QUOTABLE.fullmatch(data):
            pass
        case str() if key not in _UNREAD_KEYS:
            raise StoreError(f"it has a text where none belongs ({key[:50]}).")
    return data


def _check_expression(text: str) -> None:
    """Sizes and checks of sizes: numbers, symbols, arithmetic, L['x'].size()[0]. Raises StoreError."""
    try:
        pending: list[ast.AST] = [ast.parse(text, mode="eval").body]
    except (SyntaxError, ValueError):
        pending = [ast.Pass()]
    while pending:
        tree = pending.pop()
        match tree:
            case ast.Constant(value=bool() | int() | float()) | ast.Name(id="L" | "true" | "false" | "oo" | "int_oo"):
                continue
            case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)], keywords=keywords):
                identifier(name)
                pending += [keyword.value for keyword in keywords]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if _SYMPY.fullmatch(name):
                pending += [*args, *(keyword.value for keyword in keywords)]
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=args, keywords=[]):
                if isinstance(value, ast.Subscript) and name in ("size", "stride") and not args:
                    pending.append(value)
                elif isinstance(value, ast.Name) and f"{value.id}.{name}" in FUNCTIONS:
                    pending += args
                else:
                    pending.append(ast.Pass())
            case ast.Subscript(value=value, slice=ast.Constant(value=int())):
                pending.append(value)
            case ast.Subscript(value=value, slice=ast.Constant(value=str() as name)):
                identifier(name)  # torch writes it into a message inside double quotes
                pending.append(value)
            case _ if isinstance(tree, _ARITHMETIC):
                pending += ast.iter_child_nodes(tree)
            case _:
                raise StoreError(f"it holds an expression that is no arithmetic of sizes ({text[:60]!r}).")


def _example(data: bytes) -> tuple[Any, dict[str, Any]] | None:
    """The example inputs (args, kwargs) if they are plain values, else None. Their keys get into source code too."""
    try:
        example = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        pending = [example]
        while pending:
            value = pending.pop()
            if type(value) is dict:
                pending += [item for key, item in value.items() if identifier(key)]
            elif type(value) in (tuple, list):
                pending += value
            elif not (value is None or type(value) in (Tensor, bool, int, float)):
                return None
        args, kwargs = example
    except Exception:
        return None
    return (args, kwargs) if type(args) is tuple and type(kwargs) is dict else None


def _own_memory(module: nn.Module) -> None:
    """Move parameters and buffers out of the archive's read-only bytes; those that shared memory become one."""
    memo: dict[Any, Tensor] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is not None:
                    place = (value.data_ptr() or id(value), value.shape, value.stride(), type(value))
                    if place not in memo:
                        copy = value.detach().clone()
                        is_weight = isinstance(value, nn.Parameter)
                        memo[place] = nn.Parameter(copy, value.requires_grad) if is_weight else copy
                    table[name] = memo[place]  # type: ignore[assignment]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(str(name)[:80] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]
