"""Oracles for the rows of views, resizing and padding, with channels that have to come out free."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.oracles import Case, call, check, conv, region_of, total

A = torch.ops.aten


def weight(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size))


def turned(m, x):  # every spelling of a transposition
    x = x.permute(0, 2, 1).swapaxes(1, 2).swapdims(1, 2).transpose(1, 2).mT.mH.adjoint()
    x = torch.movedim(torch.movedim(x, 1, -1), (0, 2), (0, 1)).moveaxis(1, 2)
    x = A.moveaxis.intlist(A.moveaxis.int(x, 0, 1), [0, 1], [1, 2]).permute(2, 1, 0)
    return x + A.t(A.t(m.w[:, None])) + A.numpy_T(A.t(m.w[:, None]))


def reshaped(m, x):  # 24 = 4 * 6 channels
    y = A._unsafe_view(x, [2, 4, 6, 40]).flatten(1, 2).unflatten(1, (4, 6)).reshape(2, 24, 40)
    y = A.view_as(y.view(2, 4, 6, 40), m.like[None, :, :, None].expand(2, 4, 6, 40)).reshape_as(x)
    return y.unsqueeze(1).squeeze(1).unsqueeze(3).squeeze((1, 3)) + A.ravel(m.like)[:, None]


def squeezed(m, x):
    return x.mean(2, keepdim=True).squeeze() @ m.w


def expanded(m, x):
    w = m.w[:, None]
    return total([x, w.expand(24, 40), w.expand_as(x), w.broadcast_to(24, 40), *torch.broadcast_tensors(x, w)])


def repeated(m, x):
    w = m.w[:, None]
    y = x.mean(1, keepdim=True)  # one channel, repeated to as many as the weight has
    several = [y.repeat(1, 24, 1), y.tile(24, 1), A.repeat_interleave.self_int(y, 24, 1, output_size=24)]
    twice = torch.cat([x, x * w], 1)
    return twice.repeat(1, 2, 1) * x.tile(4, 1) + torch.cat([*several, x.repeat_interleave(1, 1)], 1)


def interleaved(m, x):
    each = torch.full((40,), 2)
    y = A.repeat_interleave.self_Tensor(x, each, 2, output_size=80)
    return (x + y[:, :, ::2]).repeat_interleave(3, 1)


def flattened_repeat(m, x):
    return x + m.w.repeat_interleave(2).view(24, 2).sum(1)[:, None]


def parted(m, x):  # 24 = 8 + 8 + 8 = 12 + 12
    a, b, c = x.chunk(3, 1)
    d = A.unsafe_chunk(x, 3, 1)[0] + x.split(8, 1)[1] + A.unsafe_split.Tensor(x, 8, 1)[2] + x.split([8, 8, 8], 1)[0]
    e = A.unsafe_split_with_sizes(x, [8, 8, 8], 1)[0] + A.tensor_split.sections(x, 3, 1)[1]
    f = A.tensor_split.indices(x, [8, 16], 1)[1] + A.split.sizes(x, [8, 16], 1)[0]
    return torch.concat([A.cat([a, b], 1), c + d + e + f], 1)


def stacked(m, x):
    y = torch.stack([x, x.square()], 0).unbind(0)[1]
    rows, more = x.mean(2), torch.hstack([y.mean(2), y.amax(2)])
    vector = torch.hstack([m.w, m.w])
    return torch.cat([rows, rows], 1) + more + torch.vstack([vector, more])[1:] + torch.vstack([vector, vector])[0]


def grids(m, x):
    first, second = torch.meshgrid(m.w, m.w.square(), indexing="ij")
    third, fourth = torch.meshgrid(m.w, torch.ones(40, dtype=x.dtype), indexing="xy")
    fifth, sixth = A.meshgrid([m.w, torch.ones(40, dtype=x.dtype)])
    return x + (first * second).sum(1)[:, None] + (third * fourth).T + fifth + sixth


def shuffled_pixels(m, x):  # (2, 32, 10, 10)
    y = F.pixel_shuffle(x, 2) * m.w[:, None, None]
    return F.pixel_unshuffle(y, 2) + A.channel_shuffle(x, 2).mean() + A.native_channel_shuffle(x.detach(), 2).mean()


def unfolded(m, x):  # (2, 16, 12, 12)
    y = F.fold(F.unfold(x, 3, padding=1) * 2, 12, 3, padding=1)
    single = F.fold(F.unfold(x[0], 2, stride=2), 12, 2, stride=2)
    return (
        y
        + single
        + x.unfold(2, 3, 1).mean((2, 4), keepdim=True)[..., 0]
        + x.unfold(3, 2, 2).sum((3, 4), keepdim=True)[..., 0]
    )


def sampled(m, x):
    grid = F.affine_grid(m.theta[None].expand(2, -1, -1), [2, 16, 12, 12], align_corners=False)
    y = A.grid_sampler(x, grid, 0, 0, False) + A.grid_sampler_2d(x, grid, 0, 0, False)
    volume = A.grid_sampler_3d(x[:, :, None], torch.zeros(2, 1, 12, 12, 3, dtype=x.dtype), 0, 0, False)[:, :, 0]
    return (
        y + volume + x.rot90(1, (2, 3)) + torch.diff(x, prepend=x[..., :1]) + torch.diff(x, dim=2, append=x[:, :, -1:])
    )


def pools_1d(m, x):
    values = [F.max_pool1d(x, 2, 2), F.avg_pool1d(x, 2), F.adaptive_avg_pool1d(x, 20), F.adaptive_max_pool1d(x, 20)]
    return total([*values, A.max_pool1d_with_indices(x, [2])[0], F.lp_pool1d(x.abs() + 0.1, 2, 2)])


def pools_2d(m, x):  # (2, 16, 12, 12)
    values = [F.max_pool2d(x, 2), F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 6), F.adaptive_max_pool2d(x, 6)]
    values += [A._adaptive_avg_pool2d(x, [6, 6]), A.max_pool2d_with_indices(x, [2, 2], [2, 2])[0]]
    pooled, places = F.max_pool2d(x, 2, return_indices=True)
    return total([*values, F.avg_pool2d(F.max_unpool2d(pooled, places, 2), 2)])


def pools_3d(m, x):  # (2, 16, 6, 8, 8)
    values = [F.max_pool3d(x, 2), F.avg_pool3d(x, 2), F.adaptive_avg_pool3d(x, (3, 4, 4))]
    values += [F.adaptive_max_pool3d(x, (3, 4, 4)), A._adaptive_avg_pool3d(x, [3, 4, 4])]
    pooled, places = A.max_pool3d_with_indices(x, [2, 2, 2], [2, 2, 2])
    return total([*values, F.avg_pool3d(F.max_unpool3d(pooled, places, 2), 2)])


def upsampled_1d(m, x):
    values = [call(f"upsample_{kind}.vec", x, None, *flag, [2.0]) for kind, flag in (
        ("nearest1d", ()), ("linear1d", (False,)))]  # fmt: skip
    values += [A.upsample_nearest1d(x, [80]), A.upsample_linear1d(x, [80], True), A._upsample_nearest_exact1d(x, [80])]
    return total([*values, A._upsample_nearest_exact1d.vec(x, None, [2.0])])


def upsampled_2d(m, x):
    values = [A.upsample_nearest2d.vec(x, None, [2.0, 2.0]), A._upsample_nearest_exact2d.vec(x, [24, 24], None)]
    values += [A.upsample_nearest2d(x, [24, 24]), A._upsample_nearest_exact2d(x, [24, 24])]
    for kind in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):
        values += [call(f"{kind}.vec", x, [24, 24], False, None), call(kind, x, [24, 24], False)]
    return total(values)


def upsampled_3d(m, x):
    values = [A.upsample_nearest3d.vec(x, None, [2.0, 2.0, 2.0]), A.upsample_nearest3d(x, [12, 16, 16])]
    values += [A._upsample_nearest_exact3d.vec(x, None, [2.0, 2.0, 2.0]), A._upsample_nearest_exact3d(x, [12, 16, 16])]
    return total(
        [*values, A.upsample_trilinear3d.vec(x, None, False, [2.0] * 3), A.upsample_trilinear3d(x, [12, 16, 16], True)]
    )


def padded(m, x):
    values = [call(f"{kind}_pad1d", x, [1, 2]) for kind in ("reflection", "replication")]
    four, five = x[:, :, None], x[:, :, None, None]
    values += [A.replication_pad2d(four, [1, 2, 0, 0])[:, :, 0], A.reflection_pad2d(four, [1, 2, 0, 0])[:, :, 0]]
    values += [
        A.replication_pad3d(five, [1, 2, 0, 0, 0, 0])[:, :, 0, 0],
        A.reflection_pad3d(five, [1, 2] + [0] * 4)[:, :, 0, 0],
    ]
    return total([*values, *(F.pad(x, (1, 2), mode=mode) for mode in ("constant", "reflect", "replicate", "circular")),
                  A.constant_pad_nd(x, [1, 2])])  # fmt: skip


def padded_channels(m, x):  # as the shortcuts of small residual networks do
    return F.pad(x, (0, 0, 4, 12)) + m.w[:, None]


def sound(operator, free=1, out=24, **parts):
    return Case("sound", operator, conv(6, 24), conv(out, 4), free, {"w": weight(24), **parts})


def image(operator, free=1, channels=16, out=16, **parts):
    return Case("image", operator, conv(3, channels, 2), conv(out, 4, 2), free, {"w": weight(channels), **parts})


def video(operator):
    return Case("video", operator, conv(3, 16, 3), conv(16, 4, 3), 1)


CASES = {
    "turned": lambda: sound(turned),
    "reshaped": lambda: sound(reshaped, 2, like=weight(4, 6)),
    "squeezed": lambda: Case("sound", squeezed, conv(6, 24), nn.Linear(12, 3), 1, {"w": weight(24, 12)}),
    "expanded": lambda: sound(expanded),
    "repeated": lambda: sound(repeated, 1, 96),
    "interleaved": lambda: sound(interleaved, 1, 72),
    "flattened repeat": lambda: sound(flattened_repeat),
    "parted": lambda: sound(parted, 1),
    "stacked": lambda: Case("sound", stacked, conv(6, 24), nn.Linear(48, 3), 1, {"w": weight(24)}),
    "grids": lambda: sound(grids),
    "pixel shuffle": lambda: Case("image", shuffled_pixels, conv(3, 32, 2), conv(32, 4, 2), 2, {"w": weight(8)}),
    "unfold": lambda: image(unfolded),
    "sampled": lambda: image(sampled, theta=nn.Parameter(torch.eye(2, 3))),
    "1d pools": lambda: sound(pools_1d),
    "2d pools": lambda: image(pools_2d),
    "3d pools": lambda: video(pools_3d),
    "1d upsampling": lambda: sound(upsampled_1d),
    "2d upsampling": lambda: image(upsampled_2d),
    "3d upsampling": lambda: video(upsampled_3d),
    "padding": lambda: sound(padded),
    "padded channels": lambda: Case("sound", padded_channels, conv(6, 24), conv(40, 4), 3, {"w": weight(40)}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name):
    case = CASES[name]
    check(region_of(case), case().free)
