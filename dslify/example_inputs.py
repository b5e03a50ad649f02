"""Inputs to run a network with: as the user spells them, as the network brings them, or inferred and proven to run."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from . import first_layer
from .errors import LoadError, OptionError
from .first_layer import inferred, runs, values, words

_MOST = 2**28  # elements of one input, 1 GiB in float32
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64)
} | {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_SHAPE = re.compile(r"\d+(x\d+)*")
_WHOLE = ("ids", "mask", "lengths", "labels")  # names that end so hold whole numbers, unless a type is given
_TOKENS, _SAMPLES = 16, 16000  # lengths of an input of whose length a configuration says nothing


class Example(NamedTuple):
    """Inputs of one forward, and one clause that says where they come from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    words: str


def example_for(model: nn.Module, spec: str | None = None) -> Example:
    """Inputs for one forward of `model`, positional and by keyword.

    spec: shapes such as "1x3x224x224", several by commas, each with an optional type ("1x16000,1x10:int64") and name
    ("input_ids=1x16,attention_mask=1x16:int64"; those named ids or mask are int64). Without it: the example that the
    network brings (a .pt2's own, `example_input_array`, `dummy_inputs`), what its configuration says (the input_size of
    timm, the image_size and the like of transformers), else what its first layer takes, largest size first. What is
    not the network's own example is proven by a forward pass. Values are seeded noise; whole numbers are valid indices
    for every embedding of the network, and masks let everything through.

    Raises OptionError for a spec that cannot be read, LoadError when no input is found.
    """
    if spec is not None:
        return _spelled(model, spec)
    brought = getattr(model, "example_input_array", None)
    if brought is not None:
        return _brought(model, brought)
    if isinstance(model, fx.GraphModule) and "dslify" in model.meta:
        shapes = model.meta["dslify"]["example"]
        leaves = [values(model, tuple(shape), getattr(torch, kind)) for shape, kind in shapes]
        spec_of = model.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
        args, kwargs = pytree.tree_unflatten(leaves, spec_of)
        return _named(args, kwargs, "as it was cut before")
    for name in ("pretrained_cfg", "default_cfg"):
        settings = getattr(model, name, None)
        size = settings.get("input_size") if isinstance(settings, Mapping) else getattr(settings, "input_size", None)
        if isinstance(size, (tuple, list)) and size and all(isinstance(axis, int) and axis > 0 for axis in size):
            inputs = (values(model, (1, *size), None),)
            return Example(inputs, {}, f"input {words(inputs)} (from the network's {name})")
    for kwargs, origin in _configured(model):
        if runs(model, (), kwargs, first_layer.SECONDS):
            return _by_name(model, kwargs, f"{origin}, proven by a forward pass")
    inputs, said = inferred(model)
    return Example(inputs, {}, said)


def example_inputs_for(model: nn.Module, spec: str | None = None) -> tuple[tuple[Any, ...], str]:
    """As example_for, for a network whose inputs are all positional: (inputs, words). Raises LoadError for others."""
    example = example_for(model, spec)
    if example.kwargs:
        raise LoadError(
            f"The network has inputs by keyword ({', '.join(example.kwargs)}); dslify.example_for gives them, and "
            "dslify.insert takes them as example_kwargs."
        )
    return example.args, example.words


def _spelled(model: nn.Module, spec: str) -> Example:
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    known = _names(model)
    for part in spec.split(","):
        name, equals, rest = part.strip().rpartition("=")
        value = values(model, *_parsed(rest.strip(), name, spec), name)
        if not equals:
            if kwargs:
                raise OptionError(
                    f"--input {spec}: {rest.strip()} has no name and stands behind one that has; name it."
                )
            args.append(value)
            continue
        if not name.isidentifier() or name in kwargs or name in (known or ())[: len(args)]:
            raise OptionError(f"--input {spec}: {name!r} cannot be the name of another input; write each name once.")
        if known is not None and name not in known:
            raise OptionError(f"--input {spec}: the network has no input {name!r}; its inputs are {', '.join(known)}.")
        kwargs[name] = value
    return _named(tuple(args), kwargs, "as given")


