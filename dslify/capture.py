"""The only caller of torch.export: a module becomes a Graph of ATen operators with dynamic batch (and length).

Export is asked for much first (every axis of sequences dynamic), then for less (the batch axis), then for nothing; what
became fixed is said. The result shares nothing with the given module: parameters and buffers are copied.
"""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import operator
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .errors import CaptureError, OptionError
from .functional import drop_assertions, functionalise

RTOL, ATOL = 1e-4, 1e-5  # captured against eager: the same kernels, but batch sizes may choose other algorithms


@dataclass(frozen=True)
class Graph:
    """A captured module.

    module: the graph (get_attr for parameters, aten operators, pytree in and out), eval mode. dynamic: what may vary, in
    words. args, kwargs: the example it was captured with. seconds: what the capture took. expected: the module's own answer
    on the example.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: str
    seconds: float
    expected: Any


class Guards(nn.Module):
    """Checks that inputs have the shapes the capture is valid for: one boolean expression a line, over `arg0_0` (input 0,
    axis 0). Only arithmetic is evaluated, so lines read from a file cannot run code.
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
                raise OptionError(f"The network was captured for inputs with {check} (arg0_1 is axis 1 of input 0); got {shapes}.")


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
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


class _TimeLimit(BaseException):
    """Derives from BaseException because torch.export swallows Exception."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode within the block; each flag restored after it."""
    flags = {child: child.training for child in module.modules()}
    for child in flags:
        child.training = False  # not .eval(): modules from torch.export refuse it
    try:
        yield
    finally:
        for child, flag in flags.items():
            child.training = flag


def capture(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, time_limit: float = 60.0
) -> Graph:
    """Capture `module` in eval mode for inputs like the example ones. The module is left as it was.

    time_limit: seconds for each attempt. Raises CaptureError with the reason of the last attempt.
    """
    start = time.perf_counter()
    kwargs = dict(kwargs or {})
    with evaluating(module), torch.no_grad():
        try:
            expected = module(*args, **kwargs)
        except Exception as error:
            shapes = _shapes((args, kwargs))
            raise CaptureError(
                f"The network does not run on the example input {shapes}: {_one_line(error)}. "
                "Give the right shape with --input, such as --input 1x1x16000."
            ) from error
        reason = ""
        for words, dynamic, example in _attempts(module, args, kwargs):
            try:
                graph_module = _export(_copy(module), *example, dynamic, time_limit)
            except _TimeLimit:
                reason = f"torch.export took more than {time_limit:.0f} s"
                continue
            except Exception as error:
                reason = _one_line(error)
                continue
            reason = _differs(graph_module, module, expected, args, kwargs)
            if not reason:
                return Graph(graph_module, args, kwargs, words, time.perf_counter() - start, expected)
    raise CaptureError(
        f"torch.export cannot capture {type(module).__name__}: {reason}. "
        "If only a part of the network needs the switch, capture that part alone: --scope encoder."
    )


