"""A file or a name -> an nn.Module in eval mode. Nothing is imported or called because a file says so.

Two kinds of files carry code: pickles call what they name, and torch.export archives hold pickles, libraries and
strings that torch evaluates. Here a pickle is read as symbols first, what it would call is held against short lists,
and only then torch reads it, with weights_only. Of an archive torch reads a copy that holds nothing which can run.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .archives import exported
from .errors import LoadError, one_line, some
from .example_inputs import example_inputs_for as example_inputs_for  # public here: dslify.load.example_inputs_for
from .pickles import unpickled
from .vouched import working_folder_first

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
        raise LoadError(f"{path} is damaged or cut short ({one_line(error)}); copy or save it again.") from None
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
        return exported(path)
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
    return _model_in(path, unpickled(path, trust, code), arch)


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
            raise LoadError(f"{text} could not be built: {type(error).__name__}: {one_line(error)}.") from error
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
        with working_folder_first():
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
        raise LoadError(f"{path} holds a {type(content).__name__} that is damaged: {one_line(error)}.") from None


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
            f"{word} {some(keys)}" for word, keys in (("lacks", missing), ("has besides", unexpected)) if keys
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
        raise LoadError(f"{path} is no readable safetensors file: {one_line(error)}.") from None


def _old_format(path: Path) -> Any:
    """The weights in a file from before PyTorch 1.6; never a whole module."""
    again = f'open it where it was made and save it again with torch.save(model, "{path.name}")'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise LoadError(f"{path} is a pickle that is not in today's torch.save format; {again}.") from None
