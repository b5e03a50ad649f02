"""Train a keyword network: `python -m recipes.keyword_spotting.train --data FOLDER`.

Cross-entropy on varied clips (augment.py), to which words that are no keywords are added, and behind every block the
cross-entropy of a small gate that tells keywords from the rest (deep supervision, arXiv 1409.5185): it helps the
network as well, and is thrown away. With `--teacher` also the divergence from a trained network's answers, which is
what lets a small transformer learn from two thousand clips. Kept is the exponential moving average of the weights.

Every step draws from (seed, step) alone, so that an interrupted run goes on to the same numbers as an unbroken one
(`--resume`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dslify.errors import DslifyError, OptionError, TrainError
from dslify.files import written_whole
from dslify.losses import class_balance, gate_loss
from dslify.omega import omega
from dslify.schedule import positions, rate_share
from dslify.switch import Switch

from .augment import blanked, other_sounds, other_words, varied
from .checkpoints import FOLDER, NETWORKS, build, read_checkpoint, write_checkpoint
from .data import POSITIVE, classes, noises, sounds, split_speakers, words_of
from .judge import logits
from .network import BANDS, HOP, LENGTH

PARTS = ("network", "average", "gates", "optimizer")  # of a trainer's state
SMOOTHING = 0.05  # of the labels
TEMPERATURE = 2.0  # of the teacher's and the learner's answers


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run.

    other: words that are no keywords, made from the batch's own, beside each batch, and as many other sounds. average:
    of the weights, what is kept of it at each step. supervision: weight of the gates' loss. save_every: steps between
    two checkpoints.
    """

    steps: int = 6000
    batch: int = 48
    other: int = 12
    rate: float = 4e-3
    decay: float = 2e-2
    average: float = 0.998
    supervision: float = 0.5
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} has to be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.other <= self.batch:
            raise OptionError(f"other has to be from 0 to the batch's {self.batch}, got {self.other}.")


