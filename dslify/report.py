"""Results as tables and paragraphs for a terminal or a file, 80 columns and up. Nothing here computes or knows torch.

Every function takes a frozen result and returns something that rich prints; without a terminal it is plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Group, RenderableType

from .evaluated import evaluation as evaluation
from .evaluated import predictions as predictions
from .evaluated import shares as shares
from .tables import Spark, figure, human, line, percent, plain_table, shape_words, times
from .tables import signed as signed
from .tables import with_interval as with_interval

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .plan import LatencyFit, Plan
    from .runs import History

LIGHTS = {  # by Plan.light; a narrow copy has a width
    "exit": "is a constant answer",
    "head": "is a head on pooled features",
    "identity": "gives back what enters it",
}


class CostRow(Protocol):
    """What a table of costs needs: a path's name, its parameters, and MACs per sample."""

    @property
    def name(self) -> str: ...
    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...


def surgery(rows: Iterable[CostRow], plan: Plan | None = None) -> RenderableType:
    """What was cut and where; parameters and MACs of base, switch, full and light with ratios.

    Of several layers there are no ratios: each full path is counted without the layers inside it.
    """
    found = list(rows)
    several = sum(row.name.startswith("full") for row in found) > 1
    full = None if several else next((row for row in found if row.name == "full"), None)
    table = plain_table("path", "parameters", "MACs", "fewer\nparameters", "fewer\nMACs")
    for row in found:
        light = full is not None and row.name == "light"
        ratios = (
            (times(full.params, row.params), times(full.macs, row.macs)) if full is not None and light else ("", "")
        )
        table.add_row(row.name, human(row.params), human(row.macs), *ratios)
    if plan is None:
        return table
    cut = f"{plan.scope}.{plan.at}" if plan.scope else plan.at
    kind = "separable, " * (plan.light == "separable") + f"at width {figure(plan.width)}"
    light_path = LIGHTS.get(plan.light, kind + " with random weights" * (plan.init == "random"))
    lines = [f"cut behind {cut}, value of shape {shape_words(plan.cut_shape)}; light path {light_path}"]
    if why := plan.why:
        lines.append(f"chosen by --at auto: {why}")
    if plan.dynamic:
        lines.append(f"inputs: {plan.dynamic}")
    if plan.crossing:
        lines.append(f"also crossing the cut: {', '.join(plan.crossing)}")
    lines += [
        f"{'into' if side.entering else 'out of'} the light path: 1x1 projection, {side.full_channels} channels "
        f"{'to' if side.entering else 'from'} {side.light_channels}"
        for side in plan.projections
    ]
    lines += [f"kept at full width, no rule: {name} ({len(nodes)}x)" for name, nodes in plan.ledger.items()]
    lines += [f"kept at full width, {why}: {node}" for node, why in plan.distrusted.items()]
    if plan.dropped:
        kept = f"depth {figure(plan.depth)}"
        lines.append(f"left out ({kept}): {', '.join(plan.dropped)}")
    return Group(*map(line, lines), table)


def latency_fit(fit: LatencyFit) -> RenderableType:
    """The light paths that a search for latency timed, in its order, and the one it took."""
    table = plain_table("width", "depth", "of the MACs", "of the latency", "")
    table.columns[-1].justify = "left"
    for each in fit.candidates:
        said = "taken" if each == fit.chosen else "" if each.share <= fit.target else "too slow"
        table.add_row(figure(each.width), figure(each.depth), percent(each.macs, 1), percent(each.share, 1), said)
    words = (
        f"width {figure(fit.chosen.width)}, depth {figure(fit.chosen.depth)}: {percent(fit.chosen.share, 1)} of the "
        f"full region's latency, asked for {percent(fit.target)} ({fit.runtime}, one thread)"
    )
    return Group(line(words), table)


def training(history: History) -> RenderableType:
    """The losses of each phase, from the mean of the first steps to that of the last, with their curve."""
    table = plain_table("phase", "steps", "loss", "first", "last", "curve", "seconds")
    table.columns[2].justify = table.columns[5].justify = "left"
    for phase in history.phases:
        parts = [name for name, values in phase.losses.items() if name != "total" and any(values)]
        shown = parts if len(parts) == 1 else ["total", *parts]
        for at, name in enumerate(shown):
            curve = phase.losses[name]
            once = (phase.name, str(phase.steps), f"{phase.seconds:.0f}") if at == 0 else ("", "", "")
            row = (once[0], once[1], name, figure(phase.first(name)), figure(phase.last(name)), Spark(curve), once[2])
            table.add_row(*row)
    lines = [f"{name}: {_counted(part)} from {part['sources']} sources" for name, part in history.data.items()]
    if history.unseen is not None:
        lines.append(
            f"light differs from full by {figure(history.unseen)} on the switch's data, which it was not fitted to"
        )
    lines += [
        f"{name} phase: the state of step {step} was kept, the best on held-out sources"
        for name, step in history.kept.items()
    ]
    lines += [f"note: {note}" for note in history.notes]
    return Group(table, *map(line, lines))


def _counted(part: Mapping[str, Any]) -> str:
    """ "360 samples (40 and varied copies of them)", of what a phase learned from."""
    varied = part["originals"] < part["samples"]
    return f"{part['samples']} samples" + varied * f" ({part['originals']} and varied copies of them)"


def calibration(result: Calibration) -> RenderableType:
    """The threshold, how it was set, what it promises, and what to beware of; of every layer."""
    if result.max_lost is not None:
        return _gates(result)
    lines = []
    for at, layer in enumerate(result.layers or (result,)):
        unit = "probability of a positive" if layer.kind == "positive" else "relative difference"
        over = f"mean difference over all {figure(layer.mean_difference)}"
        lines += [f"layer {at + 1} of {len(result.layers)}, of what reaches it:"] if result.layers else []
        lines += [
            f"threshold {figure(layer.threshold)} ({unit})",
            f"set by {layer.how}",
            f"light: {percent(layer.share)} of the {'segments' if layer.segments > 1 else 'samples'}; {over}",
        ]
        if layer.promise is not None:
            delta = "" if layer.delta is None else f", delta {figure(layer.delta)}"
            given = f"epsilon {figure(layer.epsilon)}{delta}, n {layer.units}, bound {figure(layer.bound)}"
            lines.append(f"promise: {layer.promise} ({given})")
        lines += [f"note: {note}" for note in layer.notes]
    return Group(*map(line, lines))


def _gates(result: Calibration) -> RenderableType:
    """Thresholds that were set by what they lose: what each gate does and all of them, how, and with what promise."""
    layers = result.layers or (result,)
    several = len(layers) > 1
    table = plain_table("gate", "threshold", "positives\nlost", "negatives\nstopped")
    named = [(str(at), figure(layer.threshold), layer) for at, layer in enumerate(layers, 1)]
    for name, threshold, one in [*named, *([("all", "", result)] if several else [])]:
        table.add_row(name, threshold, percent(one.lost, 2), percent(one.negatives_stopped, 1))
    kinds = ", ".join(f"{kind} {percent(share, 1)}" for kind, share in result.stopped.items())
    lines = [
        f"stopped of each kind: {kinds}",
        f"threshold{'s' * several} (probability of a positive) set by {result.how}",
    ]
    lines += [f"promise: {result.promise}"] if result.promise else []
    return Group(table, *map(line, [*lines, *(f"note: {note}" for note in result.notes)]))
