"""One torch.export program with a branch: both routes after loading, and only one of them computed."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import dslify
from dslify import conditional, pt2_format
from dslify.attempt import quietly
from dslify.errors import ExportError
from dslify.functional import copied
from dslify.programs import ANY, host_graph
from dslify.pt2_format import FACTS, write_aoti, write_pt2
from dslify.switch import DSLayer


class Residual(nn.Module):
    """A residual block on sound, with numbers across the cut and named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 8, 4)
        self.block = nn.Sequential(nn.ELU(), nn.Conv1d(8, 8, 3, padding=1))
        self.mix, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.stem(x)
        batch, channels, time = first.shape
        mixed = self.mix(first + self.block(first)).relu()
        mixed = mixed.view(batch, 2, channels // 2, time).transpose(1, 2).reshape(batch, channels, time)
        return {"map": self.head(mixed), "level": mixed.square().mean((1, 2))}


CPU = torch.profiler.ProfilerActivity.CPU


def sound(batch: int = 1, length: int = 256) -> Tensor:
    return torch.randn(batch, 1, length, generator=torch.Generator().manual_seed(5))


def inserted(model: nn.Module | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    net = dslify.insert(
        model or Residual().eval(), **{"at": "stem", **(options or {"width": 0.5})}, example_inputs=(sound(),)
    )
    for layer in dslify.dsl_layers(net):
        layer.threshold.fill_(0.25)
    return net


def graph_of(net: nn.Module):
    return host_graph(net)[1]


def loaded(path: Path) -> tuple[nn.Module, dict]:
    extra = {FACTS: ""}
    with quietly():
        return torch.export.load(path, extra_files=extra).module(), json.loads(extra[FACTS])


def convolutions(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), torch.profiler.profile(activities=[CPU], acc_events=True) as profile:
        module(x)
    return sum(event.name == "aten::conv1d" for event in profile.events())


def test_both_routes_any_length_and_batch_and_only_the_taken_path_computes(tmp_path: Path):
    net = inserted()
    written = write_pt2(graph_of(net), tmp_path / "net.pt2", batch=ANY)
    assert set(written.errors) == {"full", "light"}
    assert max(written.errors.values()) < 1e-5
    assert written.notes == ("All samples of a call go light, or none.",)
    module, facts = loaded(tmp_path / "net.pt2")
    assert facts["cut"] == "stem"
    assert facts["threshold"] == 0.25
    assert facts["batch"] == "any"
    threshold = module.get_buffer("dsl.threshold")
    assert threshold.item() == 0.25
    for batch, length in ((1, 256), (3, 256), (2, 1000)):
        x = sound(batch, length)
        for way, value in (("light", 1e9), ("full", -1.0)):
            threshold.fill_(value)
            with torch.no_grad(), dslify.route(net, way):
                expected, found = net(x), module(x)
            assert list(found) == ["map", "level"]
            for name, wanted in expected.items():
                torch.testing.assert_close(found[name], wanted)
    threshold.fill_(1e9)
    light = convolutions(module, sound())
    threshold.fill_(-1.0)
    full = convolutions(module, sound())
    with dslify.route(net, "light"):
        assert light == convolutions(net, sound())
    with dslify.route(net, "full"):
        assert full == convolutions(net, sound())


def test_the_threshold_decides_as_in_the_network(tmp_path: Path):
    net = inserted()
    graph = graph_of(net)
    (layer,) = dslify.dsl_layers(net)
    x = torch.cat([sound(), 3 * sound()])
    with torch.no_grad():
        net(x)
    low, high = sorted(layer.paths.score.tolist())
    layer.threshold.fill_((low + high) / 2)
    write_pt2(graph, tmp_path / "net.pt2")
    module, _ = loaded(tmp_path / "net.pt2")
    for one in x.split(1):
        with torch.no_grad():
            expected, found = net(one), module(one)
        torch.testing.assert_close(found, expected)
    assert layer.paths.light_taken is not None


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"to": "block", "light": "identity"}, id="identity: a branch that returns its input"),
        pytest.param({"mode": "gc"}, id="a gate and constants"),
    ],
)
def test_other_light_paths(options: dict, tmp_path: Path):
    class Chain(nn.Sequential):
        pass

    torch.manual_seed(0)
    model = Chain()
    model.stem, model.block = nn.Conv1d(1, 8, 8, 4), nn.Sequential(nn.ELU(), nn.Conv1d(8, 8, 3, padding=1))
    model.pool, model.head = nn.AdaptiveAvgPool1d(1), nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    net = inserted(model.eval(), **options)
    written = write_pt2(graph_of(net), tmp_path / "net.pt2")
    assert max(written.errors.values()) < 1e-5


