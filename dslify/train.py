"""finetune(): teach the light path to answer like the full one, then the switch to predict how well it does.

    gather     one pass over the data of the light phase: the output scale, and what the paths read and should answer
    fit        a closed-form start of the light path, layer by layer
    light      L_lwd, and with beta > 0 the mask too: beta L_comp + anchor L_anchor; base and full path frozen
    switch     L_switch on other inputs, everything else frozen: features and differences are computed once

The threshold is no part of this: `calibrate` sets it on data that neither phase has seen.

Everything runs in eval mode (BatchNorm keeps its running statistics, as the frozen base needs) and is a function of the
seed and the step alone: no shuffling state is kept anywhere, so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn

from .data import open_data
from .errors import OptionError, TrainError
from .gather import LightObjective, SwitchObjective, gather, judge
from .refit import BATCH, SAMPLES, refit
from .run_folder import RunFolder, stop_requests
from .runs import History, Options, Phase
from .samples import Samples, expected_shape, show_progress, split
from .schedule import (
    device_of,
    frozen,
    frozen_digest,
    load_trained_state,
    positions,
    rate_share,
    reproducible,
    trained_state,
)
from .switch import DSLayer, required_layers, route

LIGHT_SHARE = 0.75  # of the training data, when the switch gets no data of its own
SWITCH_BATCH = 64  # at least: a step on cached features costs next to nothing
CLIP = 1.0  # largest norm of all gradients together
BETA_WARMUP = 0.25  # share of the light phase over which beta rises: at once it is fatal
WEIGHT_DECAY = 1e-4
CACHE_BYTES = 1 << 30


def finetune(
    net: nn.Module,
    train_data: Any,
    *,
    switch_data: Any = None,
    steps: int = 800,
    switch_steps: int = 400,
    batch_size: int = 16,
    lr: float = 3e-3,
    alpha: float = 1.0,
    beta: float = 0.0,
    anchor: float = 1.0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    seed: int = 0,
    threads: int | None = None,
    fit: bool = True,
    cache_bytes: int = CACHE_BYTES,
    progress: bool | None = None,
) -> History:
    """Train light path, mask and switch of every Dynamic Switch Layer of `net`, in place; base and full stay frozen.

    train_data, switch_data: anything `open_data` reads. The switch has to learn from inputs that the light path was not
    fitted to: without switch_data a quarter of train_data, divided by source, is kept for it.
    steps, switch_steps: of the two phases; 0 leaves a phase out. batch_size: of the light phase; the switch takes 64 at
    least. lr: peak of AdamW with warm-up and cosine. alpha, beta, anchor: weights of Eq. 5 and of the anchor; at
    beta = 0 the mask is frozen too and the full route stays what it was, exactly.
    run_dir: a folder for configuration, history, TensorBoard logs and checkpoints (every `checkpoint_every` steps, at
    SIGINT and SIGTERM, and at the end). resume: go on from its last checkpoint, with the same data and options.
    fit: let a light path that is as insert() made it start from a least-squares fit of its layers on up to 64 samples
    (while the data fits into cache_bytes).
    threads: of torch on the CPU, None for torch's own choice. progress: a bar on stderr, None where that is a terminal.
    cache_bytes: while all that frozen parts compute for the data fits into this, it is computed once and each step runs
    only what is trained (the normal, fast way); else each step runs the whole network. Same losses up to rounding.

    Trains where the network is (CPU or GPU). Afterwards it is in eval mode and every requires_grad is as it was.

    Raises DataError for unusable data, OptionError for numbers out of range, TrainError when the network cannot take
    the data, a loss is not finite, the run folder cannot be used or there is nothing to resume; KeyboardInterrupt after
    a signal, with the last step in the checkpoint.
    """
    options = Options(steps, switch_steps, batch_size, lr, alpha, beta, anchor, seed, fit, cache_bytes)
    if checkpoint_every < 1 or (threads is not None and threads < 1):
        raise OptionError(f"checkpoint_every and threads are at least 1; got {checkpoint_every} and {threads}.")
    layers = required_layers(net)
    where = None if run_dir is None else Path(run_dir)
    if resume:
        RunFolder.find(where)  # before any data is read
    parts, notes = _divide(net, train_data, switch_data, options, progress)
    data, seen = {}, {}
    for name, part in parts.items():
        seen[name] = part.fingerprints()
        sources = len(set(part.sources))
        data[name] = {"origin": part.report.origin, "samples": len(part), "sources": sources, "digest": part.digest()}
    if shared := len(set(seen["light"]).intersection(seen.get("switch", ()))):
        notes += (f"{shared} samples taught both the light path and the switch, which makes the switch too sure",)
    digests = {f"{name}_data": entry["digest"] for name, entry in data.items()}
    config = {**asdict(options), **digests, "network": frozen_digest(net, layers)}
    with ExitStack() as stack:
        stack.enter_context(frozen(net, layers))
        stack.enter_context(reproducible(net, seed, threads))
        stack.enter_context(route(net, "both"))
        run = _Run(net, layers, options, checkpoint_every, stack.enter_context(show_progress(progress)))
        if resume and where is not None:
            run.folder, state, lines = RunFolder.reopen(where, config)
            run.restore(state, lines)
        elif where is not None:
            run.folder = RunFolder.create(where, config, seen, run.state())
        if run.folder is not None:
            stack.callback(run.folder.close)
            run.stop_asked = stack.enter_context(stop_requests())
        try:
            run.light_phase(parts["light"])
            if "switch" in parts:
                run.switch_phase(parts["switch"])
            run.finish()
        except Exception:
            if run.folder is not None and run.step == 0 and not resume:
                run.folder.discard()  # a start that is refused leaves nothing behind
            raise
    return History(
        phases=run.phases(),
        scale=tuple(tuple(layer.scale.tolist()) for layer in layers),
        unseen=run.unseen,
        cached=run.cached,
        fitted=run.fitted,
        options=asdict(options),
        data=data,
        notes=notes,
        resumed_at=run.resumed_at,
        run_dir=None if run_dir is None else str(run_dir),
        fingerprints=frozenset(mark for marks in seen.values() for mark in marks),
    )


class _Run:
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


def _divide(
    net: nn.Module, train_data: Any, switch_data: Any, options: Options, progress: bool | None
) -> tuple[dict[str, Samples], tuple[str, ...]]:
    """The samples of the phases "light" and "switch", and remarks."""
    shape = expected_shape(net)
    train = open_data(train_data, shape, progress=progress)
    if options.switch_steps == 0:
        return {"light": train}, ()
    if switch_data is not None:
        return {"light": train, "switch": open_data(switch_data, shape, progress=progress)}, ()
    light, other = split(train, (LIGHT_SHARE, 1 - LIGHT_SHARE), options.seed)
    note = (
        f"no data was given for the switch: it learned from {len(other)} of the {len(train)} training samples, of "
        f"{len(set(other.sources))} sources that the light path has not seen"
    )
    return {"light": light, "switch": other}, (note,)
