"""A module becomes a Graph of ATen operators with dynamic batch (and length).

Export is asked for much first (every axis of sequences dynamic), then for less (the batch axis), then for nothing; what
became fixed is said. The result shares nothing with the given module: parameters and buffers are copied, once.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .attempt import Axes, attempt, traced_copy
from .deadline import OutOfTime, own_time
from .errors import CaptureError, one_line
from .functional import symbolic, tensors_of
from .garbage import seldom_collected
from .obstacle import place
from .readings import Reading, depends_on_values, readings
from .readings import words as fixed_words

RTOL, ATOL = 1e-4, 1e-5  # captured against eager: the same kernels, but batch sizes may choose other algorithms
SECONDS = 45.0  # for all attempts together, so that surgery and checks end within a minute
_SHARES = {3: 0.45, 2: 0.65, 1: 1.0}  # of the time that is left, for the third last attempt, the second last, the last
_WAY_OUT_SECONDS = 8.0  # to find submodules that can be captured where the network cannot

Example = tuple[tuple[Any, ...], dict[str, Any]]
Dynamic = Callable[[Any], Axes | None]


@dataclass(frozen=True)
class Graph:
    """A captured module.

    module: the graph (get_attr for parameters, aten operators, pytree in and out), eval mode. dynamic: what may vary,
    in words, and what was asked to vary and could not. args, kwargs: the example it was captured with. seconds: what
    the capture took. expected: the module's own answer on the example.
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
        tensors = tensors_of((self.args, self.kwargs))
        return max(1, tensors[0].shape[0]) if tensors and tensors[0].dim() else 1


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


