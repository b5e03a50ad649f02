"""Every result of the evaluation as one Markdown page -> tables.md, beside the prototype's numbers and the paper's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dslify.tables import figure, human, percent
from recipes.pages import Found, Page, cell, markdown

from . import gates
from .work import CONFIDENCE, DEPTHS, HALF, MAX_LOST, Work

COLUMNS = (
    "background stopped", "unknown stopped", "negatives stopped", "keywords lost", "accuracy lost", "auc",
    "macs stopped",
)  # fmt: skip
HEADERS = (
    "background stopped", "unknown stopped", "all negatives stopped", "keywords lost, points", "accuracy lost, points",
    "area under curve", "MACs of a stopped clip",
)  # fmt: skip
PROTOTYPE = ("*a prototype on the same clips, 1/2*", "", "90 %", "", "82 to 88 %", "", "", "", "")


def tenths(share: float | None) -> str:
    return percent(share, 1)


def points(share: float | None) -> str:
    """0.0123 -> "+1.23"."""
    return "-" if share is None else f"{100 * share:+.2f}"


def written(figures: Found, names: Iterable[str] = COLUMNS) -> list[str]:
    """One row's cells. Intervals are given where there is one, the range over seeds elsewhere."""
    cells = []
    for name in names:
        if name not in figures:
            cells.append("-")
            continue
        write = points if name.endswith("lost") else figure if name in ("auc", "threshold") else tenths
        cells.append(cell(figures[name], write))
    return cells


def depths(found: Found) -> str:
    """Depth x beta x threshold."""
    rows = []
    for row in found["gates"]:
        main = row["at"] == HALF and row["beta"] == gates.MAIN_BETA
        name = f"{row['depth']}, beta {row['beta']:g}"
        words = f"**{name}**" if main else name
        rows.append((words, cell(_ranged(row["figures"]["threshold"]), figure), *written(_seeds(row["figures"], main))))
    rows.append(PROTOTYPE)
    looser = [
        (f"{row['depth']}, at most {percent(row['max_lost'])} lost", cell(_ranged(row["figures"]["threshold"]), figure),
         *written(_seeds(row["figures"])))
        for row in found["looser"]
    ]  # fmt: skip
    whole, clips = found["ungated"], found["clips"]
    note = (
        f"Without gates {cell(whole['accuracy'], tenths)} of the test clips are right, {tenths(whole['keywords'])} of "
        f"the keywords. Thresholds: at most {percent(MAX_LOST)} of new keywords lost, with {percent(CONFIDENCE)} "
        f"confidence, from {clips['calibration']['keywords']} keywords of {clips['calibration']['sources']} speakers "
        f"and recordings, with {clips['calibration']['clips'] // clips['calibration']['originals'] - 1} varied copies "
        f"of each. Test: {clips['test']['clips']} clips of {clips['test']['sources']} speakers and recordings, so one "
        f"clip is {100 / clips['test']['clips']:.2f} points of accuracy, one keyword "
        f"{100 / clips['test']['keywords']:.2f}. Means over {len(whole_seeds(found))} seeds with their range; in the "
        "bold row 95 % intervals over speakers and recordings."
    )
    headers = ("gate", "threshold", *HEADERS)
    return f"{markdown(headers, rows)}\n\n{note}\n\n{markdown(headers, looser)}"


def whole_seeds(found: Found) -> list[Any]:
    """The notes of the first gate, one a seed."""
    return list(found["gates"][0]["notes"])


def activations(found: Found) -> str:
    """How sparse the activation is that goes on, and what it takes to send."""
    rows = [
        (f"{row['depth']}, beta {row['beta']:g}", cell(_ranged(row["figures"]["zeros"]), tenths),
         f"{row['notes'][0]['values']:,} B", cell(_ranged(row["figures"]["bytes"]), tenths),
         cell(_ranged(row["figures"]["accuracy lost"]), points))
        for row in found["gates"]
    ]  # fmt: skip
    note = (
        "Of keywords that go on. At beta 0 there is no mask, and the zeros are those of the ReLU. As sent: a bit a "
        "value and a byte for each that is not zero. The gate reads the activation as it is before the mask. (The "
        "prototype: 70 % zeros at unchanged accuracy.)"
    )
    headers = ("gate", "zeros", "dense int8", "as sent, of dense int8", "accuracy lost, points")
    return f"{markdown(headers, rows)}\n\n{note}"


def masks(found: Found) -> str:
    """The same with a factor for each channel instead of a threshold."""
    rows = [
        (f"{row['depth']}, beta {row['beta']:g}", cell(_ranged(row["figures"]["weight_zeros"]), tenths),
         cell(_ranged(row["figures"]["zeros"]), tenths), cell(_ranged(row["figures"]["bytes"]), tenths),
         cell(_ranged(row["figures"]["negatives stopped"]), tenths),
         cell(_ranged(row["figures"]["accuracy lost"]), points))
        for row in found["gates"]
    ]  # fmt: skip
    headers = (
        "gate",
        "factors at zero",
        "zeros",
        "as sent, of dense int8",
        "negatives stopped",
        "accuracy lost, points",
    )
    return f"{markdown(headers, rows)}\n\nThe gate reads what the factors leave."


