"""compact(): the same answers without the channels that the mask has set to zero, and fewer MACs."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import dslify
from dslify.compact import compacted, smaller_switch, zeros_of
from dslify.errors import OptionError
from dslify.slicing import Kept
from dslify.switch import Switch
from tests.zoo import ZOO, Network

EXACT = 1e-6  # of an output's largest value
CUT_MACS = {  # what becomes less; a norm over the channels or a sum with other values has to see the zeros
    "autoencoder": "base light full", "unet": "base light full", "codec": "base light full",
    "resnet18": "base light full", "vit": "base light",
}  # fmt: skip


def half_zero(net, seed=0):
    """Every mask with factors of both signs, of which one in two is zero; switches with a spread of their own."""
    torch.manual_seed(seed)
    for layer in dslify.dsl_layers(net):
        axis = layer.channel_axis
        size = layer.mask.weight.shape[axis]
        with torch.no_grad():
            layer.mask.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand_like(layer.mask.weight) < 0.3, -1.0, 1.0))
            layer.mask.weight.index_fill_(axis, torch.randperm(size)[: size // 2], 1e-3)  # below the soft threshold
            layer.switch.offset.normal_()
            layer.switch.spread.uniform_(0.5, 2.0)
    return net


def answers(net, x, way):
    """(output tensors, scores, who went light) of one route."""
    with torch.no_grad(), dslify.route(net, way):
        found = [leaf for leaf in torch.utils._pytree.tree_leaves(net(x)) if isinstance(leaf, torch.Tensor)]
    paths = [layer.paths for layer in dslify.dsl_layers(net) if layer.paths is not None]
    return found, [each.score for each in paths], [each.light_taken for each in paths]


def assert_same(net, small, x):
    """Both routes, and a batch of which half goes light, answer alike; so do the decisions."""
    for way in ("full", "light"):
        for mine, theirs in zip(answers(small, x, way)[0], answers(net, x, way)[0], strict=True):
            assert (mine - theirs).abs().max() <= EXACT * theirs.abs().max(), way
    for layer, twin in zip(dslify.dsl_layers(net), dslify.dsl_layers(small), strict=True):
        answers(net, x, "mixed")
        scores = layer.paths.score.sort().values
        middle = scores[(len(scores) - 1) // 2 :][:2].mean()
        layer.threshold.copy_(middle)
        twin.threshold.copy_(middle)
    mine, theirs = answers(small, x, "mixed"), answers(net, x, "mixed")
    assert any(0 < taken.sum() < len(taken) for taken in theirs[2]), "the batch is split"
    for found, wanted in zip(mine[0], theirs[0], strict=True):
        assert (found - wanted).abs().max() <= EXACT * wanted.abs().max(), "mixed"
    for found, wanted in zip(mine[1], theirs[1], strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    for found, wanted in zip(mine[2], theirs[2], strict=True):
        assert torch.equal(found, wanted)


def rows(net):
    return {row.name: row for row in dslify.cost(net)}


@pytest.mark.parametrize("name", CUT_MACS)
def test_the_same_answers_for_fewer_macs(name, tmp_path):
    network: Network = ZOO[name]
    net = half_zero(dslify.insert(network.build(), network.at, 0.25, (network.batch(1),), scope=network.scope))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    before = rows(net)
    small, (report,) = compacted(net)
    assert_same(net, small, network.batch(6))
    (layer,), (twin,) = dslify.dsl_layers(net), dslify.dsl_layers(small)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items() if "threshold" not in key)

    channels = layer.mask.weight.numel()
    assert (report.before, report.after) == (channels, channels // 2)
    assert twin.mask.weight.numel() == twin.switch.hidden.in_features // Switch.MOMENTS == channels // 2
    assert (twin.mask.effective() != 0).all()
    after = rows(small)
    for part, (was, now) in report.macs.items():
        assert (was, now) == (before[part].macs, after[part].macs)
        assert (now < was) == (part in f"switch {CUT_MACS[name]}"), part
        assert after[part].params <= before[part].params
    assert twin.plan.cut_shape[layer.channel_axis] == str(channels // 2)
    for part in ("base", "light", "full"):
        for what in ("macs", "params"):
            saved = getattr(before[part], what) - getattr(after[part], what)
            assert getattr(layer.plan, what)[part] - getattr(twin.plan, what)[part] == saved
    state = dict(twin.light.named_parameters())
    for tensor in twin.plan.tensors:
        if tensor.name in state:
            assert tensor.after == tuple(state[tensor.name].shape)

    again = dslify.load(dslify.save(small, tmp_path / "small.dsl"), *([network.build()] if network.scope else []))
    x = network.batch(2)
    for mine, theirs in zip(answers(again, x, "full")[0], answers(small, x, "full")[0], strict=True):
        assert torch.equal(mine, theirs)


class Tails(nn.Module):
    """Behind one cut of eight channels, one output for each way of reading them; the last six have to see zeros."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(2, 8, 3, 1, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.conv, self.up = nn.Conv1d(8, 3, 3, 1, 1), nn.ConvTranspose1d(8, 3, 4, 2)
        self.flat, self.last, self.recurrent = nn.Linear(32, 3), nn.Linear(8, 3), nn.LSTM(8, 5, bidirectional=True)
        self.scale, self.matrix = nn.Parameter(torch.randn(8, 1)), nn.Parameter(torch.randn(8, 3))
        self.same = nn.Conv1d(8, 8, 3, 1, 1)
        self.depthwise, self.norm = nn.Conv1d(8, 8, 3, groups=8), nn.BatchNorm1d(8)
        self.gru = nn.GRU(8, 4, batch_first=True)

    def forward(self, x):
        x = self.front(x)
        half = functional.max_pool1d(functional.elu(x), 2)
        tokens = x.transpose(1, 2)
        return {
            "convolution": self.conv(functional.pad(functional.leaky_relu(x - 0.0 * x), (1, 0))),
            "transposed": self.up(functional.gelu(-x) * self.scale),
            "flattened": self.flat(functional.adaptive_avg_pool1d(half, 4).flatten(1)),
            "viewed": self.flat(functional.adaptive_avg_pool1d(x, 4).reshape(-1, 32)),
            "tokens": self.last(functional.dropout(tokens, 0.1, False).tanh()),
            "product": tokens.square() @ self.matrix,
            "lstm": self.recurrent(x.permute(2, 0, 1))[0].mean(0),
            "gru": self.gru(tokens.clamp(-1, 2))[0],
            "sum": self.conv(torch.cat([half.relu() + half.tanh(), half.flip(2)], 2)),
            "pooled": self.last((x * x).mean(2) / 3),
            "spread": self.last(x.unsqueeze(1).expand(-1, 2, -1, -1).select(3, 1)),
            "gated": self.conv(x * x[:, :, :1].sigmoid()),
            "itself": half,
            "depthwise": self.depthwise(x),
            "normed": self.norm(x),
            "halves": x.chunk(2, 1)[1].sum(1),
            "softmax": x.softmax(1),
            "residual": x + self.same(x),
        }


