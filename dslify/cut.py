"""Where a captured network can be cut, and what a cut divides it into: base | crossing | region | tail."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .capture import Graph, capture, scope_inputs
from .errors import CutError
from .functional import memory_of, parameters_read, size_words, writes_in_place
from .macs import node_macs


@dataclass(frozen=True)
class CutPoint:
    """A submodule behind which the network can be cut (reason == ""), or why it cannot.

    shape: of the cut's value, with words for varying axes. base_macs, region_macs: per sample. base_params,
    region_params: parameter values before and after. crossing: names of other values the region reads from the base.
    """

    path: str
    shape: tuple[Any, ...] = ()
    base_macs: int = 0
    region_macs: int = 0
    base_params: int = 0
    region_params: int = 0
    crossing: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Partition:
    """Nodes of a graph around a cut, each in graph order. outputs: region values that the tail or the output reads."""

    cut: fx.Node
    base: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]
    crossing: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    tail: tuple[fx.Node, ...]


def exits(graph: fx.Graph) -> dict[str, fx.Node | str]:
    """Module path -> the node that leaves it, or the reason why there is no single one."""
    inside: dict[str, set[fx.Node]] = {}
    calls: dict[str, set[str]] = {}
    for node in graph.nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if path and node.op == "call_function" and not key.startswith("_empty"):
                inside.setdefault(path, set()).add(node)
                calls.setdefault(path, set()).add(key)
    found: dict[str, fx.Node | str] = {}
    for path, nodes in inside.items():
        leaving = [
            node
            for node in graph.nodes
            if node in nodes and _is_tensor(node) and any(user not in nodes for user in node.users)
        ]
        if len(calls[path]) > 1:
            found[path] = f"it is called {len(calls[path])} times"
        elif len(leaving) > 1:
            found[path] = f"it returns {len(leaving)} values"
        elif not leaving:
            found[path] = "its values are not used"
        else:
            found[path] = leaving[0]
    return found


def find_cut(graph: fx.Graph, at: str, module: nn.Module | None = None) -> fx.Node:
    """The node of a module path or of a node name. Raises CutError with the nearest names, or the reason."""
    places = exits(graph)
    found = places.get(at) or next((node for node in graph.nodes if node.name == at and _is_tensor(node)), None)
    usable = [path for path, node in places.items() if isinstance(node, fx.Node)]
    if isinstance(found, fx.Node):
        if found.op in ("placeholder", "get_attr"):
            raise CutError(
                f"--at {at}: this is an input or a parameter; cut behind a layer, such as {', '.join(usable[:3])}."
            )
        return found
    near = difflib.get_close_matches(at, usable, n=3, cutoff=0) or usable[:3]
    if isinstance(found, str):
        raise CutError(
            f"--at {at}: {found}, and a cut needs one tensor that is computed once; near it are {', '.join(near)}."
        )
    known = module is not None and any(name == at for name, _ in module.named_modules())
    what = "this module computes nothing on its own" if known else "no such module in the network"
    raise CutError(f"--at {at}: {what}; the nearest cut points are {', '.join(near)}.")


def partition(graph: fx.Graph, cut: fx.Node, to: fx.Node | None = None) -> Partition:
    """Divide the nodes. Raises CutError when nothing is behind the cut, or `to` does not depend on it."""
    nodes = list(graph.nodes)
    base = _ancestors(cut) | {cut} | {node for node in nodes if node.op in ("placeholder", "get_attr", "call_module")}
    writers = [node for node in nodes if writes_in_place(node)]
    behind = {cut}
    for node in nodes:
        if any(used in behind for used in node.all_input_nodes):
            behind.add(node)
    _add_writers(base, [node for node in writers if node not in behind])
    wanted = (_ancestors(to) | {to}) if to is not None else _ancestors(nodes[-1])
    _add_writers(wanted, writers)
    if (to is not None and to not in behind) or to is cut:
        raise CutError(f"--to {to}: it does not come after the cut {cut}.")
    # sizes of base values are computed in the base: the whole value would have to cross for them otherwise
    for node in nodes:
        if (
            node not in behind
            and node not in base
            and not _is_tensorial(node)
            and all(used in base for used in node.all_input_nodes)
        ):
            base.add(node)
    region = [node for node in nodes if node in wanted and node not in base and node.op != "output"]
    inside = set(region)
    crossing = [
        node
        for node in nodes
        if node in base and node is not cut and node.op != "get_attr" and any(user in inside for user in node.users)
    ]
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    if not region or not any(node in behind for node in outputs):
        raise CutError(
            f"The cut {cut} is the network's last value: nothing comes after it that a light path could replace."
        )
    for node in region:
        if writes_in_place(node) and memory_of(node) not in inside:
            raise CutError(
                f"Behind the cut, {node} writes into a value in place through a view; "
                "cut before the module that does so."
            )
    kept = [node for node in nodes if node in base]
    tail = [node for node in nodes if node not in base and node not in inside and node.op != "output"]
    return Partition(cut, tuple(kept), tuple(region), tuple(crossing), tuple(outputs), tuple(tail))


def cut_points(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
    scope: str | None = None,
) -> list[CutPoint]:
    """Every submodule in execution order: as a cut point with its costs, or with the reason why it is none."""
    inner, args, kwargs = scope_inputs(model, scope, example_inputs, example_kwargs)
    return cut_points_of(capture(inner, args, kwargs), prefix=f"{scope}." if scope else "")


def cut_points_of(captured: Graph, prefix: str = "") -> list[CutPoint]:
    """As cut_points, of a graph that was captured already. prefix: put before each path."""
    graph = captured.module.graph
    macs = node_macs(captured.module, captured.args, captured.kwargs)
    total = sum(macs.values()) // captured.samples
    order = {node: at for at, node in enumerate(graph.nodes)}
    points = []
    for path, node in exits(graph).items():
        if isinstance(node, str):
            points.append((len(order), CutPoint(prefix + path, reason=node)))
            continue
        try:
            parts = partition(graph, node)
        except CutError:
            points.append((order[node], CutPoint(prefix + path, reason="nothing comes after it")))
            continue
        base = sum(macs.get(part, 0) for part in parts.base) // captured.samples
        point = CutPoint(
            prefix + path,
            size_words(node.meta["val"]),
            base,
            total - base,
            parameters_read(captured.module, parts.base),
            parameters_read(captured.module, parts.region),
            tuple(crossing.name for crossing in parts.crossing),
        )
        points.append((order[node], point))
    return [point for _, point in sorted(points, key=lambda item: item[0])]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        above = waiting.pop()
        if above not in found:
            found.add(above)
            waiting.extend(above.all_input_nodes)
    return found


def _add_writers(nodes: set[fx.Node], writers: list[fx.Node]) -> None:
    """Add what writes in place into the memory of these nodes, with all that it needs: nothing else reads its value."""
    missing = writers
    while missing:
        missing = [node for node in writers if node not in nodes and memory_of(node) in nodes]
        for node in missing:
            nodes |= {node, *_ancestors(node)}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_tensorial(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))
