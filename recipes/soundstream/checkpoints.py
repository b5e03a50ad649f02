"""The codec's files: weights as safetensors, and beside them a JSON file that says where they come from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dslify.errors import TrainError
from dslify.files import written_whole
from recipes.soundstream.model import CUT, SoundStream, SoundStreamConfig, encoder_costs


def read_checkpoint(path: Path) -> tuple[SoundStream, dict[str, Any]]:
    """The codec of a checkpoint, and the record of its training; TrainError where it cannot be read."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        model = SoundStream(SoundStreamConfig.from_json(note["config"]))
        model.load_state_dict(load_file(path))
        return model, note["trained"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TrainError(f"{path} with its .json is no checkpoint to start from: {error}") from error


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    with written_whole(path, mark=f".{os.getpid()}") as temporary:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata)


def write_checkpoint(
    model: SoundStream, path: Path, trained: dict[str, Any], figures: dict[str, Any], data: Sequence[str]
) -> None:
    """The weights and the record. trained: how. figures: how well it does. data: origins and licences."""
    config = model.config
    note = {
        "config": config.to_json(),
        "trained": {"data": list(data), **trained},
        **figures,
        "kbit_per_second": config.quantizers * math.log2(config.codebook_size) * 50 / 1000,
        "cut": CUT,
        "encoder": {name: asdict(cost) for name, cost in encoder_costs(config).items()},
        "parameters": {
            "decoder": sum(p.numel() for p in model.decoder.parameters()),
            "codebooks": config.quantizers * config.codebook_size * config.embedding,
        },
        "versions": {name: version(name) for name in ("torch", "vector-quantize-pytorch", "safetensors")},
    }
    write_tensors(model.state_dict(), path)
    with written_whole(path.with_suffix(".json"), mark=f".{os.getpid()}") as temporary:
        temporary.write_text(json.dumps(note, indent=1) + "\n")