@pytest.fixture(scope="module")
def tails():
    torch.manual_seed(0)
    x = torch.randn(6, 2, 12, generator=torch.Generator().manual_seed(1))
    model = Tails().eval()
    for norm in (model.front[1], model.norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
    return half_zero(dslify.insert(model, "front", example_inputs=(x[:1],), light="exit")), x


def test_every_way_of_reading_the_channels(tails):
    net, x = tails
    small, (report,) = compacted(net)
    with torch.no_grad(), dslify.route(net, "full"), dslify.route(small, "full"):
        found, wanted = small(x), net(x)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= EXACT * value.abs().max(), name
    assert report.base, "the convolution and its batch norm make half of the channels"
    assert report.blocked["light"] == ()
    reasons = {blocked.partition("(")[2].partition(")")[0]: blocked for blocked in report.blocked["full"]}
    assert set(reasons) == {"conv1d", "batch_norm", "chunk", "softmax", "sigmoid", "add"}
    assert "it has groups" in reasons["conv1d"]
    assert len(report.blocked["full"]) == 6, report.blocked["full"]
    full = dict(dslify.dsl_layers(small)[0].full.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in full.items()}
    assert shapes["up.weight"] == (4, 3, 4)
    assert shapes["matrix"] == (4, 3)
    assert shapes["flat.weight"] == (3, 16)
    assert {shapes[name] for name in shapes if name.startswith("recurrent.weight_ih")} == {(20, 4)}
    assert shapes["depthwise.weight"] == (8, 1, 3)


class Fronts(nn.Module):
    """What makes the cut, in several ways, and a convolution behind it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv1d(2, 8, 3, 1, 1)
        self.make = {
            "depthwise": lambda: nn.Sequential(nn.Conv1d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm1d(8), nn.Hardtanh()),
            "transposed": lambda: nn.Sequential(nn.ConvTranspose1d(8, 6, 2, 2), nn.Sigmoid(), nn.MaxPool1d(2)),
            "residual": lambda: nn.Conv1d(8, 8, 3, 1, 1),
            "linear": lambda: nn.Linear(8, 10),
            "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 6, 3)),
            "grouped": lambda: nn.Conv1d(8, 6, 3, groups=2),
            "read twice": lambda: nn.Conv1d(8, 8, 3, 1, 1),
        }[kind]()
        self.cut = nn.Identity()
        self.head = nn.LazyConv1d(3, 3)

    def forward(self, x):
        stem = self.stem(x)
        made = self.make(stem.transpose(1, 2)).transpose(1, 2) if self.kind == "linear" else self.make(stem)
        if self.kind == "residual":
            made = (stem + made * 0.5).relu()
        cut = self.cut(made)
        answer = self.head(cut * 1.5)
        return answer + made.mean(1, keepdim=True)[..., 2:] if self.kind == "read twice" else answer


@pytest.mark.parametrize(
    "kind", ["depthwise", "transposed", "residual", "linear", "weight_norm", "grouped", "read twice"]
)
def test_what_makes_the_channels(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 16)
    model = Fronts(kind).eval()
    with torch.no_grad():
        model(x)  # the head learns its size
    at = "make" if kind != "residual" else "relu"
    at = "transpose_1" if kind == "linear" else at
    net = half_zero(dslify.insert(model, at, 0.5, (x[:1],), to="head" if kind == "read twice" else None))
    small, (report,) = compacted(net)
    assert_same(net, small, x)
    assert report.base == (kind not in ("grouped", "read twice"))
    assert (report.macs["base"][1] < report.macs["base"][0]) == report.base
    assert report.macs["full"][1] < report.macs["full"][0]


def test_layers_in_a_cascade_and_a_further_cut(tmp_path):
    network = ZOO["autoencoder"]
    x = network.batch(6)
    net = dslify.insert(network.build(), "encoder.block2", 0.25, (x[:1],))
    net = half_zero(dslify.insert(net, "decoder.block1", 0.5, (x[:1],)))
    small, reports = compacted(net)
    assert [(each.layer, each.before, each.after) for each in reports] == [(1, 32, 16), (2, 48, 24)]
    assert_same(net, small, x)
    outer, inner = dslify.dsl_layers(small)
    costs = rows(small)
    assert inner.plan.macs["full"] == costs["full 2"].macs
    assert outer.plan.macs["full"] == costs["full"].macs + costs["full 2"].macs
    assert outer.plan.macs["base"] == costs["base"].macs
    again = dslify.load(dslify.save(small, tmp_path / "small.dsl"))
    third = dslify.insert(again, "encoder.block3", 0.5, (x[:1],))
    with torch.no_grad(), dslify.route(third, "full"), dslify.route(small, "full"):
        assert torch.allclose(third(x), small(x), atol=1e-6)
    assert len(dslify.dsl_layers(third)) == 3


@pytest.mark.parametrize("light", ["head", "identity"])
def test_other_light_paths(light):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3, 1, 1), nn.Conv1d(8, 8, 3, 1, 1), nn.Conv1d(8, 4, 1)).eval()
    x = torch.randn(6, 2, 20)
    net = half_zero(dslify.insert(model, "0", example_inputs=(x[:1],), light=light, to="1"))
    for name, weight in dslify.dsl_layers(net)[0].light.named_parameters():
        nn.init.normal_(weight)
        assert name.startswith("head")
    assert_same(net, dslify.compact(net), x)


def test_the_switch_of_the_kept_channels_scores_alike():
    torch.manual_seed(0)
    switch, kept = Switch(8), Kept(1, (0, 3, 4), 8)
    switch.offset.normal_()
    switch.spread.uniform_(1e-3, 1.0)
    x = torch.randn(5, 30, 8)
    x[:, :, [1, 2, 5, 6, 7]] = 0
    small = smaller_switch(switch, kept)
    assert torch.allclose(small(x[:, :, [0, 3, 4]]), switch(x), rtol=1e-5)
    assert switch.hidden.in_features == 8 * Switch.MOMENTS, "the given one is untouched"
    assert not torch.allclose(small.hidden.bias, switch.hidden.bias)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)).eval()
    return {
        mask: dslify.insert(model, "1", 0.5, (torch.randn(1, 2, 20),), mask=mask)
        for mask in ("channel", "element", "activation")
    }


def test_what_cannot_be_removed_is_said(plain):
    with pytest.raises(OptionError, match="no channel's weight in the mask is zero; fine-tune with a larger --beta"):
        dslify.compact(plain["channel"])
    with pytest.raises(OptionError, match="thresholds on the activation, and those set no channel to zero for good"):
        dslify.compact(plain["activation"])
    with pytest.raises(OptionError, match="holds no Dynamic Switch Layer"):
        dslify.compact(nn.Linear(2, 2))


def test_a_channel_goes_only_if_all_of_its_elements_are_zero(plain):
    net = dslify.remove(plain["element"])
    x = torch.randn(3, 2, 20)
    net = dslify.insert(net, "1", 0.5, (x[:1],), mask="element")
    (layer,) = dslify.dsl_layers(net)
    with torch.no_grad():
        layer.mask.weight[:, 0, 1:] = 0
        layer.mask.weight[:, [2, 5]] = 0
    assert zeros_of(layer).keep == (0, 1, 3, 4, 6, 7)
    assert_same(net, dslify.compact(net), x)
    with torch.no_grad():
        layer.mask.weight.zero_()
    small = dslify.compact(net)
    assert dslify.dsl_layers(small)[0].mask.weight.shape[1] == 1, "one channel stays"
    found, wanted = (answers(each, x, "full")[0][0] for each in (small, net))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_command(plain, tmp_path, capsys, monkeypatch):
    from dslify.cli import app

    monkeypatch.chdir(tmp_path)
    dslify.save(plain["channel"], "net.dsl")
    half_zero(net := dslify.load("net.dsl"))
    dslify.save(net, "half.dsl")

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            app(list(words), prog_name="dslify")
        return ended.value.code, capsys.readouterr()

    code, said = run("compact", "half.dsl")
    assert code == 0
    assert "layer 1: 4 of 8 channels are left; the base makes only these" in said.out
    assert "next: dslify export half-compact.dsl" in said.out
    assert dslify.dsl_layers(dslify.load("half-compact.dsl"))[0].mask.weight.numel() == 4
    code, said = run("compact", "half.dsl", "-o", "other.dsl", "--json")
    document = json.loads(said.out)
    assert (code, document["file"], document["layers"][0]["after"]) == (0, "other.dsl", 4)
    code, said = run("compact", "half.dsl", "-o", "other.dsl")
    assert (code, "--force to overwrite" in said.err) == (2, True)
    code, said = run("compact", "net.dsl", "-o", "none.dsl")
    assert (code, "Nothing can be removed" in said.err) == (2, True)
    assert not (tmp_path / "none.dsl").exists()
