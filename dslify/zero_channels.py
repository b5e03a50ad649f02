"""Behind a cut whose channels are partly zero: the operators that need not see the zeros, and those that have to.

The zeros are followed along their axis. An operator that makes zero of zero passes them on, a contraction over the axis
(a linear layer, a convolution) loses the weights that they meet, and in front of any other operator the value gets its
zeros back, so that the function stays as it is and only less is saved.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .functional import memories_written, op_name
from .rules import arguments
from .slicing import Kept, Shapes, Slicer
from .zero_axes import AXES
from .zeros import VALUES, Outcome, Zeros, packet

_RULES = VALUES | AXES


class ZeroChannels:
    """Follows the zeros of a region's first input, and takes out of its graph, in place, what only meets zeros.

    module: from (cut, *crossing) to a tuple, given only the `kept` channels of the cut afterwards. blocked: in words,
    the operators in front of which the zeros were put back.
    """

    def __init__(self, module: fx.GraphModule, kept: Kept, shapes: Shapes):
        self.blocked: list[str] = []
        self._slicer = Slicer(module, shapes)
        self._zeros = Zeros(self._slicer, shapes)
        nodes = list(module.graph.nodes)
        cut = nodes[0]
        writing = next((node for node in nodes if memories_written(node)), None)
        if writing is not None:  # a write into a copy would not be seen through another name
            self.blocked.append(f"{writing.name}: it writes in place")
            given = self._slicer.whole(cut, kept)
            cut.replace_all_uses_with(given, delete_user_cb=lambda user: user not in _back_to(given, cut))
        else:
            self._zeros.left[cut] = kept
            for node in nodes:
                self._visit(node)
        self._slicer.clean()

    def _visit(self, node: fx.Node) -> None:
        given = [used for used in node.all_input_nodes if used in self._zeros.left]
        if not given or node.op == "placeholder":
            return
        rule = _RULES.get(packet(node))
        outcome: Outcome = "its operator is not known to leave zeros alone"
        if node.op == "output":
            outcome = ""
        elif op_name(node) == "aten.sym_size.int" and node.args[1] != self._zeros.left[given[0]].axis:
            outcome = None
        elif rule is not None:
            outcome = rule(self._zeros, node, arguments(node) if packet(node) != "getitem" else {})
        if isinstance(outcome, Kept):
            self._zeros.left[node] = outcome
        elif isinstance(outcome, str):
            for value in given:
                node.replace_input_with(value, self._slicer.whole(value, self._zeros.left[value]))
            if outcome:
                self.blocked.append(f"{node.name} ({packet(node) or node.op}): {outcome}")


def _back_to(node: fx.Node, stop: fx.Node) -> Iterator[fx.Node]:
    while node is not stop:
        yield node
        node = node.all_input_nodes[0]
