"""How an output of the light path is held to the full one's: the equations by hand, weights, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dslify.errors import OptionError, TrainError
from dslify.losses import class_balance, difference, dsl_loss, gate_loss, light_loss
from dslify.output_losses import LOSSES, OutputLoss, output_loss, output_losses
from dslify.switch import Layout, Switch, dsl_layers

from .test_train import Codec, Net, sounds

ROUNDING = 1e-6  # relative, of float32 means over few values
FIRST = Layout(axis=0)
ONE = torch.ones(())


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


def by_hand(kind: str, light: torch.Tensor, full: torch.Tensor, scale: float) -> torch.Tensor:
    """One number a sample, samples first."""
    if kind == "l1":
        return (light - full).abs().flatten(1).mean(1) / scale
    if kind == "mse":
        return ((light - full) / scale).square().flatten(1).mean(1)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(light.flatten(1), full.flatten(1))
    divergence = functional.kl_div(light.log_softmax(-1), full.softmax(-1), reduction="none").sum(-1)
    return divergence.reshape(len(light), -1).mean(1)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7)])
def test_every_loss_is_its_equation(kind, shape):
    light, full = pair(*shape)
    found = output_loss(light, full, torch.tensor(2.0), FIRST, OutputLoss(kind))
    torch.testing.assert_close(found, by_hand(kind, light, full, 2.0))
    assert output_loss(full, full, ONE, FIRST, OutputLoss(kind)).abs().max() < ROUNDING
    assert found.min() > 0.01


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_follows_the_axis_of_the_samples_and_their_entries(kind):
    light, full = pair(6, 3, 7)
    expected = by_hand(kind, light, full, 1.0)
    moved = output_loss(light.movedim(0, 1), full.movedim(0, 1), ONE, Layout(axis=1), OutputLoss(kind))
    torch.testing.assert_close(moved, expected)
    merged = output_loss(light, full, ONE, Layout(axis=0, per_sample=2), OutputLoss(kind))
    torch.testing.assert_close(merged, by_hand(kind, light.view(3, 6, 7), full.view(3, 6, 7), 1.0))


def test_kl_takes_the_classes_from_the_axis_that_is_named():
    light, full = pair(2, 5, 4, 3)  # logits of 5 classes at 4x3 places
    found = output_loss(light, full, ONE, FIRST, output_losses("kl:1", None, 1)[0])
    torch.testing.assert_close(found, by_hand("kl", light.movedim(1, -1), full.movedim(1, -1), 1.0))


def test_the_level_counts_in_all_but_cosine():
    _, full = pair(4, 7)
    assert output_loss(3 * full, full, ONE, FIRST, OutputLoss("cosine")).abs().max() < ROUNDING
    for kind in ("l1", "mse", "kl"):
        assert output_loss(3 * full, full, ONE, FIRST, OutputLoss(kind)).min() > 0.01


def test_complex_answers_have_a_size_and_a_direction():
    light, full = torch.randn(3, 4, dtype=torch.complex64), torch.randn(3, 4, dtype=torch.complex64)
    apart = [torch.view_as_real(value).flatten(1) for value in (light, full)]
    found = output_loss(light, full, ONE, FIRST, OutputLoss("cosine"))
    torch.testing.assert_close(found, 1 - functional.cosine_similarity(*apart))
    squared = output_loss(light, full, ONE, FIRST, OutputLoss("mse"))
    torch.testing.assert_close(squared, (apart[0] - apart[1]).square().sum(1) / 4)
    with pytest.raises(TrainError, match=r"kl compares logits over axis -1, and an output is torch.complex64 of shape"):
        output_loss(light, full, ONE, FIRST, OutputLoss("kl"))


def test_kl_over_the_samples_is_refused():
    light, full = pair(4, 7)
    for axis in (0, -2, 2):
        with pytest.raises(TrainError, match="name the classes' axis"):
            output_loss(light, full, ONE, FIRST, OutputLoss("kl", axis=axis))


def test_weights_and_kinds_are_of_each_output():
    light, full = zip(pair(4, 7), pair(4, 3), strict=True)
    scale, layouts = torch.tensor([2.0, 1.0]), [FIRST, FIRST]
    parts = [by_hand("kl", light[0], full[0], 2.0).mean(), by_hand("mse", light[1], full[1], 1.0).mean()]
    found = light_loss(light, full, scale, layouts, output_losses(["kl", "mse"], [3.0, 1.0], 2))
    torch.testing.assert_close(found, (3 * parts[0] + parts[1]) / 4)
    alone = light_loss(light, full, scale, layouts, output_losses({0: "kl"}, (1, 0), 2))
    torch.testing.assert_close(alone, parts[0])
    plain = light_loss(light, full, scale, layouts)
    torch.testing.assert_close(plain, difference(light, full, scale, layouts).mean())


def test_losses_that_do_not_fit_the_outputs_are_refused():
    for loss, weights, message in [
        ("l2", None, "loss is one of l1, mse, cosine, kl .* got 'l2'"),
        ("mse:1", None, "or kl:AXIS; got 'mse:1'"),
        ("kl:x", None, "or kl:AXIS; got 'kl:x'"),
        (["l1"], None, "loss has 1 entries and the layer 2 outputs"),
        ({2: "l1"}, None, "loss names output 2; the layer's outputs are 0 to 1"),
        ("l1", [1.0], "weights has 1 entries and the layer 2 outputs"),
        ("l1", [1.0, -1.0], "weights of outputs are 0 or more; got -1.0"),
        ("l1", [1.0, math.nan], "0 or more; got nan"),
        ("l1", [0, 0], "weights are 0 for all 2 outputs"),
    ]:
        with pytest.raises(OptionError, match=message):
            output_losses(loss, weights, 2)


def test_a_weight_on_nothing_that_can_be_compared_is_said():
    with pytest.raises(TrainError, match="cannot be compared"):
        light_loss((torch.ones(2, 3), 4), (torch.ones(2, 3), 4), torch.ones(2), [FIRST, Layout()],
                   output_losses("l1", [0, 1], 2))  # fmt: skip


# Gates ----------------------------------------------------------------------------------------------------------------


def test_gate_loss_is_the_weighted_cross_entropy():
    score, positive = torch.tensor([0.9, 0.2, 0.4]), torch.tensor([True, False, True])
    weight = torch.tensor([1.0, 2.0, 0.5])
    expected = -(math.log(0.9) + 2 * math.log(0.8) + 0.5 * math.log(0.4)) / 3
    assert gate_loss(score, positive, weight).item() == pytest.approx(expected, rel=ROUNDING)


def test_rare_positives_weigh_as_much_as_all_negatives():
    positive = torch.zeros(100, dtype=torch.bool).index_fill(0, torch.tensor([7, 50]), True)
    weight = class_balance(positive)
    assert weight[positive].sum().item() == pytest.approx(weight[~positive].sum().item(), rel=ROUNDING)
    assert weight.mean().item() == pytest.approx(1, rel=ROUNDING)
    score = torch.full((100,), 0.5, requires_grad=True)
    gate_loss(score, positive, weight).backward()
    assert abs(score.grad.sum().item()) < ROUNDING  # "one half" is where a gate that knows nothing rests
    for same in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(TrainError, match="samples of both kinds"):
            class_balance(same)


def test_a_score_that_is_no_probability_is_refused():
    with pytest.raises(TrainError, match="a probability, from 0 to 1"):
        gate_loss(torch.tensor([0.5, 1.5]), torch.tensor([True, False]), torch.ones(2))


def test_gate_loss_works_under_autocast():
    gate = Switch(8, kind="positive")
    values = torch.randn(6, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        score = gate(values)
        loss = gate_loss(score, torch.arange(6) < 3, torch.ones(6))
    assert score.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert gate.hidden.weight.grad.abs().sum() > 0


# dsl_loss -------------------------------------------------------------------------------------------------------------


def test_dsl_loss_takes_the_losses_of_the_outputs():
    net = Net().train()
    net.dsl.mask.weight.data[0] = 0.5
    net(sounds(16))
    paths = net.dsl.paths
    found = dsl_loss(net, loss="mse", weights=[2.0])
    about = (net.dsl.scale, net.dsl.outputs, output_losses("mse", None, 1))
    torch.testing.assert_close(found.light, light_loss(paths.light, paths.full, *about))
    torch.testing.assert_close(found.anchor, light_loss(paths.full, paths.original, *about))
    assert found.switch.item() == dsl_loss(net).switch.item()  # predicts the relative difference, whatever is minimised
    with pytest.raises(OptionError, match="loss has 2 entries and the layer 1 outputs"):
        dsl_loss(net, loss=["l1", "l1"])


def test_dsl_loss_of_layers_deep_in_a_larger_model_under_autocast():
    model = nn.Sequential(nn.Identity(), Codec(nn.Sequential(Net(), nn.Conv1d(4, 8, 1))), Net(seed=1)).train()
    for layer in dsl_layers(model):
        layer.scale.fill_(1.0)
    x = sounds(8)[..., :784]

    def parts():
        losses = dsl_loss(model)
        return [losses.total, losses.switch, losses.light, losses.mask, losses.anchor]

    model(x)
    exact = parts()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        rough = parts()
    assert dsl_layers(model)[0].paths.score.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in rough)
    for mine, theirs in zip(rough, exact, strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=0.03, abs=1e-6)  # bfloat16 has 8 bits
    rough[0].backward()
    for layer in dsl_layers(model):
        for part in (layer.light, layer.switch, layer.mask):
            assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters())
