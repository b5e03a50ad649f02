"""finetune(): teach the light path to answer like the full one, then the switch to predict how well it does.

    gather     one pass over the data of the light phase: the output scale, and what the paths read and should answer
    light      L_lwd, and with beta > 0 the mask too: beta L_comp + anchor L_anchor; base and full path frozen
    switch     L_switch on other inputs, everything else frozen: features and differences are computed once

The threshold is no part of this: `calibrate` sets it on data that neither phase has seen.

Everything runs in eval mode (BatchNorm keeps its running statistics, as the frozen base needs) and is a function of the
seed and the step alone: no shuffling state is kept anywhere, so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from .data import Samples, expected_shape, open_data, raw_bytes, show_progress, split
from .errors import OptionError, TrainError
from .losses import anchor_loss, comparable, compression_loss, difference, light_loss, sample_scale, switch_loss
from .runs import History, Options, Phase, RunFolder, stop_requests
from .switch import DSLayer, Layout, Paths, Switch, dsl_layers, route

LIGHT_SHARE = 0.75  # of the training data, when the switch gets no data of its own
SWITCH_BATCH = 64  # at least: a step on cached features costs next to nothing
CLIP = 1.0  # largest norm of all gradients together
WARMUP = 0.05  # share of a phase over which the learning rate rises, and
BETA_WARMUP = 0.25  # over which beta does: at once it is fatal
LAST_RATE = 0.01  # of the learning rate, at the end of the cosine
WEIGHT_DECAY = 1e-4
CACHE_BYTES = 1 << 30
TRAINED = ("light", "mask", "switch")  # the parts of a layer that a run may change, besides its two buffers


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
    threads: of torch on the CPU, None for torch's own choice. progress: a bar on stderr, None where that is a terminal.
    cache_bytes: while all that frozen parts compute for the data fits into this, it is computed once and each step runs
    only what is trained (the normal, fast way); else each step runs the whole network. Same losses up to rounding.

    Trains where the network is (CPU or GPU). Afterwards it is in eval mode and every requires_grad is as it was.

    Raises DataError for unusable data, OptionError for numbers out of range, TrainError when the network cannot take
    the data, a loss is not finite, the run folder cannot be used or there is nothing to resume; KeyboardInterrupt after
    a signal, with the last step in the checkpoint.
    """
    options = Options(steps, switch_steps, batch_size, lr, alpha, beta, anchor, seed, cache_bytes)
    if checkpoint_every < 1 or (threads is not None and threads < 1):
        raise OptionError(f"checkpoint_every and threads are at least 1; got {checkpoint_every} and {threads}.")
    layers = dsl_layers(net)
    if not layers:
        raise OptionError("This network holds no Dynamic Switch Layer; put one in with dslify.insert(net, at=...).")
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
    config = {**asdict(options), **digests, "network": _frozen_digest(net, layers)}
    with ExitStack() as stack:
        stack.enter_context(_frozen(net, layers))
        stack.enter_context(_reproducible(net, seed, threads))
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
        self.device = _device(net)
        accelerator = "cpu" if self.device.type == "cpu" else self.device.type
        devices = 1 if self.device.index is None else [self.device.index]
        self.fabric = Fabric(accelerator=accelerator, devices=devices if accelerator != "cpu" else 1)
        self.step = 0  # of both phases together
        self.lines: list[dict[str, Any]] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.saved_optimizer: dict[str, Any] | None = None
        self.unseen: float | None = None
        self.cached = False
        self.resumed_at: int | None = None
        self.folder: RunFolder | None = None
        self.stop_asked: Callable[[], bool] = lambda: False
        self.bar, self.task = bar, bar.add_task("fine-tuning", total=options.steps + options.switch_steps)

    def state(self) -> dict[str, Any]:
        """A checkpoint: everything that a step changes. The data's order is a function of seed and step."""
        return {
            "layers": [_trained_state(layer) for layer in self.layers],
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "unseen": self.unseen,
            "cached": self.cached,
        }

    def restore(self, state: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            _load_trained_state(layer, saved)
        self.saved_optimizer, self.unseen, self.cached = state["optimizer"], state["unseen"], state["cached"]
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
        scales, tables = _gather(self, samples, room, bool(masks))
        if self.step == 0:
            for layer, scale in zip(self.layers, scales, strict=True):
                layer.scale.copy_(scale)
        self.cached = tables is not None
        paths = [parameter for layer in self.layers for parameter in layer.light.parameters()]
        for parameter in (*paths, *masks):
            parameter.requires_grad_(parameter.is_floating_point())
        if not paths and not masks:
            return  # a light path without parameters has nothing to learn
        names = ("light", "mask", "anchor") if masks else ("light",)
        objective = _LightObjective(self.net, self.layers, tables, samples)
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
        features, actual = _judge(self, samples)
        self.unseen = torch.stack([column.mean() for column in actual]).mean().item()
        switches = [layer.switch for layer in self.layers]
        if self.step <= options.steps:
            self.step = options.steps
            for switch, seen in zip(switches, features, strict=True):
                switch.standardise(seen)
        parameters = [parameter for switch in switches for parameter in switch.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        objective = _SwitchObjective(switches, features, actual)
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
            rate = options.lr * _rate(at, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            weights = self._weights(phase, at, steps)
            losses = module(_positions(count, batch, at, options.seed, phase))
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


class _Table:
    """What the frozen surroundings of one layer compute, for all samples at once: (cut, *crossing) and the answers.

    The cut is the one after the mask and the answers are the full path's, unless the mask trains: then the cut is the
    unmasked one and the answers are the original's. Answers that are not compared are None.
    """

    def __init__(self, layer: DSLayer, count: int):
        self.layouts, self.inputs, self.count = (*layer.inputs, *layer.outputs), len(layer.inputs), count
        self.values: list[Any] = []

    def write(self, values: Sequence[Any], begin: int, size: int, room: int) -> int | None:
        """Rows `begin` to `begin + size`. Returns what is left of `room` bytes; None when it cannot be kept."""
        if begin == 0:
            for value, layout in zip(values, self.layouts, strict=True):
                if _by_sample(value, layout):
                    room -= value.numel() * value.element_size() * self.count // size
            if room < 0:
                return None
            self.values = [self._room(value, layout, size) for value, layout in zip(values, self.layouts, strict=True)]
        for whole, value, layout in zip(self.values, values, self.layouts, strict=True):
            if _by_sample(value, layout):
                start, length = begin * layout.per_sample, size * layout.per_sample
                whole.narrow(layout.axis, start, length).copy_(value)
            elif isinstance(value, Tensor):
                if whole.shape != value.shape or not torch.equal(whole, value):
                    return None  # depends on which samples are together
            elif whole != (value // size * self.count if layout.scales else value):
                return None
        return room

    def take(self, positions: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(cut, *crossing) and the answers of these samples."""
        index = positions.to(self.values[0].device)
        rows = tuple(
            layout.take(value, index, self.count) for value, layout in zip(self.values, self.layouts, strict=True)
        )
        return rows[: self.inputs], rows[self.inputs :]

    def _room(self, value: Any, layout: Layout, size: int) -> Any:
        if _by_sample(value, layout):
            shape = list(value.shape)
            shape[layout.axis or 0] = self.count * layout.per_sample
            return value.new_empty(shape)
        return value // size * self.count if layout.scales else value


class _LightObjective(nn.Module):
    """Positions of samples -> the unweighted light loss, or (light, mask, anchor) while masks train.

    A module of its own, so that Fabric wraps what is trained whichever way the paths are run.
    """

    def __init__(self, net: nn.Module, layers: Sequence[DSLayer], tables: Sequence[_Table] | None, samples: Samples):
        super().__init__()
        self.net, self.layers, self.tables, self.samples = net, layers, tables, samples
        self.read = _Reader(net, layers)

    def forward(self, positions: Tensor) -> Tensor:
        total: Tensor | None = None
        for layer, (light, full, original) in zip(self.layers, self._answers(positions), strict=True):
            losses = [light_loss(light, full, layer.scale, layer.outputs)]
            if layer.mask.weight.requires_grad:
                losses.append(compression_loss(layer.mask.weight))
                losses.append(anchor_loss(full, original, layer.scale, layer.outputs))
            stacked = torch.stack(losses)
            total = stacked if total is None else total + stacked
        if total is None:
            raise TrainError("There is no Dynamic Switch Layer to train.")
        return total

    def _answers(self, positions: Tensor) -> Iterator[tuple[Any, Any, Any]]:
        """(light, full, original) of every layer."""
        if self.tables is None:
            self.read(self.samples.batch(positions).to(_device(self.net)))
            for layer in self.layers:
                paths = _ran(layer)
                yield paths.light, paths.full, paths.original
            return
        for layer, table in zip(self.layers, self.tables, strict=True):
            (cut, *crossing), answers = table.take(positions)
            if layer.mask.weight.requires_grad:
                masked = layer.mask(cut)
                yield layer.light(masked, *crossing), layer.full(masked, *crossing), answers
            else:
                yield layer.light(cut, *crossing), answers, None


class _SwitchObjective(nn.Module):
    """Positions of samples -> the switch loss, from features and actual differences that no longer change."""

    def __init__(self, switches: Sequence[Switch], features: Sequence[Tensor], actual: Sequence[Tensor]):
        super().__init__()
        self.held = nn.ModuleList(switches)  # for Fabric to find the parameters
        self.switches, self.features, self.actual = tuple(switches), features, actual

    def forward(self, positions: Tensor) -> Tensor:
        losses = []
        for switch, features, actual in zip(self.switches, self.features, self.actual, strict=True):
            index = positions.to(features.device)
            losses.append(switch_loss(score(switch, features[index]), actual[index]))
        return torch.stack(losses).sum().reshape(1)


def score(switch: Switch, features: Tensor) -> Tensor:
    """The switch's answer from its features, (batch, 2 channels) -> (batch,): what Switch.forward does after them."""
    normal = (features - switch.offset) / switch.spread
    return functional.softplus(switch.out(functional.silu(switch.hidden(normal))).squeeze(1))


@torch.no_grad()
def _gather(run: _Run, samples: Samples, room: int, masks_train: bool) -> tuple[list[Tensor], list[_Table] | None]:
    """One pass of the full route: the output scale of every layer and, while they fit into `room` bytes, its table."""
    layers = run.layers
    calls: list[list[tuple[Any, ...]]] = [[] for _ in layers]
    tables = [_Table(layer, len(samples)) for layer in layers] if room else None
    totals = [torch.zeros(len(layer.outputs), dtype=torch.float64) for layer in layers]
    with ExitStack() as stack:
        for layer, seen in zip(layers, calls, strict=True):
            stack.callback(layer.register_forward_pre_hook(_keeper(seen)).remove)
        stack.enter_context(route(run.net, "full"))
        read = _Reader(run.net, layers)
        for begin, batch in run.batches(samples, "reading the full path"):
            for seen in calls:
                seen.clear()
            read(batch)
            for at, layer in enumerate(layers):
                paths = _ran(layer)
                means = sample_scale(paths.full or (), layer.outputs)
                _check_finite(means, samples, begin)
                totals[at] += means.sum(0).cpu()
                if tables is None or len(calls[at]) != 1:  # a layer that runs twice has no single input
                    tables = None
                    continue
                cut, *crossing = calls[at][0]
                answers = layer.full(cut, *crossing) if masks_train else paths.full
                compared = [
                    value if comparable(value, layout) else None
                    for value, layout in zip(answers or (), layer.outputs, strict=True)
                ]
                values = (cut if masks_train else paths.masked, *crossing, *compared)
                left = tables[at].write(values, begin, len(batch), room)
                if left is None:
                    tables = None
                else:
                    room = left
    return [total / len(samples) for total in totals], tables


@torch.no_grad()
def _judge(run: _Run, samples: Samples) -> tuple[list[Tensor], list[Tensor]]:
    """For every layer the switch's features, (n, 2 channels), and the actual differences, (n,)."""
    features: list[list[Tensor]] = [[] for _ in run.layers]
    actual: list[list[Tensor]] = [[] for _ in run.layers]
    read = _Reader(run.net, run.layers)
    for begin, batch in run.batches(samples, "comparing the paths"):
        read(batch)
        for at, layer in enumerate(run.layers):
            paths = _ran(layer)
            gaps = difference(paths.light or (), paths.full or (), layer.scale, layer.outputs)
            _check_finite(gaps[:, None], samples, begin)
            features[at].append(layer.switch.features(layer.pooled(paths.masked)))
            actual[at].append(gaps)
    return [torch.cat(parts) for parts in features], [torch.cat(parts) for parts in actual]


def _keeper(seen: list[tuple[Any, ...]]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, inputs: seen.append(inputs)


def _by_sample(value: Any, layout: Layout) -> bool:
    return layout.axis is not None and isinstance(value, Tensor)


def _ran(layer: DSLayer) -> Paths:
    if layer.paths is None:
        raise TrainError("A Dynamic Switch Layer did not run in the network's forward; remove what is never called.")
    return layer.paths


class _Enough(BaseException):
    """Every layer has run; no Exception, so that no handler on the way up takes it for an error."""


class _Reader:
    """Runs the network as far as its layers need it: behind the last one, a codec's decoder say, nothing is computed.

    How often the layers run in one forward is learned from the first call, which runs to the end.
    """

    def __init__(self, net: nn.Module, layers: Sequence[DSLayer]):
        self.net, self.layers = net, layers
        self.expected: int | None = None

    def __call__(self, batch: Tensor) -> None:
        ran = 0

        def count(*_: Any) -> None:
            nonlocal ran
            ran += 1
            if ran == self.expected:
                raise _Enough

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(count).remove)
            try:
                self.net(batch)
            except _Enough:
                return
            except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
                raise TrainError(self._refusal(batch, error)) from error
        self.expected = ran

    def _refusal(self, batch: Tensor, error: Exception) -> str:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        shape = expected_shape(self.net)
        known = "" if shape is None else f"; it was captured with samples of {'x'.join(map(str, shape))}"
        found = "x".join(map(str, batch.shape))
        return f"The network cannot take a batch of shape {found} ({reason[:200]}){known}."


def _check_finite(values: Tensor, samples: Samples, begin: int) -> None:
    """values: (batch, anything), of the samples from `begin` on."""
    broken = (~torch.isfinite(values).all(1)).nonzero().flatten().tolist()
    if broken:
        raise TrainError(
            f"The network's answer is not finite for {samples.names[begin + broken[0]]} ({len(broken)} such in its "
            "batch), so nothing can be learned from it; check the network or leave that sample out."
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


def _positions(count: int, batch: int, step: int, seed: int, phase: str) -> Tensor:
    """Which samples step `step` takes: (batch,), from permutations by epoch laid end to end."""
    begin = step * batch
    first, last = begin // count, (begin + batch - 1) // count
    line = torch.cat([_permutation(count, f"{seed}/{phase}/{epoch}") for epoch in range(first, last + 1)])
    return line[begin - first * count :][:batch]


@lru_cache(maxsize=4)
def _permutation(count: int, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _rate(at: int, steps: int) -> float:
    """Share of the learning rate at step `at`: linear warm-up, then a cosine down to LAST_RATE."""
    warm = WARMUP * steps
    if at < warm:
        return (at + 1) / (warm + 1)
    gone = (at - warm) / max(1.0, steps - warm)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * gone))


@contextmanager
def _frozen(net: nn.Module, layers: Sequence[DSLayer]) -> Iterator[None]:
    """Nothing requires a gradient and everything is in eval mode; at the end gradients are required as before."""
    before = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    net.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for layer in layers:
            layer.paths = None  # holds graphs, which can neither be copied nor saved


@contextmanager
def _reproducible(net: nn.Module, seed: int, threads: int | None) -> Iterator[None]:
    """Random numbers from the seed and that many threads; the caller's state comes back at the end."""
    before = torch.get_num_threads()
    device = _device(net)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _device(net: nn.Module) -> torch.device:
    return next((value.device for value in (*net.parameters(), *net.buffers())), torch.device("cpu"))


def _trained_state(layer: DSLayer) -> dict[str, Any]:
    parts = {name: getattr(layer, name).state_dict() for name in TRAINED}
    return {**parts, "threshold": layer.threshold, "scale": layer.scale}


def _load_trained_state(layer: DSLayer, saved: dict[str, Any]) -> None:
    for name in TRAINED:
        getattr(layer, name).load_state_dict(saved[name])
    layer.threshold.copy_(saved["threshold"])
    layer.scale.copy_(saved["scale"])


def _frozen_digest(net: nn.Module, layers: Sequence[DSLayer]) -> str:
    """A hash of all that training leaves alone and of the shapes of the rest: of the network, however far trained."""
    trained = {id(value) for layer in layers for value in (layer.threshold, layer.scale)}
    for layer in layers:
        for name in TRAINED:
            trained.update(map(id, getattr(layer, name).state_dict(keep_vars=True).values()))
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(net.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if id(value) not in trained:
            digest.update(raw_bytes(value))
    return digest.hexdigest()
