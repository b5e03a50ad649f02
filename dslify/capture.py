"""The only caller of torch.export: a module becomes a Graph of ATen operators with dynamic batch (and length).

Export is asked for much first (every axis of sequences dynamic), then for less (the batch axis), then for nothing; what
became fixed is said. The result shares nothing with the given module: parameters and buffers are copied.
"""

from __future__ import annotations

import inspect
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .errors import CaptureError, one_line
from .functional import copied, drop_assertions, functionalise, graphs_in, size_words
from .guards import Guards as Guards
from .guards import add_guards

RTOL, ATOL = 1e-4, 1e-5  # captured against eager: the same kernels, but batch sizes may choose other algorithms


@dataclass(frozen=True)
class Graph:
    """A captured module.

    module: the graph (get_attr for parameters, aten operators, pytree in and out), eval mode. dynamic: what may vary,
    in words. args, kwargs: the example it was captured with. seconds: what the capture took. expected: the module's own
    answer on the example.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: str
    seconds: float
    expected: Any

    @property
    def samples(self) -> int:
        """Batch size of the example."""
        tensors = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return max(1, tensors[0].shape[0]) if tensors and tensors[0].dim() else 1


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
                f"The network does not run on the example input {shapes}: {one_line(error)}. "
                "Give the right shape with --input, such as --input 1x1x16000."
            ) from error
        reason = ""
        for dynamic, example in _attempts(module, args, kwargs):
            try:
                graph_module = _export(_copy(module), *example, dynamic, time_limit)
            except _TimeLimit:
                reason = f"torch.export took more than {time_limit:.0f} s"
                continue
            except Exception as error:
                reason = one_line(error)
                continue
            reason = _differs(graph_module, module, expected, args, kwargs)
            if not reason:
                return Graph(graph_module, args, kwargs, _varying(graph_module), time.perf_counter() - start, expected)
    raise CaptureError(
        f"torch.export cannot capture {type(module).__name__}: {reason}. "
        "If only a part of the network needs the switch, capture that part alone: --scope encoder."
    )


def scope_inputs(
    model: nn.Module, scope: str | None, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The submodule `scope` and the inputs it receives when `model` runs on the example (no scope: the model itself).

    Raises CaptureError when there is no such submodule, or it is not called exactly once.
    """
    if not scope:
        return model, args, dict(kwargs or {})
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
        raise CaptureError(f"The network does not run on the example input: {one_line(error)}.") from error
    finally:
        handle.remove()
    if len(calls) != 1:
        raise CaptureError(f"--scope {scope}: it is called {len(calls)} times in one forward, and must be called once.")
    return inner, *calls[0]


def _attempts(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Callable[[Any], Any], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """(leaf -> its dynamic axes, example) from the most general to the least."""

    def vary(axes: Callable[[Tensor], Iterable[int]]) -> Callable[[Any], Any]:
        return lambda leaf: dict.fromkeys(axes(leaf), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None

    example = _batch_of_two(module, args, kwargs)
    if example is not None:
        batch = next(leaf.shape[0] for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim())
        # images keep height and width: letting those vary is the main cost and failure of export
        yield vary(lambda leaf: range(leaf.dim() if leaf.dim() <= 3 else 1)), example
        yield vary(lambda leaf: [0] if leaf.dim() and leaf.shape[0] == batch else []), example
    yield vary(lambda leaf: []), (args, kwargs)


def _batch_of_two(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The example with two samples at least (export fixes an axis of size 1), or None if the network refuses that."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        return None
    batch = tensors[0].shape[0]
    if batch > 1:
        return args, kwargs
    doubled = [
        torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf
        for leaf in leaves
    ]
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
    add_guards(graph, exported, args, kwargs)
    for inner in graphs_in(lifted):
        drop_assertions(inner.graph)
        inner.recompile()
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
                    memo[id(value)] = (
                        nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
                    )
                table[name] = memo[id(value)]  # type: ignore[assignment]
        for name, value in list(vars(child).items()):  # constants that export lifted as plain attributes
            if isinstance(value, Tensor):
                delattr(child, name)
                child.register_buffer(name, value.detach().clone(), persistent=True)


def _copy(module: nn.Module) -> nn.Module:
    """A fresh copy for one attempt: after a failure the same object can fail again (caches in the module)."""
    try:
        return copied(module)
    except Exception:  # weight_norm's recomputed weights, open files ...
        return module


def _differs(
    captured: fx.GraphModule, module: nn.Module, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """Why the captured graph is not the module, on the example itself; "" if it is."""
    try:
        found = captured(*args, **kwargs)
    except Exception as error:
        return f"the captured graph does not run: {one_line(error)}"
    for mine, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(theirs, Tensor) and not torch.allclose(
            mine.double(), theirs.double(), rtol=RTOL, atol=ATOL, equal_nan=True
        ):
            worst = (mine.double() - theirs.double()).abs().max().item()
            return (
                f"the captured graph gives other values than the module (by up to {worst:.2g}); is its forward random?"
            )
    return ""


def _varying(captured: fx.GraphModule) -> str:
    """What the capture let vary, in words: an axis asked to vary may have become fixed."""
    values = [node.meta.get("val") for node in captured.graph.nodes if node.op == "placeholder"]
    axes = {
        at for value in values if isinstance(value, Tensor) for at, size in enumerate(size_words(value)) if size == "*"
    }
    if not axes:
        return "every axis is fixed at the example's size"
    return "batch varies, other axes are fixed" if axes == {0} else "batch and length vary"


def _shapes(tree: Any) -> str:
    return ", ".join(
        "x".join(map(str, leaf.shape)) or "scalar" for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)
    )
