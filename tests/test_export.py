"""One ONNX file: equal to the network on every route, only the taken branch runs, nothing wrong is ever written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn
from typer.testing import CliRunner

import dslify
from dslify import onnx_graph
from dslify.checked import TOLERANCE, Case, case, error
from dslify.cli import app
from dslify.errors import ExportError, OptionError
from dslify.onnx_graph import with_thresholds
from dslify.onnx_session import session
from dslify.programs import example_of, host_graph
from recipes.keyword_spotting.network import KeywordNetwork
from tests import cascades, zoo
from tests.zoo import ZOO, Network

FORCED = {"light": 1e9, "full": -1.0}
PUBLIC = {
    **{name: ZOO[name] for name in ("codec", "resnet18")},  # of the others as many blocks as a cut needs
    "vit": Network(lambda: zoo.vit(2), ZOO["vit"].shape, "blocks.0"),
    "wav2vec2": Network(lambda: zoo.wav2vec2(2), ZOO["wav2vec2"].shape, "encoder.transformer.layers.0"),
    "keyword": Network(lambda: KeywordNetwork(4), (1, 1, 16000), "blocks.1"),
}
_exports: dict[str, tuple[nn.Module, dslify.Exported]] = {}


class Recurrent(nn.Module):
    """(batch, 2, time) -> (batch, 3, time): one of each kind behind the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 8, num_layers=2, bias=False)
        self.rnn = nn.RNN(8, 6, nonlinearity="relu", bidirectional=True)
        self.last = nn.Linear(12, 3)

    def forward(self, sound: Tensor) -> Tensor:
        value = self.second(self.first(sound).relu()).relu().transpose(1, 2)
        value = self.rnn(self.gru(self.lstm(value)[0].transpose(0, 1))[0])[0]
        return self.last(value).permute(1, 2, 0)


def small() -> nn.Module:
    torch.manual_seed(0)
    tail = [nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 3, padding=1)]
    return nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), *tail).eval()


def answer(path: Path, inputs: Mapping[str, np.ndarray] | Case, **thresholds: float) -> list[np.ndarray]:
    model = onnx.load(path)
    runner = session(with_thresholds(model, thresholds))
    if isinstance(inputs, Case):
        inputs = dict(zip((each.name for each in model.graph.input), inputs.inputs, strict=True))
    found: list[np.ndarray] = runner.run(None, dict(inputs))
    return found


@pytest.fixture(params=list(PUBLIC))
def public(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, dslify.Exported]:
    """A public network with a layer, and what export() made of it for any number of samples."""
    if request.param not in _exports:
        chosen = PUBLIC[request.param]
        net = dslify.insert(chosen.build(), chosen.at, 0.1, (chosen.batch(1),), scope=chosen.scope)
        path = tmp_path_factory.mktemp("onnx") / f"{request.param}.onnx"
        _exports[request.param] = net, dslify.export(net, path, batch="any")
    return _exports[request.param]


def test_the_file_equals_the_network_on_both_routes_and_runs_one_branch(
    public: tuple[nn.Module, dslify.Exported], tmp_path: Path
):
    net, written = public
    graph = host_graph(net)[1]
    (path,) = written.files
    assert set(written.errors) == {"full", "light", "mixed"}
    assert max(written.errors.values()) <= TOLERANCE
    assert [part.part for part in written.parts] == ["front", "light", "full"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    for way, other in (("light", "full"), ("full", "light")):
        wanted = case(graph, way, example_of(graph, 2, seed=7))
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / way)
        forced = with_thresholds(model, {"threshold": FORCED[way]}).SerializeToString()
        runner = onnxruntime.InferenceSession(forced, options, providers=["CPUExecutionProvider"])
        found = runner.run(None, {model.graph.input[0].name: wanted.inputs[0]})
        assert error(found, wanted.outputs) <= TOLERANCE
        events = json.loads(Path(runner.end_profiling()).read_text())
        ran = [event["name"] for event in events if event["cat"] == "Node"]
        assert any(name.startswith(f"{way}/") for name in ran)
        assert any(name.startswith("front/") for name in ran)
        assert not any(name.startswith(f"{other}/") for name in ran)


def test_the_file_tells_what_it_is_and_where_no_machine_is_named(public: tuple[nn.Module, dslify.Exported]):
    net, written = public
    model = onnx.load(written.files[0])
    known = {each.key: each.value for each in model.metadata_props}
    layer = dslify.dsl_layers(net)[0]
    notes = host_graph(net)[1].meta["dslify"]
    assert known["dslify.version"] == dslify.__version__
    assert known["dslify.torch"] == torch.__version__
    assert (known["dslify.cut"], json.loads(known["dslify.scale"])) == (notes["at"], layer.scale.tolist())
    assert json.loads(known["dslify.layers"])[0]["initializers"] == ["threshold"]
    assert "threshold" in model.doc_string
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert all(out.type.tensor_type.shape.dim for out in model.graph.output)
    text = model.SerializeToString()
    assert str(Path(dslify.__file__).parents[1]).encode() not in text
    assert b"stack_trace" not in text


