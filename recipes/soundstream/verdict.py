"""What the recipe set out to show, line by line, with what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.claims import Line

GAP = 0.10  # ViSQOL on speech, of light under full, below which routing has nothing to win
CLOSE, ABOVE_RANDOM = 0.02, 0.03  # ViSQOL: of mixed under full, and over random routing


def quality_lines(found: Mapping[str, Any]) -> list[Line]:
    """What the stage `quality` decides, from its result."""
    speech, silence = found["over"]["speech"], found["routes"].get("silence", {}).get("mixed")
    spearman, share = found["spearman"]["as recorded"], found["share_at_speech"]
    gap = speech["full over light"]
    there = gap["value"] >= GAP
    lost = "" if there else "no gap: light equals full on speech, so this says nothing of the switch"
    levels = (spearman, found["spearman"]["level-normalised"])
    inside, normal = (sets["speech files"] for sets in levels)
    strict = [f"without their pauses and edges {sets['speech segments']['switch']['value']:.3f}" for sets in levels]
    missing = {"value": None, "interval": None}
    return [
        Line(
            "speech, ViSQOL: light under full",
            gap,
            ">=",
            GAP,
            "" if there else "no gap: the codec has no use of routing",
        ),
        Line("speech, ViSQOL: mixed under full", speech["full over mixed"], "<=", CLOSE, lost, there),
        Line("speech, ViSQOL: mixed over random", speech["mixed over random"], ">=", ABOVE_RANDOM, lost, there),
        Line("speech: share light", found["routes"]["speech"]["mixed"]["share_light"], ">=", 0.30),
        Line("silence: share light", silence["share_light"] if silence else missing, ">=", 0.80),
        Line("Spearman of predicted and actual, speech files", inside["switch"], ">=", 0.95, strict[0]),
        Line("the same over that of loudness", inside["switch over loudness"], ">=", 0.03),
        Line("Spearman, speech files, level-normalised", normal["switch"], ">=", 0.95, strict[1]),
        Line("pauses inside speech: share light", share["pause"], ">=", 0.95),
        Line("speech segments: share light", share["speech"], "<=", 0.25),
        Line("routed from continuous at the borders, relative", found["borders"], "<=", 1e-5),
        *_click_lines(found["clicks"]),
    ]


def _click_lines(clicks: Mapping[str, Any]) -> list[Line]:
    """No excess: the kinks have no more energy than always full has there, or only as much as chance gives them."""
    if not clicks["borders"]:
        return []
    own, cut = (clicks[name]["value"] for name in ("routed over own", "cut over own"))
    words = (
        f"{clicks['borders']} changes of path, judged by the interval; over what the two paths have there alone "
        f"{own:+.2f} dB, and a hard cut of the two sounds {cut:+.2f} dB"
    )
    what = "kinks within 5 ms of a change of path over always full, dB"
    return [Line(what, clicks["routed over full"], "<=", 0.0, words, by_interval=True)]
