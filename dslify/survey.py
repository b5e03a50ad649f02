"""What each cut would cost and save: the cut points with the price of their light path, and the one `auto` takes.

No weights are built here: the axis algebra alone says how large a light path would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import SymInt, Tensor, fx, nn

from .axes import AxisMap, Kept, analyse, sizes
from .capture import Graph, capture, scope_inputs
from .cut import CutPoint, Flow, cut_points_of, exits, partition
from .errors import CutError, one_line
from .functional import hint_of, size_words, tensor_at
from .graft import region_module, samples_of
from .plan import Projection, projections
from .switch import Layout
from .widths import decide

LIGHT_SHARE = 0.5  # of the inputs, for the expected cost by which cuts are compared
BASE = (0.2, 0.5)  # of the network's MACs: with less the switch sees little, with more little can be saved
WIDER = (0.02, 0.8)  # where no cut lies between those
WORTH = 0.9  # a light path dearer than this share of what it replaces is none
ALIKE = 0.03  # of the network's MACs: costs that differ by less are equal, and other things decide
PATIENCE = 2.0  # seconds without a sign of life


@dataclass(frozen=True)
class SurveyPoint(CutPoint):
    """A cut point, and what its light path would cost.

    value: name of the graph node at the cut. block: the module holds others that compute. crossing_shapes: of the
    values in `crossing`, "*" for axes that vary, () for a single number. bytes: of the cut and all that crosses, per
    sample. light_macs (per sample), light_params: of the light path with its projections; None where not priced.
    frozen_params: parameter values behind the cut in tensors that keep their size. ledger: operators behind the cut
    without a rule -> how many.
    """

    value: str = ""
    block: bool = False
    crossing_shapes: tuple[tuple[Any, ...], ...] = ()
    bytes: int = 0
    light_macs: int | None = None
    light_params: int | None = None
    frozen_params: int = 0
    projections: tuple[Projection, ...] = ()
    ledger: tuple[tuple[str, int], ...] = ()

    @property
    def base_share(self) -> float:
        """Of the network's MACs; NaN where none were counted."""
        total = self.base_macs + self.region_macs
        return self.base_macs / total if total else math.nan

    @property
    def light_share(self) -> float:
        """MACs of the light path as a share of those that it replaces; NaN where that is not known."""
        return self.light_macs / self.region_macs if self.region_macs and self.light_macs is not None else math.nan

    @property
    def expected_share(self) -> float:
        """What remains of the network's MACs when LIGHT_SHARE of the inputs go light; NaN as above."""
        return 1 - LIGHT_SHARE * (1 - self.base_share) * (1 - self.light_share)

    @property
    def tensors(self) -> int:
        """How many tensors cross besides the cut; single numbers (sizes) are not counted."""
        return sum(shape != () for shape in self.crossing_shapes)


