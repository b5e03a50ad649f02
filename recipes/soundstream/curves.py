"""What the figures show beyond the retrofits: short trainings of masks, of switches and at earlier cuts, and a sweep.

Everything returns rows, one dict for each point, which the figures draw and write as CSV. Trainings of this file are
short and see a part of the data: their curves are to be compared with each other, not with the retrofits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dslify
from dslify.data import open_data
from dslify.errors import DataError
from dslify.resampling import Interval, Resample, spearman
from dslify.samples import Samples
from recipes.soundstream.clips import Clip
from recipes.soundstream.model import CUT, SoundStream
from recipes.soundstream.routes import Heard, decoded, heard
from recipes.soundstream.spectral import LogMelDistance
from recipes.soundstream.work import SEGMENT, Work

STRETCH = 5 * SEGMENT  # samples that the trainings see at once: 1.6 s
CUTS = ("encoder.stem", CUT, "encoder.block2", "encoder.block3")
COST = 0.08  # of the full path's MACs, for the light path at every cut
MASKS = ("channel", "activation")
BETAS = (1e-5, 1e-2, 3e-2, 1e-1)
MASK_STEPS, MASK_BATCH, MASK_RATE = 200, 8, 1.5e-2  # a factor has to move from 1 to 0 in so few steps
SWITCH_STEPS = (10, 30, 100, 300, 1000)
CUT_STEPS = (200, 1000)  # of light path and switch at each cut
LEVELS = 9  # thresholds of the sweep

Rows = list[dict[str, Any]]
Step = Callable[[str], None]  # told what has just been done
HeardClips = list[tuple[Clip, Heard]]


def listened(net: nn.Module, recordings: Sequence[Clip]) -> HeardClips:
    """Every recording with what both paths and the switch make of it."""
    return [(clip, heard(net, clip.sound)) for clip in recordings]


@dataclass(frozen=True)
class Inside:
    """Predicted and actual difference of the segments of speech inside files of speech; (n,) each.

    file: which recording each is from, as whole numbers from 0.
    """

    predicted: np.ndarray
    actual: np.ndarray
    file: np.ndarray

    @classmethod
    def of(cls, found: HeardClips) -> Inside:
        """Raises DataError where no segment is known to be speech."""
        marked = [(one, np.array(clip.places) == "speech") for clip, one in found if "speech" in clip.places]
        if not marked:
            raise DataError("No recording has a segment of speech; segments.csv beside the data says where speech is.")
        predicted, actual = (
            np.concatenate([getattr(one, name)[inside] for one, inside in marked]) for name in ("predicted", "actual")
        )
        return cls(predicted, actual, np.repeat(np.arange(len(marked)), [inside.sum() for _, inside in marked]))

    def spearman(self) -> tuple[float, Interval]:
        """Rank correlation of the two, with its 95 % interval over recordings."""
        resample = Resample(self.file, int(self.file.max()) + 1, 0)
        whole = spearman(self.predicted, self.actual, np.ones((1, len(self.file))))[0]
        spread = resample.each(lambda weights: spearman(self.predicted, self.actual, weights))
        return float(whole), resample.interval(spread)


@torch.no_grad()
def sweep(net: nn.Module, found: HeardClips, step: Step) -> Rows:
    """By threshold and kind, means over recordings: share light, and log-mel distances in dB of the output, to the
    recording (`distance`) and to the output of always full (`from_full`).

    The thresholds are quantiles of all scores, the first below and the last above every one.
    """
    scores = np.concatenate([one.predicted for _, one in found])
    cuts = np.quantile(scores, np.linspace(0, 1, LEVELS))
    cuts[0], cuts[-1] = 0.0, scores.max() * 1.001
    far = LogMelDistance()
    full = [_spoken(net, one.full, clip) for clip, one in found]
    rows: Rows = []
    for threshold in cuts:
        told: dict[str, list[tuple[float, ...]]] = {}
        for (clip, one), always in zip(found, full, strict=True):
            light = one.predicted < threshold
            output = _spoken(net, one.spliced(light), clip)
            distances = (far(wanted, output).item() for wanted in (torch.from_numpy(clip.sound)[None, None], always))
            told.setdefault(clip.kind, []).append((light.mean(), *distances))
        for kind, values in told.items():
            share, distance, from_full = np.mean(values, axis=0).tolist()
            row = {"threshold": float(threshold), "kind": kind, "share": share, "distance": distance}
            rows.append({**row, "from_full": from_full})
        step(f"threshold {threshold:.3g}")
    return rows


def _spoken(net: nn.Module, embedding: Tensor, clip: Clip) -> Tensor:
    return torch.from_numpy(decoded(net, embedding, len(clip.sound)))[None, None]


def stretches(work: Work, split: str, every: int = 1) -> Samples:
    """Stretches of 1.6 s of one split; every: take each n-th."""
    found = open_data(work.data / split, (1, STRETCH), progress=False)
    return found.subset(range(0, len(found), every))


def switched(codec: SoundStream, at: str = CUT, mask: str = "channel") -> nn.Module:
    """A fresh layer behind `at`, light path of COST of the full one's MACs, routed by segments."""
    example = (torch.zeros(1, 1, STRETCH),)
    return dslify.insert(codec, at, cost=COST, mask=mask, scope="encoder", example_inputs=example, route_every=SEGMENT)


