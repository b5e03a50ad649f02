"""`python -m benchmarks.zoo`: run the zoo, print one line for each network and cut, then the summary."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from .network import Network

SHARES = (0.25, 0.5, 0.75)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="names or groups; a name may end in *")
    parser.add_argument("--cuts", nargs="+", type=float, default=SHARES, help="shares of the blocks before the cut")
    parser.add_argument("--times", action="store_true", help="capture and surgery only, without the checks")
    parser.add_argument("--sample", type=int, metavar="N", help="draw that many networks (the same ones every time)")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit for one network")
    parser.add_argument("--memory", type=float, default=12.0, help="memory limit for one network, in GB")
    parser.add_argument("--results", type=Path, default=Path("runs/zoo/results.jsonl"), help="JSON lines, one a cut")
    parser.add_argument("--resume", action="store_true", help="keep what the results file holds and run the rest")
    parser.add_argument("--json", type=Path, help="write summary and records here")
    parser.add_argument("--list", action="store_true", help="print names and groups only")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")

    from .registry import drawn, networks, selected
    from .run import Limits, as_json, read, run_all
    from .summary import line, summarise, text

    chosen: list[Network] = drawn(selected(options.only) if options.only else networks(), options.sample)
    if not chosen:
        print(f"error: no network of the zoo is called {' or '.join(options.only)}; see --list.", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{network.group:<12} {network.name}" for network in chosen))
        return 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        options.results.unlink(missing_ok=True)
    records = read(options.results)
    done = {record["network"] for record in records}
    start = time.perf_counter()
    limits = Limits(options.seconds, options.memory)
    waiting = [network for network in chosen if network.name not in done]
    for record in run_all(waiting, options.cuts, options.results, limits, options.jobs, options.times):
        records.append(record)
        print(line(record), flush=True)
    names = {network.name for network in chosen}
    records = [record for record in records if record["network"] in names]
    summary = summarise(records, len(options.cuts))
    print(f"\n{text(summary)}\n\n{len(waiting)} networks in {time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(as_json(records, summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
