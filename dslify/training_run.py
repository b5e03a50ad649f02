"""The steps of a fine-tuning run: its two phases, what a checkpoint holds, and where a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from .early_stop import EarlyStop
from .errors import TrainError
from .gate import GatedMaskObjective, GateObjective, fill_answers, gates, only_gates
from .gather import LightObjective, Reader, SwitchObjective, gather, judge
from .joint import JointObjective
from .objectives import SPARSITY, Objectives
from .output_losses import output_losses
from .refit import BATCH, SAMPLES, refit
from .run_folder import RunFolder
from .runs import Options
from .samples import Samples
from .schedule import device_of, load_trained_state, positions, rate_share, trained_state
from .segmented import segment_positions
from .stepper import Diverged, Stepper
from .switch import DSLayer
from .team import Team

SWITCH_BATCH = 64  # at least: a step on cached features costs next to nothing
BETA_WARMUP = 0.25  # share of the light phase over which beta rises: at once it is fatal


class Run:
    """The state of one run: where it is, its curves, and the folder it writes to, if any.

    positive: Omega(y) of the samples of each phase, for the gates; empty without gates.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[DSLayer],
        options: Options,
        checkpoint_every: int,
        bar: Progress,
        team: Team,
        positive: dict[str, Tensor],
    ):
        self.net, self.layers, self.options, self.checkpoint_every = net, layers, options, checkpoint_every
        self.how = {layer: output_losses(options.loss, options.weights, len(layer.outputs)) for layer in layers}
        self.team, self.positive, self.device = team, positive, device_of(net)
        self.gates = gates(layers)
        self.step = 0  # of both phases together
        self.lines: list[dict[str, Any]] = []
        self.stepper: Stepper | None = None
        self.saved: dict[str, Any] = {}  # of optimizer and precision, in the checkpoint that this run goes on from
        self.stop = EarlyStop(layers, options.patience)
        self.unseen: float | None = None
        self.cached = False
        self.fitted = False
        self.resumed_at: int | None = None
        self.folder: RunFolder | None = None  # of the first process alone
        self.stop_asked: Callable[[], bool] = lambda: False
        self.bar, self.task = bar, bar.add_task("fine-tuning", total=options.end)

    def state(self) -> dict[str, Any]:
        """A checkpoint: everything that a step changes. The data's order is a function of seed and step."""
        precision = self.team.precision
        return {
            "layers": [trained_state(layer) for layer in self.layers],
            "optimizer": None if self.stepper is None else self.stepper.optimizer.state_dict(),
            "precision": None if precision is None else precision.state_dict(),
            "early_stop": self.stop.state(),
            "network": self.net.state_dict() if self.options.joint_steps else None,
            "random": torch.get_rng_state(),
            "unseen": self.unseen,
            "cached": self.cached,
            "fitted": self.fitted,
        }

    def restore(self, state: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        if state["network"] is not None:
            self.net.load_state_dict(state["network"])
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            load_trained_state(layer, saved)
        self.saved, self.unseen = state, state["unseen"]
        self.cached, self.fitted = state["cached"], state["fitted"]
        self.stop.load(state["early_stop"])
        torch.set_rng_state(state["random"])
        self.step = self.resumed_at = state["step"]
        self.lines = lines
        self.bar.update(self.task, completed=self.step)

    def joint_phase(self, objective: JointObjective, samples: Samples) -> None:
        """Eq. 5 end to end: everything learns, but for the mask where beta is 0."""
        options = self.options
        if self.step >= options.joint_steps:
            return
        masks = [layer.mask for layer in self.layers]
        still = {id(weight) for mask in masks for weight in mask.parameters()} if options.beta == 0 else set()
        parameters = [one for one in objective.parameters() if one.is_floating_point() and id(one) not in still]
        for parameter in parameters:
            parameter.requires_grad_(True)
        everything = torch.arange(len(samples))
        batch = options.batch_size * options.accumulate
        parts = Objectives([(objective.names, objective)], masks if options.beta > 0 else ())
        groups = [{"params": parameters}]
        self._train("joint", parts, groups, (everything, everything[:0]), batch, (0, options.joint_steps))
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.net.eval()  # mask and switch are the training network's too

    def light_phase(self, samples: Samples) -> None:
        options = self.options
        if "light" in self.stop.kept or (self.step >= options.light_end and self.step > options.joint_steps):
            return
        masked = [layer for layer in self.layers if options.beta > 0]
        # A layer behind a mask that moves sees other inputs at every step: nothing to keep then.
        room = options.cache_bytes if not masked or len(self.layers) == 1 else 0
        read = Reader(self.net, self.layers)
        scales, tables = gather(self.net, self.layers, self.batches, samples, room, bool(masked), read)
        if self.step == options.joint_steps:
            for layer, scale in zip(self.layers, scales, strict=True):
                layer.scale.copy_(scale)
            if self.gates:
                fill_answers(self.net, self.gates, self.batches, samples, ~self.positive["light"])
        self.cached = tables is not None
        chosen, held = self.stop.divide(samples, options.seed)
        if self.step == options.joint_steps and options.fit and tables is not None:
            seen = chosen[positions(len(chosen), min(SAMPLES, len(chosen)), 0, options.seed, "light")].split(BATCH)
            for layer, table in zip(self.layers, tables, strict=True):
                self.fitted |= refit(self.net, layer, [table.take(part)[0] for part in seen])
        answering = [layer for layer in self.layers if not only_gates(layer)]  # whose light path can learn
        gating = [layer for layer in masked if only_gates(layer)]  # whose gate learns with its mask
        parts: list[tuple[Sequence[str], nn.Module]] = []
        if answering:
            names = ("light", "mask", "anchor") if masked else ("light",)
            kept = None if tables is None else [tables[self.layers.index(layer)] for layer in answering]
            how = [self.how[layer] for layer in answering]
            known = read if len(answering) == len(self.layers) else None
            parts.append((names, LightObjective(self.net, answering, kept, samples, how, known)))
        if gating:
            if self.step == options.joint_steps:
                for layer, seen in zip(gating, judge(self.net, gating, self.batches, samples)[0], strict=True):
                    layer.switch.standardise(seen)
            kept = None if tables is None else [tables[self.layers.index(layer)] for layer in gating]
            how = [self.how[layer] for layer in gating]
            objective = GatedMaskObjective(self.net, gating, kept, samples, self.positive["light"], how)
            parts.append((GatedMaskObjective.NAMES, objective))
        paths = [parameter for layer in answering for parameter in layer.light.parameters()]
        paths += [parameter for layer in gating for parameter in layer.switch.parameters()]
        masks = [layer.mask for layer in masked]
        weights = [parameter for mask in masks for parameter in mask.parameters()]
        for parameter in (*paths, *weights):
            parameter.requires_grad_(parameter.is_floating_point())
        if not paths and not weights:
            return  # a light path without parameters has nothing to learn
        groups: list[dict[str, Any]] = [{"params": paths}] if paths else []
        if weights:
            groups.append({"params": weights, "weight_decay": 0.0})
        batch = options.batch_size * options.accumulate
        span = (options.joint_steps, options.light_end)
        self._train("light", Objectives(parts, masks), groups, (chosen, held), batch, span)
        for parameter in (*paths, *weights):
            parameter.requires_grad_(False)

    def switch_phase(self, samples: Samples) -> None:
        options, span = self.options, (self.options.light_end, self.options.end)
        if "switch" in self.stop.kept or self.step >= options.end:
            return
        features, actual = judge(self.net, self.layers, self.batches, samples)
        count = len(actual[0]) // len(samples)  # segments that are routed one by one, of each sample
        self.unseen = torch.stack([column.mean() for column in actual]).mean().item()
        if self.step <= options.light_end:
            self.step = options.light_end
            for layer, seen in zip(self.layers, features, strict=True):
                together = options.steps and options.beta > 0 and only_gates(layer)
                if not together:  # else the gate is fitted to its features since the light phase
                    layer.switch.standardise(seen)
        parts: list[tuple[Sequence[str], nn.Module]] = []
        plain = [at for at, layer in enumerate(self.layers) if layer not in self.gates]
        gated = [at for at, layer in enumerate(self.layers) if layer in self.gates]
        if plain:
            told = ([features[at] for at in plain], [actual[at] for at in plain])
            parts.append((("switch",), SwitchObjective([self.layers[at].switch for at in plain], *told)))
        if gated:
            known = ([features[at] for at in gated], self.positive["switch"].repeat_interleave(count))
            parts.append((("gate",), GateObjective([self.layers[at].switch for at in gated], *known)))
        parameters = [parameter for layer in self.layers for parameter in layer.switch.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        batch = max(SWITCH_BATCH, options.batch_size * options.accumulate)
        chosen, held = (segment_positions(part, count) for part in self.stop.divide(samples, options.seed))
        self._train("switch", Objectives(parts), [{"params": parameters}], (chosen, held), batch, span)

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

    def _train(
        self,
        phase: str,
        objectives: Objectives,
        groups: list[dict[str, Any]],
        shares: tuple[Tensor, Tensor],
        batch: int,
        span: tuple[int, int],
    ) -> None:
        """The steps of `span` of the run, from where it stands.

        shares: positions of the samples to learn from, and of those held out to judge by. batch: samples in a step.
        """
        options, (begin, end), (chosen, held) = self.options, span, shares
        pieces = 1 if phase == "switch" else options.accumulate
        peak = options.joint_lr if phase == "joint" else options.lr
        judged = len(held) > 0 and self.stop.patience is not None
        self.stepper = stepper = Stepper(self.team, objectives, groups, options, pieces)
        self.team.agree(self.layers)
        if self.step > begin:
            stepper.optimizer.load_state_dict(self.saved["optimizer"])
            if self.team.precision is not None:
                self.team.precision.load_state_dict(self.saved["precision"])
        else:
            self.stop.start()
        batch, steps = min(batch, len(chosen)), end - begin
        last = self._weights(objectives.names, 1.0)
        gone = next((line["seconds"] for line in reversed(self.lines) if line["phase"] == phase), 0.0)
        started = time.perf_counter() - gone
        if judged and self.stop.fresh and self.step < end:
            self.stop.offer(self._held_out(stepper, held, batch, last), self.step)
        while self.step < end:
            at = self.step - begin
            rate = peak * rate_share(at, steps)
            weights = self._weights(objectives.names, min(1.0, (at + 1) / (BETA_WARMUP * steps)))
            drawn = chosen[positions(len(chosen), batch, at, options.seed, phase)]
            try:
                losses, total = stepper.step(drawn, weights, rate)
            except Diverged as found:
                raise TrainError(self._diverged(phase, str(found))) from None
            self.step += 1
            parts = dict(zip(objectives.names, losses, strict=True))
            line = {"step": self.step, "phase": phase, "lr": rate, **parts, "total": total}
            over = self.step == end
            if judged and (over or self.step % self.checkpoint_every == 0):
                line["held_out"] = self._held_out(stepper, held, batch, last)
                if self.stop.offer(line["held_out"], self.step) and self.folder is not None:
                    self.folder.save_best(self.step, self.state())
                over = over or self.stop.exhausted
                if over:
                    self.stop.keep(phase)
            self._after({**line, "seconds": round(time.perf_counter() - started, 3)}, over)
            if over:
                break
        self.stepper, self.saved = None, {}

    def _held_out(self, stepper: Stepper, held: Tensor, batch: int, weights: Sequence[float]) -> float:
        """The total over the samples held out."""
        return sum(len(part) * stepper.measure(part, weights) for part in held.split(batch)) / len(held)

    def _after(self, line: dict[str, Any], over: bool) -> None:
        self.lines.append(line)
        self.bar.update(self.task, advance=1, description=f"{line['phase']} {line['total']:.4f}")
        stop = self.team.any(self.stop_asked())
        if self.folder is not None:
            self.folder.log(line)
            if stop or over or self.step % self.checkpoint_every == 0:
                self.folder.save(self.step, self.state())
        if stop:
            where = f"; resume with the run folder {self.folder.path}" if self.folder is not None else ""
            raise KeyboardInterrupt(f"stopped after step {self.step}{where}")

    def _weights(self, names: Sequence[str], warm: float) -> list[float]:
        """What each loss weighs in the total; warm: the share of beta that is reached."""
        others = {
            "task": 1.0,
            "mask": warm * self.options.beta,
            "anchor": self.options.anchor,
            **dict.fromkeys(SPARSITY, 0.0),
        }
        return [others.get(name, self.options.alpha) for name in names]

    def _diverged(self, phase: str, found: str) -> str:
        rate = self.options.joint_lr if phase == "joint" else self.options.lr
        kept = (
            "" if self.folder is None or not self.step else f" The checkpoints in {self.folder.checkpoints} are kept."
        )
        return (
            f"Training stopped at step {self.step + 1} ({phase} phase): {found} although data and full path are "
            f"finite, so the trained part ran away; try a lower learning rate than {rate:g}.{kept}"
        )
