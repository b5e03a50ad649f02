"""Mask and Switch alone: what a fresh one changes, how zeros become exact, what a gate's score is."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import dslify
from dslify.errors import OptionError
from dslify.mask import KINDS, Mask
from dslify.switch import Switch

CHANNELS = 6


def activations(seed=0):
    """(batch, channel, time), with channels of very different loudness."""
    x = torch.randn(32, CHANNELS, 40, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 2, CHANNELS)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_mask_changes_nothing_to_the_last_bit(kind, dtype):
    mask, x = Mask((1, CHANNELS, 1), kind).to(dtype), activations().to(dtype)
    assert torch.equal(mask(x), x)
    assert mask.sparsity() == mask.activation_sparsity(mask(x)) == 0


def test_thresholds_start_at_the_same_small_share_of_every_channel_and_shrink_by_what_they_are():
    mask, x = Mask((1, CHANNELS, 1), "activation"), activations()
    mask.turn_on(x)
    t = mask.effective()
    assert torch.allclose(t.flatten() / x.abs().mean((0, 2)), torch.full((CHANNELS,), Mask.START), rtol=1e-5)
    assert torch.allclose(mask(x), x.sign() * functional.relu(x.abs() - t), rtol=1e-6)
    assert torch.equal(mask(x) == 0, x.abs() <= t)
    zeros = Mask.activation_sparsity(mask(x))
    assert zeros == pytest.approx((mask(x) == 0).sum().item() / x.numel())
    assert 0.03 < zeros < 0.15
    assert mask.sparsity() == 0, "thresholds are no factors"


def test_turning_on_again_keeps_what_was_learned():
    mask = Mask((1, CHANNELS, 1), "activation")
    mask.turn_on(activations())
    with torch.no_grad():
        mask.weight.add_(1)
    before = mask.effective()
    mask.turn_on(100 * activations(1))
    assert torch.equal(mask.effective(), before)
    again = Mask((1, CHANNELS, 1), "activation")
    again.load_state_dict(mask.state_dict())
    assert torch.equal(again.effective(), before)


def test_a_silent_channel_does_not_break_the_penalty():
    mask, x = Mask((1, CHANNELS, 1), "activation"), activations()
    x[:, 2] = 0
    mask.turn_on(x)
    assert mask.penalty(mask(x)).isfinite()
    assert (mask.magnitude > 0).all()
    mask = Mask((1, CHANNELS, 1), "activation")
    mask.turn_on(torch.zeros_like(x))
    assert mask.penalty(mask(torch.zeros_like(x))) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_the_same_for_fresh_masks_of_either_kind(kind):
    mask, x = Mask((1, CHANNELS, 1), kind), activations()
    if kind == "activation":
        assert torch.autograd.grad(mask.penalty(mask(x)), mask.weight)[0].abs().max() == 0, "off: nothing to learn yet"
    mask.turn_on(x)
    penalty = mask.penalty(mask(x))
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(CHANNELS, rel=0.15)
    gradient = torch.autograd.grad(penalty, mask.weight)[0]
    assert (gradient > 0).all() if kind == "weight" else (gradient < 0).all(), "down go factors, up go thresholds"


def trained(kind, beta):
    """A mask in front of a frozen regression that reads half of the channels, trained with the anchor."""
    torch.manual_seed(0)
    mask, x, frozen = Mask((1, CHANNELS, 1), kind), activations(), nn.Conv1d(CHANNELS, 4, 1)
    frozen.weight.data[:, ::2] = 0
    frozen.weight.data /= torch.logspace(-2, 2, CHANNELS)[:, None]
    mask.turn_on(x)
    target = frozen(x).detach()
    optimizer = torch.optim.Adam(mask.parameters())
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 120)  # or else factors swing across zero
        masked = mask(x)
        loss = (frozen(masked) - target).abs().mean() / target.abs().mean() + beta * mask.penalty(masked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        masked = mask(x)
        error = (frozen(masked) - target).abs().mean() / target.abs().mean()
    return mask.activation_sparsity(masked), error.item(), mask.sparsity()


@pytest.mark.parametrize("kind", KINDS)
def test_more_beta_gives_more_exact_zeros_and_the_anchor_holds_the_answer(kind):
    none, some, much = (trained(kind, beta) for beta in (0.0, 0.01, 1.0))
    assert none[0] <= some[0] < much[0]
    assert some[0] >= 0.45, "the channels that nothing reads are zero"
    assert some[1] < 0.02, "and those that are read are not"
    assert much[0] > 0.95
    assert (some[2] == 0.5) if kind == "weight" else (some[2] == 0)


def test_a_switch_predicts_a_difference_and_a_gate_a_probability():
    torch.manual_seed(0)
    switch, gate = Switch(CHANNELS), Switch(CHANNELS, kind="positive")
    gate.load_state_dict(switch.state_dict())
    x = 50 * torch.randn(200, 7, CHANNELS)
    scores, chances = switch(x), gate(x)
    assert (switch.kind, gate.kind) == ("difference", "positive")
    assert scores.shape == chances.shape == (200,)
    assert scores.min() >= 0
    assert (chances >= 0).all()
    assert (chances <= 1).all()
    assert torch.allclose(functional.softplus(chances.double().logit()), scores.double(), rtol=1e-3, atol=1e-4)
    assert not (chances < 0.0).any(), "at a threshold of 0 nothing is stopped"


def test_kinds_that_are_none():
    with pytest.raises(OptionError, match="switch is one of difference, positive; got 'gate'"):
        Switch(4, kind="gate")
    with pytest.raises(OptionError, match="mask is one of weight, activation; got 'channel'"):
        Mask((1, 4), "channel")


class Spotter(nn.Module):
    """A small keyword network: strided convolutions, an LSTM, twelve classes."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(1, 16, 64, 32), nn.ReLU())
        self.rnn = nn.LSTM(16, 24, batch_first=True)
        self.middle = nn.Sequential(nn.Linear(24, 32), nn.ReLU())
        self.last = nn.Linear(32, 12)

    def forward(self, x):
        return self.last(self.middle(self.rnn(self.front(x).transpose(1, 2))[0]).mean(1))


