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
from recipes.keyword_spotting.network import LENGTH, RATE, KeywordNetwork

PARTS = ("train", "valid", "test")
SHIFT = 1600  # samples either way: 0.1 s
QUIETER, LOUDER = -12.0, 3.0  # dB
NOISY = 0.5  # share of the clips that get noise
NEAR, FAR = 0.0, 25.0  # dB, of the clip above the noise


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


def varied(sound: Tensor, noises: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of the clips (batch, 1, samples), each moved in time, at another level and perhaps with a noise in it."""
    count, _, length = sound.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    starts = torch.randint(0, 2 * SHIFT + 1, (count,), generator=generator).tolist()
    padded = F.pad(sound, (SHIFT, SHIFT))
    moved = torch.stack([clip[:, start : start + length] for clip, start in zip(padded, starts, strict=True)])
    chosen = torch.randint(0, len(noises), (count,), generator=generator)
    noise = noises[chosen].roll(int(torch.randint(0, length, (1,), generator=generator)), dims=2)
    wanted = _level(moved) * 10 ** (-uniform(NEAR, FAR) / 20)
    heard = torch.rand(count, 1, 1, generator=generator) < NOISY
    mixed = moved + heard * noise * wanted / _level(noise).clamp_min(1e-5)
    return (mixed * 10 ** (uniform(QUIETER, LOUDER) / 20)).clamp(-1.0, 1.0)


def variations(samples: Samples, copies: int, noises: Tensor, seed: int) -> Samples:
    """The samples and `copies` varied copies of each, with the labels and sources of the originals."""
    generator = torch.Generator().manual_seed(seed)
    everything = range(len(samples))
    parts = [samples.batch(everything)]
    parts += [varied(parts[0], noises, generator) for _ in range(copies)]
    times = 1 + copies
    return open_data(
        torch.cat(parts), samples.shape, labels=samples.labels * times, sources=samples.sources * times, progress=False
    )


def noise(samples: Samples, omega: Omega, label: str = "background") -> Tensor:
    """Sounds to mix in: those of the label, else every negative; (n, 1, samples)."""
    found = [at for at, name in enumerate(samples.labels) if name == label]
    return samples.batch(found or [at for at, one in enumerate(omega.positive(samples.labels)) if not one])


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


def _train(network: KeywordNetwork, samples: Samples, target: Tensor, noises: Tensor, training: Training) -> None:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), training.rate, weight_decay=training.decay)
    generator = torch.Generator().manual_seed(training.seed)
    size = min(training.batch, len(samples))
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * rate_share(step, training.steps)
        chosen = positions(len(samples), size, step, training.seed, "keywords")
        logits = network(varied(samples.batch(chosen), noises, generator))
        loss = F.cross_entropy(logits, target[chosen], label_smoothing=training.smoothing)
        if not math.isfinite(loss.item()):
            raise OptionError(f"The keyword network's loss is {loss.item()} at step {step + 1}; lower the rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _level(sound: Tensor) -> Tensor:
    """Root mean square of each clip: (batch, 1, 1)."""
    return sound.square().mean(2, keepdim=True).sqrt()
