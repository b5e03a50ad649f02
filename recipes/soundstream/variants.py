"""The light paths that the recipe compares, and what came of them side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from dslify.tables import figure, human, plain_table, signed
from recipes.claims import Line
from recipes.soundstream.work import MAIN

FEWER_PARAMETERS, FEWER_MACS = 20.0, 12.3  # than the full path: the paper's light path
CLOSE, OF_RANDOM = 0.20, 0.5  # inherited weights: relative difference, and as a part of random ones'
JUDGED = ("valid", "test")  # parts of the data


@dataclass(frozen=True)
class Variant:
    """A light path: words for tables, options of `dslify insert`, and whether every seed is to be tried."""

    words: str
    options: tuple[str, ...]
    seeds: bool = False


_NARROW = ("--width", "0.16", "--no-projection")
_SHALLOW = ("--width", "0.12", "--depth", "0.01", "--no-projection")
_SEPARABLE = ("--light", "separable", "--width", "0.26", "--no-projection")
_RANDOM = ("--init", "random")
VARIANTS = {
    "shallow": Variant("width and depth: no residual units", _SHALLOW, seeds=True),
    "shallow-random": Variant("the same, random weights", (*_SHALLOW, *_RANDOM)),
    "narrow": Variant("width only", _NARROW, seeds=True),
    "narrow-random": Variant("the same, random weights", (*_NARROW, *_RANDOM), seeds=True),
    "separable": Variant("depthwise and pointwise convolutions", _SEPARABLE),
    "separable-random": Variant("the same, random weights", (*_SEPARABLE, *_RANDOM)),
}


def summary(outcomes: Mapping[tuple[str, int], Mapping[str, Any]], steps: Mapping[str, int]) -> dict[str, Any]:
    """What variants.json holds, of the outcomes of retrofit() by (variant, seed).

    steps: of the phases. "full": its parameters and MACs a second. "variants": by name words, options, parameters, MACs
    and how many times fewer than full's, and figures {"value", "range", "by_seed"}, means over seeds: "difference" of
    light from full on valid and test after all steps, "loss" of the light phase at its start and end, "switch"
    and "loudness" (rank correlation with the actual difference on valid, of all segments and inside speech),
    "seconds". "verdict": a list of verdict.Line.
    """
    found: dict[str, Any] = {}
    full: dict[str, Any] = {}
    for name in dict.fromkeys(variant for variant, _ in outcomes):
        runs = {seed: one for (variant, seed), one in outcomes.items() if variant == name}
        costs = {row["name"]: row for row in next(iter(runs.values()))["insert"]["cost"]}
        light, full = ({key: costs[path][key] for key in ("params", "macs")} for path in ("light", "full"))

        def over(values: Iterable[float], runs: Mapping[int, Any] = runs) -> dict[str, Any]:
            by_seed = dict(zip(map(str, runs), values, strict=True))
            return {"value": fmean(by_seed.values()), "range": [min(by_seed.values()), max(by_seed.values())],
                    "by_seed": by_seed}  # fmt: skip

        def rank(which: str, label: str, runs: Mapping[int, Any] = runs) -> dict[str, Any]:
            kinds = [{kind["label"]: kind for kind in one["judged"]["valid"]["kinds"]} for one in runs.values()]
            return over([one[label][which] for one in kinds], runs)

        found[name] = {
            "words": VARIANTS[name].words,
            "options": list(VARIANTS[name].options),
            **light,
            "fewer": {key: full[key] / light[key] for key in light},
            "difference": {part: over([_light(one, part) for one in runs.values()]) for part in JUDGED},
            "loss": {
                end: over([one["phases"]["light"][end]["light"] for one in runs.values()]) for end in ("first", "last")
            },
            **{
                word: {label: rank(which, label) for label in ("all", "speech")}
                for word, which in (("switch", "spearman"), ("loudness", "loudness_spearman"))
            },
            "seconds": over([one["seconds"] for one in runs.values()]),
        }
    return {
        "steps": dict(steps),
        "full": full,
        "variants": found,
        "verdict": [line.to_json() for line in lines(found, steps["light"])],
    }


def _light(outcome: Mapping[str, Any], part: str) -> float:
    return next(row["difference"] for row in outcome["judged"][part]["rows"] if row["name"] == "light")


def lines(found: Mapping[str, Any], steps: int) -> list[Line]:
    """What was to be shown of light paths, from the variants of summary()."""
    claims = []
    if main := found.get(MAIN):
        few = {key: {"value": value} for key, value in main["fewer"].items()}
        claims.append(Line("light path: times fewer parameters than full", few["params"], ">=", FEWER_PARAMETERS))
        claims.append(Line("light path: times fewer MACs than full", few["macs"], ">=", FEWER_MACS))
    narrow, random = found.get("narrow"), found.get("narrow-random")
    if narrow:
        what = f"inherited, width only: relative difference after {steps} steps, test"
        claims.append(Line(what, narrow["difference"]["test"], "<=", CLOSE))
    if narrow and random:
        inherited, drawn = (one["difference"]["test"]["value"] for one in (narrow, random))
        words = "" if inherited <= OF_RANDOM * drawn else "random weights have caught up by then"
        claims.append(
            Line("the same, as a part of random weights'", {"value": inherited / drawn}, "<=", OF_RANDOM, words)
        )
    return claims


def table(found: Mapping[str, Any]) -> Table:
    """The variants side by side."""
    shown = plain_table(
        "light path", "parameters", "MACs a second", "fewer\nparameters", "fewer\nMACs", "difference,\nvalid",
        "difference,\ntest", "switch,\nall", "switch,\nspeech",
    )  # fmt: skip
    for name, one in found["variants"].items():
        fewer = (f"{one['fewer'][key]:.1f}x" for key in ("params", "macs"))
        cells = [figure(one["difference"][part]["value"]) for part in JUDGED]
        ranks = [signed(one["switch"][label]["value"]) for label in ("all", "speech")]
        shown.add_row(name, human(one["params"]), human(one["macs"]), *fewer, *cells, *ranks)
    return shown
