"""Other ways to stop clips, held to the same promise on the same clips: the stage `rivals`.

    early exit head     `--light head` at half depth; the head answers where its largest probability is high enough
    DSL                 a narrow light path behind the same cut, learned without labels; low predicted difference: light
    voice activity      the energy detector of voice.py in front of the network
    loudness            the quietest clips
    random              as many clips as the gate stops, drawn by lot
    the whole network   its own certainty that a clip is no keyword: the bound for any gate, and saves nothing

Each gives a score; under its threshold a clip does not reach the end of the network. The threshold is the highest that
keeps lost keywords within the gates' promise, by the same test (dslify.rising).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import dslify
from dslify.capture import evaluating
from dslify.errors import DataError
from dslify.omega import Omega
from dslify.rising import rising
from dslify.samples import Samples
from dslify.switch import route

from . import gates
from .judge import Judge, batches, logits, shares
from .voice import MACS as LISTENING
from .voice import window_scores
from .work import CONFIDENCE, HALF, MAX_LOST, Work, each

WIDTH = 0.1  # of the narrow path
STEPS, SWITCH_STEPS, RATE, BATCH = 400, 600, 0.01, 32
DRAWS = 20  # of random stopping
WHOLE = "the whole network"
LEARNED = {"early exit head": {"light": "head"}, "DSL": {"width": WIDTH}}


def run(work: Work) -> dict[str, Any]:
    """Every rival -> rivals.json, with the gate at half depth that they are held against."""
    main = work.read("gates.json")
    gate = next(row for row in main["gates"] if row["at"] == HALF and row["beta"] == gates.MAIN_BETA)
    tasks = [(name, seed) for name in LEARNED for seed in work.seeds]
    learned = dict(zip(tasks, each(work, learn, tasks, "rivals"), strict=True))
    judge = gates.judge_of(work)
    unlearned = {name: [note] for name, note in given(work, judge).items()}
    whole = unlearned.pop(WHOLE)
    notes: dict[str, list[dict[str, Any]]] = {
        "gate": gate["notes"],
        **{name: [learned[name, seed] for seed in work.seeds] for name in LEARNED},
        **unlearned,
        "random": by_lot(judge, gate["figures"]),
        WHOLE: whole,
    }
    found = {"rivals": {name: {"figures": judge.figures(own), "notes": own} for name, own in notes.items()}}
    work.write("rivals.json", found)
    return found


def learn(work: Work, name: str, seed: int) -> dict[str, Any]:
    """A rival with a light path, trained without labels, its threshold set, and judged."""
    begun = time.perf_counter()
    parts, plain = work.parts, work.network()
    net = dslify.insert(plain, HALF, seed=seed, **LEARNED[name])  # type: ignore[arg-type]
    alone = name == "early exit head"  # which answers by its own certainty and needs no switch
    dslify.finetune(
        net, parts.varied, steps=STEPS, switch_steps=0 if alone else SWITCH_STEPS, batch_size=BATCH, lr=RATE,
        loss="kl", seed=seed, threads=work.threads, progress=False,
    )  # fmt: skip
    score, light, full = ways(net, parts.calibration, alone)
    tau = threshold(score, light != full, parts.calibration, parts.positive)
    judge = Judge(plain, parts.test, parts.positive)
    score, light, full = ways(net, parts.test, alone)
    rows = {row.name: row.macs for row in dslify.cost(net)}
    whole = rows["base"] + rows["full"]
    macs = (1 + rows["light"] / whole, (rows["base"] + rows["light"]) / whole) if alone else shares(net)
    stopped = score < tau
    note = judge.note(
        stopped, np.where(stopped, light, full), score,
        thresholds=(tau,), macs=macs, seconds=time.perf_counter() - begun,
    )  # fmt: skip
    return note.to_json()


def ways(net: nn.Module, samples: Samples, alone: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(score, class on the light path, class on the full one) of every sample, (n,) each.

    alone: the score is the light answer's certainty, negated; else the switch's predicted difference.
    """
    (layer,) = dslify.dsl_layers(net)
    found: dict[str, list[torch.Tensor]] = {"light": [], "full": [], "score": []}
    with evaluating(net), torch.no_grad():
        for sound in batches(samples):
            for way in ("light", "full"):
                with route(net, way):
                    found[way].append(net(sound))
            if not alone:
                assert layer.paths is not None
                found["score"].append(layer.paths.score.double())
    light, full = torch.cat(found["light"]), torch.cat(found["full"])
    score = -light.softmax(1).amax(1).double() if alone else torch.cat(found["score"])
    return score.numpy(), light.argmax(1).numpy(), full.argmax(1).numpy()


