"""The steps of a fine-tuning run: its two phases, what a checkpoint holds, and where a run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn

from .errors import TrainError
from .gather import LightObjective, SwitchObjective, gather, judge
from .refit import BATCH, SAMPLES, refit
from .run_folder import RunFolder
from .runs import Options, Phase
from .samples import Samples
from .schedule import device_of, load_trained_state, positions, rate_share, trained_state
from .switch import DSLayer

SWITCH_BATCH = 64  # at least: a step on cached features costs next to nothing
CLIP = 1.0  # largest norm of all gradients together
BETA_WARMUP = 0.25  # share of the light phase over which beta rises: at once it is fatal
WEIGHT_DECAY = 1e-4


class Run:
    """The state of one run: where it is, its curves, and the folder it writes to, if any."""

    def __init__(
        self, net: nn.Module, layers: Sequence[DSLayer], options: Options, checkpoint_every: int, bar: Progress
    ):
        self.net, self.layers, self.options, self.checkpoint_every = net, layers, options, checkpoint_every
        self.device = device_of(net)
        accelerator = "cpu" if self.device.type == "cpu" else self.device.type
        devices = 1 if self.device.index is None else [self.device.index]
        self.fabric = Fabric(accelerator=accelerator, devices=devices if accelerator != "cpu" else 1)
        self.step = 0  # of both phases together
        self.lines: list[dict[str, Any]] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.saved_optimizer: dict[str, Any] | None = None
        self.unseen: float | None = None
        self.cached = False
        self.fitted = False
        self.resumed_at: int | None = None
        self.folder: RunFolder | None = None
        self.stop_asked: Callable[[], bool] = lambda: False
        self.bar, self.task = bar, bar.add_task("fine-tuning", total=options.steps + options.switch_steps)

    def state(self) -> dict[str, Any]:
        """A checkpoint: everything that a step changes. The data's order is a function of seed and step."""
        return {
            "layers": [trained_state(layer) for layer in self.layers],
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "unseen": self.unseen,
            "cached": self.cached,
            "fitted": self.fitted,
        }

    def restore(self, state: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            load_trained_state(layer, saved)
        self.saved_optimizer, self.unseen = state["optimizer"], state["unseen"]
        self.cached, self.fitted = state["cached"], state["fitted"]
        torch.set_rng_state(state["random"])
        self.step = self.resumed_at = state["step"]
        self.lines = lines
        self.bar.update(self.task, completed=self.step)

    def light_phase(self, samples: Samples) -> None:
        options = self.options
        if self.step >= options.steps and self.step > 0:
            return
        masks = [layer.mask.weight for layer in self.layers] if options.beta > 0 else []
        # A layer behind a mask that moves sees other inputs at every step: nothing to keep then.
        room = options.cache_bytes if not masks or len(self.layers) == 1 else 0
        scales, tables = gather(self.net, self.layers, self.batches, samples, room, bool(masks))
        if self.step == 0:
            for layer, scale in zip(self.layers, scales, strict=True):
                layer.scale.copy_(scale)
        self.cached = tables is not None
        if self.step == 0 and options.fit and tables is not None:
            seen = positions(len(samples), min(SAMPLES, len(samples)), 0, options.seed, "light").split(BATCH)
            for layer, table in zip(self.layers, tables, strict=True):
                self.fitted |= refit(self.net, layer, [table.take(part)[0] for part in seen])
        paths = [parameter for layer in self.layers for parameter in layer.light.parameters()]
        for parameter in (*paths, *masks):
            parameter.requires_grad_(parameter.is_floating_point())
        if not paths and not masks:
            return  # a light path without parameters has nothing to learn
        names = ("light", "mask", "anchor") if masks else ("light",)
        objective = LightObjective(self.net, self.layers, tables, samples)
        groups: list[dict[str, Any]] = [{"params": paths}] if paths else []
        if masks:
            groups.append({"params": masks, "weight_decay": 0.0})
        self._train("light", names, objective, groups, len(samples), options.batch_size, 0, options.steps)
        for parameter in (*paths, *masks):
            parameter.requires_grad_(False)

    def switch_phase(self, samples: Samples) -> None:
        options = self.options
        end = options.steps + options.switch_steps
        if self.step >= end:
            return
        features, actual = judge(self.net, self.layers, self.batches, samples)
        self.unseen = torch.stack([column.mean() for column in actual]).mean().item()
        switches = [layer.switch for layer in self.layers]
        if self.step <= options.steps:
            self.step = options.steps
            for switch, seen in zip(switches, features, strict=True):
                switch.standardise(seen)
        parameters = [parameter for switch in switches for parameter in switch.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        objective = SwitchObjective(switches, features, actual)
        batch = max(SWITCH_BATCH, options.batch_size)
        self._train("switch", ("switch",), objective, [{"params": parameters}], len(samples), batch, options.steps, end)

    def batches(self, samples: Samples, text: str) -> Iterator[tuple[int, Tensor]]:
        """(position of the first, batch) over all samples in order, with a bar."""
        size = self.options.batch_size
        task = self.bar.add_task(text, total=len(samples))
        for begin in range(0, len(samples), size):
            if self.stop_asked():
                raise KeyboardInterrupt("stopped between two steps; resume with the same run folder")
            yield begin, samples.batch(range(begin, min(begin + size, len(samples)))).to(self.device)
            self.bar.update(task, advance=size)
        self.bar.remove_task(task)

    def finish(self) -> None:
        if self.folder is not None and not self.folder.finished:
            self.folder.save(self.step, self.state(), final=True)

    def phases(self) -> tuple[Phase, ...]:
        found = []
        for name in dict.fromkeys(line["phase"] for line in self.lines):
            lines = [line for line in self.lines if line["phase"] == name]
            parts = [part for part in lines[0] if part not in ("step", "phase", "lr", "seconds")]
            losses = {part: tuple(line[part] for line in lines) for part in parts}
            found.append(Phase(name, losses, lines[-1]["seconds"]))
        return tuple(found)

    def _train(
        self,
        phase: str,
        names: Sequence[str],
        objective: nn.Module,
        groups: list[dict[str, Any]],
        count: int,
        batch: int,
        begin: int,
        end: int,
    ) -> None:
        """Steps `begin` to `end` of the run, from where it stands."""
        options = self.options
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=WEIGHT_DECAY, fused=fused)
        if self.step > begin and self.saved_optimizer is not None:
            optimizer.load_state_dict(self.saved_optimizer)
        self.optimizer = optimizer
        module, stepper = self.fabric.setup(objective, optimizer, move_to_device=False)
        batch = min(batch, count)
        gone = next((line["seconds"] for line in reversed(self.lines) if line["phase"] == phase), 0.0)
        started = time.perf_counter() - gone
        while self.step < end:
            at, steps = self.step - begin, end - begin
            rate = options.lr * rate_share(at, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            weights = self._weights(phase, at, steps)
            losses = module(positions(count, batch, at, options.seed, phase))
            total = (losses * losses.new_tensor(weights)).sum()
            value = total.item()
            if not math.isfinite(value):
                raise TrainError(self._diverged(phase, f"the loss is {value}"))
            stepper.zero_grad()
            self.fabric.backward(total)
            norm = self.fabric.clip_gradients(module, stepper, max_norm=CLIP, error_if_nonfinite=False)
            if not math.isfinite(float(norm)):  # type: ignore[arg-type]
                raise TrainError(self._diverged(phase, f"the gradient is {float(norm)}"))  # type: ignore[arg-type]
            stepper.step()
            self.step += 1
            parts = dict(zip(names, losses.tolist(), strict=True))
            line = {"step": self.step, "phase": phase, "lr": rate, **parts, "total": value}
            self._after({**line, "seconds": round(time.perf_counter() - started, 3)}, end)
        self.optimizer = self.saved_optimizer = None

    def _after(self, line: dict[str, Any], end: int) -> None:
        self.lines.append(line)
        self.bar.update(self.task, advance=1, description=f"{line['phase']} {line['total']:.4f}")
        if self.folder is None:
            return
        self.folder.log(line)
        stop = self.stop_asked()
        if stop or self.step % self.checkpoint_every == 0 or self.step == end:
            self.folder.save(self.step, self.state())
        if stop:
            raise KeyboardInterrupt(f"stopped after step {self.step}; resume with the run folder {self.folder.path}")

    def _weights(self, phase: str, at: int, steps: int) -> list[float]:
        options = self.options
        if phase == "switch" or options.beta == 0:
            return [options.alpha]
        beta = options.beta * min(1.0, (at + 1) / (BETA_WARMUP * steps))
        return [options.alpha, beta, options.anchor]

    def _diverged(self, phase: str, found: str) -> str:
        kept = (
            "" if self.folder is None or not self.step else f" The checkpoints in {self.folder.checkpoints} are kept."
        )
        return (
            f"Training stopped at step {self.step + 1} ({phase} phase): {found} although data and full path are "
            f"finite, so the trained part ran away; try a lower learning rate than {self.options.lr:g}.{kept}"
        )
