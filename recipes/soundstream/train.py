"""Train the codec: `python -m recipes.soundstream.train --data FOLDER`.

The loss is spectral, with a little waveform and the quantizer's commitment; `--adversarial` adds a critic, for a run
that starts from a checkpoint whose spectral loss has converged. Every step draws its batch and its random
numbers from (seed, step) alone, so a run that was interrupted goes on to the same numbers as an unbroken one. With
`--seconds-budget` the clock sets the length instead of `--steps`, and two runs are no longer equal.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dslify.errors import DslifyError, OptionError, TrainError
from recipes.soundstream.adversarial import Critic, codec_losses, critic_loss
from recipes.soundstream.checkpoints import read_checkpoint, write_checkpoint, write_tensors
from recipes.soundstream.model import SoundStream
from recipes.soundstream.sound import Recording, Sound, find_recordings, fixed_clips, libritts, training_batch
from recipes.soundstream.spectral import LogMelDistance, ReconstructionLoss

TERM_WEIGHTS = {"mel": 1.0, "linear": 1.0, "wave": 0.1, "commitment": 1.0, "adversarial": 0.1, "feature": 1.0}


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run.

    steps: optimizer steps. seconds_budget: training time that ends the run, instead of steps. length: samples in a
    crop. save_every: steps between two validations, each followed by writing the checkpoint and the state.
    adversarial: with a critic, which learns alone in the warm-up.
    """

    steps: int = 20_000
    seconds_budget: float | None = None
    seed: int = 0
    batch: int = 12
    length: int = 16_000
    rate: float = 1e-3
    warmup: int = 200
    save_every: int = 500
    adversarial: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "save_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} has to be at least 1, got {getattr(self, name)}")


class Trainer:
    """A codec with its optimizer and its place in the run. before: the record of the run that it started from.

    On the CPU all is fp32; on a GPU encoder and decoder run in bf16. (bf16 convolutions on CPUs with AMX are wrong in
    torch 2.12.1.)
    """

    def __init__(
        self, model: SoundStream, settings: Settings, before: dict[str, Any] | None = None, device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).train()
        self.settings = settings
        self.before = before
        self.loss = ReconstructionLoss().to(self.device)
        self.critic = Critic().to(self.device) if settings.adversarial else None
        self.parts: dict[str, nn.Module] = {"model": self.model} | ({"critic": self.critic} if self.critic else {})
        self.optimizers = {
            name: torch.optim.AdamW(part.parameters(), settings.rate, betas=(0.8, 0.99), weight_decay=1e-4)
            for name, part in self.parts.items()
        }
        self.step = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        if self.settings.seconds_budget is not None:
            return min(1.0, self.seconds / self.settings.seconds_budget)
        return min(1.0, self.step / self.settings.steps)

    def rate(self) -> float:
        """Linear warm-up, then half a cosine down to a hundredth."""
        cosine = 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * self.progress))
        return self.settings.rate * min(1.0, (self.step + 1) / self.settings.warmup) * cosine

    def advance(self, sound: Sound) -> dict[str, float]:
        """One step; returns the terms of the loss before it."""
        began = time.perf_counter()
        settings = self.settings
        # The quantizer draws from torch's generator: first centroids, and replacements of codes that nothing uses.
        torch.manual_seed(settings.seed * 1_000_003 + self.step)
        generator = np.random.default_rng([settings.seed, self.step])
        x = training_batch(sound, settings.batch, settings.length, generator).to(self.device)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            y, commitment = self.model.reconstruct(x)
        y = y.float()
        terms = {**self.loss(x, y), "commitment": commitment}
        judged: dict[str, Tensor] = {}
        if self.critic is not None:
            real = self.critic(x)
            judged = {"critic": critic_loss(real, self.critic(y.detach()))}
            self._learn("critic", judged["critic"])
            if self.step >= settings.warmup:
                terms |= codec_losses(real, self.critic(y))
        total = torch.stack([TERM_WEIGHTS[name] * term for name, term in terms.items()]).sum()
        self._learn("model", total)
        self.step += 1
        self.seconds += time.perf_counter() - began
        return {name: term.item() for name, term in {"total": total, **terms, **judged}.items()}

    def _learn(self, part: str, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise TrainError(f"the loss of step {self.step} is {loss.item()}: try again with a smaller --rate")
        self.optimizers[part].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parts[part].parameters(), 1.0)
        self.optimizers[part].step()

    def record(self) -> dict[str, Any]:
        """How the codec came to be what it is."""
        return {
            "steps": self.step,
            "hours": round(self.seconds / 3600, 2),
            **{name: value for name, value in asdict(self.settings).items() if name not in ("steps", "save_every")},
            "term_weights": TERM_WEIGHTS,
            "started_from": self.before,
        }

    def save(self, path: Path) -> None:
        """Everything that the rest of the run depends on, as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for part, module in self.parts.items():
            tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
            for name, parameter in module.named_parameters():
                for field, value in self.optimizers[part].state[parameter].items():
                    tensors[f"adam.{part}.{name}.{field}"] = value
        place: dict[str, Any] = {"settings": asdict(self.settings), "config": self.model.config.to_json()}
        place |= {"step": self.step, "seconds": self.seconds, "before": self.before}
        write_tensors(tensors, path, {"place": json.dumps(place)})

    def restore(self, path: Path) -> None:
        """Go on from a file that `save` wrote.

        Raises TrainError where there is none, or where it belongs to a run with another seed, batch or shape.
        """
        try:
            with safe_open(path, "pt") as file:
                place = json.loads(file.metadata()["place"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise TrainError(f"{path} holds no interrupted run: start one without --resume ({error})") from error
        mine = {"config": self.model.config.to_json(), **asdict(self.settings)}
        theirs = {"config": place["config"], **place["settings"]}
        for name in ("seed", "batch", "length", "rate", "warmup", "adversarial", "config"):
            if json.dumps(mine[name]) != json.dumps(theirs[name]):
                raise TrainError(f"{path} belongs to a run with {name} {theirs[name]}, not {mine[name]}")
        for part, module in self.parts.items():
            module.load_state_dict(_below(f"{part}.", tensors))
            for name, parameter in module.named_parameters():
                self.optimizers[part].state[parameter].update(_below(f"adam.{part}.{name}.", tensors))
        self.step, self.seconds, self.before = place["step"], place["seconds"], place["before"]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def validate(model: SoundStream, clips: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Mean log-mel distance in dB over all clips and for each label."""
    model.eval()
    device = next(model.parameters()).device
    distance = LogMelDistance().to(device)
    distances = torch.cat([distance(x, model(x)).cpu() for x in clips.to(device).split(16)])
    model.train()
    groups = defaultdict(list)
    for label, distance in zip(labels, distances.tolist(), strict=True):
        groups[label or "unlabelled"].append(distance)
    return {"all": distances.mean().item(), **{label: sum(d) / len(d) for label, d in sorted(groups.items())}}


