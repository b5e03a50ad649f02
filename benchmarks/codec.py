"""The codec on real sound: what the switch predicts, whom it sends light, and what that costs.

    make bench-codec DATA=folder        # train/ valid/ test/ of sound, and manifest.csv (path, label, source_id)

The light path learns from train, the switch from one half of valid, and the threshold is set on the other half, which
serves nothing else; the halves are divided by recording. All figures are of test, which nothing else has seen. Two runs
with one seed on one machine give the same numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import dslify
from dslify import report
from dslify.calibrate import Calibration
from dslify.cost import Cost
from dslify.data import open_data
from dslify.errors import DslifyError, OptionError
from dslify.measure import Evaluation
from dslify.observe import collect
from dslify.resampling import Interval, spearman
from dslify.runs import History
from dslify.samples import Samples, split
from recipes.soundstream import CUT, SoundStream, pretrained
from recipes.soundstream.spectral import LogMelDistance

SHARES = (0.3, 0.5, 0.8)
OPTIONS = ("width", "steps", "switch_steps", "lr", "seed", "threads")
LEARNING = (0.02, 0.1, 0.3, 1.0)  # shares of the switch's steps after which its correlation is looked at
SHOWN = 0.5  # the share whose tables are printed
BOUNDARY = "encoder"


@dataclass(frozen=True)
class Outcome:
    """One run. evaluations: by the share asked for. learning: after so many steps, the rank correlation of the switch's
    prediction with the actual difference, on the threshold's data. seconds: of all stages together."""

    costs: tuple[Cost, ...]
    history: History
    data: dict[str, Samples]
    calibrations: dict[float, Calibration]
    evaluations: dict[float, Evaluation]
    learning: dict[int, float]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/codec.py", description="A Dynamic Switch Layer in the codec's encoder."
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/, valid/ and test/")
    parser.add_argument("--fit", action="store_true", help="start the light path from a least-squares fit")
    parser.add_argument(
        "--width", type=float, default=0.24, help="of the light path: 16x fewer parameters, 17x fewer MACs"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of the light path")
    parser.add_argument("--lr", type=float, default=0.01, help="peak learning rate, chosen on valid")
    parser.add_argument("--switch-steps", type=int, default=800)
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, batches, the division of valid, and the bootstrap"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args(arguments)
    try:
        for path in (options.json, options.markdown):
            if path is not None and not path.parent.is_dir():
                raise OptionError(f"{path} cannot be written, there is no folder {path.parent}; name another file.")
        torch.set_num_threads(options.threads)
        outcome = run(options)
        shown = tables(outcome, options)
        write(options.json, json.dumps(document(outcome, options), indent=1) + "\n")
        write(options.markdown, shown)
    except DslifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(report.surgery(outcome.costs), "", report.training(outcome.history), "")
    console.print(
        report.calibration(outcome.calibrations[SHOWN]), "", report.evaluation(outcome.evaluations[SHOWN]), ""
    )
    print(shown)
    return 0


def run(options: argparse.Namespace) -> Outcome:
    start = time.perf_counter()
    codec = pretrained()
    data = sounds(options.data, codec, options.seed)
    net = dslify.insert(
        codec,
        at=CUT,
        scope=BOUNDARY,
        width=options.width,
        projection=False,
        example_inputs=(codec.example_input_array,),
        seed=options.seed,
    )
    (layer,) = dslify.dsl_layers(net)
    untrained = copy.deepcopy(layer.switch.state_dict())
    history = dslify.finetune(
        net,
        data["light"],
        switch_data=data["switch"],
        steps=options.steps,
        switch_steps=options.switch_steps,
        lr=options.lr,
        seed=options.seed,
        fit=options.fit,
        threads=options.threads,
    )
    distance = LogMelDistance()
    calibrations, evaluations = {}, {}
    for share in SHARES:
        calibrations[share] = dslify.calibrate(net, data["threshold"], light_share=share, training=history)
        evaluations[share] = dslify.evaluate(
            net, data["test"], metric=lambda output, sound: distance(sound, output), seed=options.seed
        )
    learning = {steps: correlation(net, untrained, data, steps, options) for steps in moments(options.switch_steps)}
    costs = tuple(dslify.cost(net))
    return Outcome(costs, history, data, calibrations, evaluations, learning, time.perf_counter() - start)


def moments(steps: int) -> list[int]:
    """Lengths of training at which the switch is looked at."""
    return sorted({max(1, round(share * steps)) for share in LEARNING}) if steps else []


def correlation(
    net: nn.Module, untrained: dict[str, Any], data: dict[str, Samples], steps: int, options: argparse.Namespace
) -> float:
    """Rank correlation on the threshold's data, of a fresh switch that was trained for so many steps."""
    again = copy.deepcopy(net)
    (layer,) = dslify.dsl_layers(again)
    layer.switch.load_state_dict(untrained)
    common: dict[str, Any] = {"lr": options.lr, "seed": options.seed, "fit": False, "threads": options.threads}
    dslify.finetune(again, data["switch"], switch_data=data["switch"], steps=0, switch_steps=steps, **common)
    seen = collect(again, data["threshold"])
    return float(spearman(seen.score, seen.difference, np.ones((1, len(seen.score))))[0])


def sounds(folder: Path, codec: SoundStream, seed: int) -> dict[str, Samples]:
    """Segments of one second, by what they are used for."""
    missing = [name for name in ("train", "valid", "test") if not (folder / name).is_dir()]
    if missing:
        raise OptionError(f"{folder} has no folder {' and no folder '.join(missing)}; expected train, valid and test.")
    shape, rate = tuple(codec.example_input_array.shape[1:]), codec.config.sample_rate
    train, valid, test = (open_data(folder / name, shape, rate=rate) for name in ("train", "valid", "test"))
    switch, threshold = split(valid, (0.5, 0.5), seed=seed)
    return {"light": train, "switch": switch, "threshold": threshold, "test": test}


def tables(outcome: Outcome, options: argparse.Namespace) -> str:
    """The figures as Markdown."""
    lines: list[str] = []
    cost = {row.name: row for row in outcome.costs}
    rate = outcome.data["test"].shape[-1]
    lines += ["| path | parameters | MACs per second | smaller than full |", "|---|---|---|---|"]
    for name, row in cost.items():
        smaller = f"{report.times(cost['full'].params, row.params)}, {report.times(cost['full'].macs, row.macs)}"
        lines.append(f"| {name} | {row.params:,} | {report.human(row.macs)} | {smaller if name == 'light' else ''} |")
    lines += ["", "| used for | segments | recordings | kinds |", "|---|---|---|---|"]
    for name, samples in outcome.data.items():
        labels = sorted(set(samples.labels))
        kinds = ", ".join(f"{label} {samples.labels.count(label)}" for label in labels)
        lines.append(f"| {name} | {len(samples)} | {len(set(samples.sources))} | {kinds} |")
    lines += ["", "| steps of the switch | " + " | ".join(map(str, outcome.learning)) + " |"]
    lines += ["|---|" + "---|" * len(outcome.learning)]
    lines += [
        "| rank correlation on the threshold's data | "
        + " | ".join(map(report.signed, outcome.learning.values()))
        + " |"
    ]
    lines += ["", *_routing(outcome), "", *_shares(outcome), "", *_predictions(outcome.evaluations[SHOWN]), ""]
    lines += [f"- asked for {report.percent(share)}: {found.verdict}" for share, found in outcome.evaluations.items()]
    lines += [
        f"- asked for {report.percent(share)}: against loudness, mixed avoids "
        f"{_with(found.saved_loudness, found.saved_loudness_interval, percent=True)}"
        for share, found in outcome.evaluations.items()
    ]
    notes = {note for calibration in outcome.calibrations.values() for note in calibration.notes}
    notes |= {note for evaluation in outcome.evaluations.values() for note in evaluation.notes}
    lines += [f"- note: {note}" for note in sorted(notes)]
    lines += [
        f"- width {options.width:g}, {options.steps} light steps, {options.switch_steps} switch steps, segments of "
        f"{rate} samples, seed {options.seed} (weights, batches, division of valid, bootstrap)",
        f"- {outcome.seconds:.0f} s on {options.threads} threads",
        "- intervals: 95 %, bootstrap over recordings; log-mel: distance of sound and decoded sound, smaller is better",
    ]
    return "\n".join(lines) + "\n"


def _routing(outcome: Outcome) -> Iterator[str]:
    yield "| asked | route | light | mean difference | log-mel, dB | MACs per second |"
    yield "|---|---|---|---|---|---|"
    for share, found in outcome.evaluations.items():
        for row in found.rows:
            cells = (
                report.percent(share), row.name, report.percent(row.share), _with(row.difference, row.interval),
                _with(row.metric, row.metric_interval), report.human(row.macs),
            )  # fmt: skip
            yield f"| {' | '.join(cells)} |"


def _shares(outcome: Outcome) -> Iterator[str]:
    """Share light of each kind, a column for each share asked for."""
    asked = " | ".join(f"light, asked {report.percent(share)}" for share in SHARES)
    yield f"| kind | segments | recordings | {asked} |"
    yield "|---|---|---|" + "---|" * len(SHARES)
    for at, kind in enumerate(outcome.evaluations[SHOWN].kinds):
        found = [outcome.evaluations[share].kinds[at] for share in SHARES]
        cells = " | ".join(_with(one.share, one.share_interval, percent=True) for one in found)
        yield f"| {kind.label} | {kind.n} | {kind.sources} | {cells} |"


def _predictions(found: Evaluation) -> Iterator[str]:
    """The switch's prediction against the actual difference; the threshold plays no part."""
    yield "| kind | correlation of logs | rank correlation | of loudness | log error | predicted / actual |"
    yield "|---|---|---|---|---|---|"
    for kind in found.kinds:
        cells = (
            kind.label,
            _with(kind.pearson_log, kind.pearson_log_interval, signed=True),
            _with(kind.spearman, kind.spearman_interval, signed=True),
            report.signed(kind.loudness_spearman),
            report.figure(kind.log_error),
            report.figure(kind.ratio),
        )
        yield f"| {' | '.join(cells)} |"


def _with(value: float | None, interval: Interval, percent: bool = False, signed: bool = False) -> str:
    write = report.percent if percent else report.signed if signed else report.figure
    return report.with_interval(value, interval, write)


def document(outcome: Outcome, options: argparse.Namespace) -> dict[str, Any]:
    """All figures as JSON."""
    return {
        "options": {
            name: getattr(options, name) for name in ("width", "steps", "switch_steps", "lr", "seed", "threads")
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "dslify": dslify.__version__},
        "costs": [row.to_json() for row in outcome.costs],
        "data": {name: samples.report.to_json() | {"origin": name} for name, samples in outcome.data.items()},
        "history": {
            phase.name: {"first": phase.first(), "last": phase.last(), "seconds": phase.seconds}
            for phase in outcome.history.phases
        },
        "switch_learning": {str(steps): found for steps, found in outcome.learning.items()},
        "unseen_difference": outcome.history.unseen,
        "calibrations": {str(share): found.to_json() for share, found in outcome.calibrations.items()},
        "evaluations": {str(share): found.to_json() for share, found in outcome.evaluations.items()},
        "seconds": outcome.seconds,
    }


def write(path: Path | None, text: str) -> None:
    """Whole or not at all."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror}); name another file.") from error


if __name__ == "__main__":
    raise SystemExit(main())
