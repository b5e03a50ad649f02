"""What the measurements of the stage `quality` come to: means, shares and rank correlations, with their intervals.

A figure is {"value", "interval", "by_seed"}: mean over retrofits, 95 % from a bootstrap over files, each retrofit's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dslify.resampling import Resample, spearman
from recipes.soundstream.clicks import excess
from recipes.soundstream.clips import Clip
from recipes.soundstream.listening import MIXED, RANDOM, ROUTES, THRESHOLDS, Listened, threshold_of

# Paired differences of ViSQOL: the first less the second.
OVER = (("full", "light"), ("full", "mixed"), ("mixed", "random"), ("mixed", "loudness"), ("oracle", "mixed"))
PLACES = ("speech", "pause", "edge")

Array = NDArray[np.float64]
Figure = dict[str, Any]
NONE: Figure = {"value": None, "interval": None, "by_seed": []}


def aggregated(clips: Sequence[Clip], heard: Sequence[Listened], mos: Array) -> dict[str, Any]:
    """Everything that is made of the measurements. mos: ViSQOL, (retrofits, routes, clips).

    "routes": by kind and route the figures `visqol`, `log_mel_db` and `share_light` (of segments); "mixed" is at the
    threshold of that kind, "random" the mean of its draws. "over": OVER by kind. "share_at_speech", "share_at_silence":
    of segments light at that threshold, by what they are inside files of speech. "spearman": by level and set of
    segments, see `_spearmans`. "borders": of routed embeddings from continuous ones, the largest. "clicks": see
    `clicks.excess`.
    """
    distance, share = (
        {name: np.array([[_of(played, what) for played in one.played[name]] for one in heard]) for name in ROUTES}
        for what in ("log_mel_db", "light")
    )
    score = {name: mos[:, at] for at, name in enumerate(ROUTES)}
    lengths = np.array([clip.segments for clip in clips], float)
    routes: dict[str, Any] = {}
    over: dict[str, Any] = {}
    for kind in dict.fromkeys(clip.kind for clip in clips):
        names = {name: [name] for name in ROUTES} | {"mixed": [MIXED[threshold_of(kind)]], "random": list(RANDOM)}
        inside = np.array([clip.kind == kind for clip in clips])
        even, weight = np.ones(inside.sum()), lengths[inside]

        def of(column: Mapping[str, Array], several: Sequence[str], inside: NDArray[np.bool_] = inside) -> Array:
            return np.mean([column[name][:, inside] for name in several], axis=0)

        routes[kind] = {
            name: {
                "visqol": _mean(of(score, several), even),
                "log_mel_db": _mean(of(distance, several), even),
                "share_light": _mean(of(share, several), weight),
            }
            for name, several in names.items()
        }
        over[kind] = {
            f"{above} over {below}": _mean(of(score, names[above]) - of(score, names[below]), even)
            for above, below in OVER
        }
    return {
        "files": {kind: sum(clip.kind == kind for clip in clips) for kind in routes},
        "segments": {kind: sum(clip.segments for clip in clips if clip.kind == kind) for kind in routes},
        "routes": routes,
        "over": over,
        **{f"share_at_{threshold}": _places(clips, heard, threshold) for threshold in THRESHOLDS},
        "spearman": {
            "as recorded": _spearmans(clips, [one.heard for one in heard]),
            "level-normalised": _spearmans([clip.normalised() for clip in clips], [one.normal for one in heard]),
        },
        "borders": {"value": max(max(one.gap) for one in heard), "interval": None},
        "clicks": excess([each for one in heard for each in one.clicks]),
    }


def _of(played: Any, what: str) -> float:
    return float(np.mean(getattr(played, what)))


def _mean(values: Array, weight: Array) -> Figure:
    """The mean of (retrofits, files) with weights (files,), over files that have any."""
    values, weight = values[:, weight > 0], weight[weight > 0]
    if not len(weight):
        return NONE
    by_seed = values @ weight / weight.sum()
    resample = Resample(np.arange(len(weight)), len(weight), seed=0)
    spread = resample.means(values.mean(0) * weight) / resample.means(weight)
    return {"value": float(by_seed.mean()), "interval": resample.interval(spread), "by_seed": by_seed.tolist()}


def _places(clips: Sequence[Clip], heard: Sequence[Listened], threshold: str) -> dict[str, Figure]:
    """Share of the segments that are light, by what they are."""
    found = {}
    for place in PLACES:
        marked = [np.array(clip.places) == place for clip in clips]
        weight = np.array([each.sum() for each in marked], float)
        light = [
            [played.light[inside].sum() for played, inside in zip(one.played[MIXED[threshold]], marked, strict=True)]
            for one in heard
        ]
        found[place] = _mean(np.array(light) / np.maximum(weight, 1), weight)
    return found


def _spearmans(clips: Sequence[Clip], sides: Sequence[Sequence[Any]]) -> dict[str, dict[str, Figure]]:
    """Rank correlation with the actual difference, of the switch's score, of loudness, and the first less the second.

    In three sets of segments: those of files of speech that are speech, all of those files, and all there are.
    sides: of each retrofit what it heard of each clip.
    """
    levels = np.concatenate([clip.levels() for clip in clips])
    source = np.repeat(np.arange(len(clips)), [clip.segments for clip in clips])
    speech = np.array([clip.kind == "speech" for clip in clips])[source]
    places = np.array([place for clip in clips for place in clip.places])
    actual, predicted = (
        np.array([np.concatenate([getattr(each, name) for each in side]) for side in sides])
        for name in ("actual", "predicted")
    )
    sets = {"speech segments": speech & (places == "speech"), "speech files": speech, "all": np.ones(len(speech), bool)}
    return {
        name: _spearman(predicted[:, inside], actual[:, inside], levels[inside], source[inside])
        for name, inside in sets.items()
    }


def _spearman(predicted: Array, actual: Array, levels: Array, source: NDArray[np.int64]) -> dict[str, Figure]:
    """predicted, actual: (retrofits, segments); levels, source: (segments,)."""
    names = ("switch", "loudness", "switch over loudness")
    if len(levels) < 3:
        return dict.fromkeys(names, NONE)
    numbers = np.unique(source, return_inverse=True)[1]
    resample = Resample(numbers, int(numbers.max()) + 1, seed=0)

    def ranked(by: Array, weights: Array) -> Array:
        return np.array([spearman(one, true, weights) for one, true in zip(by, actual, strict=True)])

    columns = {"switch": predicted, "loudness": np.broadcast_to(levels, predicted.shape)}
    by_seed = {name: ranked(by, np.ones((1, len(levels))))[:, 0] for name, by in columns.items()}
    spread = {name: resample.each(partial(lambda by, w: ranked(by, w).mean(0), by)) for name, by in columns.items()}
    for values in (by_seed, spread):
        values["switch over loudness"] = values["switch"] - values["loudness"]
    return {
        name: {
            "value": float(by_seed[name].mean()),
            "interval": resample.interval(spread[name]),
            "by_seed": by_seed[name].tolist(),
        }
        for name in names
    }
