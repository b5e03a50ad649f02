"""Inherited weights: what each adjustment promises, exactly, and that none of them does harm."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from dslify.axes import analyse
from dslify.depth import shallower
from dslify.errors import OptionError
from dslify.functional import op_name
from dslify.inherit import HOWS, LARGEST, adjusted
from dslify.layers import find_layers, patches
from dslify.light import build
from dslify.widths import choose, decide_projections
from tests.test_depth import of_zoo, region_of

WITH_DATA = ("statistics", "fit")


def derived(region, width, projection=True):
    axes = analyse(region)
    projected = decide_projections(axes, width) if projection else frozenset()
    kept = choose(axes, width, projected) if width < 1 else {}
    return build(axes, kept, projected), axes, kept, projected


def adjust(region, width, batches, how, full=None, projection=False):
    light, axes, kept, projected = derived(region, width, projection)
    adjusted(light, full or region, axes, kept, projected, batches, how)
    return light


def sequence(*layers):
    """front -> (cut) -> layers, with weights that are not symmetric around zero."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


def inputs_of(region, inputs, count=3, seed=0):
    """Batches like the example's, of other values."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(value.shape, generator=generator) for value in inputs) for _ in range(count)]


def error(light, region, batches):
    with torch.no_grad():
        pairs = [(light(*batch)[0], region(*batch)[0]) for batch in batches]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).item()


@pytest.mark.parametrize("name", ["autoencoder", "unet", "shuffle", "tied", "resnet18", "vit", "wav2vec2", "codec"])
@pytest.mark.parametrize("how", HOWS)
def test_nothing_changes_at_width_one(name, how):
    _, _, region, inputs = of_zoo(name)
    light = adjust(region, 1.0, [inputs], how)
    with torch.no_grad():
        for mine, theirs in zip(light(*inputs), region(*inputs), strict=True):
            if isinstance(theirs, torch.Tensor):
                assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp_min(1)


def train_mode(graph):
    """The same graph and buffers with its BatchNorms in training mode, momentum 1."""
    nodes = copy.deepcopy(graph.graph)
    for node in nodes.nodes:
        if "batch_norm" in op_name(node):
            node.args = (*node.args[:5], True, 1.0, *node.args[7:])
    return fx.GraphModule(graph, nodes)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["unet", "shuffle", "tied", "resnet18", "vit", "wav2vec2", "codec"])
def test_narrow_copies_stay_finite_and_keep_their_shapes(name, how):
    _, _, region, inputs = of_zoo(name)
    light = adjust(region, 0.25, [inputs, inputs], how, projection=True)
    assert all(value.isfinite().all() for value in (*light.parameters(), *light.buffers()))
    with torch.no_grad():
        for mine, theirs in zip(light(*inputs), region(*inputs), strict=True):
            if isinstance(theirs, torch.Tensor):
                assert mine.shape == theirs.shape
                assert mine.isfinite().all()
    assert any(not torch.equal(mine, theirs) for mine, theirs in pairs_of(light, region, name)) == (how != "select")


def pairs_of(light, region, name):
    plain = derived(region, 0.25)[0]
    return zip((*light.parameters(), *light.buffers()), (*plain.parameters(), *plain.buffers()), strict=True)


LOW_RANK = {  # everything behind the first layer lives in a few channels: the rest repeat them
    "linear": ((4, 6), lambda: (nn.Linear(6, 6), nn.Linear(6, 32), nn.Linear(32, 5))),
    "conv1d": ((4, 6, 20), lambda: (nn.Conv1d(6, 6, 1), nn.Conv1d(6, 32, 3, 2, 1), nn.Conv1d(32, 5, 3, dilation=2))),
    "conv2d": ((2, 3, 9, 8), lambda: (
        nn.Conv2d(3, 3, 1), nn.Conv2d(3, 32, (3, 2), (1, 2), (1, 0)), nn.Conv2d(32, 5, 3, padding="same"))),
    "conv3d": ((2, 2, 5, 4, 6), lambda: (nn.Conv3d(2, 2, 1), nn.Conv3d(2, 32, 2), nn.Conv3d(32, 3, 2, bias=False))),
    "conv_transpose1d": ((4, 6, 11), lambda: (
        nn.Conv1d(6, 6, 1), nn.Conv1d(6, 32, 3), nn.ConvTranspose1d(32, 5, 4, 2, 1, dilation=2))),
    "conv_transpose2d": ((2, 3, 5, 6), lambda: (
        nn.Conv2d(3, 3, 1), nn.Conv2d(3, 32, 1), nn.ConvTranspose2d(32, 4, 3, (2, 1), (1, 0), output_padding=(1, 0)))),
    "groups": ((4, 6, 20), lambda: (nn.Conv1d(6, 6, 1), nn.Conv1d(6, 32, 3), nn.Conv1d(32, 6, 3, groups=2))),
    "transposed groups": ((4, 6, 9), lambda: (
        nn.Conv1d(6, 6, 1), nn.Conv1d(6, 32, 1), nn.ConvTranspose1d(32, 6, 3, 2, groups=2))),
}  # fmt: skip


@pytest.mark.parametrize("case", LOW_RANK)
def test_the_fit_recovers_the_answer_where_the_kept_channels_carry_it_all(case, monkeypatch):
    monkeypatch.setattr("dslify.inherit.RIDGE", 1e-9)
    shape, layers = LOW_RANK[case]
    model = sequence(*layers())
    middle, groups = model[1], getattr(model[2], "groups", 1)
    with torch.no_grad():  # the channels of each group are multiples of its first two, plus something
        weight = middle.weight.unflatten(0, (groups, -1))
        mix = torch.rand(weight.shape[1], 2) + torch.eye(weight.shape[1], 2)
        middle.weight.copy_(torch.einsum("om,gm...->go...", mix, weight[:, :2]).flatten(0, 1))
    region, inputs = region_of(model, "0", torch.randn(shape))
    batches = inputs_of(region, inputs)
    unseen = inputs_of(region, inputs, seed=1)
    assert error(adjust(region, 0.25, [], "select"), region, unseen) > 0.01
    light = adjust(region, 0.25, batches, "fit")
    assert error(light, region, unseen) < 1e-9


def test_patches_are_what_a_layer_reads():
    for shape, layers in LOW_RANK.values():
        region, inputs = region_of(sequence(*layers()), "0", torch.randn(shape))
        walk = fx.Interpreter(region, garbage_collect_values=False)
        with torch.no_grad():
            walk.run(*inputs, enable_io_processing=False)
            for layer in find_layers(region):
                x, y = walk.env[layer.x], walk.env[layer.node]
                at = torch.randperm(y.numel() // y.shape[layer.axis])[:30]
                found = torch.einsum("rgf,gfo->rgo", patches(layer, x, y, at), layer.matrices()).flatten(1)
                found = found if layer.bias is None else found + layer.bias
                expected = y.movedim(layer.axis, -1).flatten(0, -2)[at]
                assert torch.allclose(found, expected, atol=1e-5)


def test_a_rescaled_output_keeps_the_norm_of_its_weights():
    layers = (nn.Conv1d(3, 6, 1), nn.Conv1d(6, 32, 3), nn.ReLU(), nn.ConvTranspose1d(32, 32, 4, 2), nn.Conv1d(32, 5, 3))
    region, _ = region_of(sequence(*layers), "0", torch.randn(2, 3, 20))
    light, axes, kept, projected = derived(region, 0.25, False)
    before = {layer.node.name: layer.matrices().norm(dim=1).flatten() for layer in find_layers(light)}
    adjusted(light, region, axes, kept, projected, [], "rescale")
    whole = {layer.node.name: layer for layer in find_layers(region)}
    last = list(whole)[-1]
    for layer in find_layers(light):
        norms = whole[layer.node.name].matrices().norm(dim=1).flatten()
        mine = layer.matrices().norm(dim=1).flatten()
        assert (torch.isin((mine * 1e4).round(), (norms * 1e4).round())).all()
    assert (whole[last].matrices().norm(dim=1).flatten() > 1.5 * before[last]).all()


def test_statistics_are_those_of_the_full_path():
    layers = (
        nn.Conv1d(3, 6, 1), nn.Conv1d(6, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ELU(),
        nn.Conv1d(32, 48, 3, groups=2), nn.ELU(), nn.Conv1d(48, 5, 3),
    )  # fmt: skip
    region, inputs = region_of(sequence(*layers), "0", torch.randn(4, 3, 20))
    batches = inputs_of(region, inputs)
    with torch.no_grad():
        wanted = torch.cat([region(*batch)[0] for batch in batches])
        for how, close in (("select", False), ("statistics", True)):
            light = adjust(region, 0.25, batches, how)
            found = torch.cat([light(*batch)[0] for batch in batches])
            for moment in (torch.mean, torch.std):
                mine, theirs = moment(found, (0, 2)), moment(wanted, (0, 2))
                assert torch.allclose(mine, theirs, atol=1e-4) == close


def test_batch_norms_get_the_statistics_of_a_pass_in_training_mode():
    layers = (
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32, affine=False), nn.ReLU(), nn.Conv2d(32, 5, 1),
    )  # fmt: skip
    region, inputs = region_of(sequence(*layers), "0", torch.randn(4, 3, 12, 12))
    batches = inputs_of(region, inputs)
    everything = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    with torch.no_grad():
        train_mode(region)(*everything)  # what the full path has seen is what there is to see
    plain = adjust(region, 0.25, [], "select")
    light = adjust(region, 0.25, batches, "statistics")
    before = {name: value.clone() for name, value in plain.named_buffers()}
    with torch.no_grad():
        train_mode(plain)(*everything)
    assert len(before) == 4
    for name, value in light.named_buffers():
        # in training mode the first one's answer has its biased variance: 1 in 1200
        assert torch.allclose(plain.get_buffer(name), value, rtol=2e-3, atol=1e-3), name
    assert not torch.allclose(before["5.running_var"], light.get_buffer("5.running_var"), rtol=0.1)
    for mine, theirs in zip(light.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs) or mine.shape[0] == 5  # a convolution before a BatchNorm stays as it is


class Normed(nn.Module):
    def __init__(self, normed):
        super().__init__()
        self.front, self.middle, self.last = (
            nn.Conv1d(3, 6, 1),
            normed(nn.Conv1d(6, 32, 3)),
            normed(nn.Conv1d(32, 5, 3)),
        )

    def forward(self, x):
        return self.last(F.elu(self.middle(self.front(x))))


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_is_fitted_through(normed):
    torch.manual_seed(0)
    region, inputs = region_of(Normed(normed).eval(), "front", torch.randn(4, 3, 20))
    batches, unseen = inputs_of(region, inputs), inputs_of(region, inputs, seed=1)
    errors = {how: error(adjust(region, 0.25, batches, how), region, unseen) for how in HOWS}
    layers = find_layers(adjust(region, 0.25, batches, "fit"))
    assert len(layers) == 2
    for layer in layers:  # what the fit found is what is used
        assert layer.magnitude is not None
        assert torch.allclose(layer.effective(), layer.weight, rtol=1e-4)
    assert errors["rescale"] == pytest.approx(errors["select"], rel=1e-3)  # it keeps the norm by itself
    assert errors["fit"] < 0.6 * errors["select"]


class Folded(nn.Module):
    """A layer for each head, heads folded into the batch axis."""

    def __init__(self):
        super().__init__()
        self.front, self.split, self.each, self.last = (nn.Linear(*size) for size in ((3, 6), (6, 32), (8, 8), (32, 5)))

    def forward(self, x):
        batch, time, _ = x.shape
        y = self.split(self.front(x)).view(batch, time, 4, 8).transpose(1, 2).reshape(batch * 4, time, 8)
        return self.last(self.each(y).relu().view(batch, 4, time, 8).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", HOWS)
def test_batches_of_another_size_and_heads_in_the_batch_axis(how):
    torch.manual_seed(0)
    region, _ = region_of(Folded().eval(), "front", torch.randn(2, 7, 3))
    light, axes, kept, projected = derived(region, 0.25, False)
    batches = [(torch.randn(size, 7, 6), size, 7, size * 4) for size in (3, 40)]
    before = error(light, region, batches)
    adjusted(light, region, axes, kept, projected, batches, how)
    assert error(light, region, batches) < (0.5 * before if how == "fit" else 2 * before)
    if how != "rescale":  # which head a row belongs to depends on the batch: this layer is left alone
        plain = derived(region, 0.25, False)[0]
        assert torch.equal(light.get_parameter("each.weight"), plain.get_parameter("each.weight"))


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_dead_channels_and_layers_do_no_harm(seed):
    torch.manual_seed(seed)
    layers = (nn.Conv1d(3, 6, 1), nn.Conv1d(6, 32, 3), nn.ReLU(), nn.Conv1d(32, 32, 3, groups=32), nn.Conv1d(32, 5, 3))
    model = sequence(*layers, nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5))
    with torch.no_grad():
        model[1].weight[:20], model[1].bias[:20] = 0, -1  # never above zero
        model[5].weight.zero_()
        model[5].bias.zero_()
    region, inputs = region_of(model, "0", torch.randn(2, 3, 20))
    for batches in (inputs_of(region, inputs), [tuple(torch.zeros_like(value) for value in inputs)]):
        for how in HOWS:
            light = adjust(region, 0.75, batches, how)
            assert all(value.isfinite().all() for value in (*light.parameters(), *light.buffers())), how
            assert all(value.abs().max() <= 3 * LARGEST for value in light.parameters()), how


def test_a_projection_back_is_fitted_too():
    _, _, region, inputs = of_zoo("wav2vec2")
    light, axes, kept, projected = derived(region, 0.25)
    assert any(not axes.boundaries[at].is_input for at in projected)
    entering = {f"projection{at}" for at in projected if axes.boundaries[at].is_input}
    plain = dict(derived(region, 0.25)[0].named_parameters())
    adjusted(light, region, axes, kept, projected, [inputs], "fit")
    for name, parameter in light.named_parameters():
        if name.startswith("projection"):
            assert torch.equal(parameter, plain[name]) == (name in entering)
            assert parameter.abs().sum(1).min() > 0 or name in entering


def test_a_shallow_path_is_fitted_to_the_deep_one():
    _, _, region, inputs = of_zoo("codec")
    shallow, dropped = shallower(region, 0.5)
    assert dropped
    batches = [inputs]
    errors = [error(adjust(shallow, 1.0, batches, "fit", full), region, batches) for full in (shallow, region)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", ["codec", "resnet18", "wav2vec2"])
def test_looking_at_data_brings_the_answers_nearer(name):
    _, _, region, inputs = of_zoo(name)
    errors = {how: error(adjust(region, 0.25, [inputs], how), region, [inputs]) for how in ("select", "fit")}
    assert errors["fit"] < 0.7 * errors["select"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.front, self.same, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.last(self.same(self.same(self.front(x)).relu()))


@pytest.mark.parametrize("how", HOWS)
def test_a_weight_that_is_read_twice_stays_as_it_is(how):
    """Fitting it to one place would change the other."""
    torch.manual_seed(0)
    region, inputs = region_of(Twice().eval(), "front", torch.randn(4, 3))
    shapes = {name: tuple(value.shape) for name, value in region.named_parameters()}
    light = adjust(region, 0.5, inputs_of(region, inputs), how)
    plain = adjust(region, 0.5, [], "select")
    same = [name for name in shapes if "same" in name]
    assert len(same) == 2
    assert all(torch.equal(light.get_parameter(name), plain.get_parameter(name)) for name in same)


def test_refusals():
    region, inputs = region_of(sequence(nn.Linear(3, 8), nn.Linear(8, 3)), "0", torch.randn(2, 3))
    with pytest.raises(OptionError, match="select, rescale, statistics, fit; got 'guess'"):
        adjust(region, 0.5, [inputs], "guess")
    for how in WITH_DATA:
        with pytest.raises(OptionError, match="got none"):
            adjust(region, 0.5, [], how)