class Survey:
    """The cut points of a captured network, priced when asked for, each cut once.

    width, projection: as in insert(). prefix: put before each path. points: every submodule in execution order, not
    priced.
    """

    def __init__(self, captured: Graph, width: float = 0.1, projection: bool = True, prefix: str = ""):
        self.module, self.width, self.projection = captured.module, width, projection
        self._nodes = {
            prefix + path: node for path, node in exits(captured.module.graph).items() if isinstance(node, fx.Node)
        }
        self._known: dict[fx.Node, dict[str, Any]] = {}
        self._flow = Flow.of(captured.module.graph)
        self._values = {node.name: node.meta.get("val") for node in captured.module.graph.nodes}
        self._samples = samples_of(captured.module.graph, Layout(0))
        plain = cut_points_of(captured, prefix)
        names = sorted(point.path for point in plain)
        self.points = [self._described(point, _holds_others(point.path, names)) for point in plain]

    def price(self, point: SurveyPoint) -> SurveyPoint:
        """The point with the cost of its light path, or with the reason why there is none."""
        if point.reason:
            return point
        node = self._nodes[point.path]
        if node not in self._known:
            self._known[node] = self._light(node)
        return replace(point, **self._known[node])

    def priced(self, paths: Collection[str] | None = None, progress: bool | None = False) -> list[SurveyPoint]:
        """All points, those under `paths` priced (None: every one). progress: a bar on stderr once it takes more than
        two seconds; None shows it where stderr is a terminal.
        """
        wanted = {point.path for point in self.points} if paths is None else set(paths)
        console = Console(stderr=True)
        shown = console.is_terminal if progress is None else progress
        found = []
        with Progress(console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("pricing light paths", total=len(wanted), visible=False)
            for point in self.points:
                asked = point.path in wanted
                found.append(self.price(point) if asked else point)
                bar.update(task, advance=int(asked), visible=(bar.tasks[0].elapsed or 0) > PATIENCE)
        return found

    def auto(self) -> tuple[SurveyPoint, str]:
        """As choose_cut, pricing only what it looks at."""
        return _chosen(self.points, self.price)

    def _described(self, point: CutPoint, block: bool) -> SurveyPoint:
        if point.reason:
            return SurveyPoint(**vars(point), block=block)
        cut = self._nodes[point.path]
        values = [self._values[name] for name in point.crossing]
        shapes = tuple(size_words(value) if isinstance(value, Tensor) else () for value in values)
        held = sum(_bytes(value, self._samples) for value in (cut.meta["val"], *values) if isinstance(value, Tensor))
        return SurveyPoint(**vars(point), value=cut.name, block=block, crossing_shapes=shapes, bytes=held)

    def _light(self, cut: fx.Node) -> dict[str, Any]:
        try:
            region = region_module(self.module, partition(self.module.graph, cut, flow=self._flow))
            axes = analyse(region, samples=self._samples)
            kept, projected = decide(axes, self.width, self.projection)
        except Exception as error:  # one cut that cannot be followed must not hide the others
            return {"reason": f"no light path can be derived behind it: {one_line(error)}"}
        return {
            "light_macs": axes.macs(kept, projected),
            "light_params": axes.params(kept, projected),
            "frozen_params": _kept_whole(axes, kept),
            "projections": projections(axes, kept, projected),
            "ledger": tuple((name, len(nodes)) for name, nodes in axes.ledger.items()),
        }


def survey(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
    scope: str | None = None,
    width: float = 0.1,
    projection: bool = True,
) -> list[SurveyPoint]:
    """As dslify.cut_points, with what a light path of `width` would cost at each point. Raises CaptureError."""
    inner, args, kwargs = scope_inputs(model, scope, example_inputs, example_kwargs)
    return Survey(capture(inner, args, kwargs), width, projection, f"{scope}." if scope else "").priced()


def choose_cut(points: Iterable[SurveyPoint]) -> tuple[SurveyPoint, str]:
    """The priced point to cut at, and a sentence that says why and names the runner-up. The rules, in this order:

    1. The base has 20 to 50 % of the MACs: the switch needs features, and what lies before the cut is never saved.
       Where no cut has, 2 to 80 %, and the distance from that range counts as cost.
    2. The fewest tensors that cross besides the cut; then ends of blocks before the layers inside them. The light path
       has at most 0.9 of the MACs that it replaces; and, if there is a choice, no operator behind it lacks a rule.
    3. The lowest expected cost when half of the inputs go light. Within 3 % of the network's MACs, and between cuts
       with no MACs in between: the fewest bytes at the cut, then the outermost module.

    Raises CutError where no cut is left.
    """
    return _chosen(list(points), lambda point: point)


def _chosen(points: Sequence[SurveyPoint], price: Callable[[SurveyPoint], SurveyPoint]) -> tuple[SurveyPoint, str]:
    usable = _distinct(point for point in points if not point.reason)
    for low, high in (BASE, WIDER):
        groups: dict[tuple[int, bool], list[SurveyPoint]] = {}
        for point in usable:
            if low <= point.base_share <= high:
                groups.setdefault((point.tensors, not point.block), []).append(point)
        for rank in sorted(groups):
            worth = [point for point in map(price, groups[rank]) if point.light_share <= WORTH]
            if worth:
                return _cheapest([point for point in worth if not point.ledger] or worth)
    raise CutError(
        f"--at auto: of {len(points)} modules {len(usable)} can be cut at, and none has {_range(WIDER)} of the MACs "
        "before it and a light path that saves anything; name one with --at (dslify inspect lists them)."
    )


def _cheapest(points: Sequence[SurveyPoint]) -> tuple[SurveyPoint, str]:
    def cost(point: SurveyPoint) -> float:
        return point.expected_share + max(BASE[0] - point.base_share, point.base_share - BASE[1], 0)

    ranked = sorted(points, key=cost)
    alike = [point for point in ranked if cost(point) <= cost(ranked[0]) + ALIKE]
    best = min(alike, key=lambda point: (point.bytes, point.path.count("."), cost(point)))
    crosses = "nothing else crosses"
    if best.tensors:
        crosses = f"{best.tensors} tensor{'s' * (best.tensors != 1)} besides it cross" + "es" * (best.tensors == 1)
    why = (
        f"{best.path}, {'the end of a block' if best.block else 'a layer'}: {_percent(best.base_share)} of the MACs "
        f"lie before it, {crosses}, and with {_percent(LIGHT_SHARE)} of the inputs going light "
        f"{_percent(best.expected_share)} of the MACs remain"
    )
    if not BASE[0] <= best.base_share <= BASE[1]:
        why += f" (no suitable cut has {_range(BASE)} before it)"
    second = next((point for point in ranked if point is not best), None)
    return best, why + (f"; next best: {second.path}, {_percent(second.expected_share)}." if second else ".")


def _distinct(points: Iterable[SurveyPoint]) -> list[SurveyPoint]:
    """Of cuts with no MACs between them one: that with the fewest bytes, of those a block's end, the outermost, last.

    So a stem is cut behind its pooling, and a plain layer behind its activation.
    """
    groups: dict[tuple[int, int], list[SurveyPoint]] = {}
    for point in points:
        groups.setdefault((point.base_macs, point.tensors), []).insert(0, point)
    found = []
    for group in groups.values():
        first = min(group, key=lambda point: (point.bytes, not point.block, point.path.count(".")))
        found.append(replace(first, block=any(point.block for point in group)))
    return found


def _holds_others(path: str, names: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in names)


def _kept_whole(axes: AxisMap, kept: Kept) -> int:
    size = sizes(kept)
    found = 0
    for name in axes.weights:
        shape = tuple(tensor_at(axes.region, name).shape)
        if shape == tuple(map(size, axes.parameters[name])):
            found += math.prod(shape)
    return found


def _bytes(value: Tensor, samples: int) -> int:
    held = math.prod(map(hint_of, value.shape)) * value.element_size()
    return held // samples if any(isinstance(size, SymInt) for size in value.shape) else held


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _range(shares: tuple[float, float]) -> str:
    return f"{100 * shares[0]:.0f} to {_percent(shares[1])}"