def _parsed(part: str, name: str, spec: str) -> tuple[tuple[int, ...], torch.dtype]:
    shape, colon, kind = part.partition(":")
    if not _SHAPE.fullmatch(shape):
        raise OptionError(
            f"--input {spec}: {part!r} is no shape; write sizes with x between them and commas between inputs, "
            "such as 1x1x16000, 1x3x224x224,1x10:int64 or input_ids=1x16,attention_mask=1x16."
        )
    if colon and kind not in _DTYPES:
        raise OptionError(f"--input {spec}: the type {kind!r} is none of {', '.join(_DTYPES)}.")
    sizes = tuple(int(size) for size in shape.split("x"))
    if not all(sizes) or math.prod(sizes) > _MOST:
        raise OptionError(f"--input {spec}: {shape} has {math.prod(sizes)} elements; give between 1 and {_MOST}.")
    return sizes, _DTYPES[kind] if colon else torch.int64 if name.endswith(_WHOLE) else torch.float32


def _names(model: nn.Module) -> list[str] | None:
    """The names that a forward takes, None where it takes any."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _brought(model: nn.Module, brought: Any) -> Example:
    keywords = getattr(model, "example_kwargs", None)
    source = "the archive's own example" if keywords is not None else "the network's example_input_array"
    kwargs = dict(keywords or {})
    if isinstance(brought, Mapping):
        inputs, kwargs = (), {**brought, **kwargs}
    else:
        inputs = tuple(brought) if isinstance(brought, (tuple, list)) else (brought,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((inputs, kwargs))):
        raise LoadError("The network's example_input_array holds no tensor; give the shape with --input 1x1x16000.")
    return _named(inputs, kwargs, source)


def _configured(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Inputs by name that a network of transformers may take: its own dummies, then what its configuration says."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return
    dummies = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, Mapping) and main in dummies:
        yield dict(dummies), "the network's dummy_inputs"
    tokens = {"decoder_input_ids": (1, _TOKENS)} if getattr(config, "is_encoder_decoder", False) else {}
    for shape in _shapes_of(config, main):
        for more in (tokens, {"pixel_values": next(_shapes_of(config, "pixel_values"))}):
            shapes = {main: shape, **more}
            dtypes = {name: torch.int64 if name.endswith(_WHOLE) else None for name in shapes}
            kwargs = {name: values(model, size, dtypes[name], name) for name, size in shapes.items()}
            yield kwargs, f"from the network's config and its main input, {main}"


def _shapes_of(config: Any, name: str) -> Iterator[tuple[int, ...]]:
    """Shapes that an input of this name can have under a configuration of transformers, the likeliest first."""

    def said(word: str, default: int) -> int:
        for part in (config, getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
            value = getattr(part, word, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and value > 0:
                return value
        return default

    side = said("image_size", 224)
    match name:
        case "pixel_values":
            yield (1, said("num_channels", 3), side, side)
        case "pixel_values_videos":
            yield (1, said("num_frames", 16), said("num_channels", 3), side, side)
        case "input_features":  # frames are halved once before the positions are added
            yield (1, said("num_mel_bins", 80), 2 * said("max_source_positions", 1500))
            yield (1, 100, said("num_mel_bins", said("input_feat_per_channel", 80)))
        case "input_values":
            yield (1, _SAMPLES)
            yield (1, said("audio_channels", 1), _SAMPLES)
            yield (1, said("max_length", 1024), said("num_mel_bins", 128))
        case _:
            yield (1, min(_TOKENS, said("max_position_embeddings", _TOKENS)))


def _by_name(model: nn.Module, kwargs: dict[str, Any], origin: str) -> Example:
    """A single input that comes first in the forward is positional, so that net(x) works."""
    first = next(iter(inspect.signature(model.forward).parameters), None)
    if list(kwargs) == [first]:
        return _named(tuple(kwargs.values()), {}, origin)
    return _named((), kwargs, origin)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], origin: str) -> Example:
    parts = [words(args)] if args else []
    parts += [f"{name} {words(value)}" for name, value in kwargs.items() if words(value)]
    return Example(args, kwargs, f"input {', '.join(parts)} ({origin})")