def scope_inputs(
    model: nn.Module, scope: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The submodule `scope` and the inputs it receives when `model` runs on the example.

    Raises CaptureError when there is no such submodule, or it is not called exactly once.
    """
    try:
        inner = model.get_submodule(scope)
    except AttributeError:
        names = [name for name, _ in model.named_children()]
        raise CaptureError(f"--scope {scope}: no such submodule; the top ones are {', '.join(names)}.") from None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = inner.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            model(*args, **(kwargs or {}))
    except Exception as error:
        raise CaptureError(f"The network does not run on the example input: {_one_line(error)}.") from error
    finally:
        handle.remove()
    if len(calls) != 1:
        raise CaptureError(f"--scope {scope}: it is called {len(calls)} times in one forward, and must be called once.")
    return inner, *calls[0]


def _attempts(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Any, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """(what is dynamic in words, dynamic_shapes, example) from the most general to the least."""
    auto = torch.export.Dim.AUTO
    example = _batch_of_two(module, args, kwargs)
    if example is not None:
        batch = next(leaf.shape[0] for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim())

        def every(leaf: Any) -> Any:  # images keep height and width: dynamic ones are the main cost and failure of export
            if not isinstance(leaf, Tensor):
                return None
            return {axis: auto for axis in range(leaf.dim() if leaf.dim() <= 3 else 1)}

        def first(leaf: Any) -> Any:
            return {0: auto} if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else ({} if isinstance(leaf, Tensor) else None)

        small = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and 1 < leaf.dim() <= 3]
        if small:
            yield "batch and length vary", every, example
        yield "batch varies, other axes are fixed", first, example
    yield "every axis is fixed at the example's size", lambda leaf: {} if isinstance(leaf, Tensor) else None, (args, kwargs)


def _batch_of_two(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The example with two samples at least (export fixes an axis of size 1), or None if the network refuses that."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        return None
    batch = tensors[0].shape[0]
    if batch > 1:
        return args, kwargs
    doubled = [torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(doubled, spec)
    try:
        module(*args, **kwargs)
    except Exception:
        return None
    return args, kwargs


def _export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Callable[[Any], Any], time_limit: float
) -> fx.GraphModule:
    shapes = pytree.tree_map(dynamic, (args, kwargs))
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), _time_limit(time_limit):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            names = inspect.signature(module.forward).parameters
            by_name = {**dict(zip(names, shapes[0], strict=False)), **shapes[1]}
            exported = torch.export.export(
                module, args, kwargs, dynamic_shapes=by_name if kwargs else shapes[0], strict=False
            )
            lifted = exported.module(check_guards=False)
        finally:
            logger.setLevel(level)
    graph = lifted.graph
    _add_guards(graph, exported, args, kwargs)
    drop_assertions(graph)
    functionalise(graph)
    graph.eliminate_dead_code()
    own = fx.GraphModule(lifted, graph, class_name=type(module).__name__)
    own_tensors(own)
    own.eval()
    return own


def own_tensors(module: nn.Module) -> None:
    """Replace every parameter and buffer by a copy, once per tensor, so that tied ones stay tied."""
    memo: dict[int, Tensor] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in memo:
                    copied = value.detach().clone()
                    memo[id(value)] = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
                table[name] = memo[id(value)]
        for name, value in list(vars(child).items()):  # constants that export lifted as plain attributes
            if isinstance(value, Tensor):
                delattr(child, name)
                child.register_buffer(name, value.detach().clone(), persistent=True)


def _add_guards(graph: fx.Graph, exported: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One call_module node `_guards` behind the inputs that checks what export assumed of their shapes."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    checks: list[str] = []
    sources = _sources(graph, args, kwargs)
    for at, node in enumerate(inputs):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                checks.append(f"arg{at}_{axis} == {size}")
            else:
                low = exported.range_constraints[size.node.expr].lower if size.node.expr in exported.range_constraints else 0
                if low > 2:
                    checks.append(f"arg{at}_{axis} >= {int(low)}")
    first: dict[Any, str] = {}
    for at, node in enumerate(inputs):
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(size, int) and size.node.expr.is_symbol:
                other = first.setdefault(size.node.expr, f"arg{at}_{axis}")
                if other != f"arg{at}_{axis}":
                    checks.append(f"arg{at}_{axis} == {other}")
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


def _sources(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """How export's guards write each flat input ("L['x'][0]"), longest first -> its position."""
    names = graph._codegen.pytree_info.orig_args
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    paths = [f"L{pytree.keystr(path)}" for path, _ in pytree.tree_flatten_with_path(named)[0]]
    return dict(sorted(((path, at) for at, path in enumerate(paths)), key=lambda item: -len(item[0])))


def _copy(module: nn.Module) -> nn.Module:
    """A fresh copy for one attempt: after a failure the same object can fail again (caches in the module)."""
    try:
        return copy.deepcopy(module)
    except Exception:  # weight_norm's recomputed weights, open files ...
        return module


def _differs(captured: fx.GraphModule, module: nn.Module, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why the captured graph is not the module, on the example itself; "" if it is."""
    try:
        found = captured(*args, **kwargs)
    except Exception as error:
        return f"the captured graph does not run: {_one_line(error)}"
    for mine, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(theirs, Tensor) and not torch.allclose(mine.double(), theirs.double(), rtol=RTOL, atol=ATOL, equal_nan=True):
            worst = (mine.double() - theirs.double()).abs().max().item()
            return f"the captured graph gives other values than the module (by up to {worst:.2g}); is its forward random?"
    return ""


def _shapes(tree: Any) -> str:
    return ", ".join("x".join(map(str, leaf.shape)) or "scalar" for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
