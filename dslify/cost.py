"""What each part of a dslified network costs: parameters, multiply-accumulates, activation bytes. No clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import OptionError
from .functional import aliases
from .macs import count, fake, parameter_count
from .plan import Plan
from .switch import DSLayer, dsl_layers, route


@dataclass(frozen=True)
class Cost:
    """One part of the network, per sample at the size it was inserted with.

    name: "base" (up to the cut), "switch" (with the mask), "light" or "full". params: parameter values. macs:
    multiply-accumulates (1 MAC = 2 FLOP; matrix products, convolutions and attention). bytes: written as activations.
    """

    name: str
    params: int
    macs: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def planned(plan: Plan) -> tuple[Cost, ...]:
    """Rows base, light and full as the surgery reckoned them, without bytes."""
    return tuple(Cost(name, plan.params[name], plan.macs[name], 0) for name in ("base", "light", "full"))


def cost(net: nn.Module) -> tuple[Cost, ...]:
    """Rows base, switch, light and full of a network with one DSLayer; with `scope`, of the captured submodule.

    A tail behind the region (`to=`) counts to the base. Raises OptionError without a DSLayer, or with several.
    """
    layers = dsl_layers(net)
    if len(layers) != 1:
        raise OptionError(f"cost() reads networks with one Dynamic Switch Layer; this one has {len(layers)}.")
    layer = layers[0]
    graphs = [module for module in net.modules() if isinstance(module, fx.GraphModule) and layer in module.children()]
    if not graphs:
        raise OptionError("cost() reads networks that dslify.insert made; this one's layer was put in by hand.")
    graph = graphs[0]
    example = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in graph.meta["dslify"]["example"]]
    samples = max(1, example[0].shape[0]) if example and example[0].dim() else 1
    calls: list[tuple[Any, ...]] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    before = layer.paths
    try:
        with route(net, "full"):
            whole, base_bytes = _run(lambda *inputs: _flat(graph, inputs), graph, example)
        inputs = calls[-1]
        parts = {name: _run(getattr(layer, name), getattr(layer, name), inputs) for name in ("light", "full")}
    finally:
        handle.remove()
        layer.paths = before
    switch_macs, _ = count(lambda value: layer.switch(layer.pooled(layer.mask(value))), inputs[0])
    switch_bytes = inputs[0].numel() * inputs[0].element_size()  # the masked activation
    switch_params = parameter_count(layer.mask) + parameter_count(layer.switch)
    rest = parameter_count(graph) - parameter_count(layer) + _shared(graph, layer)
    return (
        Cost("base", rest, (whole - parts["full"][0] - switch_macs) // samples, base_bytes // samples),
        Cost("switch", switch_params, switch_macs // samples, switch_bytes // samples),
        *(
            Cost(name, parameter_count(getattr(layer, name)), macs // samples, size // samples)
            for name, (macs, size) in parts.items()
        ),
    )


def _flat(graph: fx.GraphModule, inputs: Any) -> Any:
    return fx.Interpreter(graph).run(*inputs, enable_io_processing=False)


def _run(call: Callable[..., Any], graph: nn.Module, inputs: Any) -> tuple[int, int]:
    """(MACs, activation bytes) of one call on fake tensors."""
    macs, _ = count(call, *inputs)
    return macs, _activation_bytes(graph, inputs) if isinstance(graph, fx.GraphModule) else 0


def _activation_bytes(graph: fx.GraphModule, inputs: Any) -> int:
    total = 0

    class Weighing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal total
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor) and aliases(n) is None:
                total += value.numel() * value.element_size()
            return value

    inputs, mode = fake(inputs)
    with torch.no_grad(), mode:
        Weighing(graph).run(*inputs, enable_io_processing=False)
    return total


def _shared(graph: nn.Module, layer: DSLayer) -> int:
    """Values of parameters that both the base and the layer hold (tied weights)."""
    inside = {id(parameter): parameter.numel() for parameter in layer.parameters()}
    outside = {id(p) for name, p in graph.named_parameters(remove_duplicate=False) if not name.startswith("dsl")}
    return sum(size for key, size in inside.items() if key in outside)
