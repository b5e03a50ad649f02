"""One attempt to capture a module: the only caller of torch.export."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
import torch.fx.config
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .deadline import limited
from .functional import copied, drop_assertions, functionalise, graphs_in
from .guards import add_guards
from .readings import Reading, SizeFromValues, fixed
from .recurrent import one_node_each, to_aten

Axes = dict[int, Any]


def attempt(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Callable[[Any], Axes | None],
    seconds: float,
    numbers: tuple[Reading, ...] = (),
) -> fx.GraphModule:
    """Export a copy from traced_copy() for inputs like (args, kwargs), as a graph with tensors of its own.

    dynamic: input leaf -> its axes that may vary. seconds: raises OutOfTime after them, or whatever torch.export does.
    numbers: that the forward reads out of its tensors, to be fixed.
    """
    shapes = pytree.tree_map(dynamic, (args, kwargs))
    reading = fixed(numbers) if numbers else nullcontext()
    with quietly(), limited(seconds), one_node_each(), reading, _keywords_named(module, kwargs) as signature:
        named = dict(signature.bind(*shapes[0], **shapes[1]).arguments)
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=named, strict=False)
        lifted = exported.module(check_guards=False)
    graph = lifted.graph
    add_guards(graph, exported, signature, args, kwargs)
    for inner in graphs_in(lifted):
        drop_assertions(inner.graph)
        to_aten(inner.graph)
        if inner is not lifted:  # that one's graph gets a module of its own below
            inner.recompile()
    functionalise(graph)
    graph.eliminate_dead_code()
    if (node := _size_from_values(lifted)) is not None:
        raise SizeFromValues(f"a size depends on the values that {node} computes")
    own = fx.GraphModule(lifted, graph, class_name=type(module).__name__)
    own_tensors(own)
    own.eval()
    return own


def _size_from_values(module: nn.Module) -> fx.Node | None:
    """The first node whose shape holds a number that is known only when the graph runs."""
    for node in (node for inner in graphs_in(module) for node in inner.graph.nodes):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.hint is None:
                return node
    return None


def traced_copy(module: nn.Module) -> nn.Module:
    """A fresh copy for one attempt: after a failure the same object can fail again (caches in the module). It shares
    parameters and buffers with the given one, which tracing only reads: what is captured gets its own at the end."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    try:
        copy = copied(module, dict(shared))
    except Exception:  # open files, locks ...
        return module
    for child in copy.modules():
        _numbers_as_constants(child)
    return copy


def _constant(number: int, dtype: torch.dtype, _: nn.Module) -> Tensor:
    return torch.tensor(number, dtype=dtype)


def _numbers_as_constants(module: nn.Module) -> None:
    """Whole numbers that a module holds as buffers (strides and paddings of some codecs) become constants: torch.export
    reckons with those, and with a buffer it gives up where a size depends on it."""
    numbers = {
        name: (int(value), value.dtype)
        for name, value in module._buffers.items()
        if value is not None and not value.dim() and value.dtype in (torch.int32, torch.int64) and not value.is_meta
    }
    if not numbers:
        return
    constants = {
        name: property(functools.partial(_constant, number, dtype)) for name, (number, dtype) in numbers.items()
    }
    for name in numbers:
        del module._buffers[name]
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **constants})


@contextmanager
def _keywords_named(module: nn.Module, kwargs: dict[str, Any]) -> Iterator[inspect.Signature]:
    """Within the block the forward names the arguments that come by its **kwargs: torch 2.12 (make_constraints) counts
    those twice as soon as one may vary. Yields its signature."""
    forward, own = module.forward, vars(module).get("forward")
    signature = inspect.signature(forward)
    named = [each for each in signature.parameters.values() if each.kind != inspect.Parameter.VAR_KEYWORD]
    extra = [name for name in kwargs if name not in {each.name for each in named}]
    signature = signature.replace(
        parameters=[*named, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra)]
    )
    if extra:
        stand_in = functools.partial(forward)
        stand_in.__signature__ = signature  # type: ignore[attr-defined]
        module.forward = stand_in
    try:
        yield signature
    finally:
        if extra:
            del module.forward
        if extra and own is not None:
            module.forward = own


def own_tensors(module: nn.Module) -> None:
    """Replace every parameter and buffer by a copy, once per tensor, so that tied ones stay tied."""
    memo: dict[int, Tensor] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in memo:
                    copy = value.detach().clone()
                    memo[id(value)] = (
                        nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
                    )
                table[name] = memo[id(value)]  # type: ignore[assignment]
        for name, value in list(vars(child).items()):  # constants that export lifted as plain attributes
            if isinstance(value, Tensor):
                delattr(child, name)
                child.register_buffer(name, value.detach().clone(), persistent=True)


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's notes to its own developers: logs, the graph of a failed attempt on stderr, and the Python stack
    of every node, which takes a tenth of a capture."""
    logger = logging.getLogger("torch")
    before = logger.level, fx.config.do_not_emit_stack_traces
    logger.setLevel(logging.ERROR)
    fx.config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before[0])
        fx.config.do_not_emit_stack_traces = before[1]