def mask_sparsity(work: Work, light: Samples, step: Step) -> Rows:
    """Zeros of weights and of activations over short trainings of light path and mask, one for each kind and beta."""
    rows: Rows = []
    for kind in MASKS:
        for beta in BETAS:
            net = switched(work.codec, mask=kind)
            history = dslify.finetune(
                net, light, steps=MASK_STEPS, switch_steps=0, batch_size=MASK_BATCH, lr=MASK_RATE, beta=beta,
                fit=False, threads=work.threads, progress=False,
            )  # fmt: skip
            losses = history.phases[0].losses
            for number in range(9, MASK_STEPS, 10):
                last = slice(number - 9, number + 1)
                zeros, anchor = (float(np.mean(losses[name][last])) for name in ("activation_sparsity", "anchor"))
                rows.append({"mask": kind, "beta": beta, "step": number + 1, "zeros": zeros, "anchor": anchor})
            step(f"{kind} mask, beta {beta:g}")
    return rows


def switch_progress(work: Work, net: nn.Module, learn: Samples, recordings: Sequence[Clip], step: Step) -> Rows:
    """Error of the prediction inside test speech after so many steps of a switch that starts anew, that of `net`."""
    rows: Rows = []
    (layer,) = dslify.dsl_layers(net)
    for steps in SWITCH_STEPS:
        torch.manual_seed(0)
        for linear in (layer.switch.hidden, layer.switch.out):
            linear.reset_parameters()
        dslify.finetune(
            net, learn, switch_data=learn, steps=0, switch_steps=steps, threads=work.threads, progress=False
        )
        inside = Inside.of(listened(net, recordings))
        error = float(np.abs(inside.predicted - inside.actual).mean())
        rows.append({"steps": steps, "error": error, "spearman": inside.spearman()[0]})
        step(f"switch after {steps} steps")
    return rows


def earlier_cuts(work: Work, light: Samples, learn: Samples, recordings: Sequence[Clip], step: Step) -> Rows:
    """Rank correlation of prediction and difference inside test speech, for a layer at each of CUTS."""
    rows: Rows = []
    for at in CUTS:
        net = switched(work.codec, at)
        history = dslify.finetune(
            net, light, switch_data=learn, steps=CUT_STEPS[0], switch_steps=CUT_STEPS[1], threads=work.threads,
            progress=False,
        )  # fmt: skip
        value, interval = Inside.of(listened(net, recordings)).spearman()
        low, high = interval or (float("nan"), float("nan"))
        rows.append({"cut": at, "spearman": value, "low": low, "high": high, "unseen": history.unseen})
        step(f"cut {at}")
    return rows