def train(
    settings: Settings,
    recordings: dict[str, list[Recording]],
    out: Path,
    *,
    start: Path | None = None,
    resume: bool = False,
    data: Sequence[str] = (),
    device: str = "cpu",
) -> Trainer:
    """Run to the end of the settings; `recordings` has "train" and "valid". Writes `out`, its .json and its .state.

    start: a checkpoint whose weights a new run begins with. resume: go on with the run whose state lies beside `out`.
    """
    torch.manual_seed(settings.seed)
    model, before = read_checkpoint(start) if start else (SoundStream(), None)
    trainer = Trainer(model, settings, before, device)
    state = out.with_suffix(".state")
    if resume:
        trainer.restore(state)
    out.parent.mkdir(parents=True, exist_ok=True)
    sound = Sound(recordings["train"])
    clips, labels = fixed_clips(Sound(recordings["valid"]), settings.length)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    sums: dict[str, float] = defaultdict(float)
    since = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=settings.steps)
        while trainer.progress < 1.0:
            terms = trainer.advance(sound)
            since += 1
            for name, value in terms.items():
                sums[name] += value
            done = trainer.step if settings.seconds_budget is None else round(trainer.progress * settings.steps)
            bar.update(task, completed=done, description=f"loss {terms['total']:.3f}")
            if trainer.step % settings.save_every == 0 or trainer.progress >= 1.0:
                loss = {name: round(value / since, 4) for name, value in sums.items()}
                distance = {name: round(value, 3) for name, value in validate(trainer.model, clips, labels).items()}
                figures = {"loss": loss, "valid_log_mel_db": distance}
                write_checkpoint(trainer.model, out, trainer.record(), figures, data)
                trainer.save(state)
                line = f"step {trainer.step}  {trainer.seconds:.0f} s  loss {loss}  valid dB {distance}"
                bar.console.print(line, soft_wrap=True, highlight=False)
                sums.clear()
                since = 0
    for path, reason in sound.skipped:
        console.print(f"skipped {path}: {reason}")
    return trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m recipes.soundstream.train", description="Train the codec.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="a folder with train/ and valid/ (or --valid), or a CSV manifest")
    source.add_argument("--libritts", metavar="SUBSET", help="for example train-clean-100: downloaded into --root")
    parser.add_argument("--valid", type=Path, help="sound for validation, where --data has no split of its own")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where LibriTTS lies or goes")
    parser.add_argument("--out", type=Path, default=Path("runs/soundstream/checkpoint.safetensors"))
    parser.add_argument("--resume", action="store_true", help="go on from the state beside --out")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights to begin with")
    parser.add_argument("--adversarial", action="store_true", help="with a critic; for --start, at a lower --rate")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for mixed precision")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seconds-budget", type=float, help="stop after this much training time, not after --steps")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--length", type=int, default=defaults.length, help="samples in a crop")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="highest learning rate")
    parser.add_argument("--save-every", type=int, default=defaults.save_every)
    parser.add_argument("--data-note", action="append", default=[], help="origin and licence, kept in the .json")
    given = parser.parse_args(arguments)
    try:
        settings = Settings(
            given.steps, given.seconds_budget, given.seed, given.batch, given.length, given.rate,
            save_every=given.save_every, adversarial=given.adversarial,
        )  # fmt: skip
        torch.set_num_threads(given.threads)
        if given.libritts:
            recordings = {"train": libritts(given.root, given.libritts), "valid": libritts(given.root, "dev-clean")}
        else:
            recordings = {
                "train": find_recordings(given.data, "train"),
                "valid": find_recordings(given.valid or given.data, "valid"),
            }
        train(
            settings,
            recordings,
            given.out,
            start=given.start,
            resume=given.resume,
            data=given.data_note,
            device=given.device,
        )
    except DslifyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
