"""Where a captured network can be cut, and what a cut divides it into: base | crossing | region | tail."""

from __future__ import annotations

import difflib
import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from .capture import Graph, capture, scope_inputs
from .errors import CutError, some
from .functional import is_tensor, memories_written, memory_of, op_name, size_words, tensor_at
from .macs import node_macs
from .readings import CHECK


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


@dataclass(frozen=True)
class Flow:
    """What partition() asks of every node, worked out once for all cuts of a graph. written: of the nodes that write in
    place, what made the memory they write into."""

    nodes: tuple[fx.Node, ...]
    reads: dict[fx.Node, list[fx.Node]]
    written: dict[fx.Node, set[fx.Node]]

    @classmethod
    def of(cls, graph: fx.Graph) -> Flow:
        nodes = tuple(graph.nodes)
        written = {node: set(memories) for node in nodes if (memories := memories_written(node))}
        return cls(nodes, {node: node.all_input_nodes for node in nodes}, written)

    def ancestors(self, node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = list(self.reads[node])
        while waiting:
            above = waiting.pop()
            if above not in found:
                found.add(above)
                waiting.extend(self.reads[above])
        return found

    def add_writers(self, nodes: set[fx.Node], without: set[fx.Node]) -> None:
        """Add what writes in place into the memory of these nodes, with all that it needs: nothing else reads it."""
        missing = list(self.written)
        while missing:
            missing = [w for w in self.written if w not in nodes and w not in without and self.written[w] & nodes]
            for node in missing:
                nodes |= {node, *self.ancestors(node)}


def exits(graph: fx.Graph, only: str | None = None) -> dict[str, fx.Node | str]:
    """Module path -> the node that leaves it, or the reason why there is no single one. only: the one path asked for;
    what is found for others is then not complete.

    A container that computes nothing itself (the `blocks` of `blocks.0`, `blocks.1` ...) is left by its parts' values.
    """
    stacks: dict[int, dict[str, str]] = {}  # nodes of one call share the stack of modules that it came from
    calls: dict[str, set[str]] = {}
    of: dict[fx.Node, int] = {}
    for node in graph.nodes:
        given = (node.meta.get("nn_module_stack") or {}) if node.op == "call_function" else {}
        of[node] = id(given) if given else 0
        if of[node] not in stacks:
            stacks[of[node]] = {
                path: key
                for key, (path, _) in given.items()
                if path
                and (only is None or path == only or path.startswith(f"{only}."))
                and not key.startswith("_empty")
            }
            for path, key in stacks[of[node]].items():
                calls.setdefault(path, set()).add(key)
    around = {path: [outer for outer in _outer_paths(path) if outer not in calls] for path in calls}
    inside = {
        at: dict.fromkeys(outer for path in stack for outer in (*around[path], path)) for at, stack in stacks.items()
    }
    leaving: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        users = [user for user in node.users if op_name(user) != "aten.sym_size.int"]  # the same size is read anywhere
        beyond = [inside[of[user]] for user in users if of[user] != of[node]]
        for path in inside[of[node]]:
            values = leaving.setdefault(path, [])
            if beyond and is_tensor(node) and any(path not in user for user in beyond):
                values.append(node)
    found: dict[str, fx.Node | str] = {}
    for path, values in leaving.items():
        if len(calls.get(path, ())) > 1:
            found[path] = f"it is called {len(calls[path])} times"
        elif len(values) > 1 and path not in calls:
            parts = dict.fromkeys(
                f"{path}.{part[len(path) + 1 :].split('.')[0]}" for part in calls if f"{path}." in part
            )
            found[path] = f"its parts {some(list(parts))} are left by {len(values)} values"
        elif len(values) > 1:
            found[path] = f"it returns {len(values)} values"
        else:
            found[path] = values[0] if values else "its values are not used"
    return found


def _outer_paths(path: str) -> list[str]:
    """ "a.b.c" -> ["a", "a.b"]"""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def find_cut(graph: fx.Graph, at: str, module: nn.Module | None = None) -> fx.Node:
    """The node of a module path or of a node name. Raises CutError with the nearest names, or the reason."""
    found = exits(graph, at).get(at) or next(
        (node for node in graph.nodes if node.name == at and is_tensor(node)), None
    )
    if isinstance(found, fx.Node) and found.op not in ("placeholder", "get_attr"):
        return found
    usable = [path for path, node in exits(graph).items() if isinstance(node, fx.Node)]
    if isinstance(found, fx.Node):
        raise CutError(
            f"--at {at}: this is an input or a parameter; cut behind a layer, such as {', '.join(usable[:3])}."
        )
    near = difflib.get_close_matches(at, usable, n=3, cutoff=0) or usable[:3]
    if isinstance(found, str):
        raise CutError(
            f"--at {at}: {found}, and a cut needs one tensor that is computed once; near it are {', '.join(near)}."
        )
    known = module is not None and any(name == at for name, _ in module.named_modules())
    what = "this module computes nothing on its own" if known else "no such module in the network"
    raise CutError(f"--at {at}: {what}; the nearest cut points are {', '.join(near)}.")


def partition(graph: fx.Graph, cut: fx.Node, to: fx.Node | None = None, flow: Flow | None = None) -> Partition:
    """Divide the nodes. Raises CutError when nothing is behind the cut, `to` does not depend on it, or a value that is
    overwritten in place has to be read by both sides."""
    flow = flow or Flow.of(graph)
    nodes = flow.nodes
    behind = {cut}
    for node in nodes:
        if not behind.isdisjoint(flow.reads[node]):
            behind.add(node)
    # modules: the guards, which only look at the network's inputs, and layers of earlier cuts
    given = {node for node in nodes if node.op in ("placeholder", "get_attr", "call_module")} - behind
    checks = [node for node in nodes if op_name(node) == CHECK and node not in behind]
    base = {cut, *checks}.union(given, flow.ancestors(cut), *map(flow.ancestors, checks))
    flow.add_writers(base, behind)
    wanted = (flow.ancestors(to) | {to}) if to is not None else flow.ancestors(nodes[-1])
    flow.add_writers(wanted, set())
    if (to is not None and to not in behind) or to is cut:
        raise CutError(f"--to {to}: it does not come after the cut {cut}.")
    # sizes of base values, and parts of them, are computed in the base: the whole value would have to cross otherwise
    for node in nodes:
        small = not _is_tensorial(node) or node.target is operator.getitem
        if small and node not in behind and node not in base and base.issuperset(flow.reads[node]):
            base.add(node)
    region = [node for node in nodes if node in wanted and node not in base and node.op != "output"]
    inside = set(region)
    crossing = [
        node
        for node in nodes
        if node in base and node is not cut and node.op != "get_attr" and not inside.isdisjoint(node.users)
    ]
    outputs = [node for node in region if not inside.issuperset(node.users)]
    if not region or behind.isdisjoint(outputs):
        raise CutError(
            f"The cut {cut} is the network's last value: nothing comes after it that a light path could replace."
        )
    _check_writes(flow, base, region, [cut, *crossing])
    kept = [node for node in nodes if node in base]
    tail = [node for node in nodes if node not in base and node not in inside and node.op != "output"]
    return Partition(cut, tuple(kept), tuple(region), tuple(crossing), tuple(outputs), tuple(tail))


def _check_writes(flow: Flow, base: set[fx.Node], region: list[fx.Node], entering: list[fx.Node]) -> None:
    """The base runs as a whole before the region: neither may overwrite in place what the other still reads."""
    inside = set(region)
    for node, memories in flow.written.items():
        if node in inside and not memories <= inside:
            raise CutError(
                f"Behind the cut, {node} writes into a value in place through a view; "
                "cut before the module that does so."
            )
    order = {node: at for at, node in enumerate(flow.nodes)} if flow.written else {}
    for value in entering if flow.written else ():
        memory = memory_of(value)
        for node in (each for each in flow.written if each in base and memory in flow.written[each]):
            early = [user for user in value.users if user in inside and order[user] < order[node]]
            if early:
                raise CutError(
                    f"Behind the cut, {early[0]} reads {value} before {node} overwrites that in place in the part that "
                    "would now run first; cut behind the module that overwrites it."
                )


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
    graph, flow = captured.module.graph, Flow.of(captured.module.graph)
    macs = node_macs(captured.module, captured.args, captured.kwargs)
    total = sum(macs.values()) // captured.samples
    order = {node: at for at, node in enumerate(graph.nodes)}
    weights = {
        node: {id(weight): weight.numel()}
        for node in graph.nodes
        if node.op == "get_attr" and isinstance(weight := tensor_at(captured.module, str(node.target)), nn.Parameter)
    }
    known: dict[fx.Node, CutPoint] = {}
    points = []
    for path, node in exits(graph).items():
        if isinstance(node, str):
            points.append((len(order), CutPoint(prefix + path, reason=node)))
            continue
        if node not in known:
            known[node] = _point(node, flow, macs, weights, total, captured.samples)
        points.append((order[node], replace(known[node], path=prefix + path)))
    return [point for _, point in sorted(points, key=lambda item: item[0])]


def _point(
    node: fx.Node,
    flow: Flow,
    macs: dict[fx.Node, int],
    weights: dict[fx.Node, dict[int, int]],
    total: int,
    samples: int,
) -> CutPoint:
    """What a cut behind one node costs; its path is left empty. weights: id and size of the parameter a node gets."""
    try:
        parts = partition(node.graph, node, flow=flow)
    except CutError as error:
        nothing = "is the network's last value" in str(error)
        return CutPoint("", reason="nothing comes after it" if nothing else str(error).rstrip("."))

    def params(nodes: tuple[fx.Node, ...]) -> int:
        read: dict[int, int] = {}
        for each in nodes:
            for used in flow.reads[each] if each.op == "call_function" else ():
                read.update(weights.get(used, {}))
        return sum(read.values())

    base = sum(macs.get(part, 0) for part in parts.base) // samples
    crossing = tuple(crossing.name for crossing in parts.crossing)
    shape = size_words(node.meta["val"])
    return CutPoint("", shape, base, total - base, params(parts.base), params(parts.region), crossing)


def _is_tensorial(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))
