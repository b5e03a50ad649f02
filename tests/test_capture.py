"""Capture: what becomes dynamic, what is guarded, and that nothing is shared or left changed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dslify
from dslify.capture import capture, scope_inputs
from dslify.errors import CaptureError, CutError, OptionError
from dslify.functional import functionalise, writes_in_place
from dslify.guards import Guards

CLOSE = 1e-6  # relative: same kernels, other batch


def test_batch_and_length_vary_for_sound():
    model = nn.Sequential(nn.Conv1d(1, 4, 5, 2), nn.ELU(), nn.Conv1d(4, 2, 3))
    graph = capture(model, (torch.randn(1, 1, 400),))
    assert graph.dynamic == "batch and length vary"
    for shape in ((1, 1, 400), (3, 1, 400), (2, 1, 123)):
        x = torch.randn(shape)
        torch.testing.assert_close(graph.module(x), model(x), rtol=CLOSE, atol=CLOSE)
    with pytest.raises(OptionError, match=r"arg0_1 == 1.*got 2x3x400"):
        graph.module(torch.randn(2, 3, 400))


def test_images_keep_their_size():
    graph = capture(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 16, 16),))
    assert graph.dynamic == "batch varies, other axes are fixed"
    assert graph.module(torch.randn(5, 3, 16, 16)).shape == (5, 4, 14, 14)
    with pytest.raises(OptionError, match="arg0_2 == 16"):
        graph.module(torch.randn(5, 3, 18, 16))


class OneSample(nn.Module):
    def forward(self, x):
        return F.linear(x.reshape(1, 6), torch.ones(2, 6))


def test_what_cannot_vary_is_said():
    graph = capture(OneSample(), (torch.randn(1, 6),))
    assert graph.dynamic == "every axis is fixed at the example's size"


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        h = self.encoder(x)
        return h[: int(h.sum().abs()) % 2 + 1]


def test_a_forward_that_depends_on_data_is_refused_and_cut_inside_its_scope():
    model = DataDependent().eval()
    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match="--scope encoder"):
        capture(model, (x,))
    net = dslify.insert(model, "encoder.0", 0.5, (x,), scope="encoder")
    assert type(net) is DataDependent
    assert torch.equal(net(x), model(x))
    assert net.encoder[0] if isinstance(net.encoder, nn.Sequential) else len(dslify.dsl_layers(net)) == 1


@pytest.mark.parametrize(("scope", "words"), [("decoder", "no such submodule; the top ones are encoder"), ("", "")])
def test_scope_must_exist(scope, words):
    if not scope:
        assert scope_inputs(nn.Identity(), None, (1,))[1] == (1,)
        return
    with pytest.raises(CaptureError, match=words):
        scope_inputs(DataDependent(), scope, (torch.randn(2, 4),))


def test_wrong_example_is_one_sentence():
    with pytest.raises(CaptureError, match=r"does not run on the example input 1x7.*--input") as caught:
        capture(nn.Linear(4, 2), (torch.randn(1, 7),))
    assert "\n" not in str(caught.value)


class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        y = self.a(x)
        z = y.view(y.shape[0], 8, -1)
        y.relu_()
        return self.b(z) + y


def test_in_place_operators_become_functional_only_where_no_alias_sees_them():
    model = Inplace().eval()
    x = torch.randn(2, 2, 20)
    graph = capture(model, (x,))
    assert torch.equal(graph.module(x), model(x))
    assert [node.name for node in graph.module.graph.nodes if writes_in_place(node)] == ["relu_"]
    with pytest.raises(CutError, match="in place"):
        dslify.insert(model, "a", 0.5, (x,))
    plain = capture(nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(inplace=True), nn.Conv1d(8, 2, 1)), (x,))
    assert not any(writes_in_place(node) for node in plain.module.graph.nodes)
    assert functionalise(plain.module.graph) == ()


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    module = capture(model, (torch.randn(2, 4),)).module
    assert sorted(tuple(p.shape) for p in module.parameters()) == [(4,), (4,), (4, 4)]
    used = {node.target for node in module.graph.nodes if node.op == "get_attr" and "weight" in node.target}
    assert len({id(module.get_parameter(target)) for target in used}) == 1
    assert not {id(p) for p in module.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "line", ["__import__('os').getcwd()", "arg0_0.real", "open('x')", "(lambda: 1)()", "nobody == 1"]
)
def test_guards_from_a_file_evaluate_arithmetic_only(line):
    with pytest.raises(OptionError, match="cannot be evaluated"):
        Guards([line])(torch.zeros(2))
    Guards(["arg0_0 // 2 == 1", "min(arg0_0, 3) >= 2 and not arg0_0 == 5"])(torch.zeros(2))


def test_cut_points_have_costs_shapes_and_reasons():
    model = nn.Sequential(nn.Conv1d(1, 8, 4), nn.ReLU(), nn.Conv1d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 99, 3))
    points = {point.path: point for point in dslify.cut_points(model, (torch.randn(2, 1, 102),))}
    assert points["0"].shape == ("*", 8, 99)
    assert points["0"].base_macs == 8 * 4 * 99
    assert points["0"].region_macs == 8 * 4 * 99 + 4 * 99 * 3
    assert points["2"].base_params == 8 * 4 + 8 + 8 * 4 + 4
    assert points["4"].reason == "nothing comes after it"
    assert list(points) == ["0", "1", "2", "3", "4"]


class SliceWrite(nn.Module):
    """Writes into slices before and behind the cut: nothing reads the value of the writing node itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 16, 1), nn.Conv1d(16, 4, 1)

    def forward(self, x):
        y = self.a(x)
        y[:, :2] = y[:, :2] * 3
        z = self.b(F.relu(y))
        z[:, 4:] = z[:, 4:] * 0.5
        return self.c(z)


def test_writes_into_slices_stay_with_the_memory_they_write():
    model = SliceWrite().eval()
    x = torch.randn(3, 2, 30)
    net = dslify.insert(model, "relu", 0.5, (x[:1],))
    with torch.no_grad():
        with dslify.route(net, "full"):
            assert torch.equal(net(x), model(x))
        with dslify.route(net, "light"):
            assert net(x).shape == model(x).shape
    assert list(dslify.dsl_layers(net)[0].plan.ledger) == ["aten.copy_.default"]
    with pytest.raises(CutError, match="writes into a value in place"):
        dslify.insert(model, "b", 0.5, (x[:1],))
