"""finetune(): teach the light path to answer like the full one, then the switch to predict how well it does.

    joint      only if asked for: the whole network and the layer, end to end with a task loss (Eq. 5)
    gather     one pass over the data of the light phase: the output scale, and what the paths read and should answer
    fit        a closed-form start of the light path, layer by layer
    light      L_lwd, and with beta > 0 the mask too: beta L_comp + anchor L_anchor; base and full path frozen
    switch     L_switch on other inputs, everything else frozen: features and differences are computed once

A layer whose switch is a gate learns from labels instead: the constant answer of its light path is set, its mask (with
beta > 0) trains in the light phase with the gate's cross-entropy, and in the switch phase the gate trains alone.

The threshold is no part of this: `calibrate` sets it on data that neither phase has seen.

Everything runs in eval mode (BatchNorm keeps its running statistics, as the frozen base needs) and is a function of the
seed and the step alone: no shuffling state is kept anywhere, so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import open_data
from .errors import OptionError
from .gate import gates
from .gather import Reader
from .joint import Joint
from .kinds import label_counts, remember
from .omega import Omega, omega
from .output_losses import Kinds
from .run_folder import RunFolder, stop_requests
from .runs import History, Options, phases_of
from .samples import Samples, show_progress, split
from .schedule import device_of, frozen, frozen_digest, reproducible
from .segmented import segments_in
from .switch import DSLayer, required_layers, route
from .team import Team
from .training_run import Run

Positive = str | Iterable[Any] | Callable[[str], Any]  # which labels are positive, as dslify.omega reads it
LIGHT_SHARE = 0.75  # of the training data, when the switch gets no data of its own
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
    positive: Positive | None = None,
    loss: Kinds = "l1",
    weights: Sequence[float] | None = None,
    precision: str = "32-true",
    accumulate: int = 1,
    patience: int | None = None,
    joint: Joint | None = None,
) -> History:
    """Train light path, mask and switch of every Dynamic Switch Layer of `net`, in place; base and full stay frozen.

    train_data, switch_data: anything `open_data` reads, or what `vary` made of it. The switch has to learn from inputs
    that the light path was not fitted to: without switch_data a quarter of train_data, divided by source, is kept.
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
    positive: for networks with gates, the labels that are worth the full path: "1-9", "yes,no", "!background", a set, a
    callable from label to bool.
    loss, weights: how the light path's outputs (and the masked full path's) are held to the full path's: "l1", "mse",
    "cosine" or "kl" (logits), for all outputs, for each in a sequence or for some in a dict by position; and what each
    output weighs. The switch learns the relative difference whatever the loss.
    precision: "32-true"; "bf16-mixed"; "16-mixed" on a GPU. Frozen parts that are computed once are computed in single
    precision. accumulate: parts of a step that run one after another, of batch_size samples each.
    patience: with a number, a tenth of each phase's sources is held out and judged every `checkpoint_every` steps; a
    phase ends when that many judgings in a row brought nothing better, with the best state (best.pt in the run folder).
    joint: a first phase in which base and full path learn too, end to end with a task loss (dslify.Joint), and with a
    gate's if the layer has one; its labels are those of train_data. The other phases follow on what it leaves.

    Of a layer that routes segments the light path learns from whole samples and the switch from each segment, so
    samples have to be whole segments.

    Trains where the network is (CPU or GPU). Afterwards it is in eval mode and every requires_grad is as it was.
    Under torchrun the processes divide each step's batch; data, options and result are the same in all of them, and the
    first one alone writes. Each reads all the data.

    Raises DataError for unusable data, OptionError for numbers out of range, for labels that do not fit the gates and
    for a precision that the processor or the network cannot bear, TrainError when the network cannot take the data, a
    loss is not finite, the run folder cannot be used or there is nothing to resume; KeyboardInterrupt after a signal,
    with the last step in the checkpoint.
    """
    shares = None if weights is None else tuple(map(float, weights))
    options = Options(
        steps, switch_steps, batch_size, lr, alpha, beta, anchor, seed, fit, cache_bytes, loss, shares, precision,
        accumulate, patience, *(() if joint is None else (joint.steps, joint.lr)),
    )  # fmt: skip
    if checkpoint_every < 1 or (threads is not None and threads < 1):
        raise OptionError(f"checkpoint_every and threads are at least 1; got {checkpoint_every} and {threads}.")
    layers = required_layers(net)
    team = Team(device_of(net), precision)
    if joint is not None and team.world > 1:
        raise OptionError("Joint training runs in one process: batch statistics are not shared between several.")
    progress = progress if team.first else False
    where = None if run_dir is None else Path(run_dir)
    if resume:
        team.lead(lambda: RunFolder.find(where))  # before any data is read
    parts, notes = _divide(net, train_data, switch_data, options, progress)
    for name, part in parts.items():
        count = segments_in(net, part.batch([0]).to(team.device), read=Reader(net, layers))
        if count > 1 and name == "switch":
            notes += (f"the switch learned from segments: {len(part) * count}, {count} of each sample",)
    known = _omega(layers, parts, positive)
    wanted = (
        {} if known is None else {name: torch.from_numpy(known.positive(part.labels)) for name, part in parts.items()}
    )
    data: dict[str, dict[str, Any]] = {}
    seen: dict[str, tuple[str, ...]] = {}
    for name, part in parts.items():
        seen[name] = tuple(dict.fromkeys(part.fingerprints()))
        data[name] = {
            "origin": part.report.origin,
            "samples": len(part),
            "originals": len(set(part.originals)),
            "sources": len(set(part.sources)),
            "digest": part.digest(),
            "labels": label_counts(part.labels),
        }
    if shared := len(set(seen["light"]).intersection(seen.get("switch", ()))):
        notes += (f"{shared} samples taught both the light path and the switch, which makes the switch too sure",)
    labels = {name: entry["labels"] for name, entry in data.items()}
    digests = {f"{name}_data": entry["digest"] for name, entry in data.items()}
    config = {**asdict(options), **digests, "network": frozen_digest(net, layers, joint is not None)}
    if patience is not None:
        config["checkpoint_every"] = checkpoint_every  # which decides when a phase is over
    if any(entry["samples"] > entry["originals"] for entry in data.values()):
        config["copies"] = {name: entry["samples"] - entry["originals"] for name, entry in data.items()}
    if any(layer.segments for layer in layers):
        config["segments"] = [None if layer.segments is None else layer.segments.entries for layer in layers]
    if wanted:
        told = b"".join(part.numpy().tobytes() for part in wanted.values())
        config["positive"] = hashlib.blake2b(told, digest_size=16).hexdigest()
    team.check_same(config)
    with ExitStack() as stack:
        stack.enter_context(frozen(net, layers))
        stack.enter_context(reproducible(net, seed, threads))
        stack.enter_context(route(net, "both"))
        bar = stack.enter_context(show_progress(progress))
        run = Run(net, layers, options, checkpoint_every, bar, team, wanted)
        together = None if joint is None else joint.objective(net, parts["light"], loss, shares, wanted.get("light"))
        if where is not None:
            going_on = team.lead(lambda: _open(run, where, config, (seen, labels), resume))
            if going_on is not None:
                run.restore(*going_on)
            if run.folder is not None:
                stack.callback(run.folder.close)
            run.stop_asked = stack.enter_context(stop_requests())
        try:
            first = next(iter(parts.values()))
            team.check_precision(net, layers, first.batch(range(min(batch_size, len(first)))).to(run.device))
            if together is not None:
                run.joint_phase(together, parts["light"])
            run.light_phase(parts["light"])
            if "switch" in parts:
                run.switch_phase(parts["switch"])
            run.finish()
            if known is not None:
                remember(net, parts, wanted, None if known.decide else known.text)
        except Exception:
            if run.folder is not None and run.step == 0 and not resume:
                run.folder.discard()  # a start that is refused leaves nothing behind
            raise
    return History(
        phases=phases_of(run.lines),
        scale=tuple(tuple(layer.scale.tolist()) for layer in layers),
        unseen=run.unseen,
        cached=run.cached,
        fitted=run.fitted,
        options=asdict(options),
        data=data,
        notes=notes,
        kept=run.stop.kept,
        resumed_at=run.resumed_at,
        run_dir=None if run_dir is None else str(run_dir),
        fingerprints=frozenset(mark for marks in seen.values() for mark in marks),
    )


def _open(
    run: Run, where: Path, config: dict[str, Any], data: tuple[dict[str, Any], dict[str, Any]], resume: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Give the run its folder; returns checkpoint and history to go on from. data: fingerprints and labels of it."""
    if not resume:
        run.folder = RunFolder.create(where, config, *data, run.state())
        return None
    run.folder, state, lines = RunFolder.reopen(where, config)
    return state, lines


