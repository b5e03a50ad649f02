"""What each part of a dslified network costs: parameters, multiply-accumulates, activation bytes. No clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .cascade import parents
from .errors import OptionError
from .functional import aliases
from .macs import count, fake, parameter_count
from .notes import recorded_inputs
from .plan import Plan
from .switch import DSLayer, dsl_layers, required_layers, route


@dataclass(frozen=True)
class Cost:
    """One part of the network, per sample at the size it was inserted with.

    name: "base" (what no layer decides on), then for each layer, outermost first, "switch" (with the mask), "light" and
    "full"; from the second layer on with its number, "switch 2". params: parameter values. macs: multiply-accumulates
    (1 MAC = 2 FLOP; matrix products, convolutions and attention). bytes: written as activations. layer: its number
    from 1, 0 for the base.

    A full path with layers inside is counted without what they cost, so a sample costs the base, and of each layer that
    it reaches the switch and the path that it takes.
    """

    name: str
    params: int
    macs: int
    bytes: int
    layer: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def planned(plan: Plan) -> tuple[Cost, ...]:
    """Rows base, light and full as the surgery reckoned them, without bytes."""
    return tuple(Cost(name, plan.params[name], plan.macs[name], 0) for name in ("base", "light", "full"))


def cost(net: nn.Module) -> tuple[Cost, ...]:
    """Rows base, switch, light, full of a dslified network, then "switch 2", "light 2", "full 2" and so on for further
    layers; with `scope`, of the captured submodule.

    A tail behind the region (`to=`) counts to the base. Raises OptionError without a DSLayer that dslify.insert put in.
    """
    numbers = {layer: at for at, layer in enumerate(required_layers(net), 1)}
    hosts = [module for module in net.modules() if isinstance(module, fx.GraphModule) and "dslify" in module.meta]
    found = [part for host in hosts for part in _parts(host)]
    if {layer for _, layer in found} != {None, *numbers}:
        raise OptionError("cost() reads networks that dslify.insert made; this one's layer was put in by hand.")
    bases = [part for part, layer in found if layer is None]
    rows = [Cost("base", *(sum(getattr(part, name) for part in bases) for name in ("params", "macs", "bytes")))]
    for part, layer in found:
        if layer is not None:
            number = numbers[layer]
            name = part.name if number == 1 else f"{part.name} {number}"
            rows.append(replace(part, name=name, layer=number))
    return tuple(rows)


def _parts(host: fx.GraphModule) -> Iterator[tuple[Cost, DSLayer | None]]:
    """What one captured graph costs: its base (of no layer), then switch, light and full of each of its layers."""
    layers = dsl_layers(host)
    above = parents(layers)
    example = recorded_inputs(host)
    samples = max(1, example[0].shape[0]) if example and example[0].dim() else 1

    def part(name: str, module: nn.Module, macs: int, size: int) -> Cost:
        return Cost(name, _parameters(module), macs // samples, size // samples)

    with route(host, "full"), _entering(layers) as entered:
        whole, written = _run(lambda *inputs: _flat(host, inputs), host, example)
        switches = [_switch_macs(layer, entered[layer][0]) for layer in layers]
        lights, fulls = (
            [_run(getattr(layer, name), getattr(layer, name), entered[layer]) for layer in layers]
            for name in ("light", "full")
        )

        def own(macs: int, parent: int | None) -> int:
            """Without what the layers inside cost."""
            return macs - sum(switches[at] + fulls[at][0] for at in range(len(layers)) if above[at] == parent)

        yield part("base", host, own(whole, None), written), None
        for at, layer in enumerate(layers):
            masked = entered[layer][0]  # what the switch's row writes
            switch = parameter_count(layer.mask) + parameter_count(layer.switch)
            size = masked.numel() * masked.element_size()
            yield Cost("switch", switch, switches[at] // samples, size // samples), layer
            yield part("light", layer.light, *lights[at]), layer
            yield part("full", layer.full, own(fulls[at][0], at), fulls[at][1]), layer


@contextmanager
def _entering(layers: Sequence[DSLayer]) -> Iterator[dict[DSLayer, tuple[Any, ...]]]:
    """Within the block, what last entered each layer is noted; afterwards each layer's paths are as they were."""
    entered: dict[DSLayer, tuple[Any, ...]] = {}
    before = [layer.paths for layer in layers]
    handles = [layer.register_forward_pre_hook(lambda layer, seen: entered.update({layer: seen})) for layer in layers]
    try:
        yield entered
    finally:
        for layer, handle, paths in zip(layers, handles, before, strict=True):
            handle.remove()
            layer.paths = paths


def _switch_macs(layer: DSLayer, value: Any) -> int:
    return count(lambda cut: layer.scores(layer.switch_input(cut, layer.mask(cut))), value)[0]


def _flat(graph: fx.GraphModule, inputs: Any) -> Any:
    return fx.Interpreter(graph).run(*inputs, enable_io_processing=False)


def _run(call: Callable[..., Any], graph: nn.Module, inputs: Any) -> tuple[int, int]:
    """(MACs, activation bytes) of one call on fake tensors."""
    macs, _ = count(call, *inputs)
    return macs, _activation_bytes(graph, inputs) if isinstance(graph, fx.GraphModule) else 0


def _activation_bytes(graph: fx.GraphModule, inputs: Any) -> int:
    """What the graph's own operators write; what layers inside write is theirs."""
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


def _parameters(module: nn.Module) -> int:
    """Values of a module's parameters outside of the layers in it; one that several parts share counts in each."""
    found: dict[int, int] = {}
    waiting = [module]
    while waiting:
        part = waiting.pop()
        found |= {id(parameter): parameter.numel() for parameter in part.parameters(recurse=False)}
        waiting += [child for child in part.children() if not isinstance(child, DSLayer)]
    return sum(found.values())
