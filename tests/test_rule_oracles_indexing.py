"""Oracles for the rows of indexing, factories and Fourier transforms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.oracles import Case, call, check, conv, region_of, total

A = torch.ops.aten


def weight(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size))


def sliced(m, x):  # [4 + 8 + 12], and every other one of them
    written = A.slice_scatter(x, x[:, 12:16] * 2, 1, 0, 4)
    return torch.cat([x[:, 4:12], x.narrow(1, 12, 12), written[:, -24:4], x[:, :1000]], 1)


def stepped(m, x):  # 24 = (12 2)
    return torch.cat([x[:, ::2] * m.w[:, None], x[:, 1::2]], 1)


def picked(m, x):  # along time
    single = A.select_scatter(x, x[:, :, 3] * 2, 2, 5)
    index = m.index
    values = [
        x[:, :, index],
        x.unflatten(2, (5, 8))[..., index[:, None] % 5, index % 8].mean(-1),
        x[:1, :, index],
        x.index_select(2, index),
    ]
    along = index.expand(2, 24, 40)
    values += [x.gather(2, along), x.take_along_dim(along, 2), x.take_along_dim(index.expand(2, 1, 40), 2)]
    rows = x[torch.zeros_like(index), :, index].permute(1, 0)  # the index's axes in front
    return total([single, *values, rows, x.unbind(2)[4][:, :, None], x.select(2, 1)[:, :, None]])


def written(m, x):  # along time
    index = m.index
    along = index.expand(2, 24, 40)
    values = [x.scatter(2, along, x * 2), x.scatter(2, along, 2.0), A.scatter.reduce(x.detach(), 2, along,
                  x.detach(), reduce="multiply"),
              A.scatter.value_reduce(x.detach(), 2, along, 0.5, reduce="add"), x.scatter_add(2, along, x),
              x.scatter_reduce(2, along, x, "amax"), x.index_add(2, index, x), x.index_copy(2, index, x * 2),
              x.index_fill(2, index, 1.0), A.index_fill.int_Tensor(x, 2, index, x.sum()),
              A.index_put(x, [None, None, index], x * 3), x.index_put((m.w[:, None] * x > 0,),
              x.new_tensor(2.0))]  # fmt: skip
    y = torch.cat([x, x], 2).detach()
    part = y[:, :, :40]  # what writes through a slice stays in place
    part[:, :, index] = x.detach()
    part.scatter_(2, along, part * 2).scatter_(2, along[:, :, :3], 1.0).scatter_add_(2, along, part * 1)
    part.index_add_(2, index, part * 1).index_copy_(2, index, part * 2).index_fill_(2, index[:2], 1.0)
    return total([*values, part + y[:, :, 40:]])


def diagonals(m, x):
    square = torch.diag_embed(x.transpose(1, 2))  # (batch, time, 24, 24)
    beside = torch.diag_embed(x, 1)[..., :-1, 1:]  # over time
    times = x[:, :, :, None] * x[:, :, None]
    values = [
        square.sum(-1).transpose(1, 2),
        beside.sum(-1),
        times.diagonal(0, 2, 3),
        times.sum((0, 1)).diag(),
        times.sum((0, 1)).trace(),
    ]
    places = torch.searchsorted(m.steps, x) + torch.searchsorted(m.steps, 0.5)
    rows = torch.searchsorted(m.steps.expand(2, 24, 40).contiguous(), x)
    return total([*values, places, rows, torch.diag(m.steps).sum(0)])


def bags(m, x):
    bag, embedded = m.bag(m.words), m.table(m.words).mean(1)
    plain = A.embedding_bag(m.bag.weight, m.words.flatten(), torch.tensor([0, 4]))[0]
    return x + (bag + embedded + plain)[:, :, None]


def filled(m, x):
    sizes = [x.shape[0], 24, 40]
    values = [torch.zeros(sizes, dtype=x.dtype), torch.ones(24, 1, dtype=x.dtype), torch.full((24, 40), 2.0,
                  dtype=x.dtype),
              x.new_zeros(24, 1), x.new_ones(sizes), x.new_full((24, 1), 3.0),
              torch.empty(24, 40, dtype=x.dtype).fill_(1.0), x.new_empty(24, 1).fill_(2.0)]  # fmt: skip
    return torch.cat([x * sum(values), x.new_zeros(x.shape)], 1)


def counted(m, x):  # along time
    d = {"dtype": x.dtype}
    values = [torch.arange(40, **d), torch.arange(1, 41, **d), torch.arange(0, 80, 2, **d), torch.linspace(0, 1, 40,
                  **d),
              torch.logspace(0, 1, 40, **d), torch.eye(40, **d).sum(0), torch.eye(3, 40, **d).sum(0),
              A.scalar_tensor(2.0, **d), torch.fft.fftfreq(40, **d), torch.fft.rfftfreq(78, **d),
              F.one_hot(torch.arange(40), 40).sum(0), torch.tril_indices(40, 1)[0], torch.triu_indices(1,
              40)[1]]  # fmt: skip
    for kind in ("hann", "hamming", "blackman", "bartlett", "kaiser"):
        values += [call(f"{kind}_window", 40, **d), call(f"{kind}_window.periodic", 40, False, **d)]
    return x * total([*values, A.kaiser_window.beta(40, True, 8.0, **d)])


def transformed(m, x):  # along time, the channels pass
    planes = x.unflatten(2, (5, 8))
    line = [call(f"fft_{kind}", x + 0j if kind in ("irfft", "hfft") else x) for kind in
            ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")]  # fmt: skip
    plane = [call(f"fft_{kind}2", planes + 0j if kind in ("irfft", "hfft") else planes) for kind in
             ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")]  # fmt: skip
    solid = [call(f"fft_{kind}n", planes + 0j if kind in ("irfft", "hfft") else planes, [4, 8]) for kind in
             ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")]  # fmt: skip
    shifted = [torch.fft.fftshift(x, 2), torch.fft.ifftshift(x, 2)]
    rows = [value.flatten(2).abs().sum(2, keepdim=True) for value in (*line, *plane, *solid, *shifted)]
    return total([x, *rows])


def short_time(m, x):
    flat = x.reshape(-1, 40)
    spectrum = torch.stft(flat, 8, 4, window=m.window, return_complex=True)
    back = torch.istft(torch.view_as_complex(torch.view_as_real(spectrum) * 2), 8, 4, window=m.window, length=40)
    framed = A.stft(flat, 8, 4, None, m.window, False, True, True)
    framed = framed + A.stft.center(flat, 8, 4, None, m.window, False, "reflect", False, True, True)[..., :9]
    return back.view(2, 24, 40) + framed.abs().mean((1, 2)).view(2, 24, 1)


def sound(operator, free=1, out=24, **parts):
    return Case("sound", operator, conv(6, 24), conv(out, 4), free, parts)


def counts(size=40):
    return torch.arange(size).flip(0)


CASES = {
    "sliced": lambda: sound(sliced, 3, 48),
    "stepped": lambda: sound(stepped, w=weight(12)),
    "picked": lambda: sound(picked, index=counts()),
    "written": lambda: sound(written, index=counts(), w=weight(24)),
    "diagonals": lambda: sound(diagonals, steps=torch.linspace(-1, 1, 40)),
    "bags": lambda: sound(bags, words=torch.arange(8).view(2, 4), bag=nn.EmbeddingBag(9, 24), table=nn.Embedding(9,
    24)),
    "filled": lambda: sound(filled, 2, 48),
    "counted": lambda: sound(counted),
    "transformed": lambda: sound(transformed),
    "short time": lambda: sound(short_time, window=torch.hann_window(8)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", list(CASES))
def test_rule(name):
    case = CASES[name]
    check(region_of(case), case().free)
