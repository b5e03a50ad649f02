"""Every row of the table against the operator itself: permute what the rule says is one axis, run, compare.

Each case is a small network whose operator in question stands between parameters, so that its axes are free. The oracle
is the permutation test (the equation holds), the widths test (the rewritten arguments hold), and the number of free
axes (the rule does not hide behind freezing everything).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dslify.axes import analyse, choose, decide_projections, rounded
from dslify.capture import capture
from dslify.cut import find_cut, partition
from dslify.graft import region_inputs, region_module
from dslify.light import build
from dslify.rules import RULES, Axis, Reason, indices, kept_size, product
from dslify.rules.table import rule
from dslify.rules.terms import concat, unify
from dslify.verify import PERMUTED, check_light, permutation_error


class Between(nn.Module):
    """front -> (cut) -> before -> operator -> after, with `before` and `after` making the operator's axes free."""

    def __init__(self, operator, before, after, **parts):
        super().__init__()
        self.front, self.before, self.after = nn.Identity(), before, after
        self.scale = nn.Parameter(torch.ones(()))
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.add_module(name, part)
        self.operator = operator

    def forward(self, x):
        return self.after(self.operator(self, self.before(x * self.scale)))


def conv(i, o, **kw):
    return nn.Conv1d(i, o, 3, padding=1, **kw)


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


def glu_and_cat(m, x):
    a = F.glu(x, 1)
    return torch.cat([a, a.neg(), x[:, 4:12]], 1)


sound, tokens, image = (2, 6, 40), (2, 7, 16), (2, 3, 12, 12)
CASES = {
    "linear": (tokens, lambda m, x: F.gelu(x), nn.Linear(16, 40), nn.Linear(40, 5), 1),
    "addmm": ((4, 16), lambda m, x: torch.addmm(m.b, x, m.w), nn.Linear(16, 24), nn.Linear(12, 3), 2),
    "matmul": (tokens, lambda m, x: x @ m.w, nn.Linear(16, 24), nn.Linear(12, 3), 2),
    "einsum": (tokens, lambda m, x: torch.einsum("btc,cd->btd", x, m.w), nn.Linear(16, 24), nn.Linear(12, 3), 2),
    "attention": (tokens, heads, nn.Linear(16, 96), nn.Linear(32, 5), 2),
    "grouped query attention": (tokens, grouped_query, nn.Linear(16, 64), nn.Linear(32, 5), 4),
    "attention by chunk and matmul": (tokens, chunked, nn.Linear(16, 96), nn.Linear(32, 5), 2),
    "conv": (sound, lambda m, x: F.elu(x), conv(6, 32), conv(32, 4), 1),
    "strided conv": (sound, lambda m, x: F.pad(x, (3, 0)), nn.Conv1d(6, 32, 4, 2), nn.Conv1d(32, 4, 5, 3), 1),
    "grouped conv": (sound, lambda m, x: m.mid(x), conv(6, 32), conv(48, 4), 3, nn.Conv1d(32, 48, 3, 1, 1, groups=4)),
    "depthwise conv": (sound, lambda m, x: m.mid(x), conv(6, 32), conv(32, 4), 1, conv(32, 32, groups=32)),
    "transposed conv": (sound, lambda m, x: m.mid(x), conv(6, 16), conv(24, 4), 2, nn.ConvTranspose1d(16, 24, 4, 2, 1)),
    "grouped transposed conv": (
        sound, lambda m, x: m.mid(x), conv(6, 16), conv(24, 4), 3, nn.ConvTranspose1d(16, 24, 4, 2, 1, groups=4)),
    "batch norm": (image, lambda m, x: m.mid(x), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), 1, nn.BatchNorm2d(16)),
    "group norm": (image, lambda m, x: m.mid(x), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), 2, nn.GroupNorm(4, 16)),
    "layer norm": (tokens, lambda m, x: m.mid(x), nn.Linear(16, 24), nn.Linear(24, 3), 1, nn.LayerNorm(24)),
    "channel shuffle": (sound, shuffled, conv(6, 32), conv(32, 4), 2),
    "glu, slice, cat": (sound, glu_and_cat, conv(6, 32), conv(40, 4), 3),
    "pooling": (image, lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1),
                nn.Conv2d(3, 16, 3), nn.Linear(16, 4), 1),
    "pool before flatten": (image, lambda m, x: F.avg_pool2d(x, 5).flatten(1),
                            nn.Conv2d(3, 16, 3), nn.Linear(64, 4), 1),
    "mean and expand": (sound, lambda m, x: x * x.mean(1, keepdim=True) + m.w[None, :, None].expand(2, -1, 40),
                        conv(6, 24), conv(24, 4), 1),
    "stack and unbind": (sound, lambda m, x: torch.stack([x, x.square()], 0).unbind(0)[1], conv(6, 16), conv(16, 4), 1),
    "upsampling": (image, lambda m, x: F.interpolate(x, scale_factor=2.0), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), 1),
    "prelu": (sound, lambda m, x: m.mid(x), conv(6, 16), conv(16, 4), 1, nn.PReLU(16)),
    "weight norm": (sound, lambda m, x: m.mid(x), conv(6, 16), conv(24, 4), 2,
                    torch.nn.utils.parametrizations.weight_norm(conv(16, 24))),
    "constants": (sound, lambda m, x: torch.cat([x, x.new_zeros(x.shape)], 1) + m.w.repeat(2)[None, :, None],
                  conv(6, 24), conv(48, 4), 1),
    "roll fixes its axis": (sound, lambda m, x: torch.roll(x, 1, 2), conv(6, 16), conv(16, 4), 1),
    "where and clamp": (sound, lambda m, x: torch.where(x > 0, x.clamp(max=2), m.w[:, None]),
                        conv(6, 24), conv(24, 4), 1),
    "unflatten": (sound, lambda m, x: x.unflatten(1, (4, 6)).flatten(1, 2), conv(6, 24), conv(24, 4), 2),
    "permute and squeeze": (sound, lambda m, x: x.permute(0, 2, 1).unsqueeze(1).squeeze(1).movedim(1, 2),
                            conv(6, 16), conv(16, 4), 1),
}  # fmt: skip


