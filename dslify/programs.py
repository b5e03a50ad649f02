"""The parts of a network as torch.export programs, ready for the exporters: numbers between them reckoned anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .attempt import quietly
from .errors import ExportError, one_line
from .functional import symbolic
from .guards import Guards
from .notes import recorded_inputs
from .parts import parts_of
from .recurrent import OVERLOADS, to_aten
from .switch import DSLayer, dsl_layers

ANY = 0  # batch size of a program that takes any
ONE_NODE = {overload: getattr(torch.ops.dslify, name).default for name, overload in OVERLOADS.items()}


@dataclass(frozen=True)
class Program:
    """One part as a torch.export program. module, args, shapes: what it was exported from, with an example."""

    exported: torch.export.ExportedProgram
    module: nn.Module
    args: tuple[Tensor, ...]
    shapes: tuple[dict[int, Any], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Programs:
    """The parts around one layer. light and full are Programs themselves where they hold further layers.

    front gives (masked, score, *passed), light and full take (masked, *passed): tensors only, the numbers among the
    passed values are reckoned from the sizes of these. inputs, outputs: names of the network's.
    """

    layer: DSLayer
    front: Program
    light: Program | Programs
    full: Program | Programs
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def host_graph(net: nn.Module) -> tuple[str | None, fx.GraphModule]:
    """(scope, None for the whole network; the captured graph that holds all layers). Raises ExportError for several."""
    if not dsl_layers(net):
        raise ExportError("The network holds no Dynamic Switch Layer; put one in with dslify insert.")
    found: dict[str, fx.GraphModule] = {}
    for name, module in net.named_modules():
        if (
            isinstance(module, fx.GraphModule)
            and dsl_layers(module)
            and not any(not outer or name.startswith(f"{outer}.") for outer in found)
        ):
            found[name] = module
    if len(found) != 1:
        raise ExportError(f"Only one captured graph can be exported; layers lie in {', '.join(found)}.")
    ((name, graph),) = found.items()
    return graph.meta.get("dslify", {}).get("scope") or name or None, graph


def example_of(graph: fx.GraphModule, batch: int = 1, seed: int = 0, stretch: float = 1.0) -> tuple[Tensor, ...]:
    """Random inputs of the recorded shapes and types, flat, with `batch` samples where the batch may vary.

    stretch: of the sizes of all other axes that may vary.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for value, free in zip(recorded_inputs(graph), free_axes(graph), strict=True):
        shape = [max(1, round(size * stretch)) if at in free else size for at, size in enumerate(value.shape)]
        if 0 in free:
            shape[0] = batch
        if value.is_floating_point():
            made.append(torch.randn(shape, generator=generator, dtype=value.dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(value.dtype))
    return tuple(made)


def free_axes(graph: fx.GraphModule) -> tuple[frozenset[int], ...]:
    """Of every input the axes that its capture let vary."""
    guards = next((child for child in graph.children() if isinstance(child, Guards)), None)
    fixed = set(guards.checks) if guards is not None else set()
    return tuple(
        frozenset(axis for axis, size in enumerate(value.shape) if f"arg{at}_{axis} == {size}" not in fixed)
        if guards is not None
        else frozenset()
        for at, value in enumerate(recorded_inputs(graph))
    )


def programs_of(graph: fx.GraphModule, batch: int = 1, dynamic: bool = True) -> Programs:
    """The programs of a captured graph with at least one layer.

    batch: samples in every call, ANY to let it vary. dynamic: keep other axes that the capture let vary, such as the
    length of sound. Raises ExportError when torch.export refuses a part.
    """
    free = free_axes(graph)
    args = example_of(graph, batch or 2)
    shapes = tuple(
        {axis: torch.export.Dim.AUTO for axis in axes if (dynamic and axis) or (batch == ANY and not axis)}
        for axes in free
    )
    return _programs(graph, args, shapes)


def _programs(graph: fx.GraphModule, args: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...]) -> Programs:
    parts = parts_of(graph)
    front = exported_part(parts.front, args, shapes, parts.inputs, ("masked", "score", *parts.passed), "front")
    values = _outputs(front.exported)
    numbers = {at: value for at, value in enumerate(values) if not isinstance(value, Tensor)}
    if numbers:
        output = list(parts.front.graph.nodes)[-1]
        output.args = (tuple(value for at, value in enumerate(cast(Any, output.args[0])) if at not in numbers),)
        parts.front.recompile()
        names = tuple(name for at, name in enumerate(front.outputs) if at not in numbers)
        front = exported_part(parts.front, args, shapes, parts.inputs, names, "front")
        values = _outputs(front.exported)
    entering = [value for at, value in enumerate(values) if at != 1]
    with torch.no_grad():
        given = tuple(value for at, value in enumerate(front.module(*args)) if at != 1)
    varying = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(value.shape) if not isinstance(symbolic(size), int)}
        for value in entering
    )
    names = tuple(name for at, name in enumerate(front.outputs) if at != 1)

    def path(name: str, module: fx.GraphModule) -> Program | Programs:
        whole = _with_numbers(module, {at - 1: number for at, number in numbers.items()}, entering)
        if isinstance(whole, fx.GraphModule) and dsl_layers(whole):
            return _programs(whole, given, varying)
        return exported_part(whole, given, varying, names, parts.outputs, name)

    return Programs(
        parts.layer, front, path("light", parts.light), path("full", parts.full), parts.inputs, parts.outputs
    )