def test_the_real_threshold_decides_as_the_network_does_and_several_samples_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    net = dslify.insert(small(), "1", 0.5, (torch.randn(1, 2, 32),))
    graph = host_graph(net)[1]
    (layer,) = dslify.dsl_layers(net)
    inputs = [example_of(graph, 1, seed)[0] * 3.0**seed for seed in range(4)]
    scores = []
    for x in inputs:
        net(x)
        scores.append(layer.paths.score.item())
    layer.threshold.fill_(float(np.mean(sorted(scores)[1:3])))
    file = dslify.save(net, tmp_path / "net.dsl")
    path = tmp_path / "net.onnx"
    written = dslify.export(file, path, batch="any")
    assert written.files == (path,)
    names = ["light" if score < layer.threshold else "full" for score in scores]
    assert set(names) == {"light", "full"}
    for x, way in zip(inputs, names, strict=True):
        assert error(answer(path, {"input": x.numpy()}), case(graph, way, (x,)).outputs) <= TOLERANCE
        assert error(answer(path, {"input": x.numpy()}), case(graph, "mixed", (x,)).outputs) <= TOLERANCE
        other = case(graph, "full" if way == "light" else "light", (x,)).outputs
        assert error(answer(path, {"input": x.numpy()}), other) > TOLERANCE, "the routes cannot be told apart"
    light = torch.cat([x for x, way in zip(inputs, names, strict=True) if way == "light"])
    mixed = torch.cat(inputs)
    assert error(answer(path, {"input": light.numpy()}), case(graph, "light", (light,)).outputs) <= TOLERANCE
    assert error(answer(path, {"input": mixed.numpy()}), case(graph, "full", (mixed,)).outputs) <= TOLERANCE


def test_recurrent_layers_are_one_operator_each_in_a_branch(tmp_path: Path):
    torch.manual_seed(0)
    net = dslify.insert(Recurrent().eval(), "first", 0.5, (torch.randn(1, 2, 20),))
    graph, path = host_graph(net)[1], tmp_path / "net.onnx"
    dslify.export(net, path, batch="any")
    for branch in (attribute.g for attribute in onnx.load(path).graph.node[-1].attribute):
        kinds = [node.op_type for node in branch.node]
        assert [kinds.count(kind) for kind in ("LSTM", "GRU", "RNN", "Loop", "Gather")] == [2, 2, 1, 0, 0]
    for way in ("light", "full"):  # another length than the recorded one, in more samples
        wanted = case(graph, way, (torch.randn(3, 2, 33, generator=torch.Generator().manual_seed(1)),))
        assert error(answer(path, wanted, threshold=FORCED[way]), wanted.outputs) <= TOLERANCE


def test_further_layers_branch_inside_a_branch(tmp_path: Path):
    net = cascades.cascade("in a row")
    graph, path = host_graph(net)[1], tmp_path / "net.onnx"
    written = dslify.export(net, path, dynamic=False)
    first, second = (layer for layer in dslify.dsl_layers(net))
    ways = {"full", "light", "mixed"}
    assert len(set(written.errors) - ways) == 2, "each layer alone on its light path too"
    assert max(written.errors.values()) <= TOLERANCE
    known = {each.key: each.value for each in onnx.load(path).metadata_props}
    inner = json.loads(known["dslify.layers"])[1]["initializers"]
    assert inner == ["light.threshold", "full.threshold"]
    first.route, second.route = "full", "light"
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = graph(x).numpy()
    forced = {"threshold": FORCED["full"], **dict.fromkeys(inner, FORCED["light"])}
    assert error(answer(path, Case("full", (x.numpy(),), (wanted,)), **forced), [wanted]) <= TOLERANCE


def test_weights_behind_both_paths_are_stored_once(tmp_path: Path):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 256)]
    model = nn.Sequential(*small()[:4], *head).eval()
    net = dslify.insert(model, "1", 0.5, (torch.randn(1, 2, 32),), to="3")
    written = dslify.export(net, tmp_path / "net.onnx", dynamic=False)
    tail = 4 * 256 * 1024
    assert tail < written.files[0].stat().st_size < 1.4 * tail
    assert sum(part.bytes for part in written.parts) > 2 * tail


def test_dictionaries_gates_and_fixed_sizes(tmp_path: Path):
    chosen = ZOO["unet"]
    net = dslify.insert(chosen.build(), chosen.at, 0.5, (chosen.batch(1),))
    model = onnx.load(dslify.export(net, tmp_path / "unet.onnx", dynamic=False).files[0])
    assert {out.name for out in model.graph.output} == {"mask", "level"}
    gated = dslify.insert(small(), "1", light="exit", mode="gc", example_inputs=(torch.randn(1, 2, 32),))
    written = dslify.export(gated, tmp_path / "gate.onnx", batch=3, dynamic=False)
    assert max(written.errors.values()) <= TOLERANCE
    (given,) = onnx.load(written.files[0]).graph.input
    assert [size.dim_value for size in given.type.tensor_type.shape.dim] == [3, 2, 32]


