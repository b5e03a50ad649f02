"""The keyword network of `benchmarks/gc.py`: its data, its training, and the cache of the trained one."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dslify.data import open_data
from dslify.errors import OptionError
from dslify.omega import Omega
from dslify.samples import Samples
from dslify.schedule import positions, rate_share
from dslify.vary import vary
from recipes.keyword_spotting.network import LENGTH, RATE, KeywordNetwork

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Training:
    """What decides the network's weights, besides the data."""

    steps: int = 1500
    batch: int = 48
    rate: float = 4e-3
    decay: float = 1e-2
    smoothing: float = 0.05
    seed: int = 0


def sounds(folder: Path) -> dict[str, Samples]:
    """One-second clips of train, valid and test. Raises OptionError for a folder without them."""
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        raise OptionError(f"{folder} has no folder {' and no folder '.join(missing)}; expected train, valid and test.")
    return {name: open_data(folder / name, (1, LENGTH), rate=RATE) for name in PARTS}


def classes(samples: Samples, omega: Omega) -> Tensor:
    """The class of each sample: 0 for every negative, then the positive labels in order; (n,)."""
    words = [label for label in sorted(set(samples.labels)) if omega.positive([label])[0]]
    place = {label: 1 + at for at, label in enumerate(words)}
    return torch.tensor([place.get(label, 0) for label in samples.labels])


def noise(samples: Samples, omega: Omega, label: str = "background") -> Samples:
    """Sounds to mix in: those of the label, else every negative."""
    found = [at for at, name in enumerate(samples.labels) if name == label]
    return samples.subset(found or [at for at, one in enumerate(omega.positive(samples.labels)) if not one])


def trained(samples: Samples, omega: Omega, training: Training, cache: Path | None) -> KeywordNetwork:
    """The keyword network for these samples, in eval mode; from the folder `cache` if it was trained before."""
    torch.manual_seed(training.seed)
    target = classes(samples, omega)
    network = KeywordNetwork(int(target.max()) + 1)
    key = json.dumps([asdict(training), samples.digest(), target.tolist(), str(network)])
    file = cache and cache / f"network-{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}.safetensors"
    if file is not None and file.is_file():
        network.load_state_dict(load_file(file))
        return network.eval()
    _train(network, samples, target, noise(samples, omega), training)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), file)
    return network.eval()


def _train(network: KeywordNetwork, samples: Samples, target: Tensor, noises: Samples, training: Training) -> None:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), training.rate, weight_decay=training.decay)
    size = min(training.batch, len(samples))
    copies = math.ceil(training.steps * size / len(samples))
    learn = vary(samples, copies, noises=noises, seed=training.seed)
    target = target.repeat(1 + copies)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * rate_share(step, training.steps)
        chosen = positions(len(learn), size, step, training.seed, "keywords")
        logits = network(learn.batch(chosen))
        loss = F.cross_entropy(logits, target[chosen], label_smoothing=training.smoothing)
        if not math.isfinite(loss.item()):
            raise OptionError(f"The keyword network's loss is {loss.item()} at step {step + 1}; lower the rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
