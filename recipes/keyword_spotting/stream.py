"""An always-on keyword spotter on long sound: what it misses, its false alarms, and what it really computes.

    nets = {"ungated": pretrained(), "gate at 1/2": net, "cascade": cascade}
    found = judged(nets, test, valid, calibration=held_out, seed=0, minutes=20)
    found["systems"]["cascade"]["macs_share"]       # of "ungated", counted while both ran

The sound is background with rare words (`soundscape`), read in windows of one second, one every HOP; probabilities are
averaged over neighbouring windows and fire over a decision threshold (`detection`). That threshold is one for all
systems: with it the ungated network has its largest F1 on a stream of validation clips.

`judged` gives what can be written as JSON:

    stream     minutes, windows, hop_s, smoothed (windows), keywords, unknown (how many were said), seed, threads
    decision   threshold, and of the validation stream that set it: misses, false_alarms_per_hour
    systems    by name: those of `nets`, then "voice activity" and "random at the share of <last gated>"; each
        misses, said, missed_by_label {label: [missed, said]}, false_alarms, false_alarms_per_hour
        stopped {"background", "unknown", "keyword": share of the windows that hold it}, stopped_all
        gates   a row for each: reached, went_on (shares of all windows), bytes_per_window, bytes_per_hour
        macs_per_window, macs_share, macs_share_with_transform   (counted by running; shares of "ungated")
        macs_computed_share   (from dslify.cost and how many windows each gate stopped; None where that does not apply)
        joules_per_hour, energy_share  (an estimate by dslify's profile ENERGY; None where cost() does not apply)
        ms_per_window, seconds_share   (one window at a time; None for "random ...", which is not run)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dslify import energy
from dslify.errors import OptionError
from dslify.omega import Omega, omega
from dslify.samples import Samples
from dslify.switch import dsl_layers

from . import voice
from .data import POSITIVE, words_of
from .detection import Score, best_threshold, detections, scored, smoothed
from .network import LENGTH, RATE
from .soundscape import Soundscape, composed
from .windows import Passed, computed, one_by_one, passed

UNGATED = "ungated"
HOP = 0.25  # s between windows
SMOOTHED = 2  # windows whose probabilities are averaged
ENERGY = "45nm-sram"
CALIBRATION_SHARE = 0.18  # keywords by time in the sound that the voice detector's threshold is set on
ALONE = 240  # windows that are timed one at a time


@dataclass(frozen=True)
class Decision:
    """How probabilities become detections. labels: of the classes from 1 on. threshold: of the mean probability."""

    labels: tuple[str, ...]
    threshold: float
    hop: float = HOP
    count: int = SMOOTHED

    def score(self, probabilities: np.ndarray, scape: Soundscape) -> Score:
        means = smoothed(probabilities, self.count)
        return scored(detections(means, self.labels, self.threshold, self.hop, self.count), scape)


def judged(
    nets: Mapping[str, nn.Module],
    split: Samples,
    validation: Samples,
    *,
    calibration: Samples | None = None,
    positive: str = POSITIVE,
    seed: int = 0,
    minutes: float = 20.0,
    max_lost: float = 0.01,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Every system on one stream made of `split`; see the top of this file for what comes back.

    nets: sound (batch, 1, LENGTH) -> logits; "ungated" is the network as it was, without a Dynamic Switch Layer, the
    others have one or several. validation: makes the stream that sets the decision threshold. calibration: clips that
    set the voice detector's threshold, for at most `max_lost` of the keywords at this confidence; `validation` if None.
    Raises OptionError without "ungated", DataError for data without background, keywords or other words, and for too
    few keywords to keep that promise.
    """
    if UNGATED not in nets or dsl_layers(nets[UNGATED]):
        raise OptionError(
            f'One of the networks has to be "{UNGATED}", without a gate; got {", ".join(nets) or "none"}.'
        )
    words = omega(positive, split.labels)
    scape = composed(split, words, minutes, seed)
    windows = scape.windows(HOP)
    decision, heard = decided(nets[UNGATED], validation, words, minutes, seed)
    whole = passed(nets[UNGATED], windows)
    seen = {name: whole if name == UNGATED else passed(net, windows) for name, net in nets.items()}
    gated = [name for name in nets if dsl_layers(nets[name])]
    detector = voice_threshold(nets[UNGATED], calibration or validation, words, seed, max_lost, confidence)
    scores = voice.window_scores(scape.sound, np.arange(len(windows)) * round(HOP * RATE))
    voiced = torch.from_numpy(scores >= detector)
    alone = {**nets, "voice activity": voice.VoiceGated(nets[UNGATED], detector, HOP, len(decision.labels) + 1)}
    timed = one_by_one(alone, windows[_stretch(scape, len(windows))])
    part = passed(nets[UNGATED], windows[voiced]) if voiced.any() else None
    judge = _Judge(scape, decision, whole, nets[gated[-1]] if gated else None, timed)
    systems = {name: judge.row(name, found, nets[name]) for name, found in seen.items()}
    systems["voice activity"] = judge.voice(part, voiced.numpy(), len(windows))
    if gated:
        generator = np.random.default_rng(seed)
        systems[f"random at the share of {gated[-1]}"] = judge.random(seen[gated[-1]], systems[gated[-1]], generator)
    return {
        "stream": {
            "minutes": minutes, "windows": len(windows), "hop_s": HOP, "smoothed": SMOOTHED,
            "keywords": len(scape.keywords), "unknown": len(scape.words) - len(scape.keywords), "seed": seed,
            "threads": torch.get_num_threads(),
        },
        "decision": {
            "threshold": decision.threshold, "misses": heard.misses,
            "false_alarms_per_hour": heard.alarms_per_hour,
        },
        "systems": systems,
    }  # fmt: skip