def region_of(case):
    shape, operator, before, after, _, *parts = case
    torch.manual_seed(0)
    matrix = before.weight.shape[0] == 24 and isinstance(after, nn.Linear)
    extra = {"w": nn.Parameter(torch.randn(24, 12) if matrix else torch.randn(24)), "b": nn.Parameter(torch.randn(12))}
    if parts:
        extra["mid"] = parts[0]
    model = Between(operator, before, after, **extra).eval()
    captured = capture(model, (torch.randn(shape),))
    first = next(node for node in captured.module.graph.nodes if node.op == "call_function" and "mul" in node.name)
    parts = partition(captured.module.graph, find_cut(captured.module.graph, first.name))
    region = region_module(captured.module, parts)
    return analyse(region), region_inputs(captured.module, parts, captured), region


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name):
    axes, inputs, region = region_of(CASES[name])
    assert not axes.ledger
    free = [atom for atom in axes.atoms() if axes.shrinks(atom)]
    assert len(free) == CASES[name][4], axes.parameters
    assert permutation_error(axes, inputs) < PERMUTED
    expected = region(*inputs)
    for width in (0.5, 0.2):
        projected = decide_projections(axes, width)
        for chosen in {frozenset(), projected}:
            kept = choose(axes, width, chosen)
            light = build(axes, kept, chosen)
            check_light(light, region, inputs)
            assert sum(p.numel() for p in light.parameters()) == axes.params(kept, chosen)
            assert axes.macs(kept) < axes.macs()
    whole = build(axes, {})
    assert torch.equal(whole(*inputs)[0], expected[0])


def test_an_operator_without_a_rule_is_frozen_and_named():
    case = (sound, lambda m, x: torch.fft.rfft(x, dim=2).abs(), conv(6, 16), conv(16, 4), 0)
    axes, inputs, region = region_of(case)
    assert list(axes.ledger) == ["aten.fft_rfft.default"]
    assert not [atom for atom in axes.atoms() if axes.shrinks(atom)]
    weight = axes.parameters["before.weight"]
    reason = axes.kept_because(next(iter(weight[0].atoms())))
    assert "no rule for this operator (fft_rfft" in str(reason)
    assert permutation_error(axes, inputs) < PERMUTED
    check_light(build(axes, choose(axes, 0.1)), region, inputs)


def test_inherited_channels_are_the_strongest():
    axes, _, _ = region_of(CASES["conv"])
    weights = {name: axes.region.get_parameter(name) for name in ("before.weight", "after.weight")}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(0.01)
        weights["before.weight"][5] = 10.0
        weights["after.weight"][:, 20] = 10.0
    light = build(axes, choose(axes, 2 / 32))
    assert any(torch.equal(row, weights["before.weight"][5]) for row in light.get_parameter("before.weight"))
    assert light.get_parameter("before.weight").shape[0] == 4
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
    assert 0 <= kept - size * share + 1e-6 < (4 if size >= 32 else 1) + 1e-5
    assert size < 32 or kept % 4 == 0 or kept == size
    assert rounded(size, 1.0) == size