def cascade(found: Found) -> str:
    """Three gates under one budget."""
    rows = [("all three gates", *written(_seeds(found["figures"], True)))]
    where = ", ".join(f"{cell(one, tenths)} at {depth}" for depth, one in found["stopped at"].items())
    note = f"Of all test clips, keywords included, stop {where}. One budget of lost keywords for the three together."
    return f"{markdown(('cascade', *HEADERS), rows)}\n\n{note}"


WORDS = {
    "gate": "**gate at 1/2**",
    "early exit head": "early exit head, where it is sure",
    "DSL": "DSL, narrow light path, no labels",
    "voice activity": "voice activity (energy) in front",
    "loudness": "loudness",
    "random": "random, as many as the gate",
    "the whole network": "the whole network's own certainty",
}


def rivals(found: Found) -> str:
    """Other ways at the same promise."""
    rows = [(WORDS[name], *written(_seeds(row["figures"], True))) for name, row in found["rivals"].items()]
    note = (
        "A clip counts as stopped that does not reach the end of the network; the head and the narrow path answer for "
        "it, elsewhere the answer is `no keyword`. All thresholds keep the same promise on the same clips. The last "
        "row computes everything first: it bounds what any gate can do, and saves nothing."
    )
    return f"{markdown(('what stops', *HEADERS), rows)}\n\n{note}"


def stream(found: Found) -> str:
    """Long sound with rare words."""
    rows = [
        (name, cell(one["macs_share"], tenths), cell(one["macs_share_with_transform"], tenths),
         cell(one["energy_share"], tenths), cell(one["seconds_share"], tenths),
         *(cell(one["stopped"][kind], tenths) for kind in ("background", "unknown", "keyword")),
         f"{cell(one['misses'], tenths)} of {one['said']['value']:g}", cell(one["false_alarms_per_hour"], figure),
         human(one["bytes_per_hour"]["value"], "B"))
        for name, one in found["systems"].items()
    ]  # fmt: skip
    headers = (
        "system", "MACs", "with the Fourier transform", "energy, estimated", "time", "background windows stopped",
        "unknown", "keyword", "keywords missed", "false alarms an hour", "bytes over the first cut an hour",
    )  # fmt: skip
    told = found["stream"]
    note = (
        f"{told['minutes']:g} minutes: 90 % background, 5 % keywords ({told['keywords']}), 5 % other words "
        f"({told['unknown']}) by time; windows of one second every {told['hop_s']:g} s. MACs are counted while the "
        "stream runs, as parts of the ungated network's; time is of one window at a time."
    )
    return f"{markdown(headers, rows)}\n\n{note}"


def profile(found: Found) -> str:
    """How many nodes of the exported file ran, by part, on either clip."""
    rows = []
    for name, clips in found["profiles"].items():
        for kind, one in clips.items():
            ran = ", ".join(f"{part} {len(nodes)}" for part, nodes in one["ran"].items() if nodes)
            gate = "none" if one["gate"] is None else str(one["gate"])
            rows.append((f"{name}, {kind}", gate, ran, str(len(one["after_gate"])), f"{one['ms']:.2f} ms"))
    headers = ("exported, clip", "stopped by gate", "nodes that ran, by part", "behind that gate", "a call")
    return markdown(headers, rows) + "\n\nBy ONNX Runtime's profiler, one thread; `light` is the constant answer."


def transformer(found: Found) -> str:
    """A gate in another kind of network."""
    row = ("transformer, behind layer 2 of 4", *written(_seeds(found["figures"], True)))
    note = (
        f"{found['ungated']['parameters']:,} parameters; without the gate {cell(found['ungated']['accuracy'], tenths)} "
        "of the test clips are right."
    )
    return f"{markdown(('gate', *HEADERS), [row])}\n\n{note}"


def _ranged(one: Found) -> dict[str, Any]:
    return {"value": one["value"], "range": one.get("range")}


def _seeds(figures: Found, interval: bool = False) -> Found:
    """Without intervals, so that ranges are shown."""
    return figures if interval else {name: _ranged(one) for name, one in figures.items()}


PAGE = Page(
    "keyword_spotting",
    stages={
        "gates": "gates", "masks": "gates", "cascade": "cascade", "rivals": "rivals", "stream": "stream",
        "profile": "profile", "transformer": "transformer", "figures": "figures",
    },
    sections=(
        ("Gates by depth, beta and threshold", "gates", depths),
        ("What crosses the cut", "gates", activations),
        ("With a mask of factors", "masks", masks),
        ("Three gates in one network", "cascade", cascade),
        ("Beside other ways to stop early", "rivals", rivals),
        ("On long sound", "stream", stream),
        ("What an exported gate runs", "profile", profile),
        ("In a transformer", "transformer", transformer),
    ),
    pictures={
        "timeline": "A minute of the stream: what was said, how far each window went, what fired, what it cost",
        "stopped_lost": f"Negatives stopped against keywords lost, at {', '.join(DEPTHS.values())} of the depth",
    },
)  # fmt: skip


def run(work: Work) -> dict[str, Any]:
    """What the other stages wrote -> tables.md; returns the lines of the verdict and which stages are missing."""
    return PAGE.write(work.folder)
