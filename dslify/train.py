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

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .data import open_data
from .errors import OptionError
from .run_folder import RunFolder, stop_requests
from .runs import History, Options
from .samples import Samples, expected_shape, show_progress, split
from .schedule import frozen, frozen_digest, reproducible
from .switch import required_layers, route
from .training_run import Run

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
        run = Run(net, layers, options, checkpoint_every, stack.enter_context(show_progress(progress)))
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
