"""The loss equations: values by hand, who gets a gradient and who does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dslify.errors import OptionError, TrainError
from dslify.losses import (
    SCORE_FLOOR,
    anchor_loss,
    difference,
    dsl_loss,
    light_loss,
    sample_scale,
    switch_loss,
)
from dslify.switch import Layout, route

from .test_train import Net, sounds

ROUNDING = 1e-6  # relative; means over at most a few thousand float32 values
FIRST = Layout(axis=0)
SHARED = Layout()


def test_difference_is_the_mean_gap_over_the_scale():
    full = (torch.tensor([[1.0, 3.0], [2.0, 2.0]]),)
    light = (torch.tensor([[2.0, 1.0], [2.0, 2.0]]),)
    assert difference(light, full, torch.tensor([3.0]), [FIRST]).tolist() == [0.5, 0.0]


def test_difference_averages_outputs_each_in_its_own_scale():
    full = (torch.zeros(2, 4), torch.zeros(2, 3, 5))
    light = (torch.ones(2, 4), 10 * torch.ones(2, 3, 5))
    assert difference(light, full, torch.tensor([1.0, 10.0]), [FIRST, FIRST]).tolist() == [1.0, 1.0]
    assert difference(light, full, torch.tensor([1.0, 5.0]), [FIRST, FIRST]).tolist() == [1.5, 1.5]


def test_difference_without_a_measured_scale_is_relative_to_the_batch():
    full = (torch.tensor([[1.0, 3.0], [5.0, 7.0]]),)
    light = (torch.zeros(2, 2),)
    assert difference(light, full, torch.zeros(1), [FIRST]).tolist() == [0.5, 1.5]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_difference_follows_the_batch_axis(axis):
    full = (torch.randn(3, 4, 5).movedim(0, axis),)
    light = (torch.randn(3, 4, 5).movedim(0, axis),)
    expected = (light[0] - full[0]).abs().movedim(axis, 0).mean((1, 2))
    torch.testing.assert_close(difference(light, full, torch.ones(1), [Layout(axis=axis)]), expected)


def test_difference_gathers_windows_merged_into_the_batch():
    full = (torch.zeros(6, 2),)
    light = (torch.arange(12.0).view(6, 2),)
    assert difference(light, full, torch.ones(1), [Layout(axis=0, per_sample=3)]).tolist() == [2.5, 8.5]


def test_what_cannot_be_compared_is_left_out():
    full = (torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), torch.zeros(7), 3, None)
    light = (torch.ones(2, 2), torch.ones(2, dtype=torch.long), torch.ones(7), 4, None)
    layouts = [FIRST, FIRST, SHARED, Layout(scales=True), SHARED]
    assert difference(light, full, torch.ones(5), layouts).tolist() == [1.0, 1.0]
    assert sample_scale(light, layouts).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 2


def test_nothing_to_compare_is_said():
    with pytest.raises(TrainError, match=r"what leaves the region is torch.int64, and at least one floating-point"):
        difference((torch.ones(2, dtype=torch.long),), (torch.ones(2, dtype=torch.long),), torch.ones(1), [FIRST])
    with pytest.raises(TrainError, match="cannot be compared"):
        sample_scale((torch.ones(2),), [SHARED])


def test_half_precision_answers_are_compared_in_single():
    full = (torch.full((2, 4), 1e-4, dtype=torch.float16),)
    gap = difference((torch.zeros(2, 4, dtype=torch.float16),), full, torch.zeros(1), [FIRST])
    assert gap.dtype == torch.float32
    assert gap.tolist() == pytest.approx([1.0, 1.0], rel=1e-3)  # half precision has 10 bits


def test_an_output_of_zeros_gives_no_nan():
    assert difference((torch.zeros(2, 3),), (torch.zeros(2, 3),), torch.zeros(1), [FIRST]).tolist() == [0.0, 0.0]


def test_sample_scale_averages_to_the_scale_of_the_set():
    full = (torch.randn(8, 3, 4),)
    expected = full[0].abs().mean().item()
    assert sample_scale(full, [FIRST]).mean().item() == pytest.approx(expected, rel=ROUNDING)


def test_light_loss_reaches_light_only():
    light, full = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    light_loss((light,), (full,), torch.ones(1), [FIRST]).backward()
    assert light.grad.abs().sum() > 0
    assert full.grad is None


def test_switch_loss_reaches_the_score_only_and_is_zero_at_the_truth():
    score, actual = torch.rand(6, requires_grad=True), torch.rand(6, requires_grad=True)
    switch_loss(score, actual).backward()
    assert score.grad.abs().min() > 0
    assert actual.grad is None
    assert switch_loss(actual, actual).item() == 0


def test_switch_loss_is_the_log_ratio_far_from_the_truth():
    loss = switch_loss(torch.tensor([1.0 - SCORE_FLOOR]), torch.tensor([0.01 - SCORE_FLOOR]))
    assert loss.item() == pytest.approx(torch.tensor(100.0).log().item() - 0.5, rel=ROUNDING)


def test_anchor_holds_full_to_the_original():
    full, original = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    loss = anchor_loss((full,), (original,), torch.tensor([2.0]), [FIRST])
    loss.backward()
    assert loss.item() == 0.5
    assert full.grad is not None
    assert original.grad is None
    assert anchor_loss((full,), None, torch.ones(1), [FIRST]).item() == 0


# dsl_loss: a user's own loop ------------------------------------------------------------------------------------------


@pytest.fixture
def net():
    net = Net()
    net.train()
    net(sounds(16))
    return net


def gradients(module: nn.Module) -> float:
    return sum(parameter.grad.abs().sum().item() for parameter in module.parameters() if parameter.grad is not None)


def test_dsl_loss_is_the_weighted_sum_of_its_parts(net):
    loss = dsl_loss(net, alpha=2.0, beta=0.1, anchor=3.0)
    expected = 2 * (loss.switch + loss.light) + 0.1 * loss.mask + 3 * loss.anchor
    assert loss.total.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert loss.mask.item() == 8.0
    assert loss.anchor.item() == 0.0  # a fresh mask changes nothing


def test_every_part_reaches_what_it_should(net):
    for part, reached in (("switch", net.dsl.switch), ("light", net.dsl.light), ("mask", net.dsl.mask)):
        net.zero_grad()
        getattr(dsl_loss(net), part).backward(retain_graph=True)
        assert gradients(reached) > 0, part
        assert gradients(net.dsl.full) == 0, part
    net.zero_grad()
    dsl_loss(net).switch.backward(retain_graph=True)
    assert gradients(net.dsl.light) == 0  # the difference that the switch predicts is no lever on the light path


def test_the_anchor_pulls_a_moved_mask_back():
    net = Net().train()
    net.dsl.mask.weight.data[0] = 0.5
    net(sounds(16))
    loss = dsl_loss(net)
    assert loss.anchor > 0
    loss.anchor.backward()
    assert net.dsl.mask.weight.grad[0] < 0
    frozen = Net().train()
    frozen.dsl.mask.weight.requires_grad_(False)
    frozen(sounds(16))
    assert dsl_loss(frozen).anchor.item() == 0


def test_several_layers_add_up():
    both = nn.Sequential(Net(), nn.ConvTranspose1d(4, 1, 16, stride=16), Net(seed=1)).train()
    both(sounds(8))
    apart = [dsl_loss(both[0]), dsl_loss(both[2])]
    together = dsl_loss(both)
    for part in ("total", "switch", "light", "mask", "anchor"):
        expected = sum(getattr(loss, part).item() for loss in apart)
        assert getattr(together, part).item() == pytest.approx(expected, rel=ROUNDING)


def test_a_loop_of_the_users_own_trains_the_layer():
    net = Net().train()
    optimizer = torch.optim.Adam([*net.dsl.light.parameters(), *net.dsl.switch.parameters()], 3e-3)
    values = []
    for _ in range(60):
        net(sounds(16))
        loss = dsl_loss(net)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        values.append((loss.light.item(), loss.switch.item()))
    assert values[-1][0] < 0.7 * values[0][0]
    assert values[-1][1] < 0.7 * values[0][1]


def test_dsl_loss_says_what_is_missing():
    with pytest.raises(OptionError, match="no Dynamic Switch Layer"):
        dsl_loss(nn.Linear(1, 1))
    net = Net()
    with pytest.raises(TrainError, match=r"found no forward; call net.train\(\) and then net\(batch\)"):
        dsl_loss(net)
    for mode in ("full", "light", "mixed"):
        with route(net.eval(), mode):
            net(sounds(4))
        with pytest.raises(TrainError, match="did not run both paths"):
            dsl_loss(net)
