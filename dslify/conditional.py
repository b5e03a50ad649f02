"""A network with layers as one torch.export program in which torch.cond runs the light or the full path."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._higher_order_ops.cond import cond_op
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from .attempt import quietly
from .errors import ExportError, one_line
from .functional import copied, symbolic
from .guards import Guards
from .parts import Scored
from .programs import ANY, example_of, free_axes
from .switch import DSLayer


class Conditional(nn.Module):
    """A DSLayer whose paths are the branches of a torch.cond, for tracing. All samples of a call go light, or none.

    The operator itself and not torch.cond: that one hands its branches to dynamo, which refuses whole numbers among the
    crossing values and outputs whose length varies (torch 2.12).
    """

    threshold: Tensor

    def __init__(self, layer: DSLayer):
        super().__init__()
        self.scored, self.light, self.full = Scored(layer), layer.light, layer.full
        self.register_buffer("threshold", layer.threshold.clone())

    def forward(self, cut: Tensor, *crossing: Any) -> Any:
        masked, score = self.scored(cut)
        light_taken = (score < self.threshold).all()
        inputs = (masked, *crossing)
        paths = (self.light, self.full)
        with disable_proxy_modes_tracing():  # for their shapes
            examples, others = (path(*inputs) for path in paths)
        self._compare(examples, others)
        tensors = [dict((*path.named_parameters(), *path.named_buffers())) for path in paths]
        given = tuple(value for value in inputs if _traced(value))
        starts = (len(given), len(given) + len(tensors[0]))
        branches = [
            self._branch(path, inputs, tuple(own), start)
            for path, own, start in zip(paths, tensors, starts, strict=True)
        ]
        operands = (*given, *tensors[0].values(), *tensors[1].values())
        values = iter(cast(Any, cond_op)(light_taken, *branches, operands))
        outputs = [
            next(values).view(_sizes(example, inputs)) if isinstance(example, Tensor) else example
            for example in examples
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def _branch(path: nn.Module, inputs: Sequence[Any], names: tuple[str, ...], start: int) -> Any:
        """A path as a function of the operands of both branches. names: of its tensors, which begin at `start`.

        It returns flat copies: the two may differ in strides, which cond refuses, and none may be an operand.
        """

        def run(*operands: Any) -> tuple[Tensor, ...]:
            given = iter(operands)
            values = tuple(next(given) if _traced(value) else value for value in inputs)
            own = dict(zip(names, operands[start : start + len(names)], strict=True))
            outputs = functional_call(path, own, values)
            return tuple(value.flatten().clone() for value in outputs if isinstance(value, Tensor))

        return run

    @staticmethod
    def _compare(light: Sequence[Any], full: Sequence[Any]) -> None:
        for mine, theirs in zip(light, full, strict=True):
            if isinstance(mine, Tensor) and _described(mine) != _described(theirs):
                raise ExportError(
                    f"The light path gives {_described(mine)} where the full path gives {_described(theirs)}; the "
                    "branches of one program must agree."
                )


def _sizes(example: Tensor, inputs: Sequence[Any]) -> list[Any]:
    """A shape to view a flat value with. Sizes that vary are read off the inputs, since torch.export cannot write all
    of the expressions that it would reckon them with; one that no input has is left to view."""
    known = {
        symbolic(size): (value, axis)
        for value in inputs
        if isinstance(value, Tensor)
        for axis, size in enumerate(value.shape)
    }
    sizes: list[Any] = []
    for size in example.shape:
        expression = symbolic(size)
        if isinstance(expression, int):
            sizes.append(expression)
        elif expression in known:
            value, axis = known[expression]
            sizes.append(value.shape[axis])
        else:
            sizes.append(size if -1 in sizes else -1)
    return sizes


def _traced(value: Any) -> bool:
    return isinstance(value, (Tensor, torch.SymInt))


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {'x'.join(str(symbolic(size)) for size in value.shape)}"


def conditional(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with torch.cond in every layer's place and without the checks of its inputs; shares the tensors."""
    shared = {id(tensor): tensor for tensor in (*graph.parameters(), *graph.buffers())}
    whole = cast(fx.GraphModule, copied(graph, cast(Any, shared)))
    for name, module in reversed(list(whole.named_modules())):
        path, _, own = name.rpartition(".")
        parent = whole.get_submodule(path)
        if isinstance(module, DSLayer):
            setattr(parent, own, Conditional(module))
        elif isinstance(module, Guards) and isinstance(parent, fx.GraphModule):
            for node in [node for node in parent.graph.nodes if node.op == "call_module" and node.target == own]:
                parent.graph.erase_node(node)
            delattr(parent, own)
            parent.recompile()
    return whole


def asked(graph: fx.GraphModule, batch: int, dynamic: bool) -> list[set[int]]:
    """Of every input the axes that a program should let vary."""
    return [{axis for axis in axes if (dynamic and axis) or (batch == ANY and not axis)} for axes in free_axes(graph)]


def conditional_program(
    graph: fx.GraphModule, batch: int = 1, dynamic: bool = True
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """(the program, takes and gives what the graph does; name of each layer -> name of its threshold in the program).

    batch: samples in a call, ANY to let it vary. dynamic: keep the other axes that the capture let vary. Raises
    ExportError when torch.export refuses.
    """
    whole = conditional(graph)
    args, kwargs = pytree.tree_unflatten(list(example_of(graph, batch or 2)), graph._in_spec)
    leaves = [dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in asked(graph, batch, dynamic)]
    shapes = pytree.tree_unflatten(leaves, graph._in_spec)
    named = dict(inspect.signature(graph.forward).bind(*shapes[0], **shapes[1]).arguments)
    try:
        with quietly(), torch.no_grad():
            program = torch.export.export(whole, args, kwargs, dynamic_shapes=named, strict=False)
    except ExportError as error:
        raise ExportError(f"{one_line(error)}. {INSTEAD}") from error  # torch adds lines of its own
    except Exception as error:
        raise ExportError(f"torch.cond cannot hold the paths of this network: {one_line(error)}. {INSTEAD}") from error
    layers = [name for name, module in whole.named_modules() if isinstance(module, Conditional)]
    return program, {name: f"{name}.threshold" for name in layers}


INSTEAD = "Write the parts as files of their own: dslify export --to onnx --split."
