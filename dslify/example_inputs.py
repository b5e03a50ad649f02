"""Inputs to run a network with: as the user spells them, as the network brings them, or inferred and proven to run."""

from __future__ import annotations

import inspect
import math
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .errors import LoadError, OptionError

SECONDS = 20.0  # for all forward passes of one inference
_SCALE = 0.1  # deviation of the noise: loud enough for every path, too quiet to clip
_MOST = 2**28  # elements of one input, 1 GiB in float32
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64)
} | {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_SHAPE = re.compile(r"\d+(x\d+)*")


def example_inputs_for(model: nn.Module, spec: str | None = None) -> tuple[tuple[Any, ...], str]:
    """Positional inputs for one forward of `model`, and one clause that says where they come from.

    spec: shapes such as "1x3x224x224", several by commas, each with an optional type: "1x16000,1x10:int64". Without it:
    the example that the network brings (a .pt2's own, `example_input_array`, the input_size of a timm configuration),
    else what its first layer takes, largest size first, proven by a forward pass. Values are seeded noise; whole
    numbers are valid indices for every embedding of the network.

    Raises OptionError for a spec that cannot be read, LoadError when no input is found.
    """
    if spec is not None:
        inputs = tuple(_tensor(model, *_parsed(part, spec)) for part in spec.split(","))
        return inputs, f"input {_words(inputs)} (as given)"
    brought = getattr(model, "example_input_array", None)
    if brought is not None:
        return _brought(model, brought)
    for name in ("pretrained_cfg", "default_cfg"):
        settings = getattr(model, name, None)
        size = settings.get("input_size") if isinstance(settings, Mapping) else getattr(settings, "input_size", None)
        if isinstance(size, (tuple, list)) and size and all(isinstance(axis, int) and axis > 0 for axis in size):
            inputs = (_tensor(model, (1, *size), None),)
            return inputs, f"input {_words(inputs)} (from the network's {name})"
    return _inferred(model)


def _parsed(part: str, spec: str) -> tuple[tuple[int, ...], torch.dtype]:
    shape, colon, kind = part.strip().partition(":")
    if not _SHAPE.fullmatch(shape):
        raise OptionError(
            f"--input {spec}: {part.strip()!r} is no shape; write sizes with x between them and commas between inputs, "
            "such as 1x1x16000 or 1x3x224x224,1x10:int64."
        )
    if colon and kind not in _DTYPES:
        raise OptionError(f"--input {spec}: the type {kind!r} is none of {', '.join(_DTYPES)}.")
    sizes = tuple(int(size) for size in shape.split("x"))
    if not all(sizes) or math.prod(sizes) > _MOST:
        raise OptionError(f"--input {spec}: {shape} has {math.prod(sizes)} elements; give between 1 and {_MOST}.")
    return sizes, _DTYPES[kind] if colon else torch.float32


def _tensor(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """Seeded values of a shape; without a dtype, in that of the network's parameters."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    if dtype is None:
        dtype = parameter.dtype
    if dtype == torch.bool:
        value = torch.ones(shape, dtype=dtype)  # as a mask: everything counts
    elif dtype.is_floating_point:
        value = (torch.randn(shape, generator=generator) * _SCALE).to(dtype)
    else:
        entries = [layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)]
        value = torch.randint(0, min([*entries, 128] if entries else [2]), shape, generator=generator).to(dtype)
    return value.to(parameter.device)


def _brought(model: nn.Module, brought: Any) -> tuple[tuple[Any, ...], str]:
    keywords = getattr(model, "example_kwargs", None)
    if keywords or isinstance(brought, Mapping):
        names = ", ".join(keywords or brought)
        raise LoadError(
            f"The network's own example has inputs by keyword ({names}); from Python, give them to dslify.insert as "
            "example_kwargs, or export the network with positional inputs."
        )
    inputs = tuple(brought) if isinstance(brought, (tuple, list)) else (brought,)
    if not inputs or not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs)):
        raise LoadError("The network's example_input_array holds no tensor; give the shape with --input 1x1x16000.")
    source = "the archive's own example" if keywords is not None else "the network's example_input_array"
    return inputs, f"input {_words(inputs)} ({source})"


@dataclass(frozen=True)
class _Guess:
    """A layer that may be the first one, and the inputs it could be fed with, best first."""

    name: str
    words: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype | None = field(default=None)


def _inferred(model: nn.Module) -> tuple[tuple[Any, ...], str]:
    needed = _needed(model)
    if len(needed) != 1:
        shapes = ",".join(["1x1x16000", *["1x10"] * (len(needed) - 1)])
        raise LoadError(
            f"The network's forward needs {len(needed)} inputs ({', '.join(needed)}); give --input {shapes}."
        )
    guesses = list(_guesses(model))
    queue = guesses[:8]
    if guesses:
        queue.append(_Guess("", "", _LAST_RESORT))
    end = time.monotonic() + SECONDS
    tried: set[Any] = set()
    accident: tuple[tuple[Any, ...], _Guess] | None = None
    while queue:
        guess = queue.pop(0)
        for shape in guess.shapes:
            if (shape, guess.dtype) in tried or time.monotonic() > end:
                continue
            tried.add((shape, guess.dtype))
            inputs = (_tensor(model, shape, guess.dtype),)
            first = _first_called(model, inputs, guesses, end - time.monotonic())
            if first is guess or (first is not None and guess.shapes is _LAST_RESORT and accident is None):
                return inputs, _inference(inputs, first)
            if first is not None:  # it runs, but the shape was another layer's: ask the one that was called first
                accident = accident or (inputs, guess)
                queue = [first, *(other for other in queue if other is not first)]
                break
    if accident is not None:
        return accident[0], _inference(*accident)
    raise LoadError(
        f"No input was found on which {type(model).__name__} runs ({len(tried)} shapes tried); give its shape with "
        "--input, such as --input 1x1x16000 or --input 1x3x224x224."
    )


def _inference(inputs: tuple[Any, ...], first: _Guess) -> str:
    from_what = f"inferred from {first.name or 'the network'}, {first.words}"
    return f"input {_words(inputs)} ({from_what}, proven by a forward pass)"


def _needed(model: nn.Module) -> list[str]:
    """Names of the inputs that a forward cannot do without; the first one where none is required."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ["input"]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    return required or ["input"]


def _guesses(model: nn.Module) -> Iterator[_Guess]:
    """The parametric layers in the order of registration, with what each could take."""
    kinds = [type(layer).__name__ for layer in model.modules()]
    sequential = any(word in kind for kind in kinds for word in ("LSTM", "GRU", "RNN", "Attention", "Conv1d"))
    for name, layer in model.named_modules():
        guess = _guess(name, layer, sequential)
        if guess is not None:
            yield guess


_LENGTHS = (16000, 16384, 4096, 1024, 512, 256, 128, 64, 32, 16)
_FRAMES = (512, 256, 128, 100, 64, 32, 16)  # where the channels are features: attention over more is costly
_SIDES = (224, 256, 128, 96, 64, 32, 28, 16)
_LAST_RESORT: list[tuple[int, ...]] = [(1, 1, 16000), (1, 16000), (1, 2, 44100), (1, 3, 224, 224)]


def _guess(name: str, layer: nn.Module, sequential: bool) -> _Guess | None:
    kind = type(layer).__name__.removeprefix("Parametrized")
    article = "an" if kind[0] in "AEIO" or kind in ("LSTM", "RNN") else "a"
    shapes: list[tuple[int, ...]]
    match layer:
        case nn.Conv1d() | nn.ConvTranspose1d():
            channels = layer.in_channels
            lengths = _LENGTHS if channels <= 8 else _FRAMES
            shapes = [(1, channels, length) for length in lengths]
            if channels == 1:  # (batch, time), the channel axis added inside
                shapes += [(1, length) for length in lengths]
        case nn.Conv2d() | nn.ConvTranspose2d():
            channels = layer.in_channels
            shapes = [(1, channels, side, side) for side in _SIDES]
            if channels == 1:  # a spectrogram is computed inside
                shapes += [shape for length in _LENGTHS[:4] for shape in ((1, 1, length), (1, length))]
        case nn.Conv3d() | nn.ConvTranspose3d():
            channels = layer.in_channels
            shapes = [(1, channels, 16, side, side) for side in (112, 64, 32, 16)]
        case nn.Linear():
            channels = layer.in_features
            shapes = [(1, 16, channels), (1, channels)] if sequential else [(1, channels), (1, 16, channels)]
        case nn.Embedding():
            channels, shapes = layer.num_embeddings, [(1, 16), (1, 8), (1,)]
            return _Guess(name, f"{article} {kind} with {channels} entries", shapes, torch.int64)
        case nn.RNNBase():
            channels = layer.input_size
            shapes = [(1, 100, channels) if layer.batch_first else (100, 1, channels)]
        case nn.TransformerEncoderLayer() | nn.MultiheadAttention():
            attention = layer.self_attn if isinstance(layer, nn.TransformerEncoderLayer) else layer
            channels = attention.embed_dim
            shapes = [(1, 16, channels) if attention.batch_first else (16, 1, channels)]
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.GroupNorm():
            channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
            shapes = [(1, channels, 64, 64), (1, channels, 512), (1, channels)]
        case nn.LayerNorm():
            channels = layer.normalized_shape[-1]
            shapes = [(1, 16, *layer.normalized_shape), (1, *layer.normalized_shape)]
        case _:
            return None
    return _Guess(name, f"{article} {kind} with {channels} channel{'s' if channels != 1 else ''}", shapes)


def _first_called(model: nn.Module, inputs: tuple[Any, ...], guesses: list[_Guess], seconds: float) -> _Guess | None:
    """Run a forward; the parametric layer that was called first, or None if the network did not take the inputs."""
    called: list[_Guess] = []

    def remember(guess: _Guess) -> Callable[..., None]:
        return lambda *_: called.append(guess)

    handles = [model.get_submodule(guess.name).register_forward_pre_hook(remember(guess)) for guess in guesses]
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = False
        with _limited(seconds), torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = model(*inputs)
    except (Exception, _OutOfTime):
        return None
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags.items():
            module.training = flag
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return called[0] if called and tensors and all(tensor.numel() for tensor in tensors) else None


class _OutOfTime(BaseException):
    """No Exception, so that a network that catches those cannot catch this."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Stop the block after `seconds`; without effect outside the main thread, where signals do not arrive."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _words(inputs: tuple[Any, ...]) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return ", ".join(
        ("x".join(map(str, tensor.shape)) or "scalar")
        + ("" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}")
        for tensor in tensors
    )
