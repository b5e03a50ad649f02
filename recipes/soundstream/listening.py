"""Everything that one retrofit says of the test clips: on every path, as routed, and under the controls.

The controls send as many segments light as the switch does, over all clips of a kind: at random, the ones whose actual
difference is smallest (the oracle), and the quietest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from recipes.soundstream.clicks import Borders, borders
from recipes.soundstream.clips import Clip
from recipes.soundstream.routes import Heard, Light, decoded, exactly, heard, largest_gap, routed
from recipes.soundstream.spectral import LogMelDistance

DRAWS = 2  # of random routing
THRESHOLDS = ("speech", "silence")
RANDOM = tuple(f"random {draw + 1}" for draw in range(DRAWS))
MIXED = {name: f"mixed at {name}" for name in THRESHOLDS}
ROUTES = ("full", "light", *MIXED.values(), *RANDOM, "oracle", "loudness")


def threshold_of(kind: str) -> str:
    """The threshold that clips of a kind are judged at: room tone at that for silence, all else at that for speech."""
    return "silence" if kind == "silence" else "speech"


@dataclass(frozen=True)
class Played:
    """One clip by one route. sound: (samples,). light: (segments,). log_mel_db: of the sound from the clip."""

    sound: NDArray[np.float32]
    light: Light
    log_mel_db: float


@dataclass(frozen=True)
class Listened:
    """One retrofit on all clips; every tuple has one entry for each clip.

    normal: the same clips at one level, of which the two columns predicted and actual are of use. played: by route.
    gap: of really routed embeddings from the continuous ones at the borders, see `largest_gap`; one for each clip and
    threshold. clicks: at the threshold of the clip's kind.
    """

    seed: int
    heard: tuple[Heard, ...]
    normal: tuple[Heard, ...]
    played: Mapping[str, tuple[Played, ...]]
    gap: tuple[float, ...]
    clicks: tuple[Borders, ...]


def listen(
    net: nn.Module,
    thresholds: Mapping[str, float],
    clips: Sequence[Clip],
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> Listened:
    """A codec with one layer that routes by segments, at the thresholds "speech" and "silence".

    seed: of the retrofit, also of the random routes. done: called after each clip.
    """
    found = tuple(heard(net, clip.sound) for clip in clips)
    real = {name: [routed(net, clip.sound, thresholds[name]) for clip in clips] for name in THRESHOLDS}
    chosen: dict[str, list[Light]] = {
        "full": [np.zeros(clip.segments, bool) for clip in clips],
        "light": [np.ones(clip.segments, bool) for clip in clips],
        **{MIXED[name]: [light for _, light in each] for name, each in real.items()},
        **controls(clips, found, real, seed),
    }
    played: dict[str, list[Played]] = {name: [] for name in ROUTES}
    gaps, clicks = [], []
    distance = LogMelDistance()
    for at, clip in enumerate(clips):
        for name in ROUTES:
            light = chosen[name][at]
            embedding = found[at].spliced(light)
            if name in MIXED.values():
                truly = real[name.removeprefix("mixed at ")][at][0]
                gaps.append(largest_gap(truly, embedding, light))
                embedding = truly
            played[name].append(_play(net, clip, embedding, light, distance))
        full, light_only, mixed = (played[name][at] for name in ("full", "light", MIXED[threshold_of(clip.kind)]))
        clicks.append(borders(full.sound, mixed.sound, light_only.sound, mixed.light))
        done()
    normal = tuple(heard(net, clip.normalised().sound) for clip in clips)
    whole = {name: tuple(each) for name, each in played.items()}
    return Listened(seed, found, normal, whole, tuple(gaps), tuple(clicks))


def controls(
    clips: Sequence[Clip], found: Sequence[Heard], real: Mapping[str, Sequence[tuple[object, Light]]], seed: int
) -> dict[str, list[Light]]:
    """The routes that are not the switch's, by name: over the clips of each kind exactly as many light segments."""
    chosen: dict[str, list[Light]] = {
        name: [np.empty(0, bool)] * len(clips) for name in (*RANDOM, "oracle", "loudness")
    }
    for kind in dict.fromkeys(clip.kind for clip in clips):
        members = [at for at, clip in enumerate(clips) if clip.kind == kind]
        count = sum(int(real[threshold_of(kind)][at][1].sum()) for at in members)
        ends = np.cumsum([clips[at].segments for at in members])
        orders = {
            "oracle": np.concatenate([found[at].actual for at in members]),
            "loudness": np.concatenate([clips[at].levels() for at in members]),
            **{name: np.random.default_rng([seed, draw]).random(ends[-1]) for draw, name in enumerate(RANDOM)},
        }
        for name, order in orders.items():
            for at, light in zip(members, np.split(exactly(count, order), ends[:-1]), strict=True):
                chosen[name][at] = light
    return chosen


def _play(net: nn.Module, clip: Clip, embedding: torch.Tensor, light: Light, distance: LogMelDistance) -> Played:
    sound = decoded(net, embedding, len(clip.sound))
    pair = (torch.from_numpy(wave)[None, None] for wave in (clip.sound, sound))
    return Played(sound, light, distance(*pair).item())
