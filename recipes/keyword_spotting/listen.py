"""The stages `stream`, `profile` and `transformer`: gates on long sound, as exported, and in another network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import dslify
from dslify.errors import DataError
from recipes.claims import Line

from . import gates, stream
from .judge import spread
from .profiled import early_stop_profile
from .work import CONFIDENCE, HALF, MAX_LOST, Work, each

GATE = "gate at 1/2"
SHARES = ("macs_share", "macs_share_with_transform", "energy_share", "seconds_share")
SAVED = 0.55  # of the MACs, by the cascade
PLACE = "blocks.1"  # of the transformer


def run(work: Work) -> dict[str, Any]:
    """One stream for every seed's retrofits -> stream.json."""
    heard = each(work, hear, [(seed,) for seed in work.seeds], "streams")
    systems = {
        name: {
            **{share: spread([one["systems"][name][share] for one in heard]) for share in SHARES},
            **{word: spread([one["systems"][name][word] for one in heard]) for word in ("misses", "said")},
            "false_alarms_per_hour": spread([one["systems"][name]["false_alarms_per_hour"] for one in heard]),
            "stopped": {
                kind: spread([one["systems"][name]["stopped"][kind] for one in heard])
                for kind in heard[0]["systems"][name]["stopped"]
            },
            "bytes_per_hour": spread([sum(row["bytes_per_hour"] for row in one["systems"][name]["gates"][:1]) or None
                                      for one in heard]),
        }
        for name in heard[0]["systems"]
    }  # fmt: skip
    saved = spread([1 - value for value in systems[gates.CASCADE]["macs_share"]["by_seed"]])
    found = {
        "stream": heard[0]["stream"],
        "decision": heard[0]["decision"],
        "systems": systems,
        "by_seed": heard,
        "verdict": [Line("cascade on the stream: MACs saved, counted while it ran", saved, ">=", SAVED).to_json()],
    }
    work.write("stream.json", found)
    return found


def hear(work: Work, seed: int) -> dict[str, Any]:
    """The whole network, one gate and the cascade of a seed on the stream."""
    parts = work.parts
    nets = {
        stream.UNGATED: work.network(),
        GATE: dslify.load(work.gate(gates.name_of(HALF, gates.MAIN_BETA), seed)),
        gates.CASCADE: dslify.load(work.gate(gates.CASCADE, seed)),
    }
    plain = parts.calibration.subset(range(len(set(parts.calibration.originals))))  # as recorded, without copies
    return stream.judged(
        nets, parts.test, plain, calibration=plain, seed=0, minutes=work.minutes, max_lost=MAX_LOST,
        confidence=CONFIDENCE,
    )  # fmt: skip


def run_profile(work: Work) -> dict[str, Any]:
    """What ONNX Runtime runs of the exported gate and of the exported cascade, on a clip of background that is stopped
    and on a keyword that goes on -> profile.json."""
    found: dict[str, Any] = {}
    after = 0
    for name, retrofit in ((GATE, gates.name_of(HALF, gates.MAIN_BETA)), (gates.CASCADE, gates.CASCADE)):
        sounds = {kind: clip(work, retrofit, kind) for kind in ("background", "keyword")}
        ran = early_stop_profile(dslify.load(work.gate(retrofit, work.seeds[0])), sounds)
        found[name] = ran
        after += len(ran["background"]["after_gate"])
    line = Line("exported: nodes that ran behind the gate on background", {"value": float(after)}, "<=", 0.0)
    result = {"profiles": found, "verdict": [line.to_json()]}
    work.write("profile.json", result)
    return result


def clip(work: Work, retrofit: str, kind: str) -> Tensor:
    """The first test clip of background that a gate stops, or the first keyword that every gate lets go on,
    (1, 1, samples). Raises DataError where there is none."""
    parts = work.parts
    note = gates.judge_of(work).gated(dslify.load(work.gate(retrofit, work.seeds[0])))
    positive = parts.positive.positive(parts.test.labels)
    for at, label in enumerate(parts.test.labels):
        stopped = note.stopped[at] != "0"
        if (stopped and label == kind) or (kind == "keyword" and positive[at] and not stopped):
            return parts.test.batch([at])
    raise DataError(f"No {kind} of {work.data} takes its way through {retrofit}: nothing can be profiled on it.")


def run_transformer(work: Work) -> dict[str, Any]:
    """One gate behind the second of the transformer's four layers, every seed -> transformer.json."""
    notes = each(work, in_transformer, [(seed,) for seed in work.seeds], "transformer")
    judge = gates.judge_of(work, "transformer")
    found = {"at": PLACE, "ungated": gates.ungated(judge), "figures": judge.figures(notes), "notes": notes}
    work.write("transformer.json", found)
    return found


def in_transformer(work: Work, seed: int) -> dict[str, Any]:
    return gates.made(work, "transformer", [PLACE], 0.0, seed, network="transformer")[0]
