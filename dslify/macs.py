"""Multiply-accumulates by running on fake tensors under torch's own counter (1 MAC = 2 FLOP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .recurrent import OVERLOADS, outputs_like, recurrent_macs


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_lstm(input: Any, input_weight: Any, hidden_weight: Any, *_: Any, **__: Any) -> int:
    """FLOP of one layer in one direction, of shapes: (time, batch, features) and the two weight matrices."""
    return 2 * input[0] * input[1] * (math.prod(input_weight) + math.prod(hidden_weight))


# torch 2.12 counts attention on GPUs only, and no LSTM that oneDNN runs
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten.mkldnn_rnn_layer: _cpu_lstm,
}


_RECURRENT = frozenset(OVERLOADS.values())


def counting(more: Mapping[Any, Callable[..., int]] | None = None) -> FlopCounterMode:
    """torch's counter with what it leaves out. more: FLOP of further operators, from the shapes of their arguments."""
    return FlopCounterMode(display=False, custom_mapping={**_UNCOUNTED, **(more or {})})


def fake(tree: Any) -> tuple[Any, FakeTensorMode]:
    """A tree of tensors as fake ones (shapes without storage), and their mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return pytree.tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, tree), mode


def count(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[int, Any]:
    """(MACs of one call, its outputs as fake tensors)."""
    (args, kwargs), mode = fake((args, kwargs))
    counter = counting()
    with torch.no_grad(), mode, counter:
        outputs = call(*args, **kwargs)
    return counter.get_total_flops() // 2, outputs


def node_macs(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, int]:
    """MACs of every node of a captured graph at the example's size, per call (divide by its batch for one sample)."""
    (args, kwargs), mode = fake((args, kwargs))
    flat = pytree.tree_leaves((args, kwargs))
    counter = counting()
    found: dict[fx.Node, int] = {}

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_function" and n.target in _RECURRENT:  # fake tensors would go through it step by step
                inputs, settings = self.fetch_args_kwargs_from_env(n)
                found[n] = recurrent_macs(inputs[0], inputs[2])
                return outputs_like(*inputs, **settings)
            before = counter.get_total_flops()
            result = super().run_node(n)
            found[n] = (counter.get_total_flops() - before) // 2
            return result

    with torch.no_grad(), mode, counter:
        Counting(module).run(*flat, enable_io_processing=False)
    return found


def parameter_count(module: nn.Module) -> int:
    """Values of the parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
