"""Short-time Fourier transforms as convolutions, for runtimes without complex numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from .functional import op_name, put_tensor, tensor_at
from .rules import arguments

aten = torch.ops.aten


def real_spectra(module: fx.GraphModule) -> int:
    """Replace, in place, every transform that is read only as pairs of real numbers (torch.view_as_real) by a
    convolution with the windowed cosines and sines, which gives the same pairs. Returns how many there were.

    Left as they are: transforms whose complex values are read, and those whose window the graph computes.
    """
    graph, done = module.graph, 0
    for node in list(graph.nodes):
        if op_name(node) != "aten.stft.default" or not node.users:
            continue
        given = arguments(node)
        window = given["window"]
        if any(op_name(user) != "aten.view_as_real.default" for user in node.users) or given["align_to_window"]:
            continue
        if window is not None and window.op != "get_attr":
            continue
        known = None if window is None else tensor_at(module, str(window.target))
        weight = spectrum_weight(
            given["n_fft"], given["win_length"], known, bool(given["normalized"]), given["onesided"] is not False
        )
        name = f"spectrum{done}"
        put_tensor(module, name, weight)
        _replace(graph, node, name, weight, given)
        done += 1
    if done:
        graph.eliminate_dead_code()
        module.recompile()
    return done


def spectrum_weight(length: int, inside: int | None, window: Tensor | None, normalized: bool, onesided: bool) -> Tensor:
    """(2 bins, 1, length): cosines, then negative sines, times the window, as torch.stft defines them.

    length: n_fft. inside: samples of the window (win_length), which lies in the middle.
    """
    inside = inside or length
    kept = torch.ones(inside, dtype=torch.float64) if window is None else window.detach().double().cpu()
    before = (length - inside) // 2
    padded = torch.nn.functional.pad(kept, (before, length - inside - before))
    bins = torch.arange(length // 2 + 1 if onesided else length, dtype=torch.float64)
    steps = torch.outer(bins, torch.arange(length, dtype=torch.float64)) % length  # exact, so that angles stay small
    angles = 2 * math.pi / length * steps
    both = torch.cat([angles.cos(), -angles.sin()]) * padded * (length**-0.5 if normalized else 1.0)
    return both[:, None].to(torch.float32 if window is None else window.dtype)


def _replace(graph: fx.Graph, node: fx.Node, name: str, weight: Tensor, given: dict[str, Any]) -> None:
    single = given["self"].meta["val"].dim() == 1
    hop = given["hop_length"] or given["n_fft"] // 4
    with graph.inserting_before(node):
        held = graph.get_attr(name)
        sound = graph.call_function(aten.unsqueeze.default, (given["self"], 0)) if single else given["self"]
        sound = graph.call_function(aten.unsqueeze.default, (sound, 1))
        found = graph.call_function(aten.conv1d.default, (sound, held, None, [hop]))
        pairs = graph.call_function(aten.unflatten.int, (found, 1, [2, len(weight) // 2]))
        pairs = graph.call_function(aten.permute.default, (pairs, [0, 2, 3, 1]))
        pairs = graph.call_function(aten.squeeze.dim, (pairs, 0)) if single else pairs
    for user in list(node.users):
        user.replace_all_uses_with(pairs)
        graph.erase_node(user)
    graph.erase_node(node)
