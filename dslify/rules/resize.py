"""Sliding and resizing: pooling, padding, interpolation, unfolding, pixel shuffles, differences."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from .table import Binding, Terms, arguments, dims, rule, shape
from .terms import Axis, concat, product

_POOLS = [
    f"{kind}_pool{rank}d.default" for rank in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
]
_DECOMPOSED = [  # in networks that were decomposed to core ATen
    "max_pool1d_with_indices.default", "max_pool2d_with_indices.default", "max_pool3d_with_indices.default",
    "_adaptive_avg_pool2d.default", "_adaptive_avg_pool3d.default",
]  # fmt: skip
_INTERPOLATIONS = [
    f"upsample_{kind}.{overload}"
    for kind in ("nearest1d", "nearest2d", "nearest3d", "_nearest_exact1d", "_nearest_exact2d", "_nearest_exact3d",
                 "linear1d", "bilinear2d", "trilinear3d", "bicubic2d", "_bilinear2d_aa", "_bicubic2d_aa")
    for overload in ("vec", "default")
]  # fmt: skip
_MIRRORS = [f"{kind}_pad{rank}d.default" for kind in ("reflection", "replication") for rank in (1, 2, 3)]


@rule(*_POOLS, *_DECOMPOSED, *(name.replace("upsample__", "_upsample_") for name in _INTERPOLATIONS), *_MIRRORS,
      "max_unpool2d.default", "max_unpool3d.default")  # fmt: skip
def spatial(b: Binding, node: fx.Node) -> Any:
    """The last one, two or three axes are resized, pooled or padded: fixed on both sides. Channels pass."""
    a = arguments(node)
    x = b[a.get("self", a.get("input"))]
    if a.get("indices") is not None:
        x = b.broadcast(node, x, b[a["indices"]])
    outputs = node.meta["val"]
    sizes = tuple((outputs if isinstance(outputs, Tensor) else outputs[0]).shape)
    first = len(x) - next(int(digit) for digit in str(node.target) if digit in "123")
    why = "it is resized, pooled or padded"
    out = (*x[:first], *(b.renewed(node, axis, size, why) for axis, size in zip(x[first:], sizes[first:], strict=True)))
    return out if isinstance(outputs, Tensor) else tuple(out for _ in outputs)


@rule("pad.default", "constant_pad_nd.default")
def pad(b: Binding, node: fx.Node) -> Terms:
    """Channels padded with a constant become [before + x + after]; what parameters do not reach is fixed."""
    a = arguments(node)
    x, amounts = b[a["self"]], list(a["pad"])
    out, added = list(x), dict[int, Axis]()
    for first in range(0, len(amounts), 2):
        dim = len(x) - 1 - first // 2
        pair = amounts[first : first + 2]
        if all(isinstance(amount, int) and amount == 0 for amount in pair):
            continue
        plain = a.get("mode", "constant") == "constant" and all(isinstance(n, int) and n >= 0 for n in pair)
        if plain and isinstance(x[dim].find().size, int) and any(atom.touched for atom in x[dim].atoms()):
            before, after = (b.neutral(amount) for amount in pair)
            added[first], added[first + 1] = before, after
            out[dim] = concat([before, x[dim], after])
        else:
            out[dim] = b.renewed(node, x[dim], shape(node)[dim], "it is padded")
    b.rewrite(node, "pad", lambda size: [size(added[at]) if at in added else n for at, n in enumerate(amounts)])
    return tuple(out)


@rule("pixel_shuffle.default")  # * (c r r) h w -> * c (h r) (w r)
def pixel_shuffle(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, factor = b[a["self"]], a["upscale_factor"]
    channels = b.neutral(shape(node)[-3])
    b.unify(node, x[-3], product([channels, b.fixed(factor**2, node, "pixels are made of it")]))
    return (*x[:-3], channels, *_moved(b, node, x[-2:]))


@rule("pixel_unshuffle.default")  # * c (h r) (w r) -> * (c r r) h w
def pixel_unshuffle(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x, factor = b[a["self"]], a["downscale_factor"]
    channels = product([x[-3], b.fixed(factor**2, node, "it is made of pixels")])
    return (*x[:-3], channels, *_moved(b, node, x[-2:]))


def _moved(b: Binding, node: fx.Node, axes: Terms) -> Terms:
    """The last axes of the output, from those of the input whose entries move."""
    sizes = shape(node)[len(shape(node)) - len(axes) :]
    return tuple(b.renewed(node, axis, size, "its entries move") for axis, size in zip(axes, sizes, strict=True))


@rule("channel_shuffle.default", "native_channel_shuffle.default")  # n (g c) * -> n (c g) *
def channel_shuffle(b: Binding, node: fx.Node) -> Terms:
    x, groups = b[node.args[0]], arguments(node)["groups"]
    if groups == 1:
        return x
    group, inner = b.neutral(groups), b.neutral(shape(node)[1] // groups)
    b.unify(node, x[1], product([group, inner]))
    b.rewrite(node, "groups", lambda size: size(group))
    return (x[0], product([inner, group]), *x[2:])


@rule("im2col.default")  # n? c h w -> n? (c k) l
def im2col(b: Binding, node: fx.Node) -> Terms:
    x, kernel = b[node.args[0]], math.prod(arguments(node)["kernel_size"])
    b.freeze(node, x[-2:], "a window slides along it")
    channels = product([x[-3], b.fixed(kernel, node, "it is a window")])
    return (*x[:-3], channels, b.fixed(shape(node)[-1], node, "it counts windows"))


@rule("col2im.default")  # n? (c k) l -> n? c h w
def col2im(b: Binding, node: fx.Node) -> Terms:
    x, kernel = b[node.args[0]], math.prod(arguments(node)["kernel_size"])
    channels = b.neutral(shape(node)[-3])
    b.unify(node, x[-2], product([channels, b.fixed(kernel, node, "it is a window")]))
    b.freeze(node, x[-1], "it counts windows")
    return (*x[:-2], channels, *(b.fixed(size, node, "windows are added up along it") for size in shape(node)[-2:]))


@rule("unfold.default")  # the windows of one axis become the last axis
def unfold(b: Binding, node: fx.Node) -> Terms:
    a = arguments(node)
    x = b[a["self"]]
    dim = a["dimension"] % len(x)
    windows = b.renewed(node, x[dim], shape(node)[dim], "a window slides along it")
    return (*x[:dim], windows, *x[dim + 1 :], b.fixed(shape(node)[-1], node, "it is a window"))


@rule("grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default")  # n c *, n * r -> n c *
def grid_sampler(b: Binding, node: fx.Node) -> Terms:
    x, grid = b[node.args[0]], b[node.args[1]]
    b.freeze(node, [*x[2:], grid[-1]], "it is sampled at coordinates")
    b.unify(node, x[0], grid[0])
    return (*x[:2], *grid[1:-1])


@rule("rot90.default", "diff.default", "affine_grid_generator.default")
def moved(b: Binding, node: fx.Node) -> Any:
    """Entries move along some axes; the others pass."""
    a = arguments(node)
    if "theta" in a:
        b.freeze(node, b[a["theta"]], "it is a transformation")
        return b.fixed_outputs(node, "coordinates are counted along it")
    x = b[a["self"]]
    along = dims(a["dims"] if "dims" in a else a["dim"], len(x))
    out = [b.renewed(node, axis, size, "its entries move") if at in along else axis
           for at, (axis, size) in enumerate(zip(x, shape(node), strict=True))]  # fmt: skip
    for name in ("prepend", "append"):
        if a.get(name) is not None:
            for at, axis in enumerate(b[a[name]]):
                b.freeze(node, axis, "its entries move") if at in along else b.unify(node, axis, out[at])
    return tuple(out)
