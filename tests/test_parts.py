"""A network as three graphs: together they are the network, on every way through its layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import dslify
from dslify.checked import TOLERANCE, case, error, stretched
from dslify.errors import ExportError
from dslify.parts import parts_of
from dslify.programs import ANY, Programs, example_of, free_axes, host_graph, programs_of
from dslify.written import routed, trials
from tests.cascades import NETWORKS
from tests.conftest import Inserted
from tests.zoo import ZOO


class Gathering(nn.Module):
    """A number that is no size of the cut crosses it, an input is read again, and an output has a taken name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Conv1d(2, 8, 4, 4), nn.Conv1d(8, 2, 1)
        self.middle = nn.Conv1d(8, 8, 3, 1, 1)

    def forward(self, sound: Tensor) -> dict[str, Tensor]:
        length = sound.shape[-1]
        value = self.last(self.middle(self.inner(sound)).relu())
        up = value.repeat_interleave(4, 2)[..., : length // 2]
        return {"sound": up + sound[..., : length // 2], "loud": value.square().mean((1, 2))}


def gathering() -> fx.GraphModule:
    torch.manual_seed(0)
    net = dslify.insert(Gathering().eval(), "inner", 0.5, (torch.randn(2, 2, 64),))
    return host_graph(net)[1]


def in_parts(programs: Programs, graph: fx.GraphModule, batch: int) -> list[float]:
    """The errors of the exported programs, routed by the host."""

    def call(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part = programs
        *path, last = name.split("_")
        for step in path:
            part = getattr(part, step)
        return getattr(part, last).exported.module()(*inputs)

    found = []
    for trial in trials(graph, batch):
        answers = routed(programs, trial.inputs, call, trial.thresholds)
        found.append(error([answer.detach().numpy() for answer in answers], trial.outputs))
    return found


def test_the_graphs_of_every_network_are_that_network(inserted: Inserted):
    graph = host_graph(inserted.net(0.1))[1]
    parts = parts_of(graph)
    inputs = example_of(graph, 2, seed=3)
    with torch.no_grad():
        masked, score, *passed = parts.front(*inputs)
        for way, part in (("light", parts.light), ("full", parts.full)):
            found = part(masked, *passed)
            wanted = case(graph, way, inputs)
            assert error([value.numpy() for value in found], wanted.outputs) <= TOLERANCE
            assert torch.allclose(parts.layer.paths.score, score, rtol=1e-5)
    assert len(parts.outputs) == len(wanted.outputs)


def test_parts_share_their_weights_with_the_network():
    graph = gathering()
    parts = parts_of(graph)
    own = {id(value) for value in graph.parameters()}
    assert all(id(value) in own for part in (parts.front, parts.light, parts.full) for value in part.parameters())


def test_names_are_the_forward_s_own_unless_they_are_taken():
    parts = parts_of(gathering())
    assert parts.inputs == ("sound",)
    assert parts.outputs == ("output_0", "output_1"), "the key 'sound' is the name of the input"
    parts = parts_of(host_graph(dslify.insert(ZOO["unet"].build(), "down2", 0.5, (ZOO["unet"].batch(1),)))[1])
    assert set(parts.outputs) == {"mask", "level"}


@pytest.mark.parametrize(("batch", "tried"), [(ANY, (1, 3)), (2, (2,))])
def test_numbers_that_cross_are_reckoned_from_sizes(batch: int, tried: tuple[int, ...]):
    graph = gathering()
    programs = programs_of(graph, batch)
    for size in tried:
        assert max(in_parts(programs, graph, size)) <= TOLERANCE
    longer = stretched(graph, tried[0])
    assert longer is not None
    assert longer[0].shape[2] != 64
    with torch.no_grad():
        masked, _, *passed = programs.front.exported.module()(*longer)
        found = programs.full.exported.module()(masked, *passed)
    assert error([value.numpy() for value in found], case(graph, "full", longer).outputs) <= TOLERANCE


def test_sizes_are_fixed_when_asked():
    graph = gathering()
    assert free_axes(graph) == (frozenset({0, 2}),)
    programs = programs_of(graph, 2, dynamic=False)
    assert programs.front.shapes == ({},)
    assert max(in_parts(programs, graph, 2)) <= TOLERANCE


@pytest.mark.parametrize("name", list(NETWORKS))
def test_further_layers_are_programs_of_their_own(name: str):
    make, first, second = NETWORKS[name]
    x = torch.randn(2, 1, 64)
    net = dslify.insert(make(), first[0], 0.5, (x,), to=first[1])
    graph = host_graph(dslify.insert(net, second[0], 0.5, (x,), to=second[1]))[1]
    programs = programs_of(graph)
    assert isinstance(programs.full, Programs)
    assert isinstance(programs.light, Programs) == (name == "in a row")
    assert max(in_parts(programs, graph, 1)) <= TOLERANCE


def test_a_network_without_a_layer_is_refused():
    with pytest.raises(ExportError, match="holds no Dynamic Switch Layer"):
        host_graph(nn.Linear(2, 2))
