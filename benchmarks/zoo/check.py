"""One network: captured once, cut in several places, and at each of them everything that "works" means."""

from __future__ import annotations

import functools
import importlib
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

import dslify
from dslify import derive
from dslify.axes import analyse
from dslify.capture import Graph, capture, scope_inputs
from dslify.cut import find_cut, partition
from dslify.errors import DslifyError
from dslify.functional import copied, graphs_in
from dslify.graft import region_module
from dslify.insert import insert_into
from dslify.request import Request
from dslify.widths import choose

from .cuts import chosen_cuts
from .network import Network

surgery = importlib.import_module("dslify.insert")  # the room: dslify.insert is the function
EXACT = 1e-5  # of the largest output
WIDTH = 0.1
TIMES = 5  # that a cut is timed
Record = dict[str, Any]
Example = tuple[tuple[Any, ...], dict[str, Any]]


class Unlike(Exception):
    """A check that failed; the message says what was found."""


def check_network(network: Network, shares: Sequence[float], times: bool = False) -> Iterator[Record]:
    """One record for each cut, or a single one that says at which stage the network dropped out.

    stage: "eager" (PyTorch itself cannot run it), "captured", or "cut". times: capture and surgery only, no checks.
    """
    whole: Record = {"network": network.name, "group": network.group}
    try:
        model = network.build()
        inner, args, kwargs = scope_inputs(model, network.scope, *network.example(1))
        expected = {1: _eager(inner, (args, kwargs))}
    except Exception as error:
        yield {**whole, "stage": "eager", "reason": _words(error)}
        return
    examples = {1: (args, kwargs)}
    try:
        examples[3] = scope_inputs(model, network.scope, *network.example(3))[1:]
        expected[3] = _eager(inner, examples[3])
    except Exception as error:
        whole["batch_of_three"] = f"eager PyTorch cannot: {_words(error)}"
        examples.pop(3, None)
    try:
        start = time.perf_counter()
        captured = capture(inner, args, kwargs)
        whole |= {"capture_s": time.perf_counter() - start, "dynamic": captured.dynamic}
        whole["nodes"] = len(captured.module.graph.nodes)
    except Exception as error:
        yield {**whole, "stage": "captured", "reason": _words(error), "traceback": traceback.format_exc()}
        return
    cuts = dict.fromkeys([*network.at, *chosen_cuts(inner, captured, shares)])
    if not cuts:
        yield {**whole, "stage": "cut", "reason": "no usable cut point"}
    for at in cuts:
        found = _timed_cut(captured, at) if times else _check_cut(captured, at, examples, expected)
        yield {**whole, "stage": "cut", "at": at, **found}


def _check_cut(captured: Graph, at: str, examples: dict[int, Example], expected: dict[int, Any]) -> Record:
    record: Record = {}
    try:
        net, record = _cut(captured, at)
        for batch, example in examples.items():
            _run_of(
                net, "full", example, f"full route, batch of {batch}", lambda found, b=batch: _same(found, expected[b])
            )
            _run_of(
                net,
                "light",
                example,
                f"light route, batch of {batch}",
                lambda found, b=batch: _like(found, expected[b]),
            )
        _reloads(net, examples[1])
        record |= _trains(net, examples[1])
        _width_one(insert_into(_fresh(captured), Request(at=at, width=1.0)), examples[1])
    except (DslifyError, Unlike) as error:
        return {**record, "works": False, "reason": _words(error), "traceback": traceback.format_exc()}
    except Exception as error:
        return {**record, "works": False, "reason": f"unexpected: {_words(error)}", "traceback": traceback.format_exc()}
    return {**record, "works": True, "reason": ""}


def _timed_cut(captured: Graph, at: str) -> Record:
    """One cut, its seconds as medians of TIMES: a single tenth of a second says more about the machine."""
    try:
        records = [_cut(captured, at)[1] for _ in range(TIMES)]
    except DslifyError as error:
        return {"works": False, "reason": _words(error)}
    medians = {name: statistics.median(record[name] for record in records) for name in ("insert_into_s", "surgery_s")}
    return {**records[0], **medians, "first_surgery_s": records[0]["surgery_s"]}


def _cut(captured: Graph, at: str) -> tuple[fx.GraphModule, Record]:
    """The network with a layer, what that took, and what became of it."""
    fresh, checks = _fresh(captured), Stopwatch()
    start = time.perf_counter()
    with (
        checks.on(derive, "permutation_error", "in_child"),
        checks.on(surgery, "region_inputs", "_check_full_route"),
    ):
        net = insert_into(fresh, Request(at=at, width=WIDTH))
    seconds = time.perf_counter() - start
    taken = {"insert_into_s": seconds, "surgery_s": seconds - checks.seconds}
    return net, {**taken, **_plan(net), **_unprojected(captured, at)}