@pytest.fixture(scope="module")
def parts() -> tuple[nn.Module, dict[str, ModelProto]]:
    """A small network with a layer, and the models of its parts."""
    net = dslify.insert(small(), "1", 0.5, (torch.randn(1, 2, 32),))
    return net, onnx_graph.models_of(dslify.programs.programs_of(host_graph(net)[1]))


def _scaled(model: ModelProto) -> ModelProto:
    """With one weight that is a little off."""
    copy = ModelProto()
    copy.CopyFrom(model)
    weight = max(copy.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    return copy


@pytest.mark.parametrize(("part", "way"), [("light", "light"), ("full", "full"), ("front", "(light|full)")])
def test_a_file_that_differs_is_refused_and_nothing_is_left(
    parts: tuple[nn.Module, dict[str, ModelProto]],
    part: str,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    net, models = parts
    path = tmp_path / "net.onnx"
    path.write_text("before")
    wrong = {**models, part: _scaled(models[part])}
    monkeypatch.setattr(onnx_graph, "models_of", lambda programs: wrong)
    with pytest.raises(ExportError, match=rf"differs from the network on the {way} route.*nothing was written"):
        dslify.export(net, path, force=True)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("net.onnx", "before")]


def test_a_switch_that_decides_otherwise_is_refused(
    parts: tuple[nn.Module, dict[str, ModelProto]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    net, models = parts
    front = ModelProto()
    front.CopyFrom(models["front"])
    offset = next(tensor for tensor in front.graph.initializer if "out.bias" in tensor.name)
    offset.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(offset) + np.float32(0.1), offset.name))
    monkeypatch.setattr(onnx_graph, "models_of", lambda programs: {**models, "front": front})
    with pytest.raises(ExportError, match="differs from the network"):
        dslify.export(net, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_shows_and_refuses(tmp_path: Path):
    file, target = tmp_path / "net.dsl", tmp_path / "net.onnx"
    net = dslify.insert(small(), "1", 0.5, (torch.randn(1, 2, 32),))
    dslify.save(net, file)

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["export", str(file), *words])

    shown = run()
    assert shown.exit_code == 0, shown.output
    assert target.is_file()
    for word in ("front", "light", "full", "operators", "next: dslify run"):
        assert word in shown.stdout
    before = target.read_bytes()
    for words, said in {
        (): "exists already",
        ("--to", "tensorrt"): "format is one of onnx, pt2, aoti, executorch, litert",
        ("-o", str(tmp_path / "net.bin")): "has to end in .onnx",
        ("--to", "pt2", "-o", str(target)): "has to end in .pt2",
        ("--to", "pt2", "--split"): "split export is ONNX",
        ("--batch", "0"): "batch must be a whole number of at least 1",
        ("--quantize", "int4", "--force"): "quantize is int8",
        ("--to", "pt2", "--quantize", "int8"): "Only ONNX and ExecuTorch parts are quantized",
        ("--rate", "8000"): "give a folder with --data",
        ("-o", str(tmp_path / "no" / "net.onnx")): "there is no folder",
        ("-o", str(tmp_path)): "has to end in",
    }.items():
        refused = run(*words)
        assert refused.exit_code == 2, words
        assert said in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
    assert target.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"net.dsl", "net.onnx"}
    document = json.loads(run("--force", "--json", "--static").stdout)
    assert document["format"] == "onnx"
    assert set(document["errors"]) == {"full", "light", "mixed"}


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ExportError, match=rf"needs {package}; install it with pip install 'dslify\[onnx\]'"):
        dslify.export(nn.Linear(2, 2), tmp_path / "net.onnx")


def test_a_network_that_was_captured_for_one_batch_size_is_not_exported_for_another(tmp_path: Path):
    net = dslify.insert(small(), "1", 0.5, (torch.randn(1, 2, 32),))
    guards = next(child for child in host_graph(net)[1].children() if hasattr(child, "checks"))
    guards.checks = (*guards.checks, "arg0_0 == 1")
    with pytest.raises(ExportError, match=r"captured for 1 samples in a call.*--batch 1"):
        dslify.export(net, tmp_path / "net.onnx", batch="any")
    with pytest.raises(OptionError, match="batch is a whole number"):
        dslify.export(net, tmp_path / "net.onnx", batch=0)


class Skipping(nn.Module):
    """The sound itself is added to what follows the cut, so an input crosses it as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 1, 3, padding=1)

    def forward(self, sound: Tensor) -> Tensor:
        return self.last(self.first(sound).relu()) + sound


def test_an_input_that_is_read_behind_the_cut_goes_there_as_it_is(tmp_path: Path):
    torch.manual_seed(0)
    net = dslify.insert(Skipping().eval(), "first", 0.5, (torch.randn(2, 1, 64),))
    found = dslify.export(net, tmp_path / "net.onnx")
    assert set(found.errors) == {"full", "light", "mixed"}
    assert max(found.errors.values()) <= TOLERANCE