class Trainer:
    """A network in training: its optimizer, the average of its weights, and its place in the run."""

    def __init__(self, network: nn.Module, settings: Settings, teacher: nn.Module | None = None):
        self.network, self.settings, self.teacher = network.train(), settings, teacher
        with torch.no_grad():
            between = network.stages(torch.zeros(2, BANDS, LENGTH // HOP + 1))[1]  # type: ignore[operator]
        self.gates = nn.ModuleList(Switch(value.shape[2], kind="positive") for value in between)
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.average), use_buffers=True)
        learned = [*network.parameters(), *self.gates.parameters()]
        self.optimizer = torch.optim.AdamW(learned, settings.rate, weight_decay=settings.decay)
        self.step, self.seconds = 0, 0.0

    def advance(self, sound: Tensor, truth: Tensor, noise: Tensor) -> float:
        """One step on a part of the clips (n, 1, samples) of the classes (n,); returns the loss before it."""
        began, settings = time.perf_counter(), self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        torch.manual_seed(settings.seed * 1_000_003 + self.step)  # of the dropout
        chosen = positions(len(sound), min(settings.batch, len(sound)), self.step, settings.seed, "keywords")
        clips, target = sound[chosen], truth[chosen]
        words = target.nonzero().flatten()[: settings.other]
        spoken = other_words(clips[words], target[words], generator)
        clips = torch.cat([clips, spoken, other_sounds(noise, settings.other, generator)])
        target = torch.cat([target, target.new_zeros(len(clips) - len(target))])
        clips = varied(clips, noise, generator)
        with torch.no_grad():
            frames = self.network.front(clips)  # type: ignore[operator]
            told = None if self.teacher is None else self.teacher(clips)
        logits, between = self.network.stages(blanked(frames, generator))  # type: ignore[operator]
        loss = F.cross_entropy(logits, target, label_smoothing=SMOOTHING)
        told_apart = torch.ones(len(target), dtype=torch.bool)
        told_apart[len(chosen) : len(chosen) + len(words)] = False  # a gate has no eye for the order of sounds
        positive = target[told_apart] > 0
        if settings.supervision and positive.any() and not positive.all():
            weight = class_balance(positive)
            for gate, value in zip(self.gates, between, strict=True):
                features = gate.features(value[told_apart])  # type: ignore[operator]
                if self.step == 0:
                    gate.standardise(features.detach())  # type: ignore[operator]
                score = gate.score(features)  # type: ignore[operator]
                loss = loss + settings.supervision * gate_loss(score, positive, weight)
        if told is not None:
            loss = loss + _divergence(logits, told)
        if not math.isfinite(loss.item()):
            raise TrainError(f"The loss is {loss.item()} at step {self.step + 1}; lower --rate {settings.rate:g}.")
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * rate_share(self.step, settings.steps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1
        self.seconds += time.perf_counter() - began
        return loss.item()

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        return {**parts, "step": self.step, "seconds": self.seconds, "settings": asdict(self.settings)}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises TrainError for the state of a run with other settings."""
        for name, value in asdict(self.settings).items():
            if state["settings"].get(name) != value and name != "save_every":
                raise TrainError(f"The run to go on with has {name} {state['settings'].get(name)}; got {value}.")
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]


def _divergence(logits: Tensor, told: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's answers, softened (arXiv 1503.02531)."""
    mine, theirs = (F.log_softmax(one / TEMPERATURE, 1) for one in (logits, told))
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * TEMPERATURE**2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="recipes.keyword_spotting.train", description="Train a keyword network.")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/, valid/ and test/")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="convolutional")
    parser.add_argument("--positive", default=POSITIVE, help="the labels that are keywords")
    parser.add_argument("--teacher", type=Path, help="a checkpoint whose answers are learned too")
    parser.add_argument("--output", type=Path, help="the checkpoint (its place in the recipe)")
    parser.add_argument("--resume", action="store_true", help="go on from the state beside the checkpoint")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(arguments)
    try:
        settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
        _run(given, settings)
    except (DslifyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(given: argparse.Namespace, settings: Settings) -> None:
    torch.set_num_threads(1)
    path = given.output or FOLDER / f"{given.network}.safetensors"
    data = sounds(given.data)
    positive = omega(given.positive, data["train"].labels)
    learning, calibration = split_speakers(data["train"])
    words = words_of(data["train"], positive)
    torch.manual_seed(settings.seed)
    teacher = None if given.teacher is None else read_checkpoint(given.teacher)[0]
    trainer = Trainer(build(given.network, 1 + len(words)), settings, teacher)
    kept = path.with_suffix(".state")
    if given.resume:
        if not kept.is_file():
            raise TrainError(f"There is nothing to go on from: no {kept}; leave --resume out.")
        trainer.restore(torch.load(kept, weights_only=True))
    place = {word: 1 + at for at, word in enumerate(words)}
    truth = torch.tensor([place.get(label, 0) for label in learning.labels])
    sound, noise = learning.batch(range(len(learning))), noises(learning, positive)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=settings.steps, completed=trainer.step)
        while trainer.step < settings.steps:
            loss = trainer.advance(sound, truth, noise)
            bar.update(task, advance=1, description=f"loss {loss:.3f}")
            if trainer.step % settings.save_every == 0 and trainer.step < settings.steps:
                with written_whole(kept) as temporary:
                    torch.save(trainer.state(), temporary)
    network = trainer.average.module.eval()
    right = {
        name: round(float((logits(network, part).argmax(1) == classes(part, positive).numpy()).mean()), 4)
        for name, part in {**data, "train": learning, "calibration": calibration}.items()
    }
    record = {
        "network": given.network,
        "classes": ["no keyword", *words],
        "parameters": sum(one.numel() for one in network.parameters()),
        "trained": {
            "settings": asdict(settings),
            "teacher": None if given.teacher is None else given.teacher.name,
            "seconds": round(trainer.seconds),
            "clips": len(learning),
            "speakers": len(set(learning.sources)),
        },
        "right": right,
    }
    write_checkpoint(network.state_dict(), path, record)
    kept.unlink(missing_ok=True)
    print(json.dumps(record["right"]))
    print(f"wrote {path} ({record['parameters']} parameters)")


if __name__ == "__main__":
    raise SystemExit(main())
