"""What a capture assumed of its inputs' shapes, checked at every call."""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .errors import OptionError
from .functional import symbolic


class Guards(nn.Module):
    """Checks that inputs have the shapes the capture is valid for: one boolean expression a line, over `arg0_0` (input
    0, axis 0). Only arithmetic is evaluated, so lines read from a file cannot run code.
    """

    def __init__(self, checks: Sequence[str]):
        super().__init__()
        self.checks = tuple(checks)
        self._is_impure = True  # fx: its value is unused, and dead code elimination must keep it
        self._trees = [ast.parse(check, mode="eval").body for check in self.checks]

    def forward(self, *inputs: Any) -> None:
        sizes = {
            f"arg{at}_{axis}": size
            for at, value in enumerate(inputs)
            if isinstance(value, Tensor)
            for axis, size in enumerate(value.shape)
        }
        for check, tree in zip(self.checks, self._trees, strict=True):
            if not _evaluate(tree, sizes):
                shapes = ", ".join("x".join(map(str, v.shape)) for v in inputs if isinstance(v, Tensor))
                raise OptionError(
                    f"The network was captured for inputs with {check} (arg0_1 is axis 1 of input 0); got {shapes}."
                )


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs}


def _evaluate(tree: ast.expr, sizes: Mapping[str, int]) -> Any:
    """A boolean or integer expression; a name that is no input axis raises OptionError."""
    match tree:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluate(inner, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _evaluate(inner, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)(_evaluate(value, sizes) for value in values)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            return _CALLS[name](*(_evaluate(arg, sizes) for arg in args))
    raise OptionError(f"An input check of the captured network cannot be evaluated: {ast.unparse(tree)}.")


def add_guards(
    graph: fx.Graph, exported: Any, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """One call_module node `_guards` behind the inputs that checks what export assumed of their shapes.

    signature: of the forward that was exported, whose names export's guards use.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    checks: list[str] = []
    sources = _sources(signature, args, kwargs)
    first: dict[Any, str] = {}
    for at, node in enumerate(inputs):
        value = node.meta.get("val")
        for axis, size in enumerate(map(symbolic, value.shape) if isinstance(value, Tensor) else ()):
            name = f"arg{at}_{axis}"
            if isinstance(size, int):
                checks.append(f"{name} == {size}")
                continue
            if size.is_symbol and (other := first.setdefault(size, name)) != name:
                checks.append(f"{name} == {other}")
            low = exported.range_constraints[size].lower if size in exported.range_constraints else 0
            if low > 2:  # export says "2 or more" of every axis it lets vary, and 1 runs as well
                checks.append(f"{name} >= {int(low)}")
    for line in exported._guards_code:
        for source, at in sources.items():
            line = re.sub(re.escape(source) + r"\.size\(\)\[(\d+)\]", rf"arg{at}_\1", line)
        if "L[" not in line and "arg" in line and _is_arithmetic(line):
            checks.append(line)
    module = graph.owning_module
    module.add_submodule("_guards", Guards(list(dict.fromkeys(checks))))
    with graph.inserting_after(inputs[-1]):
        node = graph.call_module("_guards", tuple(inputs))
        node.meta["val"] = None


def _is_arithmetic(line: str) -> bool:
    try:
        _evaluate(ast.parse(line, mode="eval").body, {f"arg{a}_{b}": 64 for a in range(32) for b in range(8)})
    except (OptionError, SyntaxError):
        return False
    except ArithmeticError:
        pass
    return True


def _sources(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """How export's guards write each flat input ("L['x'][0]"), longest first -> its position."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    numbered_args, numbered_kwargs = pytree.tree_unflatten(range(len(leaves)), spec)
    named = dict(signature.bind(*numbered_args, **numbered_kwargs).arguments)
    paths = {f"L{pytree.keystr(path)}": at for path, at in pytree.tree_flatten_with_path(named)[0]}
    return dict(sorted(paths.items(), key=lambda item: -len(item[0])))
