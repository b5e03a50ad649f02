"""The recipe's networks by name, and their files: weights as safetensors, and a JSON file that says how they came."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dslify.errors import OptionError, TrainError
from dslify.files import written_whole

from .network import KeywordNetwork
from .transformer import KeywordTransformer

NETWORKS: dict[str, type[KeywordNetwork] | type[KeywordTransformer]] = {
    "convolutional": KeywordNetwork,
    "transformer": KeywordTransformer,
}
FOLDER = Path(__file__).parent


def build(name: str, classes: int) -> KeywordNetwork | KeywordTransformer:
    """A network with random weights. Raises OptionError for another name."""
    if name not in NETWORKS:
        raise OptionError(f"The network is one of {', '.join(NETWORKS)}; got {name!r}.")
    return NETWORKS[name](classes)


def pretrained(name: str = "convolutional") -> KeywordNetwork | KeywordTransformer:
    """A trained network of the recipe, in eval mode. Raises OptionError for another name."""
    build(name, 1)
    return read_checkpoint(FOLDER / f"{name}.safetensors")[0]


def convolutional() -> nn.Module:
    """For `dslify insert recipes.keyword_spotting.checkpoints:convolutional`."""
    return pretrained("convolutional")


def transformer() -> nn.Module:
    """For `dslify insert recipes.keyword_spotting.checkpoints:transformer`."""
    return pretrained("transformer")


def read_checkpoint(path: Path) -> tuple[KeywordNetwork | KeywordTransformer, dict[str, Any]]:
    """The network of a checkpoint in eval mode, and its record; TrainError where it cannot be read."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        network = build(record["network"], len(record["classes"]))
        network.load_state_dict(load_file(path))
        return network.eval(), record
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TrainError(f"{path} with its .json is no checkpoint of a keyword network: {error}") from error


def write_checkpoint(tensors: dict[str, Tensor], path: Path, record: dict[str, Any]) -> None:
    """Weights and record, each whole or not at all. record: with "network", "classes", and how it was trained."""
    versions = {name: version(name) for name in ("torch", "safetensors")}
    mark = f".{os.getpid()}"
    with written_whole(path, mark=mark) as temporary:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary)
    with written_whole(path.with_suffix(".json"), mark=mark) as temporary:
        temporary.write_text(json.dumps({**record, "versions": versions}, indent=1) + "\n")