def test_a_layer_inside_the_full_path_is_a_branch_inside_the_branch(tmp_path: Path):
    net = dslify.insert(inserted(), at="mix", width=0.25, example_inputs=(sound(),))
    written = write_pt2(graph_of(net), tmp_path / "net.pt2")
    assert set(written.errors) == {"full", "light", "dsl", "dsl.full.dsl"}
    assert max(written.errors.values()) < 1e-5
    module, facts = loaded(tmp_path / "net.pt2")
    assert [each["name"] for each in facts["layers"]] == ["dsl", "dsl.full.dsl"]
    assert {name for name, _ in module.named_buffers() if name.endswith("threshold")} == {
        "dsl.threshold", "dsl.full.dsl.threshold",
    }  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.memory, self.head = nn.Conv1d(1, 4, 64, 32), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(self.stem(x).transpose(1, 2))[0])


def test_a_recurrent_layer_stays_one_operator_inside_the_branch(tmp_path: Path):
    written = write_pt2(graph_of(inserted(Recurrent().eval())), tmp_path / "net.pt2", batch=ANY)
    assert max(written.errors.values()) < 1e-5
    module, _ = loaded(tmp_path / "net.pt2")
    graphs = [each for each in module.modules() if isinstance(each, fx.GraphModule)]
    assert sum("gru" in str(node.target) for each in graphs for node in each.graph.nodes) == 2


def test_an_axis_that_torch_export_fixes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graph = graph_of(inserted(Recurrent().eval()))  # captured for one length
    monkeypatch.setattr(pt2_format, "asked", lambda *_: [{2}])
    assert write_pt2(graph, tmp_path / "net.pt2").notes == ("Axis 2 of x is fixed to 256.",)


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graph = graph_of(inserted())
    honest = pt2_format.conditional_program
    for part in ("full.head.weight", "switch.out.bias"):

        def other(given, *rest, part=part):
            wrong = copied(given)
            wrong.get_submodule("dsl").get_parameter(part).data.mul_(1.01).add_(0.01)
            return honest(wrong, *rest)

        monkeypatch.setattr(pt2_format, "conditional_program", other)
        with pytest.raises(ExportError, match=r"The .pt2 file differs from the network on the \w+ route by"):
            write_pt2(graph, tmp_path / "net.pt2")
        assert not list(tmp_path.iterdir())


def test_paths_of_different_shapes_are_refused(tmp_path: Path):
    graph = graph_of(inserted())

    class Longer(nn.Module):
        def forward(self, *inputs):
            return tuple(torch.cat([value, value], -1) for value in path(*inputs))

    (layer,) = (module for module in graph.modules() if isinstance(module, DSLayer))
    path = layer.light
    layer.light = Longer()
    with pytest.raises(ExportError, match=r"The light path gives float32 1x2x.* where the full path gives .*--split"):
        conditional.conditional_program(graph)


def test_aoti_compiles_the_branch(tmp_path: Path):
    net = inserted(
        nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.Linear(16, 8), nn.Linear(8, 4)).eval(), at="1", width=0.5
    )
    path = tmp_path / "net.pt2"
    with torch._inductor.config.patch({"cpp.simdlen": 1, "aot_inductor.compile_wrapper_opt_level": "O0"}):
        written = write_aoti(graph_of(net), path)
    assert set(written.errors) == {"full", "light"}
    assert max(written.errors.values()) < 1e-5
    with quietly():
        package = torch._inductor.aoti_load_package(str(path))
    assert json.loads(package.get_metadata()["threshold"]) == 0.25
    x = sound()
    for way, value in (("light", 1e9), ("full", -1.0)):
        package.load_constants({"dsl.threshold": torch.tensor(value)}, check_full_update=False)
        with torch.no_grad(), dslify.route(net, way):
            torch.testing.assert_close(package(x), net(x))


def test_aoti_without_a_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.Linear(16, 4)).eval()
    with pytest.raises(ExportError, match=r"needs a C\+\+ compiler, and none was found; install g\+\+"):
        write_aoti(graph_of(inserted(model, at="1", width=0.5)), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
