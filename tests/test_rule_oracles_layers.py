"""Oracles for the rows of norms, contractions, attention, convolutions and recurrent layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.oracles import Case, check, conv, region_of

A = torch.ops.aten


def weight(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size))


def normed(m, x):  # (2, 24, 12, 12)
    native = A.native_group_norm(x, m.w, m.b, 2, 24, 144, 4, 1e-5)
    legit = A._native_batch_norm_legit_no_training(x, m.w, m.b, m.bn.running_mean, m.bn.running_var, 0.1, 1e-5)
    batch = A.native_batch_norm(x, m.w, m.b, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-5)
    last = x.permute(0, 2, 3, 1)
    layer = A.native_layer_norm(last, [24], m.w, m.b, 1e-5)
    fused = A._fused_rms_norm(last, [24], m.w, 1e-5)
    lasts = layer[0] * layer[1] + fused[0] + F.rms_norm(last, (24,), m.w) + F.layer_norm(last, (24,), m.w, m.b)
    return m.bn(x) + native[0] * native[2].mean() + legit[0] + batch[0] + lasts.permute(0, 3, 1, 2) + m.instance(x)


def local_norms(m, x):  # (2, 24, 12, 12)
    return (
        F.normalize(x, dim=1)
        + A._weight_norm(m.v, m.g, 0)[:, :, None]
        + A._weight_norm_interface(m.v, m.g, 0)[0][..., None]
    )


def contracted(m, x):  # (2, 7, 24) rows, w: (24, 12)
    flat, w, v = x[0], m.w, m.v
    out = A.mm(flat, w) + A.addmm(m.b, flat, w) + A.addmv(flat @ w @ m.b, flat, v)[:, None] + A.mv(flat, v)[:, None]
    out = (
        out
        + A.addr(A.outer(flat.mean(1), m.b), flat.sum(1), m.b)
        + A.ger(flat.mean(1), m.b)
        + A.dot(v, v)
        + A.vdot(v, v)
    )
    out = out + A.inner(flat, v)[:, None] + A.tensordot(x, w, [2], [0])[0] + A.addbmm(out, x, w.expand(2, -1, -1))
    out = out + A.bmm(x, w.expand(2, -1, -1)) + A.baddbmm(m.b, x, w.expand(2, -1, -1)) + A.linalg_matmul(x, w)
    out = (
        out
        + torch.einsum("...c,cd->...d", x, w)
        + torch.einsum("btc,cd", x, w).mT
        + torch.einsum("bii->bi", x @ x.mT)[..., None]
    )
    out = out + A.linalg_vecdot(x, v)[..., None] + F.bilinear(x, x, m.cube, m.b) + (v @ x.mT)[..., None] + (v @ v)
    return out + torch.cdist(x, w.T) + A._cdist_forward(x, w.T.expand(2, -1, -1).contiguous(), 2.0, None)


def routed(m, x):  # two experts for the first six and the other rows
    from transformers.integrations import moe  # registers the operator

    assert moe
    rows = torch.ops.transformers.grouped_mm_fallback(x.flatten(0, 1), m.experts, m.ends)
    return rows.unflatten(0, x.shape[:2]) + torch.histc(x.detach(), 4).sum()


def crossed(m, x):  # vectors of space: 24 = (8 3)
    y = x.unflatten(-1, (8, 3))
    return torch.linalg.cross(y, m.w.expand(2, 7, -1, -1), dim=-1).flatten(2)


def attended(m, x):  # 24 = 3 heads of 8, a bias per head, causal as well
    y = x.view(2, 7, 3, 8).transpose(1, 2)
    one = F.scaled_dot_product_attention(y, y * 2, y, attn_mask=m.bias[:, None, None])
    return (one + F.scaled_dot_product_attention(y, y, y, is_causal=True)).transpose(1, 2).flatten(2)


def convolved(m, x):  # (2, 24, 12, 12)
    y = A.convolution(x, m.k, m.w, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    y = y + A.convolution(x, m.k, m.w, [1, 1], [1, 1], [1, 1], True, [0, 0], 1) + F.conv2d(x, m.k, padding="same")
    y = (
        y
        + F.conv_transpose2d(x, m.k, padding=1)
        + F.conv1d(x[0].flatten(1), m.k[:, :, 0], padding="same").view(24, 12, 12)
    )
    volume = F.conv3d(x[:, :, None], m.k[:, :, None], padding="same")[:, :, 0]
    return y + volume + F.conv_transpose3d(x[:, :, None], m.k[:, :, None], padding=(0, 1, 1))[:, :, 0]


def layers(m, x):  # (2, 24, 40)
    y, *_ = m.rnn(x.transpose(1, 2))
    return y.transpose(1, 2)


def from_a_state(m, x):
    first = m.w.expand(1, 2, -1)
    _, state = m.rnn(x.transpose(1, 2), (first, first * 2) if isinstance(m.rnn, nn.LSTM) else first)
    return state[0][-1, :, :, None] * state[1][-1, :, :, None] if isinstance(state, tuple) else state[-1, :, :, None]


def cells(m, x):
    state = x.new_zeros(2, 20)
    memory, gated, hyperbolic, linear = (state, state), state, state, state
    for step in x.unbind(2)[:2]:
        memory, gated = m.lstm(step, memory), m.gru(step, gated)
        hyperbolic, linear = m.tanh(step, hyperbolic), m.relu(step, linear)
    return (memory[0] * memory[1] + gated + hyperbolic + linear)[:, :, None]


def tokens(operator, free=1, out=24, **parts):
    return Case("tokens", operator, nn.Linear(16, 24), nn.Linear(out, 3), free, parts)


def image(operator, free=1, **parts):
    return Case("image", operator, conv(3, 24, 2), conv(24, 4, 2), free, parts)


def rnn(kind, operator=layers, out=20, free=2, **options):
    parts = {"rnn": kind(24, 20, batch_first=True, **options), "w": weight(20)}
    return Case("sound", operator, conv(6, 24), conv(out, 4), free, parts)


CASES = {
    "norms": lambda: image(normed, 2, bn=nn.BatchNorm2d(24), w=weight(24), b=weight(24),
                           instance=nn.InstanceNorm2d(24, affine=True)),
    "local norms": lambda: image(local_norms, v=weight(24, 12), g=weight(24, 1)),
    "contracted": lambda: tokens(contracted, 2, 12, w=weight(24, 12), v=weight(24), b=weight(12), cube=weight(12, 24,
    24)),
    "routed": lambda: tokens(routed, 2, 12, experts=weight(2, 24, 12), ends=torch.tensor([6, 14], dtype=torch.int32)),
    "crossed": lambda: tokens(crossed, 1, 24, w=weight(8, 3)),
    "attended": lambda: tokens(attended, 2, bias=weight(3)),
    "convolved": lambda: image(convolved, w=weight(24), k=weight(24, 24, 3, 3)),
    "lstm": lambda: rnn(nn.LSTM),
    "lstm of 2 layers": lambda: rnn(nn.LSTM, num_layers=2),
    "lstm both ways": lambda: rnn(nn.LSTM, out=40, num_layers=2, bidirectional=True, bias=False),
    "lstm with projection": lambda: rnn(nn.LSTM, out=24, free=3, num_layers=2, bidirectional=True, proj_size=12),
    "lstm from a state": lambda: rnn(nn.LSTM, from_a_state),
    "gru both ways": lambda: rnn(nn.GRU, out=40, num_layers=2, bidirectional=True),
    "gru from a state": lambda: rnn(nn.GRU, from_a_state),
    "rnn": lambda: rnn(nn.RNN, num_layers=2),
    "relu rnn": lambda: rnn(nn.RNN, nonlinearity="relu", bias=False),
    "cells": lambda: Case("sound", cells, conv(6, 24), conv(20, 4), 2, {
        "lstm": nn.LSTMCell(24, 20), "gru": nn.GRUCell(24, 20), "tanh": nn.RNNCell(24, 20, bias=False),
        "relu": nn.RNNCell(24, 20, nonlinearity="relu")}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", list(CASES))
def test_rule(name):
    case = CASES[name]
    check(region_of(case), case().free)
