"""Inputs inferred from a network's first layer, and proven by a forward pass."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .deadline import OutOfTime, limited
from .errors import LoadError

SECONDS = 20.0  # for all forward passes of one inference
_SCALE = 0.1  # deviation of the noise: loud enough for every path, too quiet to clip
_ENTRIES = 128  # of a vocabulary that values are drawn from


def values(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None, name: str = "") -> Tensor:
    """Seeded values of a shape for the input `name`; without a dtype, in that of the network's parameters.

    Whole numbers are valid indices for every embedding of the network; in a mask everything counts.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    if dtype is None:
        dtype = parameter.dtype
    if dtype == torch.bool or name.endswith("mask"):
        value = torch.ones(shape, dtype=dtype)
    elif dtype.is_floating_point:
        value = (torch.randn(shape, generator=generator) * _SCALE).to(dtype)
    else:
        entries = [layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)]
        value = torch.randint(0, min([*entries, _ENTRIES] if entries else [2]), shape, generator=generator).to(dtype)
    return value.to(parameter.device)


def words(tree: Any) -> str:
    """Shapes of the tensors in a tree, and the types that are not floating point."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return ", ".join(
        ("x".join(map(str, tensor.shape)) or "scalar")
        + ("" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}")
        for tensor in tensors
    )


@dataclass(frozen=True)
class _Guess:
    """A layer that may be the first one, and the inputs it could be fed with, best first."""

    name: str
    words: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype | None = field(default=None)


def inferred(model: nn.Module) -> tuple[tuple[Any, ...], str]:
    """One input on which the network runs and its first layer is called first, and a clause that says where it is from.

    Raises LoadError when the forward needs several inputs, or none of the shapes tried fits.
    """
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
            inputs = (values(model, shape, guess.dtype),)
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
    return f"input {words(inputs)} ({from_what}, proven by a forward pass)"


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
    """The parametric layer that a forward calls first, or None if the network did not take the inputs."""
    called: list[_Guess] = []

    def remember(guess: _Guess) -> Callable[..., None]:
        return lambda *_: called.append(guess)

    handles = [model.get_submodule(guess.name).register_forward_pre_hook(remember(guess)) for guess in guesses]
    try:
        taken = runs(model, inputs, {}, seconds)
    finally:
        for handle in handles:
            handle.remove()
    return called[0] if called and taken else None


def runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float) -> bool:
    """Whether a forward in eval mode gives tensors with something in them, in time; the network is left as it was."""
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = False
        with limited(seconds), torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = model(*args, **kwargs)
    except (Exception, OutOfTime):
        return False
    finally:
        for module, flag in flags.items():
            module.training = flag
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(tensor.numel() for tensor in tensors)
