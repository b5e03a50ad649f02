"""Rows of the layers that most networks are made of; an operator without a row; the algebra of terms."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dslify.light import build
from dslify.rules import RULES, Axis, Reason, indices, kept_size, product, rule
from dslify.rules.terms import concat, unify
from dslify.verify import PERMUTED, check_light, permutation_error
from dslify.widths import choose, rounded
from tests.oracles import Case, check, conv, region_of


def heads(m, x):  # (batch, time, 3 * 4 * 8)
    b, t, _ = x.shape
    q, k, v = x.view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 32)


def grouped_query(m, x):  # 4 query heads, 2 key heads of size 8
    b, t, _ = x.shape
    q, k, v = x.split([32, 16, 16], -1)
    q, k, v = (part.view(b, t, -1, 8).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def chunked(m, x):
    q, k, v = x.chunk(3, -1)
    return torch.matmul(torch.softmax(q @ k.transpose(-1, -2) / 8, -1), v)


def shuffled(m, x):
    b, c, t = x.shape
    return x.view(b, 4, c // 4, t).transpose(1, 2).reshape(b, c, t)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


def glu_and_cat(m, x):
    a = F.glu(x, 1)
    return torch.cat([a, a.neg(), x[:, 4:12]], 1)


def tokens(operator, out, after, free, **parts):
    return Case("tokens", operator, nn.Linear(16, out), nn.Linear(after, 5), free, parts)


def sound(operator, out, after, free, mid=None):
    return Case("sound", operator, conv(6, out), conv(after, 4), free, {"mid": mid} if mid is not None else {})


def image(operator, after, free, mid=None):
    return Case("image", operator, nn.Conv2d(3, 16, 3), after, free, {"mid": mid} if mid is not None else {})


def through(m, x):
    return m.mid(x)


CASES = {
    "linear": lambda: tokens(lambda m, x: F.gelu(x), 40, 40, 1),
    "matmul": lambda: tokens(lambda m, x: x @ m.w, 24, 12, 2, w=nn.Parameter(torch.randn(24, 12))),
    "layer norm": lambda: tokens(through, 24, 24, 1, mid=nn.LayerNorm(24)),
    "attention": lambda: tokens(heads, 96, 32, 2),
    "grouped query attention": lambda: tokens(grouped_query, 64, 32, 4),
    "attention by chunk and matmul": lambda: tokens(chunked, 96, 32, 2),
    "conv": lambda: sound(lambda m, x: F.elu(x), 32, 32, 1),
    "strided conv": lambda: Case(
        "sound", lambda m, x: F.pad(x, (3, 0)), nn.Conv1d(6, 32, 4, 2), nn.Conv1d(32, 4, 5, 3), 1
    ),
    "grouped conv": lambda: sound(through, 32, 48, 3, nn.Conv1d(32, 48, 3, 1, 1, groups=4)),
    "depthwise conv": lambda: sound(through, 32, 32, 1, conv(32, 32, groups=32)),
    "transposed conv": lambda: sound(through, 16, 24, 2, nn.ConvTranspose1d(16, 24, 4, 2, 1)),
    "grouped transposed conv": lambda: sound(through, 16, 24, 3, nn.ConvTranspose1d(16, 24, 4, 2, 1, groups=4)),
    "batch norm": lambda: image(through, nn.Conv2d(16, 4, 1), 1, nn.BatchNorm2d(16)),
    "group norm": lambda: image(through, nn.Conv2d(16, 4, 1), 2, nn.GroupNorm(4, 16)),
    "local response norm": lambda: image(lambda m, x: F.local_response_norm(x, 3), nn.Conv2d(16, 4, 1), 0),
    "spectral norm": lambda: sound(through, 16, 24, 2, torch.nn.utils.parametrizations.spectral_norm(conv(16, 24))),
    "weight norm": lambda: sound(through, 16, 24, 2, torch.nn.utils.parametrizations.weight_norm(conv(16, 24))),
    "old weight norm": lambda: sound(through, 16, 24, 2, old_weight_norm(conv(16, 24))),
    "prelu": lambda: sound(through, 16, 16, 1, nn.PReLU(16)),
    "channel shuffle": lambda: sound(shuffled, 32, 32, 2),
    "glu, slice, cat": lambda: sound(glu_and_cat, 32, 40, 3),
    "pooling": lambda: image(lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1), nn.Linear(16, 4), 1),
    "pool before flatten": lambda: image(lambda m, x: F.avg_pool2d(x, 5).flatten(1), nn.Linear(64, 4), 1),
    "encoder layer": lambda: tokens(through, 32, 32, 4, mid=nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name):
    case = CASES[name]
    check(region_of(case), case().free)


def test_an_operator_without_a_rule_is_frozen_and_named():
    region = region_of(lambda: sound(lambda m, x: torch.renorm(x, 2, 0, 5.0), 16, 16, 0))
    axes = region.axes
    assert list(axes.ledger) == ["aten.renorm.default"]
    assert not region.free
    weight = axes.parameters["before.weight"]
    reason = axes.kept_because(next(iter(weight[0].atoms())))
    assert "no rule for this operator (renorm" in str(reason)
    assert permutation_error(axes, region.inputs) < PERMUTED
    check_light(build(axes, choose(axes, 0.1)), region.full, region.inputs)


def test_inherited_channels_are_the_strongest():
    axes = region_of(lambda: CASES["conv"]()).axes  # one of its own, whose weights may change
    weights = {name: axes.region.get_parameter(name) for name in ("before.weight", "after.weight")}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(0.01)
        weights["before.weight"][5] = 10.0
        weights["after.weight"][:, 20] = 10.0
    light = build(axes, choose(axes, 2 / 32))
    assert any(torch.equal(row, weights["before.weight"][5]) for row in light.get_parameter("before.weight"))
    assert light.get_parameter("before.weight").shape[0] == 2
    assert (light.get_parameter("after.weight") == 10.0).all(2).any(1).all()


def test_a_rule_is_registered_once():
    with pytest.raises(ValueError, match="has a rule already"):
        rule("linear.default")(lambda b, node: ())
    assert all(name.count(".") == 2 for name in RULES)


WHY = Reason("test", "a test")


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=150, deadline=None)
def test_products_of_one_size_agree_after_unification(factors, data):
    """Two factorisations of one axis: after unify, both keep the same entries whatever each atom keeps."""
    other = data.draw(st.permutations(factors))
    a = [Axis(f, f, touched=True) for f in factors]
    b = [Axis(f, f, touched=True) for f in other]
    left, right = product(a), product(b)
    unify(left, right, WHY)
    atoms = list(dict.fromkeys(atom for axis in (left, right) for atom in axis.atoms() if not atom.frozen))
    chosen = {}
    for atom in atoms:
        size = data.draw(st.integers(1, atom.hint))
        chosen[atom] = torch.randperm(atom.hint)[:size].sort().values
    assert torch.equal(indices(left, chosen.get), indices(right, chosen.get))
    sizes = [kept_size(axis, lambda atom: len(chosen[atom]) if atom in chosen else atom.hint) for axis in (left, right)]
    assert sizes == [len(indices(left, chosen.get))] * 2
    if factors == list(other):
        assert len(atoms) == len(factors)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(1, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_concatenations_meet_products(pieces, minor, data):
    """[a + b] meets (g m) when m divides every piece: the pieces keep the same members of each group."""
    joined = concat([Axis(size * minor, size * minor, touched=True) for size in pieces])
    grouped = product([Axis(sum(pieces), sum(pieces)), Axis(minor, minor)])
    unify(joined, grouped, WHY)
    chosen = {}
    for atom in dict.fromkeys(atom for axis in (joined, grouped) for atom in axis.atoms() if not atom.frozen):
        chosen[atom] = torch.arange(data.draw(st.integers(1, atom.hint)))
    assert torch.equal(indices(joined, chosen.get), indices(grouped, chosen.get))


@given(st.integers(1, 2000), st.floats(0.001, 1.0))
def test_rounded_stays_within_the_axis(size, share):
    kept = rounded(size, share)
    assert 1 <= kept <= size
    assert abs(kept - size * share) <= 0.5 or kept == 1
    assert rounded(size, 1.0) == size
