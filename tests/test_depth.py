"""Residual branches: found from the graph alone, and dropped so that the rest is what a hand-written forward gives."""

import copy
from functools import cache
from itertools import pairwise

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.nn import functional as F

from dslify.axes import analyse
from dslify.capture import capture, scope_inputs
from dslify.cut import find_cut, partition
from dslify.depth import Branch, _surplus, residual_branches, shallower
from dslify.errors import OptionError
from dslify.graft import region_inputs, region_module
from dslify.light import build
from dslify.verify import check_light
from dslify.widths import choose, decide_projections
from tests.zoo import ZOO


def region_of(model, at, x, scope=None):
    """The region behind a cut, and the values it reads."""
    inner, args, kwargs = scope_inputs(model, scope, (x,), None)
    captured = capture(inner, args, kwargs)
    parts = partition(captured.module.graph, find_cut(captured.module.graph, at))
    return region_module(captured.module, parts), region_inputs(captured.module, parts, captured)


@cache
def of_zoo(name):
    network = ZOO[name]
    model, x = network.build(), network.batch(2)
    with torch.no_grad():
        for weight in model.parameters():  # branches that start at zero hide errors
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    at = network.at.removeprefix(f"{network.scope}.")
    return model, x, *region_of(model, at, x, network.scope)


PATHS = {
    "autoencoder": [],
    "unet": [],
    "shuffle": [],
    "resnet18": ["layer3.1", "layer4.1"],
    "vit": [f"blocks.{n}.{part}" for n in (2, 3) for part in ("attn", "mlp")],
    "codec": ["block2.2.layers", "block2.3.layers", "block3.2.layers"],
    "wav2vec2": [f"encoder.transformer.layers.{n}.{part}" for n in (1, 2) for part in ("attention", "feed_forward")],
}


class Norms(nn.Module):
    """A post-norm transformer layer without its branches."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, attention_mask=None, position_bias=None):
        return self.layer.final_layer_norm(self.layer.layer_norm(x)), None


def _last_block(model):
    model.blocks[3] = nn.Identity()


def _last_unit(model):
    model.encoder.block2[3] = nn.Identity()


def _last_stage(model):
    model.layer4[1] = nn.Identity()  # its input is behind a ReLU already


def _last_layer(model):
    layers = model.encoder.transformer.layers
    layers[2] = Norms(layers[2])


HALF = {"resnet18": _last_stage, "vit": _last_block, "codec": _last_unit, "wav2vec2": _last_layer}


@pytest.mark.parametrize("name", PATHS)
def test_branches_of_public_networks(name):
    _, _, region, _ = of_zoo(name)
    branches = residual_branches(region)
    assert [branch.path for branch in branches] == PATHS[name]
    for branch in branches:
        assert branch.macs > 0
        assert branch.sum not in branch.nodes
        assert all(user is branch.sum or user in branch.nodes for node in branch.nodes for user in node.users)
    if name in HALF:
        return
    assert shallower(region, 0.5) == (region, ())


@pytest.mark.parametrize("name", HALF)
def test_half_the_depth_is_the_network_with_those_blocks_left_out(name):
    model, x, region, inputs = of_zoo(name)
    shallow, dropped = shallower(region, 0.5)
    assert len(dropped) in (len(PATHS[name]) // 2, len(PATHS[name]) // 2 + 1)
    by_hand = copy.deepcopy(model)
    HALF[name](by_hand)
    with torch.no_grad():
        expected = (by_hand if name != "codec" else by_hand.encoder)(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = shallow(*inputs)[0]
        assert not torch.equal(found, region(*inputs)[0])
    assert torch.equal(found, expected)

    theirs = dict(region.named_parameters())
    mine = dict(shallow.named_parameters())
    assert set(mine) < set(theirs)
    assert all(parameter is theirs[name] for name, parameter in mine.items())
    shallow(*inputs)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in mine.values())
    assert all(theirs[name].grad is None for name in set(theirs) - set(mine))
    kept = {node.name for node in shallow.graph.nodes}
    assert all("val" in node.meta for node in shallow.graph.nodes if node.op not in ("output", "get_attr"))
    assert [n.name for n in shallow.graph.nodes if n.op == "placeholder"] == [
        n.name for n in region.graph.nodes if n.op == "placeholder"
    ]
    for branch in residual_branches(region):
        gone = branch.path in dropped
        assert all((node.name in kept) != gone for node in (*branch.nodes, branch.sum)), branch.path


@pytest.mark.parametrize("name", HALF)
def test_a_shallow_region_can_be_narrowed(name):
    _, _, region, inputs = of_zoo(name)
    shallow, _ = shallower(region, 0.5)
    axes = analyse(shallow)
    projected = decide_projections(axes, 0.25)
    light = build(axes, choose(axes, 0.25, projected), projected)
    check_light(light, region, inputs)


class Body(nn.Module):
    """front -> (cut) -> body -> back."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.front, self.back, self.body = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1), forward
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.add_module(name, part)

    def forward(self, x):
        return self.back(self.body(self, self.front(x)))


