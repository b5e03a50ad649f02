"""A graph's tensors with some entries of an axis left out: weights become smaller, other values are selected from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .functional import op_name, put_tensor, tensor_at
from .macs import fake
from .notes import recorded_inputs
from .recurrent import OVERLOADS, outputs_like
from .switch import DSLayer

aten = torch.ops.aten
_RECURRENT = frozenset(OVERLOADS.values())
Shapes = dict[fx.Node, tuple[int, ...]]


@dataclass(frozen=True)
class Kept:
    """What is left of one axis of a value: the entries `keep`, in order, of `size`; the others are left out."""

    axis: int
    keep: tuple[int, ...]
    size: int

    def at(self, axis: int) -> Kept:
        """The same on another axis."""
        return Kept(axis, self.keep, self.size)

    def index(self) -> Tensor:
        return torch.tensor(self.keep)


def shapes_of(net: fx.GraphModule) -> Shapes:
    """The shape of every tensor node at the recorded example, in the graph and in the paths of the layers in it.

    A value as it was captured does not tell: a narrow copy's nodes have the region's, and a loaded file's have none.
    """
    found: Shapes = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_function" and n.target in _RECURRENT:  # fake tensors would go through it step by step
                inputs, settings = self.fetch_args_kwargs_from_env(n)
                return outputs_like(*inputs, **settings)
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found[n] = tuple(int(size) for size in value.shape)
            return value

        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            called = self.fetch_attr(str(target))
            if not isinstance(called, DSLayer):
                return super().call_module(target, args, kwargs)
            for path in (called.light, called.full):
                outputs = Watching(path).run(*args) if isinstance(path, fx.GraphModule) else path(*args)
            return outputs[0] if len(called.outputs) == 1 else outputs

    inputs, mode = fake(tuple(recorded_inputs(net)))
    with torch.no_grad(), mode:
        Watching(net).run(*inputs, enable_io_processing=False)
    return found


@dataclass
class Slicer:
    """Leaves entries out of what a graph reads, in place. Weights that nothing reads any more go with clean()."""

    module: fx.GraphModule
    shapes: Shapes
    _made: dict[tuple[fx.Node, Kept], fx.Node] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)  # of smaller weights -> of what they are made from

    def constant(self, node: Any) -> bool:
        """Whether a value follows from the graph's own tensors alone."""
        if not isinstance(node, fx.Node):
            return False
        computed = node.op == "call_function" and bool(node.all_input_nodes)
        return node.op == "get_attr" or (computed and all(map(self.constant, node.all_input_nodes)))

    def taken(self, node: fx.Node, kept: Kept) -> fx.Node:
        """The kept entries of a value: a smaller weight where it is constant, else a selection."""
        if (node, kept) in self._made:
            return self._made[node, kept]
        if self.constant(node):
            value = self._value(node)
            smaller = value.detach().index_select(kept.axis, kept.index().to(value.device))
            is_weight = node.op != "get_attr" or isinstance(value, nn.Parameter)
            if is_weight:
                smaller = nn.Parameter(smaller, value.requires_grad and smaller.is_floating_point())
            made = self._held(str(node.target) if node.op == "get_attr" else node.name, smaller, node)
        else:
            index = self._held("kept", kept.index().to(self._device()), node)
            made = self._behind(index, aten.index_select.default, node, kept.axis, index)
        self.shapes[made] = tuple(
            len(kept.keep) if at == kept.axis else size for at, size in enumerate(self.shapes[node])
        )
        self._made[node, kept] = made
        return made

    def whole(self, node: fx.Node, kept: Kept) -> fx.Node:
        """A value of which only the kept entries are there, with zeros in place of the others: no MACs, two copies."""
        if (node, kept) in self._made:
            return self._made[node, kept]
        rank, absent = len(self.shapes[node]), len(kept.keep)
        places = torch.full((kept.size,), absent)
        places[kept.index()] = torch.arange(absent)
        padding = [0] * (2 * (rank - 1 - kept.axis)) + [0, 1]
        index = self._held("places", places.to(self._device()), node)
        padded = self._behind(index, aten.constant_pad_nd.default, node, padding, 0)
        made = self._behind(padded, aten.index_select.default, padded, kept.axis, index)
        self._made[node, kept] = made
        return made

    def clean(self) -> None:
        """Drop what is not read any more, and the captured values, which do not hold any longer."""
        graph = self.module.graph
        graph.lint()
        before = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        for node in reversed(graph.nodes):
            if not node.users and (node.op == "get_attr" or (self.constant(node) and op_name(node))):
                graph.erase_node(node)
        reading = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
        for target in before - set(reading):
            self._drop(target)
        for new, old in self._names.items():
            if new in reading and old in before and old not in reading:
                put_tensor(self.module, old, tensor_at(self.module, new))
                self._drop(new)
                reading[old] = reading.pop(new)
                reading[old].target = old
        for node in graph.nodes:
            node.meta.pop("val", None)
        self.module.recompile()

    def _drop(self, target: str) -> None:
        path, _, name = target.rpartition(".")
        delattr(self.module.get_submodule(path), name)

    def _value(self, node: fx.Node) -> Tensor:
        if node.op == "get_attr":
            held: Tensor = tensor_at(self.module, str(node.target))
            return held
        env: dict[fx.Node, Any] = {used: self._value(used) for used in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return found

    def _held(self, name: str, value: Tensor, near: fx.Node) -> fx.Node:
        """A tensor of the graph's own under a free name, read right behind `near`."""
        free = f"{name}_kept" if isinstance(value, nn.Parameter) else name
        taken = {str(node.target) for node in self.module.graph.nodes if node.op == "get_attr"}
        while free in taken or hasattr(self.module, free):
            free += "_"
        put_tensor(self.module, free, value)
        if near.op == "get_attr":
            self._names[free] = name
        last = next(reversed(self._inputs())) if near.op == "placeholder" else near
        with self.module.graph.inserting_after(last):
            made = self.module.graph.create_node("get_attr", free)
        self.shapes[made] = tuple(value.shape)
        return made

    def _behind(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.module.graph.inserting_after(before):
            return self.module.graph.call_function(target, args)

    def _inputs(self) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))


def readers(node: fx.Node) -> Sequence[fx.Node]:
    """Who reads a value, but for its sizes."""
    return [user for user in node.users if op_name(user) != "aten.sym_size.int"]