def given(work: Work, judge: Judge) -> dict[str, dict[str, Any]]:
    """The rivals that learn nothing."""
    parts, network = work.parts, work.network()
    rows = {row.name: row.macs for row in dslify.cost(dslify.load(work.gate(gates.name_of(HALF, 0.0), work.seeds[0])))}
    heard = LISTENING / (rows["base"] + rows["full"])
    whole = logits(network, parts.calibration)
    scores = {
        "voice activity": (activity(parts.calibration), activity(parts.test), heard),
        "loudness": (parts.calibration.rms_db.numpy(), parts.test.rms_db.numpy(), heard),
        WHOLE: (certainty(whole), certainty(judge.logits), 1.0),
    }
    found = {}
    for name, (known, score, macs) in scores.items():
        tau = threshold(known, whole.argmax(1) > 0, parts.calibration, parts.positive)
        stopped = score < tau
        answer = np.where(stopped, 0, judge.original)
        found[name] = judge.note(stopped, answer, score, thresholds=(tau,), macs=(1.0 + heard, macs)).to_json()
    found[WHOLE]["macs"] = (1.0, 1.0)
    return found


def by_lot(judge: Judge, gate: dict[str, Any]) -> list[dict[str, Any]]:
    """DRAWS times as many clips stopped, at random, as the gate stops of these."""
    negative = ~judge.positive
    share = gate["negatives stopped"]["value"] * negative.mean()
    share += float(np.mean([judge.positive.mean() * value for value in gate["keywords stopped"]["by_seed"]]))
    generator = np.random.default_rng(0)
    notes = []
    for _ in range(DRAWS):
        stopped = generator.permutation(np.arange(len(negative)) < round(share * len(negative)))
        notes.append(judge.note(stopped, np.where(stopped, 0, judge.original), macs=(1.0, 0.0)).to_json())
    return notes


def activity(samples: Samples) -> np.ndarray:
    """How far each clip rises above its own floor, dB, (n,)."""
    start = np.zeros(1, int)
    return np.concatenate([window_scores(sound[0], start) for batch in batches(samples) for sound in batch])


def certainty(answers: np.ndarray) -> np.ndarray:
    """Of logits (n, classes): the best keyword's over the negative's, (n,)."""
    found: np.ndarray = answers[:, 1:].max(1) - answers[:, 0]
    return found


def threshold(score: np.ndarray, losing: np.ndarray, samples: Samples, positive: Omega) -> float:
    """The highest under which at most MAX_LOST of new keywords are lost, with CONFIDENCE.

    losing: whether stopping that clip changes the network's decision, (n,). Copies count within their original. Raises
    DataError for too few keywords.
    """
    inside = positive.positive(samples.labels)
    units: Sequence[int] = np.array(samples.originals)[inside]  # type: ignore[assignment]
    found = rising(np.where(losing, score, math.inf)[inside], np.asarray(units))
    at = found.last(MAX_LOST, 1 - CONFIDENCE)
    if at < 0:
        raise DataError(f"{found.units} keywords are too few to promise at most {MAX_LOST:g} of them lost; give more.")
    end = float(found.ends[at])
    return end if math.isfinite(end) else float(np.nextafter(score.max(), math.inf))