def conv(**options):
    return nn.Conv1d(8, 8, 3, padding=1, **options)


def add_into_branch(m, x):
    y = m.f(x)
    y += x
    return y


def add_into_skip(m, x):
    y = m.f(x)
    x += y
    return x


def written_slice(m, x):
    y = m.f(x)
    y[:, :2] = 0.5
    return x + m.g(y)


def shared_norm(m, x):
    y = m.norm(x.transpose(1, 2)).transpose(1, 2)
    return x + m.f(y) + m.g(y)


def chain(m, x):
    for layer in m.many:
        x = x + layer(x)
    return x


def spelled_gelu(m, x):
    y = m.f(x)
    return 0.5 * y * (1 + torch.tanh(0.8 * (y + 0.044715 * y.pow(3))))


def read_elsewhere(m, x):
    y = m.f(x)
    return (x + m.g(y)) * y.mean()


def writes_back(m, x):
    x = m.h(x)
    y = m.f(x)
    x[:, :2] = y[:, :2]
    return x + m.g(y)


def written_sum(m, x):
    y = x + m.f(x)
    y[:, :2] = 0.5
    return y * x


def sized(m, x):
    y = m.f(x).view(x.shape[0], 2, 4, x.shape[2])
    return x + m.g(y.flatten(1, 2))


def other_rows(m, x):
    return x + m.f(x).view(x.shape[0], 4, 2, -1).transpose(1, 2).reshape(x.shape)


def attention(m, x):
    tokens = x.transpose(1, 2)
    return x + m.attend(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2)