def _with_numbers(path: fx.GraphModule, numbers: Mapping[int, Any], entering: Sequence[Tensor]) -> fx.GraphModule:
    """A path of tensors only. numbers: place among (masked, *passed) -> the value when front was exported."""
    inputs = [node for node in path.graph.nodes if node.op == "placeholder"]
    tensors = [node for at, node in enumerate(inputs) if at not in numbers]
    tracer = fx.proxy.GraphAppendingTracer(path.graph)
    sizes: dict[Any, tuple[fx.Node, int]] = {}  # of the entering tensors, as expressions
    for node, value in zip(tensors, entering, strict=True):
        for axis, size in enumerate(map(symbolic, value.shape)):
            if not isinstance(size, int):
                sizes.setdefault(size, (node, axis))
    first = next((node for node in path.graph.nodes if node.op != "placeholder"), None)
    for at, value in numbers.items():
        if not isinstance(value, (int, torch.SymInt)):
            raise ExportError(
                f"The value {inputs[at].name} that crosses the cut is a {type(value).__name__}, no tensor."
            )
        expression, read = _in_sizes(sympy.sympify(symbolic(value)), tuple(sizes))
        with path.graph.inserting_before(first):
            env = {
                name: fx.Proxy(path.graph.call_function(torch.ops.aten.sym_size.int, sizes[size]), tracer)
                for name, size in read.items()
            }
            found = sympy_interp(PythonReferenceAnalysis, env, expression) if env else int(expression)
        inputs[at].replace_all_uses_with(found.node if isinstance(found, fx.Proxy) else found)
        path.graph.erase_node(inputs[at])
    if numbers:
        path.recompile()
    return path


def _in_sizes(expression: sympy.Expr, sizes: Sequence[sympy.Expr]) -> tuple[sympy.Expr, dict[sympy.Symbol, sympy.Expr]]:
    """The expression in terms of sizes that can be read: (expression, its symbols -> the sizes they stand for)."""
    read: dict[sympy.Symbol, sympy.Expr] = {}
    for at, size in enumerate(sorted(sizes, key=sympy.count_ops, reverse=True)):
        name = sympy.Symbol(f"size{at}", integer=True, positive=True)
        quotient = size / sum(size.free_symbols) if len(size.free_symbols) == 1 else None
        if quotient is not None and quotient.is_Integer:  # a multiple of one symbol, such as heads x batch
            written = expression.xreplace({next(iter(size.free_symbols)): FloorDiv(name, quotient)})
        else:
            written = expression.xreplace({size: name})
        if written != expression:
            expression, read[name] = written, size
    left = [symbol for symbol in expression.free_symbols if symbol not in read]
    if left:
        raise ExportError(
            f"A number that crosses the cut, {expression}, cannot be read off the sizes of the tensors there "
            f"({', '.join(map(str, sizes)) or 'none varies'}); export it with --static."
        )
    return expression, read


def _outputs(exported: torch.export.ExportedProgram) -> list[Any]:
    """Values of a program's outputs as it was exported."""
    output = list(exported.graph.nodes)[-1]
    return [value.meta["val"] if isinstance(value, fx.Node) else value for value in cast(Any, output.args[0])]


class _OneNodeEach(TorchFunctionMode):
    """Within the block ATen's recurrent operators are those of recurrent.py, which torch.export does not unroll."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return ONE_NODE.get(func, func)(*args, **(kwargs or {}))


def exported_part(
    module: nn.Module,
    args: tuple[Tensor, ...],
    shapes: tuple[dict[int, Any], ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    name: str,
) -> Program:
    try:
        with quietly(), torch.no_grad(), _OneNodeEach():
            exported = torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)
        to_aten(exported.graph)
    except Exception as error:
        raise ExportError(f"torch.export refuses the {name} part: {one_line(error)}.") from error
    return Program(exported, module, args, shapes, inputs, outputs)
