"""Invariants of the surgery, over every network of the zoo."""

import copy
import warnings

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import dslify
from benchmarks.zoo.check import check_network
from benchmarks.zoo.registry import selected
from dslify.errors import CutError, OptionError
from tests.conftest import Inserted
from tests.zoo import ZOO

BATCHED = 2e-5  # of the largest output: other batch sizes take other kernels
TRAINED_STEPS = 30


def tensors(outputs):
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def difference(mine, theirs):
    """Largest difference over the largest value, over all outputs."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)).item()
        for a, b in zip(tensors(mine), tensors(theirs), strict=True)
    )


def run(net, x, mode=None):
    with torch.no_grad():
        if mode is None:
            return net(x)
        with dslify.route(net, mode):
            return net(x)


def test_full_route_is_the_original_bit_for_bit(inserted):
    x = inserted.network.batch(3)
    found, expected = run(inserted.net(0.1), x, "full"), run(inserted.original, x)
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


def test_untrained_it_takes_the_full_path(inserted):
    net = inserted.net(0.1)
    assert not net.training
    x = inserted.network.batch(3)
    assert difference(run(net, x), run(inserted.original, x)) == 0
    assert not dslify.dsl_layers(net)[0].paths.light_taken.any()


def test_at_width_one_light_is_full_exactly(inserted):
    x = inserted.network.batch(3)
    net = inserted.net(1.0)
    light, full = run(net, x, "light"), run(net, x, "full")
    assert all(torch.equal(a, b) for a, b in zip(tensors(light), tensors(full), strict=True))


def test_light_is_much_smaller_finite_and_trains(inserted):
    net = inserted.net(0.1)
    rows = {row.name: row for row in dslify.cost(net)}
    assert rows["light"].macs < 0.5 * rows["full"].macs
    assert rows["light"].params < 0.2 * rows["full"].params
    light = run(net, inserted.network.batch(2), "light")
    assert all(value.isfinite().all() for value in tensors(light))

    layer = copy.deepcopy(dslify.dsl_layers(net)[0]).train()
    calls = []
    handle = dslify.dsl_layers(net)[0].register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    run(net, inserted.network.batch(4))
    handle.remove()
    optimizer = torch.optim.Adam(layer.light.parameters(), 3e-3)
    losses = []
    for _ in range(TRAINED_STEPS):
        layer(*calls[0])
        loss = sum(
            (light - full.detach()).square().mean()
            for light, full in zip(layer.paths.light, layer.paths.full, strict=True)
            if isinstance(full, torch.Tensor) and full.is_floating_point()
        )
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in layer.light.parameters() if parameter.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_routed_batch_equals_its_samples(inserted):
    net, x = inserted.net(0.1), inserted.network.batch(4)
    layer = dslify.dsl_layers(net)[0]
    run(net, x)
    scores = layer.paths.score
    layer.threshold.copy_(scores.sort().values[1:3].mean())
    try:
        together = run(net, x)
        taken = layer.paths.light_taken
        assert taken.tolist() == (scores < layer.threshold).tolist()
        assert taken.sum() == 2
        for at in range(4):
            alone = run(net, x[at : at + 1])
            assert layer.paths.light_taken.item() == taken[at].item()
            picked = [value[at : at + 1] for value in tensors(together)]
            assert difference(alone, picked) < BATCHED
        layer.threshold.fill_(float("inf"))
        assert difference(run(net, x), run(net, x, "light")) == 0
    finally:
        layer.threshold.zero_()


def test_only_the_taken_path_computes(inserted):
    net, x = inserted.net(0.1), inserted.network.batch(2)
    layer = dslify.dsl_layers(net)[0]
    ran = []
    handles = [
        getattr(layer, name).register_forward_pre_hook(lambda m, i, name=name: ran.append(name))
        for name in ("light", "full")
    ]
    try:
        run(net, x)
        assert ran == ["full"]
        layer.threshold.fill_(float("inf"))
        run(net, x)
        assert ran == ["full", "light"]
    finally:
        layer.threshold.zero_()
        for handle in handles:
            handle.remove()


def test_the_given_network_is_untouched():
    network = ZOO["autoencoder"]
    model = network.build()
    model.encoder.block1.train()  # a mixture of flags must come back as it was
    flags = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = dslify.insert(model, network.at, 0.1, (network.batch(1),))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    net.train().requires_grad_(False)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_remove_gives_the_network_back(inserted):
    net, x = inserted.net(0.1), inserted.network.batch(2)
    plain = dslify.remove(net)
    assert not dslify.dsl_layers(plain)
    assert dslify.dsl_layers(net)
    assert difference(run(plain, x), run(inserted.original, x)) == 0
    used = {name for name, _ in plain.named_parameters()}
    assert used <= {name for name, _ in inserted.original.named_parameters(remove_duplicate=False)}


def test_costs_agree_with_the_plan(inserted):
    net = inserted.net(0.1)
    plan = dslify.dsl_layers(net)[0].plan
    rows = {row.name: row for row in dslify.cost(net)}
    for name in ("base", "light", "full"):
        assert rows[name].macs == plan.macs[name], name
        assert rows[name].params == plan.params[name], name
    assert rows["switch"].macs < max(0.01 * rows["base"].macs, 2000)  # 1 % of every network of a real size
    assert all(row.bytes > 0 for row in rows.values())
    assert type(plan).from_json(plan.to_json()) == plan


def test_cost_instead_of_width():
    network = ZOO["autoencoder"]
    for share in (0.05, 0.3):
        net = dslify.insert(network.build(), network.at, example_inputs=(network.batch(1),), cost=share)
        rows = {row.name: row for row in dslify.cost(net)}
        assert 0.5 * share < rows["light"].macs / rows["full"].macs <= share


def test_the_codec_light_path_is_as_small_as_the_paper():
    rows = {row.name: row for row in dslify.cost(Inserted("codec").net(0.1))}
    assert rows["full"].macs >= 12.3 * rows["light"].macs
    assert rows["full"].params >= 20 * rows["light"].params


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "above 0 and at most 1; got 0"),
        ({"width": 1.5}, "got 1.5"),
        ({"cost": 2.0}, "between 0 and 1; got 2.0"),
        ({"mask": "wide"}, "channel, element, activation; got 'wide'"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(OptionError, match=words):
        dslify.insert(nn.Linear(2, 2), "x", example_inputs=(torch.zeros(1, 2),), **options)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.rnn = nn.Linear(4, 4), nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return self.two(self.rnn(self.one(self.one(x)))[0])


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("one", "it is called 2 times"),
        ("tow", "no such module in the network; the nearest cut points are two"),
        ("two", "nothing comes after it"),
    ],
)
def test_cuts_that_cannot_be(at, words):
    with warnings.catch_warnings(), pytest.raises(CutError, match=words):
        dslify.insert(Twice(), at, example_inputs=(torch.zeros(1, 6, 4),))


def test_mask_and_element_mask():
    network = ZOO["resnet18"]
    net = dslify.insert(network.build(), network.at, 0.1, (network.batch(1),), mask="element")
    layer = dslify.dsl_layers(net)[0]
    assert tuple(layer.mask.weight.shape) == (1, 128, 8, 8)
    with torch.no_grad():
        layer.mask.weight[:, :64] = 0.001
    assert layer.mask.sparsity() == 0.5
    with torch.no_grad():
        net(network.batch(1))
    assert (layer.paths.masked[:, :64] == 0).all()
    assert (layer.paths.masked[:, 64:] != 0).any()


class Windows(nn.Module):
    """Cut where four windows of a sample stand in the batch axis, sample by sample or window by window."""

    def __init__(self, by_sample):
        super().__init__()
        self.by_sample = by_sample
        self.stem, self.inside, self.back = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 4, 1)

    def forward(self, x):
        batch, channels, time = (y := self.stem(x)).shape
        y = y.view(batch, channels, 4, time // 4).permute(*((0, 2, 1, 3) if self.by_sample else (2, 0, 1, 3)))
        y = self.back(self.inside(y.reshape(batch * 4, channels, time // 4)).relu())
        y = y.view(*((batch, 4) if self.by_sample else (4, batch)), 4, time // 4)
        return y if self.by_sample else y.transpose(0, 1)


@pytest.mark.parametrize("by_sample", [True, False])
def test_samples_that_share_the_batch_axis_with_windows(by_sample):
    torch.manual_seed(0)
    model = Windows(by_sample).eval()
    net = dslify.insert(model, "inside", 0.5, (torch.randn(1, 2, 32),))
    layer = dslify.dsl_layers(net)[0]
    assert layer.inputs[0].per_sample == 4
    assert layer.routable == by_sample
    x = torch.randn(4, 2, 32) * torch.tensor([0.1, 1, 2, 4]).view(4, 1, 1)
    run(net, x)
    assert layer.paths.score.shape == (4,) or not by_sample
    if not by_sample:
        return
    layer.threshold.copy_(layer.paths.score.sort().values[1:3].mean())
    together = run(net, x)
    assert layer.paths.light_taken.sum() == 2
    assert difference(together, torch.cat([run(net, sample) for sample in x.split(1)])) < BATCHED


@pytest.mark.parametrize(
    "name",
    ["own_lstm_bidirectional", "own_weight_norm_parametrized", "own_in_place", "own_autocast", "own_pixel_shuffle"],
)
def test_awkward_networks_pass_the_checks_of_the_zoo(name):
    (network,) = selected([name])
    (record,) = check_network(network, [0.5])
    assert record.get("works"), record.get("traceback", record)
    assert record["with_projection"][1] < 0.3
