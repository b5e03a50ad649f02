"""Tensors made from sizes: constant fills follow what they meet, counted ones are fixed."""

from __future__ import annotations

from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, new_sizes, rule, shape


@rule("zeros.default", "ones.default", "full.default", "empty.memory_format", "new_zeros.default", "new_ones.default",
      "new_full.default", "new_empty.default")  # fmt: skip
def constant(b: Binding, node: fx.Node) -> Terms:
    """Every entry is the same: the size argument is written anew."""
    given = list(arguments(node)["size"])
    out = tuple(b.given(size, node) for size in shape(node))
    b.rewrite(node, "size", lambda size: new_sizes(given, out, size))
    return out


@rule("arange.default", "arange.start", "arange.start_step", "linspace.default", "logspace.default", "eye.default",
      "eye.m", "scalar_tensor.default", "tril_indices.default", "triu_indices.default", "fft_fftfreq.default",
      "fft_rfftfreq.default", "hann_window.default", "hann_window.periodic", "hamming_window.default",
      "hamming_window.periodic", "blackman_window.default", "blackman_window.periodic", "bartlett_window.default",
      "bartlett_window.periodic", "kaiser_window.default", "kaiser_window.periodic",
      "kaiser_window.beta")  # fmt: skip
def counted(b: Binding, node: fx.Node) -> Any:
    return b.fixed_outputs(node, "its entries count along it")


@rule("one_hot.default")  # * -> * k
def one_hot(b: Binding, node: fx.Node) -> Terms:
    return (*b[node.args[0]], b.fixed(shape(node)[-1], node, "its entries count along it"))