class Stopwatch:
    """Seconds that the functions of a module take, while on() lasts."""

    seconds = 0.0

    @contextmanager
    def on(self, module: ModuleType, *names: str) -> Iterator[None]:
        before = {name: getattr(module, name) for name in names}
        for name, function in before.items():
            setattr(module, name, functools.partial(self._timed, function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(module, name, function)

    def _timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def _unprojected(captured: Graph, at: str) -> Record:
    """The shares that are left at WIDTH without projections."""
    module = captured.module
    axes = analyse(region_module(module, partition(module.graph, find_cut(module.graph, at, module))))
    kept = choose(axes, WIDTH)
    if not axes.params() or not axes.macs():
        return {}
    return {"without_projection": [axes.params(kept) / axes.params(), axes.macs(kept) / axes.macs()]}


def _plan(net: nn.Module) -> Record:
    (layer,) = dslify.dsl_layers(net)
    plan = layer.plan
    record: Record = {"ledger": {name: len(nodes) for name, nodes in plan.ledger.items()}}
    record["distrusted"] = dict(plan.distrusted)
    record["crossing"] = len(plan.crossing)
    if plan.params["full"] and plan.macs["full"]:
        record["with_projection"] = [plan.params["light"] / plan.params["full"], plan.macs["light"] / plan.macs["full"]]
    return record


def _run_of(net: nn.Module, mode: Any, example: Example, what: str, judge: Callable[[Any], None]) -> None:
    try:
        with torch.no_grad(), dslify.route(net, mode):
            found = net(*example[0], **example[1])
        judge(found)
    except Unlike as error:
        raise Unlike(f"{what}: {error}") from error
    except Exception as error:
        raise Unlike(f"{what}: {_words(error)}") from error


def _reloads(net: nn.Module, example: Example) -> None:
    with tempfile.TemporaryDirectory() as folder:
        again = dslify.load(dslify.save(net, Path(folder) / "net.dsl"))
    for mode in ("full", "light"):
        with torch.no_grad(), dslify.route(net, mode):
            before = net(*example[0], **example[1])
        _run_of(again, mode, example, f"{mode} route, reloaded", lambda found, before=before: _same(found, before))


def _trains(net: nn.Module, example: Example) -> Record:
    """Gradients reach every light parameter whose full counterpart they reach."""
    (layer,) = dslify.dsl_layers(net)
    missing = {}
    for mode, path in (("light", layer.light), ("full", layer.full)):
        path.requires_grad_(True)
        with torch.enable_grad(), dslify.route(net, mode):
            found = net(*_contiguous(example[0]), **_contiguous(example[1]))
        loss = sum(out.abs().pow(2).mean() for out in _tensors(found) if out.requires_grad)
        if not isinstance(loss, Tensor):
            raise Unlike(f"{mode} route: no output has a gradient")
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in path.named_parameters()}
        missing[mode] = {name for name, gradient in gradients.items() if gradient is None}
        infinite = [
            name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()
        ]
        if mode == "light" and infinite and loss.isfinite():
            raise Unlike(f"the gradient of {infinite[0]} of the light path is not finite")
        net.zero_grad(set_to_none=True)
    if lost := sorted(missing["light"] - missing["full"]):
        raise Unlike(f"no gradient reaches {lost[0]} of the light path, and {len(lost) - 1} more")
    return {"without_gradient": len(missing["light"])}


def _width_one(net: fx.GraphModule, example: Example) -> None:
    """Light equals full in float64."""
    double = _in_float64(net)
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf, example
    )
    with torch.no_grad(), dslify.route(double, "full"):
        full = double(*args, **kwargs)
    _run_of(double, "light", (args, kwargs), "light route at width 1.0", lambda found: _same(found, full))


def _in_float64(net: fx.GraphModule) -> fx.GraphModule:
    """Casts to single precision inside the network become casts to double, or nothing would fit together."""
    net.double()
    for inner in graphs_in(net):
        for node in inner.graph.nodes:
            node.args, node.kwargs = (
                map_aggregate(part, lambda a: torch.float64 if a == torch.float32 else a)
                for part in (node.args, node.kwargs)
            )
        inner.recompile()
    return net


def _fresh(captured: Graph) -> Graph:
    """A copy of a capture, because the surgery consumes it."""
    return replace(captured, module=copied(captured.module))


def _eager(module: nn.Module, example: Example) -> Any:
    with torch.no_grad():
        return module(*example[0], **example[1])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _contiguous(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, tree)


def _same(found: Any, expected: Any) -> None:
    _like(found, expected)
    for mine, theirs in zip(_tensors(found), _tensors(expected), strict=True):
        if theirs.numel() and theirs.isfinite().all():
            wide = torch.complex128 if theirs.is_complex() else torch.float64
            gap = (mine.to(wide) - theirs.to(wide)).abs().max() / theirs.abs().max().double().clamp_min(1e-12)
            if not gap <= EXACT:
                raise Unlike(f"differs by {gap:.1e} of the largest value")


def _like(found: Any, expected: Any) -> None:
    """The same number of tensors, the same shapes and types, and finite where the network's own are."""
    mine, theirs = _tensors(found), _tensors(expected)
    if len(mine) != len(theirs):
        raise Unlike(f"{len(mine)} tensors instead of {len(theirs)}")
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Unlike(f"{tuple(a.shape)} of {a.dtype} instead of {tuple(b.shape)} of {b.dtype}")
        if b.isfinite().all() and not a.isfinite().all():
            raise Unlike("values that are not finite")


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
