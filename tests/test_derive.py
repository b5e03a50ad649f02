"""What the surgery does when its own work fails a check: freeze more, try again, say so; and crashes stay outside."""

import os
import signal

import pytest
import torch
from torch import nn

import dslify
from dslify import isolate
from dslify.errors import VerifyError
from dslify.rules import RULES
from tests.zoo import ZOO

EXACT = 1e-6


def inserted(name, **options):
    network = ZOO[name]
    net = dslify.insert(network.build(), network.at, 0.1, (network.batch(1),), **options)
    return net, dslify.dsl_layers(net)[0]


def answers(net, name, route):
    with torch.no_grad(), dslify.route(net, route):
        return net(ZOO[name].batch(2))


def test_a_wrong_rule_costs_width_and_not_the_answer(monkeypatch):
    """A channel shuffle whose transpose is overlooked has two equal factors, so it passes every shape check."""
    transpose = RULES["aten.transpose.int"]

    def forgetful(b, node):
        return tuple(b[node.args[0]]) if len(b[node.args[0]]) == 4 else transpose(b, node)

    _, right = inserted("shuffle")
    monkeypatch.setitem(RULES, "aten.transpose.int", forgetful)
    net, layer = inserted("shuffle")
    assert set(layer.plan.distrusted.values()) == {"its rule does not hold here"}
    assert list(layer.plan.ledger) == ["aten.transpose.int"]
    assert layer.plan.params["light"] > right.plan.params["light"]
    assert answers(net, "shuffle", "light").shape == answers(net, "shuffle", "full").shape


def test_a_rule_whose_narrow_copy_does_not_run_costs_width(monkeypatch):
    view = RULES["aten.view.default"]

    def without_sizes(b, node):
        out = view(b, node)
        b.rewrites.pop(node, None)
        return out

    monkeypatch.setitem(RULES, "aten.view.default", without_sizes)
    net, layer = inserted("shuffle")
    assert set(layer.plan.distrusted.values()) == {"its narrow copy does not run"}
    assert answers(net, "shuffle", "light").isfinite().all()


def test_it_gives_up_with_the_reason_when_no_operator_is_to_blame(monkeypatch):
    monkeypatch.setattr("dslify.derive.permutation_error", lambda *_: 1.0)
    monkeypatch.setattr("dslify.derive.misunderstood", lambda *_: None)
    with pytest.raises(VerifyError, match="no single operator is to blame"):
        inserted("autoencoder")


def test_a_crash_in_the_check_is_an_error_and_not_the_end():
    with pytest.raises(VerifyError, match="SIGSEGV"):
        isolate.in_child(lambda: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(VerifyError, match="does not run: something else"):
        isolate.in_child(lambda: (_ for _ in ()).throw(RuntimeError("something else")))


def test_a_check_that_hangs_ends(monkeypatch):
    monkeypatch.setattr(isolate, "SECONDS", 0.2)
    with pytest.raises(VerifyError, match="within 0 s"):
        isolate.in_child(signal.pause)


def test_the_check_runs_here_after_a_backward_pass_here():
    """Autograd refuses to run in a fork of a process that has run a backward pass."""
    torch.ones(2, requires_grad=True).sum().backward()
    here = []

    def check():
        weight = torch.ones(2, requires_grad=True)
        weight.sum().backward()
        here.append(weight.grad)

    isolate.in_child(check)
    if not here:  # this build of torch runs it in the child after all
        isolate.in_child(lambda: torch.ones(2, requires_grad=True).sum().backward())


class Regions(nn.Module):
    """A region with autocast and one with gradients (capture is without) behind the cut; what is inside narrows too."""

    def __init__(self):
        super().__init__()
        self.front, self.mid, self.out = nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 4)
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, x):
        h = self.mid(self.front(x))
        with torch.enable_grad():
            level = h.view(h.shape[0], 8, 8).square().mean(-1, keepdim=True).expand(-1, 8, 8).reshape(h.shape)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.nn.functional.gelu(self.out.weight.shape[1] ** -0.5 * h * self.gain)
        return self.out(h.float() / (1 + level))


def test_autocast_and_no_grad_regions_are_entered():
    net = dslify.insert(Regions(), "front", 0.25, (torch.randn(2, 8),))
    (layer,) = dslify.dsl_layers(net)
    targets = {str(node.target) for node in layer.light.graph.nodes}
    assert {"wrap_with_autocast", "wrap_with_set_grad_enabled"} <= targets, "kept as they are, not inlined"
    assert layer.plan.ledger == {}
    assert layer.plan.distrusted == {}
    assert layer.light.get_parameter("mid.weight").shape == (16, 2), "both sides of the weight"
    with torch.no_grad(), dslify.route(net, "light"):
        assert net(torch.randn(3, 8)).isfinite().all()


def test_group_norm_behind_a_channels_last_cut_trains():
    """Its backward crashes PyTorch 2.12.1 on a channels_last input that needs no gradient."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    net = dslify.insert(net, "0", 0.5, (x,))
    (layer,) = dslify.dsl_layers(net)
    net.requires_grad_(False)
    layer.light.requires_grad_(True)
    layer.train()
    net(x)
    layer.paths.light[0].square().mean().backward()
    assert all(weight.grad is not None for weight in layer.light.parameters())


class HeadsInTheBatch(nn.Module):
    """Heads folded into the batch axis, in the value that crosses the cut too, as BLOOM's ALiBi."""

    def __init__(self):
        super().__init__()
        self.front, self.qkv, self.out = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 8)
        self.slopes = nn.Parameter(torch.rand(4))

    def forward(self, x):
        batch, length, _ = x.shape
        bias = (self.slopes[None, :, None] * x[:, None, :, 0]).reshape(batch * 4, 1, length)
        q, k, v = (
            self.qkv(self.front(x + bias.mean())).view(batch, length, 4, 3, 8).permute(3, 0, 2, 1, 4).flatten(1, 2)
        )
        mixed = torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1) @ v
        return self.out(mixed.view(batch, 4, length, 8).transpose(1, 2).reshape(batch, length, 32))


@pytest.mark.parametrize("batch", [1, 3])
def test_heads_folded_into_the_batch(batch):
    net = dslify.insert(HeadsInTheBatch(), "front", 0.5, (torch.randn(batch, 5, 8),))
    (layer,) = dslify.dsl_layers(net)
    assert not layer.plan.distrusted
    assert layer.plan.crossing
    with torch.no_grad(), dslify.route(net, "light"):
        assert net(torch.randn(4, 5, 8)).shape == (4, 5, 8)