def images():
    def block(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())

    return nn.Sequential(
        block(3, 8), block(8, 16), block(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)
    )


CASCADES = {
    "images": (images, (16, 3, 24, 24), ("0", "1", "2")),
    "keywords": (Spotter, (16, 1, 2000), ("front", "middle")),
}


@pytest.mark.parametrize("name", CASCADES)
def test_gates_at_several_depths(name, tmp_path):
    make, shape, cuts = CASCADES[name]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    net = model
    for at in cuts:
        net = dslify.insert(net, at, example_inputs=(x[:1],), mode="gc")
    for at, layer in enumerate(dslify.dsl_layers(net)):
        assert (layer.switch.kind, layer.plan.light, layer.plan.at) == ("positive", "exit", cuts[at])
        assert not list(layer.light.parameters()), "a gate's answer is set and not learned"
        layer.light.answer0.fill_(-1.0 - at)  # each gate's answer tells it from the others
    with torch.no_grad():
        assert torch.equal(net(x), model(x)), "untrained gates stop nothing"
        for layer in dslify.dsl_layers(net):  # half of what reaches it is stopped
            net(x)
            layer.threshold.copy_(layer.paths.score.median() + 1e-6)
        found = net(x)
    net = dslify.load(dslify.save(net, tmp_path / "gates.dsl"))
    layers = dslify.dsl_layers(net)
    assert [layer.switch.kind for layer in layers] == ["positive"] * len(cuts)
    with torch.no_grad():
        assert torch.equal(net(x), found)
    stopped = [(found == -1.0 - at).all(1) for at in range(len(cuts))]
    reached = torch.ones(len(x), dtype=torch.bool)
    for layer, stop in zip(layers, stopped, strict=True):
        assert len(layer.paths.score) == reached.sum(), "what was stopped before is not asked again"
        assert 0 < stop.sum() < reached.sum()
        assert torch.equal(stop[reached], layer.paths.light_taken)
        reached &= ~stop
    with torch.no_grad():
        assert torch.allclose(found[reached], model(x)[reached], atol=1e-5), (
            "what passes every gate is the network's own"
        )


def test_what_a_gate_stops_costs_nothing_behind_it():
    torch.manual_seed(0)
    model = images().eval()
    net = dslify.insert(model, "0", example_inputs=(torch.randn(1, 3, 24, 24),), mode="gc")
    (layer,) = dslify.dsl_layers(net)
    rows = {row.name: row.macs for row in dslify.cost(net)}
    sizes = []
    layer.full.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))

    def macs(x):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        return counter.get_total_flops() // 2

    x = torch.randn(8, 3, 24, 24)
    assert macs(x) == 8 * (rows["base"] + rows["switch"] + rows["full"])
    layer.threshold.fill_(float("inf"))
    assert macs(x) == 8 * (rows["base"] + rows["switch"])
    layer.threshold.copy_(layer.paths.score.sort().values[4:6].mean())
    assert macs(x) == 8 * (rows["base"] + rows["switch"]) + 3 * rows["full"]
    assert sizes == [8, 3]