@contextmanager
def _without_cache(module: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[bool]:
    """Within the block a decoder of Hugging Face's keeps no keys and values for a next step, unless it was asked to:
    they are for generation, and no tensors. Yields whether that turned anything off."""
    configs = {
        id(config): config for child in module.modules() if (config := getattr(child, "config", None)) is not None
    }
    asked = kwargs.get("use_cache") is not None
    turned = [c for c in configs.values() if not asked and getattr(c, "use_cache", None) is True]
    for config in turned:
        config.use_cache = False
    try:
        yield bool(turned)
    finally:
        for config in turned:
            config.use_cache = True


@seldom_collected()
def capture(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, time_limit: float = SECONDS
) -> Graph:
    """Capture `module` in eval mode for inputs like the example ones. The module is left as it was.

    Recurrent layers stay one node. Keyword arguments may be given in any order, then and later. Dataclasses among
    inputs and outputs are registered with torch's pytree. Key-value caches are off (`use_cache=True` keeps them on).
    time_limit: seconds for all attempts. Raises CaptureError with the line that was in the way and the nearest way out.
    """
    start, begin = time.perf_counter(), own_time()
    kwargs = _in_order(module, dict(kwargs or {}))
    with evaluating(module), torch.no_grad(), _without_cache(module, kwargs) as uncached:
        try:
            expected = module(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, value.shape)) or "scalar" for value in tensors_of((args, kwargs)))
            raise CaptureError(
                f"The network does not run on the example input {shapes}: {one_line(error)}. "
                "Give the right shape with --input, such as --input 1x1x16000."
            ) from error
        _register_dataclasses((args, kwargs, expected))
        asked = list(attempts(args, kwargs))
        reason, given_up, stuck = "", "", None
        waiting: list[tuple[Dynamic, Example, tuple[Reading, ...]]] = [(*each, ()) for each in asked]
        while waiting:
            seconds = _SHARES[min(3, len(waiting))] * (time_limit - (own_time() - begin))
            dynamic, example, numbers = waiting.pop(0)
            traced = traced_copy(module)
            try:
                graph_module = attempt(traced, *example, dynamic, seconds, numbers)
            except CaptureError:
                raise
            except (Exception, OutOfTime) as error:
                took = f"torch.export took more than {seconds:.0f} s"
                reason = took if isinstance(error, OutOfTime) else one_line(error)
                stuck = place(error, traced)
                given_up = given_up or reason
                if not numbers and depends_on_values(error) and (numbers := readings(module, *example)):
                    waiting.insert(0, (dynamic, example, numbers))
                continue
            reason = _differs(graph_module, expected, args, kwargs)
            if not reason:
                words = _varying(graph_module, asked[0], "" if numbers else given_up)
                if numbers:
                    words += f"; numbers that the forward reads from its inputs are fixed: {fixed_words(numbers)}"
                if uncached and any(hasattr(expected, name) for name in ("past_key_values", "cache_params")):
                    words += "; without key-value cache"
                return Graph(graph_module, args, kwargs, words, time.perf_counter() - start, expected)
            del graph_module  # with its weights, before the next one has its own
            given_up = given_up or reason
        line, inside = stuck or ("", None)
        raise CaptureError(
            f"torch.export cannot capture {type(module).__name__}{f', at {line}' if line else ''}: {reason}. "
            + _way_out(module, args, kwargs, inside)
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
    try:
        calls = _calls(model, [scope], args, kwargs or {})[scope]
    except Exception as error:
        raise CaptureError(f"The network does not run on the example input: {one_line(error)}.") from error
    if len(calls) != 1:
        raise CaptureError(f"--scope {scope}: it is called {len(calls)} times in one forward, and must be called once.")
    return inner, *calls[0]


def _calls(model: nn.Module, paths: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> the inputs of each call of that submodule in one forward."""
    calls: dict[str, list[Example]] = {path: [] for path in paths}

    def remember(path: str) -> Callable[..., None]:
        return lambda _, a, k: calls[path].append((a, k))

    handles = [model.get_submodule(path).register_forward_pre_hook(remember(path), with_kwargs=True) for path in calls]
    try:
        with evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _way_out(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inside: str | None) -> str:
    """The largest submodules without the one that was in the way, tried as far as time allows."""
    end = own_time() + _WAY_OUT_SECONDS
    stuck = f"{inside}." if inside else ""
    size = {
        path: sum(parameter.numel() for parameter in child.parameters())
        for path, child in module.named_modules()
        if path and not stuck.startswith(f"{path}.") and any(child.children())
    }
    calls = _calls(module, sorted(size, key=lambda path: -size[path]), args, kwargs)
    found: list[str] = []
    for path, given in calls.items():
        seconds = end - own_time()
        if seconds < 0.5 or len(found) == 3:
            break
        if len(given) != 1 or not size[path] or any(path.startswith(f"{other}.") for other in found):
            continue
        dynamic, example = list(attempts(*given[0]))[-2:][0]  # the batch alone, where there is one
        try:
            attempt(traced_copy(module.get_submodule(path)), *example, dynamic, seconds)
        except (Exception, OutOfTime):
            continue
        found.append(path)
    if found:
        return f"These parts of it can be captured alone: {', '.join(f'--scope {path}' for path in found)}."
    return "If only a part of the network needs the switch, capture that part alone: --scope encoder."


def _in_order(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as torch.export orders its inputs: as the forward names them."""
    names = list(inspect.signature(module.forward).parameters)
    return dict(sorted(kwargs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))


def _register_dataclasses(tree: Any) -> None:
    """Make dataclasses transparent to torch.export and to comparisons; those of Hugging Face are already."""
    for leaf in pytree.tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            if type(leaf) not in pytree.SUPPORTED_NODES:
                pytree.register_dataclass(type(leaf))
            _register_dataclasses(leaf)


def attempts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Dynamic, Example]]:
    """(leaf -> its dynamic axes, example) from the most general to the least."""

    def vary(axes: Callable[[Tensor], Iterable[int]]) -> Dynamic:
        return lambda leaf: dict.fromkeys(axes(leaf), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None

    example = _batch_of_two(args, kwargs)
    if example is not None:
        tensors = [leaf for leaf in tensors_of(example) if leaf.dim()]
        batch = tensors[0].shape[0]
        # images keep height and width: letting those vary is the main cost and failure of export
        if any(1 < leaf.dim() <= 3 for leaf in tensors):
            yield vary(lambda leaf: range(leaf.dim() if leaf.dim() <= 3 else 1)), example
        yield vary(lambda leaf: [0] if leaf.dim() and leaf.shape[0] == batch else []), example
    yield vary(lambda leaf: []), (args, kwargs)


def _batch_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example | None:
    """The example with two samples at least, because export fixes an axis of size 1; None without tensors."""
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
    return pytree.tree_unflatten(doubled, spec)  # type: ignore[no-any-return]


def _differs(captured: fx.GraphModule, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why the captured graph is not the module, on the example itself; "" if it is."""
    try:
        found = pytree.tree_leaves(captured(*args, **kwargs))
    except Exception as error:
        return f"the captured graph does not run: {one_line(error)[:120]}"
    wanted = pytree.tree_leaves(expected)
    if len(found) != len(wanted):
        return f"the captured graph gives {len(found)} values where the module gives {len(wanted)}"
    for mine, theirs in zip(found, wanted, strict=True):
        if isinstance(theirs, Tensor) and not torch.allclose(
            mine.double(), theirs.double(), rtol=RTOL, atol=ATOL, equal_nan=True
        ):
            worst = (mine.double() - theirs.double()).abs().max().item()
            return (
                f"the captured graph gives other values than the module (by up to {worst:.2g}); is its forward random?"
            )
    return ""


def _varying(captured: fx.GraphModule, first: tuple[Dynamic, Example], given_up: str) -> str:
    """What the capture let vary, in words, and the axes that the first attempt asked to vary and that became fixed.

    given_up: why an attempt was, "" if the first one succeeded.
    """
    asked, example = first
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    varying: set[int] = set()
    fixed: list[str] = []
    for node, leaf in zip(inputs, pytree.tree_leaves(example), strict=True):
        value = node.meta.get("val")
        for at, size in enumerate(map(symbolic, value.shape) if isinstance(value, Tensor) else ()):
            if not isinstance(size, int):
                varying.add(at)
            elif at in (asked(leaf) or {}) and leaf.shape[at] > 1:
                fixed.append(f"axis {at} of {node.target} at {size}")
    why = f" ({given_up})" if given_up else ""
    if not varying:
        return f"every axis is fixed at the example's size{why}"
    words = "batch varies, other axes are fixed" if varying == {0} else "batch and length vary"
    return f"{words}; asked to vary but fixed: {', '.join(fixed)}{why}" if fixed else words