many = nn.ModuleList(conv() for _ in range(4))
gamma = nn.Parameter(torch.full((8, 1), 0.3))
plain = lambda m, x: x  # noqa: E731
CASES = {  # body, the same with every branch left out, number of branches, parts
    "sum": (lambda m, x: x + m.f(x), plain, 1, {"f": conv()}),
    "sum the other way round": (lambda m, x: m.f(x) + x, plain, 1, {"f": conv()}),
    "in place into the branch": (add_into_branch, plain, 1, {"f": conv()}),
    "in place into the skip": (add_into_skip, plain, 1, {"f": conv()}),
    "activation behind the sum": (lambda m, x: F.relu_(x + m.f(x)), lambda m, x: F.relu(x), 1, {"f": conv()}),
    "slice written inside": (written_slice, plain, 1, {"f": conv(), "g": conv()}),
    "layer scale": (lambda m, x: x + m.gamma * m.f(x), plain, 1, {"f": conv(), "gamma": gamma}),
    "layer scale, fused": (lambda m, x: torch.addcmul(x, m.gamma, m.f(x)), plain, 1, {"f": conv(), "gamma": gamma}),
    "scaled branch": (lambda m, x: torch.add(x, m.f(x), alpha=0.5), plain, 1, {"f": conv()}),
    "scaled skip": (lambda m, x: torch.add(m.f(x), x, alpha=0.5), None, 0, {"f": conv()}),
    "drop path": (lambda m, x: x + m.drop(m.f(x)), plain, 1, {"f": conv(), "drop": DropPath(0.5)}),
    "dropped out skip": (lambda m, x: m.drop(x) + m.f(x), plain, 1, {"f": conv(), "drop": nn.Dropout(0.5)}),
    "two in a row": (lambda m, x: (y := x + m.f(x)) + m.g(y), plain, 2, {"f": conv(), "g": conv()}),
    "two side by side": (shared_norm, plain, 1, {"f": conv(), "g": conv(), "norm": nn.LayerNorm(8)}),
    "one inside another": (
        lambda m, x: x + m.g((y := m.f(x)) + m.h(y)), plain, 1, {"f": conv(), "g": conv(), "h": conv()}),
    "around everything": (lambda m, x: x + m.f(chain(m, x)), lambda m, x: x + m.f(x), 4, {"f": conv(), "many": many}),
    "sizes read inside": (sized, plain, 1, {"f": conv(), "g": conv()}),
    "broadcast over time": (lambda m, x: x + m.f(x).mean(2, keepdim=True), plain, 1, {"f": conv()}),
    "reshaped inside": (other_rows, plain, 1, {"f": conv()}),
    "attention": (attention, plain, 1, {"attend": nn.MultiheadAttention(8, 2, batch_first=True)}),
    "concatenation": (lambda m, x: torch.cat([x, m.f(x)], 1)[:, 4:12], None, 0, {"f": conv()}),
    "projected shortcut": (lambda m, x: m.g(x) + m.f(x), None, 0, {"f": conv(), "g": conv()}),
    "sum without a layer": (spelled_gelu, None, 0, {"f": conv()}),
    "inside read elsewhere": (read_elsewhere, None, 0, {"f": conv(), "g": conv()}),
    "inside written into the skip": (writes_back, None, 0, {"f": conv(), "g": conv(), "h": conv()}),
    "sum written into": (written_sum, None, 0, {"f": conv()}),
    "gate": (lambda m, x: x * m.f(x).sigmoid(), None, 0, {"f": conv()}),
    "sum of another type": (lambda m, x: (x + m.f(x).double()).float(), None, 0, {"f": conv()}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_every_spelling(case):
    body, without, count, parts = CASES[case]
    torch.manual_seed(0)
    model = Body(body, **parts).eval()
    x = torch.randn(2, 3, 12)
    region, inputs = region_of(model, "front", x)
    branches = residual_branches(region)
    assert len(branches) == count
    shallow, dropped = shallower(region, 0.01)
    assert dropped == tuple(branch.path for branch in branches)
    model.body = without or body
    with torch.no_grad():
        assert torch.equal(shallow(*copy.deepcopy(inputs))[0], model(x))


@pytest.mark.parametrize(
    ("block", "shape", "path"),
    [
        (ConvNeXtBlock(12, ls_init_value=0.5), (2, 12, 8, 8), "body"),
        (InvertedResidual(12, 12, se_layer=timm.layers.SqueezeExcite, drop_path_rate=0.1), (2, 12, 8, 8), "body"),
    ],
)
def test_blocks_of_timm(block, shape, path):
    model = nn.Sequential()
    model.add_module("front", nn.Conv2d(12, 12, 1))
    model.add_module("body", block)
    model.add_module("back", nn.Conv2d(12, 5, 1))
    model.eval()
    x = torch.randn(shape)
    region, inputs = region_of(model, "front", x)
    (branch,) = residual_branches(region)
    assert branch.path == path
    shallow, _ = shallower(region, 0.01)
    model.body = nn.Identity()
    with torch.no_grad():
        assert torch.equal(shallow(*inputs)[0], model(x))


def test_an_encoders_memory_is_no_obstacle():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.front = nn.Linear(6, 8), nn.Linear(6, 8)
            self.layer, self.back = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            memory = self.memory(x)
            return self.back(self.layer(self.front(x), memory))

    model, x = Decoder().eval(), torch.randn(2, 5, 6)
    region, inputs = region_of(model, "front", x)
    assert len(inputs) > 1
    assert len(residual_branches(region)) == 3
    shallow, _ = shallower(region, 0.01)
    layer = model.layer
    with torch.no_grad():
        expected = model.back(layer.norm3(layer.norm2(layer.norm1(model.front(x)))))
        assert torch.equal(shallow(*inputs)[0], expected)


def test_a_view_behind_a_branch_that_goes_finds_the_layout_it_needs():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.f, self.back = nn.Conv1d(3, 8, 1), nn.Linear(8, 8), nn.Linear(96, 4)

        def forward(self, x):
            tokens = self.front(x).transpose(1, 2)
            return self.back((self.f(tokens) + tokens).view(x.shape[0], -1))

    model, x = Transposed().eval(), torch.randn(2, 3, 12)
    region, inputs = region_of(model, "front", x)
    shallow, dropped = shallower(region, 0.01)
    assert dropped == ("f",)
    with torch.no_grad():
        assert torch.equal(shallow(*inputs)[0], model.back(inputs[0].transpose(1, 2).reshape(2, -1)))


def test_a_size_of_the_input_is_no_part_of_the_branch():
    region, inputs = region_of(Body(CASES["sum"][0], f=conv()).eval(), "front", torch.randn(2, 3, 12))
    graph, aten = region.graph, torch.ops.aten
    x, total = (next(node for node in graph.nodes if node.name == name) for name in ("conv1d", "add"))
    with graph.inserting_after(x):
        size = graph.call_function(aten.sym_size.int, (x, 2))
        size.meta["val"] = 12
    for reader in (total, next(iter(total.users))):  # one in the branch, one behind it
        value = reader.args[reader is total]
        with graph.inserting_before(reader):
            part = graph.call_function(aten.narrow.default, (value, 2, 0, size))
            part.meta["val"] = value.meta["val"]
        reader.replace_input_with(value, part)
    region.recompile()
    shallow, dropped = shallower(region, 0.01)
    assert dropped == ("f",)
    assert shallow(*inputs)[0].shape == region(*inputs)[0].shape


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4, 0.5, 0.75, 0.9])
def test_the_share_is_one_of_macs_and_spread_over_the_depth(share):
    kinds = [("attention", 3), ("mlp", 4)]
    branches = [Branch(None, None, f"{kind}{n}", (), "", (kind,), macs) for n in range(12) for kind, macs in kinds]
    dropped = _surplus(branches, share)
    total = sum(branch.macs for branch in branches)
    kept = [branch for branch in branches if branch.sum not in dropped]
    assert abs(sum(branch.macs for branch in kept) - share * total) <= 2
    for kind, _ in kinds:
        stays = [n for n in range(12) if f"{kind}{n}" not in dropped]
        assert abs(len(stays) - 12 * share) <= 1
        ends = [-1, *stays, 12]
        assert max(after - before for before, after in pairwise(ends)) <= 1 / share + 2


def test_bounds_of_the_share():
    region, _ = region_of(Body(CASES["sum"][0], f=conv()).eval(), "front", torch.randn(2, 3, 12))
    assert shallower(region, 1) == (region, ())
    for share in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(OptionError, match=f"above 0 and at most 1; got {share}"):
            shallower(region, share)
