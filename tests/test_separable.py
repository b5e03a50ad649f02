"""Light paths of depthwise and pointwise convolutions, and light paths that inherit nothing."""

import json
import math
from functools import cache

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import dslify
from dslify.errors import OptionError
from dslify.request import Request
from dslify.separable import nearest, separate
from dslify.unlearned import randomise
from tests.zoo import ZOO


def graph_of(*layers: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """The layers as one graph over ATen, with parameters of its own."""
    return torch.export.export(nn.Sequential(*layers).eval(), (x,), strict=False).module()


def outer_products(outputs, inputs, kernel, seed=0):
    """The weight of a convolution that is exactly a depthwise and a pointwise one."""
    generator = torch.Generator().manual_seed(seed)
    depthwise = torch.randn(1, inputs, *kernel, generator=generator, dtype=torch.float64)
    return depthwise * torch.randn(outputs, inputs, *[1] * len(kernel), generator=generator, dtype=torch.float64)


CONVOLUTIONS = {
    "strided and padded": (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3}, (2, 6, 21)),
    "dilated, same": (nn.Conv1d, {"kernel_size": 3, "dilation": 2, "padding": "same"}, (2, 6, 20)),
    "without bias": (nn.Conv1d, {"kernel_size": 5, "bias": False}, (2, 6, 20)),
    "two axes": (nn.Conv2d, {"kernel_size": (3, 5), "stride": (1, 2), "padding": (1, 0)}, (2, 6, 9, 12)),
    "three axes": (nn.Conv3d, {"kernel_size": (2, 3, 2), "padding": 1}, (2, 6, 4, 5, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_that_are_outer_products_keep_their_answers(name):
    kind, options, shape = CONVOLUTIONS[name]
    layer = kind(6, 8, **options).double()
    weight = outer_products(8, 6, layer.weight.shape[2:])
    layer.weight.data.copy_(weight)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    graph = graph_of(layer, x=x)
    before = sum(parameter.numel() for parameter in graph.parameters())
    with torch.no_grad():
        expected = layer(x)
        assert separate(graph) == ("0.weight",)
        torch.testing.assert_close(graph(x), expected, rtol=1e-10, atol=1e-10)
    taps = math.prod(weight.shape[2:])
    after = sum(parameter.numel() for parameter in graph.parameters())
    assert before - after == 8 * 6 * taps - (6 * taps + 8 * 6)


def test_no_outer_product_is_nearer():
    weight = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    depthwise, pointwise = (part.requires_grad_() for part in nearest(weight))
    error = (depthwise.transpose(0, 1) * pointwise - weight).square().sum()
    error.backward()
    for part in (depthwise, pointwise):  # nothing to gain in any direction
        assert part.grad.abs().max() < 1e-5
    channels = torch.linalg.svdvals(weight.double().transpose(0, 1))  # of all stationary points, the lowest
    assert error.item() == pytest.approx(channels[:, 1:].square().sum().item(), rel=1e-5)
    assert torch.allclose(depthwise.flatten(1).norm(dim=1), pointwise.flatten(1).norm(dim=0), rtol=1e-5)


class Tied(nn.Module):
    """One weight for two convolutions, one that is in groups already, one with a kernel of 1, one for one channel."""

    def __init__(self):
        super().__init__()
        self.twice, self.grouped = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, groups=2)
        self.point, self.one = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 1, 3)
        self.plain = nn.Conv1d(4, 4, 3)

    def forward(self, x):
        x = self.grouped(F.relu(self.twice(self.twice(x))))
        return self.one(self.plain(self.point(x)))


def test_what_does_not_shrink_or_is_read_twice_stays():
    x = torch.randn(1, 4, 30)
    graph = graph_of(Tied(), x=x)
    assert separate(graph) == ("0.plain.weight",)
    assert graph(x).shape == (1, 1, 20)


AT, X = ZOO["autoencoder"].at, ZOO["autoencoder"].batch(1)


@cache
def inserted(width=0.5, **options):
    return dslify.insert(ZOO["autoencoder"].build(), AT, width, (X,), projection=False, **options)


def sound():
    return torch.randn(24, *X.shape[1:], generator=torch.Generator().manual_seed(0))


def test_a_separable_light_path_is_stored_costed_and_trained(tmp_path):
    net = inserted(light="separable")
    (layer,) = dslify.dsl_layers(net)
    plan = layer.plan
    kernels = {name: value.shape[2] for name, value in layer.light.named_parameters() if value.dim() == 3}
    assert plan.separated
    assert all(kernels[name] == 1 for name in plan.separated)
    held = layer.light.state_dict()
    assert {row.name: row.after for row in plan.tensors} == {
        row.name: tuple(held[row.name].shape) for row in plan.tensors
    }
    rows = {row.name: row for row in dslify.cost(net)}
    assert (plan.params["light"], plan.macs["light"]) == (rows["light"].params, rows["light"].macs)
    dense = {row.name: row for row in dslify.cost(inserted())}["light"]
    assert rows["light"].macs < 0.7 * dense.macs
    path = dslify.save(net, tmp_path / "net.dsl")
    first, fitted = dslify.load(path), dslify.load(path)
    assert dslify.dsl_layers(first)[0].plan == plan
    with torch.no_grad(), dslify.route(net, "light"), dslify.route(first, "light"):
        assert torch.equal(net(X), first(X))
    plain, better = (
        dslify.finetune(one, sound(), steps=40, switch_steps=0, fit=fit, progress=False)
        for one, fit in ((first, False), (fitted, True))
    )
    assert better.fitted
    assert better.phases[0].first("light") < 0.9 * plain.phases[0].first("light")
    assert plain.phases[0].last("light") < plain.phases[0].first("light")


def test_a_cost_is_reached_by_what_the_separable_path_costs():
    rows = {row.name: row for row in dslify.cost(inserted(None, light="separable", cost=0.1))}
    share = rows["light"].macs / rows["full"].macs
    assert 0.06 < share <= 0.1


def test_random_weights_are_new_of_torch_s_size_and_the_seed_s():
    net = inserted(init="random")
    inherited, light = (dslify.dsl_layers(one)[0].light for one in (inserted(), net))
    random = {name: value.clone() for name, value in light.named_parameters() if value.dim() > 1}
    assert len(random) == 5
    for name, value in random.items():
        assert not torch.equal(value, inherited.get_parameter(name)), name
        transposed = name.startswith("decoder") and value.shape[2] > 1
        most = (value[:, 0] if transposed else value[0]).numel() ** -0.5
        assert 0.8 * most < value.abs().max() <= most, name
    for seed, alike in ((1, False), (0, True)):
        randomise(light, seed)
        found = [torch.equal(value, random[name]) for name, value in light.named_parameters() if value.dim() > 1]
        assert found == [alike] * len(found)
    plan = dslify.dsl_layers(net)[0].plan
    assert plan.init == "random"
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with torch.no_grad(), dslify.route(inserted(), "full"), dslify.route(net, "full"):
        assert torch.equal(inserted()(X), net(X)), "the full path's weights are untouched"
    assert not dslify.finetune(net, sound(), steps=1, switch_steps=0, progress=False).fitted


def test_random_weights_leave_norms_as_new_ones_are():
    layers = (nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), weight_norm(nn.Conv1d(4, 4, 3)))
    for norm in layers[1:3]:
        for value in (*norm.parameters(), *norm.buffers()):
            value.data.add_(3)
    x = torch.randn(2, 1, 30)
    graph = graph_of(*layers, x=x)
    randomise(graph, 0)
    held = {name: value for name, value in graph.state_dict().items() if name[0] in "12"}
    wanted = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    for name, value in held.items():
        if (last := name.rpartition(".")[2]) in wanted:
            assert value.unique().tolist() == [wanted[last]], name
    assert len(held) == 7
    last = {name.removeprefix("3."): value for name, value in graph.state_dict().items() if name.startswith("3.")}
    direction = last["parametrizations.weight.original1"]
    norms = last["parametrizations.weight.original0"].flatten()
    torch.testing.assert_close(norms, direction.flatten(1).norm(dim=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "zeros"}, "init is one of inherited, random"),
        ({"init": "random", "light": "exit"}, "init says how a copy begins, and light 'exit' is no copy"),
        ({"latency": 0.2, "light": "separable"}, "latency looks for a narrow copy"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(OptionError, match=words):
        Request(AT, **options)
