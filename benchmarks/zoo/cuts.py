"""Which places of a captured network the zoo cuts: at given shares of its blocks, found without knowing the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import fx, nn

from dslify.capture import Graph
from dslify.cut import exits, partition
from dslify.errors import CutError
from dslify.macs import node_macs

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def chosen_cuts(model: nn.Module, captured: Graph, shares: Sequence[float]) -> list[str]:
    """One path for each share, all different: behind that share of the repeated blocks, where there are enough of them,
    else the usable cut point whose base has nearest to that share of the MACs.

    Fewer than asked for when the network has fewer usable cut points.
    """
    graph = captured.module.graph
    order = {node: at for at, node in enumerate(graph.nodes)}
    usable = {path: node for path, node in exits(graph).items() if isinstance(node, fx.Node)}
    in_order = sorted(usable, key=lambda path: (order[usable[path]], len(path)))
    listed = set(blocks(model))
    paths = [path for path in in_order if path in listed]
    if len(paths) > len(shares):
        ideal = {path: (at + 1) / len(paths) for at, path in enumerate(paths)}
    else:
        paths, ideal = in_order, _shares_of_macs(captured, usable)
    found: list[str] = []
    taken: set[fx.Node] = set()
    for share in shares:
        for path in sorted(paths, key=lambda path: abs(ideal[path] - share)):
            if usable[path] not in taken and _divides(graph, usable[path]):
                found.append(path)
                taken.add(usable[path])
                break
    return found


def blocks(model: nn.Module) -> Iterator[str]:
    """Paths of the repeated blocks: children of containers with several layers each, but not the stages around them."""

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if isinstance(module, CONTAINERS) and _layers(child) > 1 and not _holds_blocks(child):
                yield prefix + name
            else:
                yield from walk(child, f"{prefix}{name}.")

    return walk(model, "")


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a list of blocks of one kind is inside; a convolution with its norm is not a block."""
    for inner in module.modules():
        if isinstance(inner, CONTAINERS):
            kinds = Counter(type(child) for child in inner.children() if _layers(child) > 2)
            if any(times > 1 for times in kinds.values()):
                return True
    return False


def _layers(module: nn.Module) -> int:
    return sum(1 for inner in module.modules() if any(True for _ in inner.parameters(recurse=False)))


def _shares_of_macs(captured: Graph, usable: dict[str, fx.Node]) -> dict[str, float]:
    """Path -> share of all MACs that are spent before its exit, in the order of execution."""
    macs = node_macs(captured.module, captured.args, captured.kwargs)
    spent, total = {}, 0
    for node in captured.module.graph.nodes:
        total += macs.get(node, 0)
        spent[node] = total
    return {path: spent[node] / max(1, total) for path, node in usable.items()}


def _divides(graph: fx.Graph, node: fx.Node) -> bool:
    try:
        parts = partition(graph, node)
    except CutError:
        return False
    return any(used.op == "get_attr" for inner in parts.region for used in inner.all_input_nodes)
