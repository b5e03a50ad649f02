"""The stages `gates` and `cascade`: gates at three depths, with and without a mask, and all three in one network.

Gates learn from varied clips of the speakers that the network learned from; thresholds come from speakers that nothing
has heard, in several varied copies of each clip, by `dslify.calibrate(max_lost=0.01, confidence=0.95)`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from torch import nn

import dslify
from recipes.claims import Line

from .data import POSITIVE
from .judge import Judge, spread
from .work import CONFIDENCE, DEPTHS, HALF, MAX_LOST, Work, each

BETAS = (0.0, 0.003, 0.01)  # of L_comp; at 0 there is no mask
MAIN_BETA = 0.003
FACTOR_BETAS = (0.003, 0.03)  # with a mask of factors
LOOSER = (0.02, 0.05)  # other promises, for the gates of MAIN_BETA: what more loss would buy
STEPS, SWITCH_STEPS = 300, 600  # of mask and gate together, of the gate alone
RATE, BATCH = 0.02, 32
CASCADE = "cascade"
MaskKind = Literal["channel", "activation"]


def run(work: Work) -> dict[str, Any]:
    """Every depth with every beta and seed -> gates.json, and a .dsl file each."""
    tasks = [(at, beta, seed) for at in DEPTHS for beta in BETAS for seed in work.seeds]
    notes = dict(zip(tasks, each(work, one, tasks, "gates"), strict=True))
    judge = judge_of(work)
    rows = [
        {
            "at": at, "depth": DEPTHS[at], "beta": beta,
            "figures": judge.figures(own := [notes[at, beta, seed][0] for seed in work.seeds]), "notes": own,
        }
        for at in DEPTHS
        for beta in BETAS
    ]  # fmt: skip
    looser = [
        {"depth": DEPTHS[at], "max_lost": most,
         "figures": judge.figures([notes[at, MAIN_BETA, seed][1 + number] for seed in work.seeds])}
        for at in DEPTHS
        for number, most in enumerate(LOOSER)
    ]  # fmt: skip
    found: dict[str, Any] = {"ungated": ungated(judge), "clips": counted(work), "gates": rows, "looser": looser}
    found["verdict"] = [line.to_json() for line in lines(found)]
    work.write("gates.json", found)
    return found


def one(work: Work, at: str, beta: float, seed: int) -> list[dict[str, Any]]:
    """One gate, trained, calibrated, judged and stored; at MAIN_BETA once more for each looser promise."""
    return made(work, name_of(at, beta), [at], beta, seed, promises=(MAX_LOST, *LOOSER) if beta == MAIN_BETA else ())


def name_of(at: str, beta: float) -> str:
    """Of the retrofit with one gate."""
    return f"{at}-{beta:g}"


def run_cascade(work: Work) -> dict[str, Any]:
    """Three gates in one network, every seed -> cascade.json, and a .dsl file each."""
    notes = each(work, cascade, [(seed,) for seed in work.seeds], "cascades")
    judge = judge_of(work)
    through = [[note["stopped"].count(str(gate)) / len(note["stopped"]) for note in notes] for gate in range(4)]
    found = {
        "cuts": list(DEPTHS),
        "figures": judge.figures(notes),
        "stopped at": {depth: spread(through[at + 1]) for at, depth in enumerate(DEPTHS.values())},
        "notes": notes,
    }
    work.write("cascade.json", found)
    return found


def run_masks(work: Work) -> dict[str, Any]:
    """The other kind of mask, a factor for each channel, at half depth with every seed -> masks.json."""
    tasks = [(beta, seed) for beta in FACTOR_BETAS for seed in work.seeds]
    notes = dict(zip(tasks, each(work, factors, tasks, "masks of factors"), strict=True))
    judge = judge_of(work)
    rows = [
        {"at": HALF, "depth": DEPTHS[HALF], "beta": beta,
         "figures": judge.figures(own := [notes[beta, seed] for seed in work.seeds]), "notes": own}
        for beta in FACTOR_BETAS
    ]  # fmt: skip
    found = {"gates": rows}
    work.write("masks.json", found)
    return found


def factors(work: Work, beta: float, seed: int) -> dict[str, Any]:
    """One gate behind a mask of factors."""
    return made(work, f"{HALF}-channel-{beta:g}", [HALF], beta, seed, mask="channel")[0]


def cascade(work: Work, seed: int) -> dict[str, Any]:
    """Three gates, trained together, under one budget of lost keywords."""
    return made(work, CASCADE, list(DEPTHS), 0.0, seed)[0]


def made(
    work: Work,
    name: str,
    cuts: Sequence[str],
    beta: float,
    seed: int,
    network: str = "convolutional",
    promises: Sequence[float] = (),
    mask: MaskKind = "activation",
) -> list[dict[str, Any]]:
    """A network with gates behind the cuts -> its note for each promise; with the first of them (MAX_LOST when none is
    given) the network goes to `work.gate(name, seed)`."""
    begun = time.perf_counter()
    parts, plain = work.parts, work.network(network)
    net = gated(work, plain, cuts, beta, seed, mask)
    judge = Judge(plain, parts.test, parts.positive)
    notes: list[dict[str, Any]] = []
    for most in promises or (MAX_LOST,):
        found = dslify.calibrate(
            net, parts.calibration, positive=POSITIVE, max_lost=most, confidence=CONFIDENCE, progress=False
        ).to_json()
        short = {key: found.get(key) for key in ("how", "promise", "units", "lost", "max_lost", "notes")}
        if not notes:
            work.gate(name, seed).parent.mkdir(parents=True, exist_ok=True)
            dslify.save(net, work.gate(name, seed), force=True)
        notes.append(judge.gated(net, calibration=short, seconds=time.perf_counter() - begun).to_json())
    return notes


def gated(
    work: Work, network: nn.Module, cuts: Sequence[str], beta: float, seed: int, mask: MaskKind = "activation"
) -> nn.Module:
    """The network with trained gates, which stop nothing yet."""
    net, learn = network, work.parts.varied
    for at in cuts:
        net = dslify.insert(net, at, light="exit", mode="gc", mask=mask, seed=seed)
    dslify.finetune(
        net,
        learn,
        switch_data=learn,  # the constant answer was not fitted to single clips, so the gate may see the same ones
        positive=POSITIVE,
        steps=STEPS if beta else 0,
        switch_steps=SWITCH_STEPS,
        batch_size=BATCH,
        lr=RATE,
        beta=beta,
        loss="kl",
        seed=seed,
        threads=work.threads,
        progress=False,
    )
    return net


def judge_of(work: Work, network: str = "convolutional") -> Judge:
    return Judge(work.network(network), work.parts.test, work.parts.positive)


def ungated(judge: Judge) -> dict[str, Any]:
    """What the network without gates gets right: all clips (a negative as a negative), keywords, and by label."""
    right = (judge.original == judge.truth).astype(float)
    return {
        "accuracy": {
            "value": float(right.mean()),
            "interval": judge.draw.interval(judge.draw.means(right)),
        },
        "keywords": float(right[judge.positive].mean()),
        "by label": {label: float(right[judge.labels == label].mean()) for label in sorted(set(judge.samples.labels))},
        "parameters": sum(parameter.numel() for parameter in judge.network.parameters()),
    }


def counted(work: Work) -> dict[str, dict[str, int]]:
    """Clips, keywords among them, and speakers or recordings of every part."""
    parts = work.parts
    found = {}
    for name in ("varied", "calibration", "test"):
        samples = getattr(parts, name)
        inside = parts.positive.positive(samples.labels)
        found[name] = {
            "clips": len(samples),
            "originals": len(set(samples.originals)),
            "keywords": len(set(np.array(samples.originals)[inside].tolist())),
            "sources": len(set(samples.sources)),
        }
    return found


def lines(found: dict[str, Any]) -> list[Line]:
    """What the gates had to show."""
    rows = {(row["at"], row["beta"]): row["figures"] for row in found["gates"]}
    main = rows[HALF, MAIN_BETA]
    shares = [rows[at, MAIN_BETA]["negatives stopped"]["value"] for at in DEPTHS]
    rises = min(after - before for before, after in pairwise(shares))
    accuracy = {"value": abs(main["accuracy lost"]["value"]), "interval": None}
    return [
        Line("accuracy without gates", found["ungated"]["accuracy"], ">=", 0.96),
        Line("one gate at 1/2: background stopped", main["background stopped"], ">=", 0.90),
        Line("one gate at 1/2: negatives stopped", main["negatives stopped"], ">=", 0.80),
        Line("one gate at 1/2: keywords lost", main["keywords lost"], "<=", 0.005),
        Line("one gate at 1/2: accuracy from ungated, either way", accuracy, "<=", 0.005),
        Line("negatives stopped from one depth to the next, least rise", {"value": rises}, ">=", 0.0),
        Line("zeros in a keyword's activation at 1/2", main["zeros"], ">=", 0.70),
        Line("its bytes, as a part of dense int8", main["bytes"], "<=", 0.42),
    ]
