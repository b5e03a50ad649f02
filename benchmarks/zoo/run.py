"""Each network in a process of its own, with a limit on time and memory, so that a crash is one line of the result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..children import in_child
from .check import Record, check_network
from .network import Network


@dataclass(frozen=True)
class Limits:
    """For one network: seconds of its process, and GB of memory it may have."""

    seconds: float = 240.0
    gigabytes: float = 12.0


def run_all(
    networks: Sequence[Network], shares: Sequence[float], results: Path, limits: Limits, jobs: int, times: bool = False
) -> Iterator[Record]:
    """Records in the order in which networks finish; they are appended to `results` as well."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_child, network, shares, results, limits, times) for network in networks]
        for future in as_completed(waiting):
            yield from future.result()


def read(results: Path) -> list[Record]:
    """The records of an earlier run; a line that was cut short ends them."""
    records = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _child(network: Network, shares: Sequence[float], results: Path, limits: Limits, times: bool) -> list[Record]:
    part = results.with_name(f"{network.name}.part")
    part.unlink(missing_ok=True)
    start = time.perf_counter()
    ending = in_child(
        _check, network.name, tuple(shares), part, times, seconds=limits.seconds, gigabytes=limits.gigabytes
    )
    records = read(part)
    part.unlink(missing_ok=True)
    if ending:
        stage = "cut" if records else "process"
        records.append(
            {"network": network.name, "group": network.group, "stage": stage, "works": False, "reason": ending}
        )
    for record in records:
        record["network_s"] = round(time.perf_counter() - start, 2)
    with results.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return records


def _check(name: str, shares: Sequence[float], part: Path, times: bool) -> None:
    """In the child: the records of one network as JSON lines, each when it is there."""
    from .registry import selected

    (network,) = selected([name])
    for record in check_network(network, shares, times):
        with part.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def as_json(records: Sequence[Record], summary: Any) -> str:
    return json.dumps({"summary": summary, "records": list(records)}, indent=1)
