"""Fourier transforms: the axes that are transformed are fixed on both sides, the others pass."""

from __future__ import annotations

from typing import Any

from torch import fx

from .table import Binding, Terms, arguments, dims, rule, shape

_WHY = "it is Fourier-transformed"
_KINDS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")


@rule(*(f"fft_{kind}{rank}.default" for kind in _KINDS for rank in ("", "2", "n")), "fft_fftshift.default",
      "fft_ifftshift.default")  # fmt: skip
def fft(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, along = b[a["self"]], a["dim"]
    if along is None and a.get("s"):  # as many of the last axes as there are sizes
        along = list(range(-len(a["s"]), 0))
    gone = dims(along, len(x))
    return tuple(
        b.renewed(node, axis, size, _WHY) if at in gone else axis
        for at, (axis, size) in enumerate(zip(x, shape(node), strict=True))
    )


@rule("stft.default", "stft.center")  # n? t -> n? f t (2)
def stft(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    _transformed(b, node, x[-1:], a["window"])
    return (*x[:-1], *(b.fixed(size, node, _WHY) for size in shape(node)[len(x) - 1 :]))


@rule("istft.default")  # n? f t (2) -> n? t
def istft(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    batch = x[: len(shape(node)) - 1]
    _transformed(b, node, x[len(batch) :], a["window"])
    return (*batch, b.fixed(shape(node)[-1], node, _WHY))


def _transformed(b: Binding, node: fx.Node, axes: Terms, window: Any) -> None:
    b.freeze(node, [*axes, *(b[window] if window is not None else ())], _WHY)


@rule("view_as_real.default")  # * -> * 2
def view_as_real(b: Binding, node: fx.Node) -> Terms:
    return (*b[node.args[0]], b.fixed(2, node, "it holds real and imaginary parts"))


@rule("view_as_complex.default")  # * 2 -> *
def view_as_complex(b: Binding, node: fx.Node) -> Terms:
    x = b[node.args[0]]
    b.freeze(node, x[-1], "it holds real and imaginary parts")
    return x[:-1]
