"""What a run of the zoo showed: lines, shares, exceptions, ratios and times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .check import Record

RATIOS = "light / region at width 0.1, by network"


def line(record: Record) -> str:
    """One record in one line."""
    name = f"{record['network']}  {record.get('at', '')}".rstrip()
    if record.get("works", record["stage"] == "cut" and "insert_into_s" in record):
        light = "  ".join(
            f"{word} {' / '.join(f'{share:.4f}' for share in record[key])}"
            for key, word in (("with_projection", "light"), ("without_projection", "unprojected"))
            if key in record
        )
        times = f"capture {record['capture_s']:.1f} s, insert {record['insert_into_s']:.1f} s"
        odd = "".join(f", {word}: {record[word]}" for word in ("ledger", "distrusted") if record.get(word))
        return f"ok    {name:<66} {light}  {times}{odd}"
    stage = {"eager": "eager", "captured": "capture"}.get(record["stage"], "fails")
    return f"{stage:<5} {name:<66} {record.get('reason', '')}"


def summarise(records: Sequence[Record], cuts: int) -> dict[str, Any]:
    """Figures over all records. cuts: how many were asked for in each network; one that dropped out counts with all."""
    by_network: dict[str, list[Record]] = {}
    for record in records:
        by_network.setdefault(record["network"], []).append(record)
    dropped = {name: rows[0] for name, rows in by_network.items() if rows[0]["stage"] != "cut"}
    eager = {name: row["reason"] for name, row in dropped.items() if row["stage"] == "eager"}
    runs = {name: rows for name, rows in by_network.items() if name not in eager}
    captured = {name: rows for name, rows in runs.items() if name not in dropped}
    attempted = sum(len(rows) if name in captured else cuts for name, rows in runs.items())
    working = sum(bool(row.get("works")) for rows in captured.values() for row in rows)
    checked = any("works" in row for rows in captured.values() for row in rows)
    one_capture = [rows[0]["capture_s"] for rows in captured.values() if "capture_s" in rows[0]]
    inserts = [row["capture_s"] + row["insert_into_s"] for row in records if "insert_into_s" in row]
    return {
        "networks": len(by_network),
        "eager PyTorch runs": len(runs),
        "captured": len(captured),
        "networks that work at every cut": sum(all(row.get("works") for row in rows) for rows in captured.values()),
        "cuts attempted": attempted,
        "cuts that work": working,
        "share that works": working / max(1, attempted) if checked else math.nan,
        "exceptions": [
            {"network": row["network"], "at": row.get("at", ""), "reason": row.get("reason", "")}
            for rows in runs.values()
            for row in rows
            if not row.get("works", "insert_into_s" in row)
        ],
        "not run by eager PyTorch": eager,
        "batch of three that eager PyTorch refuses": {
            name: rows[0]["batch_of_three"] for name, rows in captured.items() if "batch_of_three" in rows[0]
        },
        "without a rule": _total(row.get("ledger", {}) for row in records),
        RATIOS: _ratios(captured),
        f"{RATIOS}, without our own": _ratios(
            {name: rows for name, rows in captured.items() if rows[0]["group"] != "awkward"}
        ),
        "seconds": {
            "capture": _times(one_capture),
            "surgery": _times([row["surgery_s"] for row in records if "surgery_s" in row]),
            "surgery and its checks": _times([row["insert_into_s"] for row in records if "insert_into_s" in row]),
            "insert, in all": _times(inserts),
        },
    }


def text(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    share = summary["share that works"]
    lines = [f"{name:<34} {summary[name]}" for name in list(summary)[: 3 if math.isnan(share) else 6]]
    lines.append(f"{'share that works':<34} {'not checked' if math.isnan(share) else f'{share:.1%}'}")
    for title in (RATIOS, f"{RATIOS}, without our own", "seconds"):
        lines += ["", title]
        for name, figures in summary[title].items():
            lines.append(f"  {name:<32} " + "  ".join(f"{word} {value:.4g}" for word, value in figures.items()))
    for title in ("without a rule", "not run by eager PyTorch", "batch of three that eager PyTorch refuses"):
        if summary[title]:
            lines += ["", title, *(f"  {name:<42} {what}" for name, what in summary[title].items())]
    if summary["exceptions"]:
        lines += ["", "exceptions"]
        lines += [f"  {row['network']} {row['at']}: {row['reason']}" for row in summary["exceptions"]]
    return "\n".join(lines)


def _ratios(captured: dict[str, list[Record]]) -> dict[str, dict[str, float]]:
    return {
        f"{what}, {kind}": _spread([statistics.median(shares) for shares in _shares(captured, key, at)])
        for key, kind in (("with_projection", "projected"), ("without_projection", "unprojected"))
        for at, what in enumerate(("parameters", "MACs"))
    }


def _shares(captured: dict[str, list[Record]], key: str, at: int) -> list[list[float]]:
    """Of every network, the shares at its cuts."""
    shares = ([row[key][at] for row in rows if row.get("works", True) and key in row] for rows in captured.values())
    return [each for each in shares if each]


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ranked = sorted(values)
    return {
        "median": statistics.median(ranked),
        "90 % at most": ranked[math.ceil(0.9 * len(ranked)) - 1],
        "max": ranked[-1],
    }


def _times(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "max": max(values)} if values else {}


def _total(ledgers: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for ledger in ledgers:
        for name, count in ledger.items():
            total[name] = total.get(name, 0) + count
    return total
