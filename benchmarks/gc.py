"""A gate (GC) in a keyword network: what it stops, what that loses, and how sparse the activation behind it becomes.

    make bench-gc DATA=folder        # train/ valid/ test/ of one-second clips, labels from folders or manifest.csv

Network, mask and gate learn from train. The threshold is set on valid, which serves nothing else: the highest at which
a new speaker's expected share of stopped keywords is at most EPSILON (conformal risk control, a unit is a source). All
figures are of test. Two runs with one seed on one machine give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dslify
from benchmarks.gate_table import BYTES, Judge, Result, logits, look, percent, row, table
from benchmarks.keywords import Training, noise, sounds, trained
from dslify.calibrate import threshold_after
from dslify.errors import DslifyError, OptionError
from dslify.files import written_whole
from dslify.guarantee import conformal_risk_control, needed
from dslify.observe import plain
from dslify.omega import Omega, omega
from dslify.samples import Samples

DEPTHS = {"blocks.0": "1/4", "blocks.1": "1/2", "blocks.2": "3/4"}
BETAS = [0.0, 0.01, 0.03]
RATE = 0.02  # of mask and gate: a weight has to be able to come down from 1 to 0 within the steps
EPSILON = 0.02  # expected share of a new speaker's keywords that may be stopped


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gc.py", description="A gate in a keyword network.")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/, valid/ and test/")
    parser.add_argument("--positive", default="!background,!unknown", help="the labels that must not be stopped")
    parser.add_argument("--at", nargs="+", default=list(DEPTHS), help="cuts")
    parser.add_argument("--masks", nargs="+", default=["channel", "activation"], help="kinds of mask")
    parser.add_argument(
        "--betas", nargs="+", type=float, default=BETAS, help="weights of L_comp; at 0 there is no mask"
    )
    parser.add_argument("--training-steps", type=int, default=Training.steps, help="of the keyword network")
    parser.add_argument("--steps", type=int, default=300, help="of mask and gate together")
    parser.add_argument("--switch-steps", type=int, default=600, help="of the gate alone")
    parser.add_argument("--copies", type=int, default=0, help="varied copies of each clip of train, for mask and gate")
    parser.add_argument("--epsilon", type=float, default=EPSILON, help="share of keywords that may be stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/gc"), help="folder of the trained keyword network")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    try:
        for path in (options.json, options.markdown):
            if path is not None and not path.parent.is_dir():
                raise OptionError(f"{path} cannot be written, there is no folder {path.parent}; name another file.")
        if not 0 < options.epsilon < 1:
            raise OptionError(f"epsilon is a share of the keywords, between 0 and 1; got {options.epsilon:g}.")
        torch.set_num_threads(1)
        results, notes = run(options)
        shown = table(results, notes)
        document = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "results": [plain(asdict(result)) for result in results],
            "notes": notes,
        }
        for path, text in ((options.json, json.dumps(document, indent=1) + "\n"), (options.markdown, shown)):
            if path is not None:
                with written_whole(path) as temporary:
                    temporary.write_text(text)
    except (DslifyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shown, end="")
    return 0


def run(options: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """The rows of the table, and remarks below it."""
    start = time.perf_counter()
    data = sounds(options.data)
    positive = omega(options.positive, data["train"].labels)
    training = Training(steps=options.training_steps, seed=options.seed)
    network = trained(data["train"], positive, training, options.cache)
    learn = dslify.vary(data["train"], options.copies, noises=noise(data["train"], positive), seed=options.seed)
    tune = data["valid"]
    judge = Judge(data["test"], positive, options.seed)
    original = logits(network, judge.samples).argmax(1)
    learned = time.perf_counter() - start
    results = list(baselines(network, tune, judge, options.epsilon))
    for at in options.at:
        for mask, beta in settings(options.masks, options.betas):
            begun = time.perf_counter()
            net = gated(network, at, mask, beta, learn, positive, options)
            (layer,) = dslify.dsl_layers(net)
            layer.threshold.fill_(threshold(look(net, tune).score, tune, positive, options.epsilon))
            results.append(judge.gate(net, original, DEPTHS.get(at, at), mask if beta else "none", beta, begun))
            print(row(results[-1]), file=sys.stderr)
    right = original == judge.truth
    notes = [
        f"the network alone is right on {percent(right.mean())} of test and {percent(right[judge.positive].mean())} of "
        "its keywords; a negative is right as a negative",
        f"mask and gate learned from {len(learn)} clips (of each one as it is, {options.copies} varied), thresholds "
        f"from {len(tune)} of {len(set(tune.sources))} sources, judged on {len(judge.samples)} of {judge.draw.sources}",
        f"thresholds: at most {percent(options.epsilon)} of a new speaker's keywords stopped, in expectation",
        "lost: points against the network alone; intervals: 95 %, bootstrap over sources",
        f"bytes: {BYTES} a value as it is; sent: a bit a value and {BYTES} bytes for each that is not zero, of a clip "
        "that goes on; zeros without a mask are those of the ReLU",
        f"{time.perf_counter() - start:.0f} s, {learned:.0f} of them for the network and the data, seed {options.seed}",
    ]
    return results, notes


def gated(
    network: nn.Module, at: str, mask: str, beta: float, learn: Samples, positive: Omega, options: argparse.Namespace
) -> nn.Module:
    """The network with a trained gate, which stops nothing yet."""
    net = dslify.insert(network, at, light="exit", mode="gc", mask=mask, seed=options.seed)
    dslify.finetune(
        net,
        learn,
        switch_data=learn,  # the constant answer was not fitted to single samples, so the gate may see the same ones
        positive=positive,
        steps=options.steps if beta else 0,
        switch_steps=options.switch_steps,
        batch_size=32,
        lr=RATE,
        beta=beta,
        seed=options.seed,
        progress=False,
    )
    return net


def settings(masks: Sequence[str], betas: Sequence[float]) -> Iterator[tuple[str, float]]:
    """(kind of mask, beta); without beta the mask does nothing, whichever kind it is."""
    if 0.0 in betas:
        yield masks[0], 0.0
    yield from ((mask, beta) for mask in masks for beta in betas if beta)


def threshold(score: np.ndarray, samples: Samples, positive: Omega, epsilon: float) -> float:
    """The highest at which the expected share of a new source's positives under it is at most epsilon.

    Raises OptionError for too few sources.
    """
    inside = positive.positive(samples.labels)
    names, units = np.unique(np.array(samples.sources)[inside], return_inverse=True)
    if len(names) < needed(epsilon, 1.0):
        raise OptionError(
            f"Valid holds keywords of {len(names)} sources; {needed(epsilon, 1.0)} are needed for a bound of {epsilon}."
        )
    ordered = np.sort(score[inside])
    k = conformal_risk_control(np.ones(len(units)), score[inside], epsilon, 1.0, units)
    return threshold_after(ordered, k) if k else float(ordered[0])


def baselines(network: nn.Module, tune: Samples, judge: Judge, epsilon: float) -> Iterator[Result]:
    """Stopping by loudness, the trivial gate, and by the whole network's own certainty, which saves nothing."""
    certain = {}
    for name, samples in (("tune", tune), ("test", judge.samples)):
        found = logits(network, samples)
        certain[name] = found[:, 1:].max(1) - found[:, 0], samples.rms_db.double().numpy(), found.argmax(1)
    for at, name in ((1, "loudness"), (0, "the whole network")):
        tau = threshold(certain["tune"][at], tune, judge.omega, epsilon)
        score, original = certain["test"][at], certain["test"][2]
        stopped = score < tau
        mixed = np.where(stopped, 0, original)
        yield judge.result(score, stopped, mixed, original, depth=name, mask="none", beta=None, threshold=tau)


if __name__ == "__main__":
    raise SystemExit(main())
