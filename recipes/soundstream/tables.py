"""Every result of the evaluation as one Markdown page, next to the paper's numbers (arXiv 2404.04405) -> tables.md.

A stage that has not run yet leaves a sentence that says which one; nothing is filled in for it.
"""

from __future__ import annotations

from typing import Any

from dslify.tables import human, percent
from recipes.pages import Found, Page, cell, markdown, score
from recipes.soundstream.downstream import WORDS, points_of
from recipes.soundstream.work import Work

PAPER_MS = {"full": 14.74, "light": 9.86, "mixed, 80 % light": 10.84, "mixed, 30 % light": 13.28}  # on an A32 core
PAPER_VISQOL = {"silence": (4.51, 4.50), "speech": (4.35, 4.34)}  # full, mixed
PAPER_SPEAKERS = {"full": 0.897, "light": 0.943, "mixed": 0.963}


def quality(found: Found) -> str:
    """Quality of every route on every kind of sound."""
    rows = []
    for kind, routes in found["routes"].items():
        for name in ("full", "light", "mixed", "random", "oracle", "loudness"):
            one = routes[name]
            paper = dict(zip(("full", "mixed"), PAPER_VISQOL.get(kind, ()), strict=False)).get(name)
            rows.append(
                (f"{kind}, {name}", percent(one["share_light"]["value"]), cell(one["visqol"], score),
                 f"{paper:.2f}" if paper else "", cell(one["log_mel_db"]))
            )  # fmt: skip
    over = [
        (f"{kind}, {name}", cell(one, lambda number: "-" if number is None else f"{number:+.3f}"))
        for kind, pairs in found["over"].items()
        for name, one in pairs.items()
    ]
    headers = ("sound, route", "light", "ViSQOL", "the paper's", "log-mel distance, dB")
    differences = markdown(("difference of ViSQOL on the same files", "mean"), over)
    return f"{markdown(headers, rows)}\n\n{differences}"


def switch(found: Found) -> str:
    """What the switch knows, beside loudness, and where it sends pauses and speech."""
    ranks = [
        (f"{level}, {name}", *(cell(one[which], score) for which in ("switch", "loudness", "switch over loudness")))
        for level, sets in found["spearman"].items()
        for name, one in sets.items()
    ]
    shares = [
        (place, *(cell(found[f"share_at_{name}"][place], percent) for name in ("speech", "silence")))
        for place in ("speech", "pause", "edge")
    ]
    headers = ("Spearman with the actual difference", "switch", "loudness", "switch - loudness")
    light = ("segments of speech files", "light at the threshold for speech", "light at the one for silence")
    return f"{markdown(headers, ranks)}\n\n{markdown(light, shares)}"


def downstream(found: Found) -> str:
    """Accuracy of the probes on every route."""
    rows = []
    for name, task in found["tasks"].items():
        for way, one in task["accuracy"].items():
            gap = task["difference"].get(way)
            paper = PAPER_SPEAKERS.get(way) if name == "speakers" else None
            rows.append(
                (f"{WORDS[name]}, {way}", cell(one, lambda value: percent(value, 1)),
                 "" if gap is None else cell(gap, points_of), "" if paper is None else percent(paper, 1))
            )  # fmt: skip
    headers = ("task, path of the encoder", "accuracy", "points over full, same clips", "the paper's")
    notes = [
        f"{WORDS[name]}: {len(task['classes'])} classes (the commonest one alone {percent(task['most_common'])}), "
        f"{task['clips']['test']} test clips of {task['test_sources']} speakers or recordings, "
        f"{percent(sum(task['share_light']) / len(task['share_light']))} of their segments light, a probe of "
        f"{task['probe_parameters']:,} parameters."
        for name, task in found["tasks"].items()
    ]
    return markdown(headers, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def variants(found: Found) -> str:
    """The light paths side by side."""
    rows = [
        (f"{name}: {one['words']}", f"{one['params']:,}", f"{one['fewer']['params']:.1f}x", human(one["macs"]),
         f"{one['fewer']['macs']:.1f}x", cell(one["difference"]["test"]), cell(one["switch"]["speech"], score),
         cell(one["loudness"]["speech"], score))
        for name, one in found["variants"].items()
    ]  # fmt: skip
    rows.append(("*the paper's*", "3,104", "20.9x", "440 k", "12.3x", "", "", ""))
    headers = (
        "light path", "parameters", "fewer", "MACs a second", "fewer", "relative difference, test",
        "Spearman of the switch, valid speech", "of loudness",
    )  # fmt: skip
    full = found["full"]
    note = (
        f"Full path: {full['params']:,} parameters, {human(full['macs'])} MACs (the paper's: 65,024 and 5.4 M)."
        f" Means after {found['steps']['light']} steps, with the range over seeds."
    )
    return f"{markdown(headers, rows)}\n\n{note}"


def streams(found: Found) -> str:
    """The paper's Table 1, which is computed from always full and always light, beside measured streams."""
    full = PAPER_MS["full"]
    rows = []
    for name in next(iter(found["runtimes"].values())):
        paper = PAPER_MS.get(name)
        cells = ["" if paper is None else f"{paper:.2f} ms", "" if paper is None else percent(1 - paper / full, 1)]
        for runtime in found["runtimes"].values():
            one = runtime[name]
            cells += [human(one["us"]), percent(one["computed_saved"], 1), percent(one["saved"], 1)]
        rows.append((name, *cells))
    headers = ["stream", "the paper's", "saved, computed"]
    for runtime in found["runtimes"]:
        headers += [f"{runtime}: us", "saved, computed", "saved, measured"]
    note = (
        f"Microseconds of the whole encoder for a second of sound, one thread, {found['segments']} segments of "
        f"{found['segment_seconds']:g} s, {found['rounds']} rounds, all streams in turn in one run. Always full in one "
        f"call, without segments: {human(found['one_call_us']['onnx'])} us in ONNX Runtime, "
        f"{human(found['one_call_us']['eager'])} us in PyTorch."
    )
    return f"{markdown(headers, rows)}\n\n{note}"


def lengths(found: Found) -> str:
    """What segments of other lengths cost, inside ONNX Runtime's sessions."""
    names = list(next(iter(found["sizes"].values())))
    rows = [
        (size, *(f"{human(row[name]['us'])} us, {percent(row[name]['saved'], 1)}" for name in names))
        for size, row in found["sizes"].items()
    ]
    return markdown(("segment", *(f"{name}: time, saved" for name in names)), rows)


PAGE = Page(
    "soundstream",
    stages={
        "variants": "retrofit",
        "quality": "quality",
        "downstream": "downstream",
        "latency": "latency",
        "figures": "figures",
    },
    sections=(
        ("What routing saves (the paper's Table 1)", "latency", streams),
        ("Segments of other lengths", "latency", lengths),
        ("Quality", "quality", quality),
        ("What the switch knows", "quality", switch),
        ("Light paths side by side", "variants", variants),
        ("Downstream tasks", "downstream", downstream),
    ),
    pictures={
        "routed_sound": "Which segments of a sound take which path (the paper's Fig. 3)",
        "share_and_quality": "Share light and quality against the threshold, by kind of sound (Fig. 4)",
        "mask_sparsity": "Zeros at the cut while a mask trains, for several beta (Fig. 6)",
        "predicted_actual": "Predicted against actual difference, and the error over training (Fig. 7)",
        "earlier_cuts": "Correlation of the two for layers at earlier cuts (Fig. 8)",
    },
)


def run(work: Work) -> dict[str, Any]:
    """What the other stages wrote -> tables.md; returns the lines of the verdict and which stages are missing."""
    return PAGE.write(work.folder)