def _omega(layers: Sequence[DSLayer], parts: dict[str, Samples], positive: Positive | None) -> Omega | None:
    """Which labels are positive; None without gates. Raises OptionError."""
    if not gates(layers):
        if positive is not None:
            raise OptionError(
                "positive labels are for gates, and this network has none; insert with mode='gc', or leave them out."
            )
        return None
    if positive is None:
        raise OptionError(
            "This network has a gate, which learns from labels; say which are positive, such as positive='1-9' or "
            "'yes,no' (--positive)."
        )
    return omega(positive, [label for part in parts.values() for label in part.labels])


def _divide(
    net: nn.Module, train_data: Any, switch_data: Any, options: Options, progress: bool | None
) -> tuple[dict[str, Samples], tuple[str, ...]]:
    """The samples of the phases "light" and "switch", and remarks."""
    train = open_data(train_data, net, progress=progress)
    if options.switch_steps == 0:
        return {"light": train}, ()
    if switch_data is not None:
        return {"light": train, "switch": open_data(switch_data, net, progress=progress)}, ()
    light, other = split(train, (LIGHT_SHARE, 1 - LIGHT_SHARE), options.seed)
    note = (
        f"no data was given for the switch: it learned from {len(other)} of the {len(train)} training samples, of "
        f"{len(set(other.sources))} sources that the light path has not seen"
    )
    return {"light": light, "switch": other}, (note,)