def decided(network: nn.Module, validation: Samples, words: Omega, minutes: float, seed: int) -> tuple[Decision, Score]:
    """The decision threshold of the ungated network, and what it does on the validation stream that set it."""
    scape = composed(validation, words, minutes, seed)
    labels = tuple(words_of(validation, words))
    means = smoothed(passed(network, scape.windows(HOP)).probabilities, SMOOTHED)
    threshold = best_threshold(means, labels, scape, HOP, SMOOTHED)
    decision = Decision(labels, threshold)
    return decision, scored(detections(means, labels, threshold, HOP, SMOOTHED), scape)


def voice_threshold(
    network: nn.Module, samples: Samples, words: Omega, seed: int, max_lost: float, confidence: float
) -> float:
    """Of the voice detector, on a sound in which every keyword of the samples is said once."""
    count = int(words.positive(samples.labels).sum())
    minutes = (count + 0.25) * LENGTH / RATE / CALIBRATION_SHARE / 60
    scape = composed(samples, words, minutes, seed, CALIBRATION_SHARE)
    return voice.calibrated(network, scape, max_lost, confidence)


def _stretch(scape: Soundscape, count: int) -> slice:
    """Windows one after the other that are timed: ALONE of them around the first keyword that has as many before it."""
    middle = next((word.start for word in scape.keywords if word.start / HOP > ALONE / 2), 0.0)
    begin = max(0, min(round(middle / HOP) - ALONE // 2, count - ALONE))
    return slice(begin, begin + ALONE)


class _Judge:
    """Makes the rows. whole: of the ungated network. priced: a gated network, whose parts dslify.cost can
    tell. timed: seconds of a window, by system."""

    def __init__(
        self, scape: Soundscape, decision: Decision, whole: Passed, priced: nn.Module | None, timed: dict[str, float]
    ):
        self.scape, self.decision, self.whole, self.timed = scape, decision, whole, timed
        self.kinds = scape.kinds(decision.hop)
        self.work = None if priced is None else self._full_work(priced)
        self.profile = energy.profile(ENERGY)

    def _full_work(self, net: nn.Module) -> tuple[float, float]:
        """(MACs, bytes) of all windows through base and full paths, without mask and switch."""
        count, layers = len(self.whole), len(dsl_layers(net))
        everything = np.ones((layers, count), bool)
        return computed(net, Passed(self.whole.probabilities, ~everything, everything, np.zeros(layers), 0, 0))

    def row(self, name: str, found: Passed, net: nn.Module) -> dict[str, Any]:
        work = computed(net, found) if dsl_layers(net) else self.work
        return {
            **self._heard(found.probabilities, found.stopped),
            "gates": self._gates(found),
            **self._cost(found.macs, found.transform_macs, work),
            **self._seconds(name),
        }

    def voice(self, part: Passed | None, voiced: np.ndarray, count: int) -> dict[str, Any]:
        """part: the ungated network on the windows with voice in them, None where there are none."""
        probabilities = np.zeros_like(self.whole.probabilities)
        probabilities[:, 0] = 1
        macs = voice.MACS * self.decision.hop * count  # energies of the sound that is new in each window
        transform = 0
        share = float(voiced.mean())
        work = None if self.work is None else (self.work[0] * share + macs, self.work[1] * share)
        if part is not None:
            probabilities[voiced] = part.probabilities
            macs, transform = macs + part.macs, part.transform_macs
        return {
            **self._heard(probabilities, ~voiced),
            "gates": [],
            **self._cost(macs, transform, work),
            **self._seconds("voice activity"),
        }

    def random(self, like: Passed, row: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """As many windows stopped as gates stopped, drawn at random: their cost, the ungated network's answers."""
        stopped = generator.permutation(like.stopped)
        probabilities = np.where(stopped[:, None], np.eye(like.probabilities.shape[1])[0], self.whole.probabilities)
        costs = {key: row[key] for key in ("macs_per_window", "macs_share", "macs_share_with_transform")}
        costs |= {key: row[key] for key in ("macs_computed_share", "joules_per_hour", "energy_share")}
        return {
            **self._heard(probabilities, stopped), "gates": [], **costs, "ms_per_window": None, "seconds_share": None,
        }  # fmt: skip

    def _heard(self, probabilities: np.ndarray, stopped: np.ndarray) -> dict[str, Any]:
        score = self.decision.score(probabilities, self.scape)
        kinds = ("background", "unknown", "keyword")
        return {
            "misses": score.misses,
            "said": len(score.words),
            "missed_by_label": score.by_label(),
            "false_alarms": score.false_alarms,
            "false_alarms_per_hour": score.alarms_per_hour,
            "stopped": {kind: float(stopped[self.kinds == kind].mean()) for kind in kinds},
            "stopped_all": float(stopped.mean()),
        }

    def _gates(self, found: Passed) -> list[dict[str, float]]:
        rows = []
        for reached, on, sent in zip(found.reached, found.went_on, found.sent, strict=True):
            rows.append(
                {
                    "reached": float(reached.mean()),
                    "went_on": float(on.mean()),
                    "bytes_per_window": float(sent) / max(1, int(on.sum())),
                    "bytes_per_hour": float(sent) / self.scape.hours,
                }
            )
        return rows

    def _cost(self, macs: float, transform: float, work: tuple[float, float] | None) -> dict[str, Any]:
        joules = share = part = None
        if work is not None and self.work is not None:
            mine, whole = (
                energy.estimate(energy.Work(*each), self.profile, 0.0).total / self.scape.hours
                for each in (work, self.work)
            )
            joules, share, part = mine, mine / whole, work[0] / self.work[0]
        return {
            "macs_per_window": macs / len(self.whole),
            "macs_share": macs / self.whole.macs,
            "macs_share_with_transform": (macs + transform) / (self.whole.macs + self.whole.transform_macs),
            "macs_computed_share": part,
            "joules_per_hour": joules,
            "energy_share": share,
        }

    def _seconds(self, name: str) -> dict[str, float]:
        return {
            "ms_per_window": 1e3 * self.timed[name],
            "seconds_share": self.timed[name] / self.timed[UNGATED],
        }
