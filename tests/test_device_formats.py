"""Files for small devices: exact rewrites, the host's loop over the parts, and both routes where a runtime is there."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import dslify
from dslify.attempt import quietly
from dslify.errors import ExportError
from dslify.executorch_format import write_executorch
from dslify.litert_format import write_litert
from dslify.programs import ANY, host_graph, programs_of
from dslify.switch import DSLayer
from dslify.undelegated import rewritten
from dslify.written import parts_in, routed, trials, tried


def sound(batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, 256, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    """Two layers, one inside the full path of the other, and ELUs everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 8, 8, 4), nn.ELU(), nn.Conv1d(8, 16, 3), nn.ELU(0.5), nn.Conv1d(16, 4, 3))
    net = dslify.insert(model.eval(), at="1", width=0.5, example_inputs=(sound(),))
    net = dslify.insert(net, at="3", width=0.25, example_inputs=(sound(),))
    for layer in dslify.dsl_layers(net):
        layer.threshold.fill_(0.25)
    return host_graph(net)[1]


ACTIVATIONS = [nn.ELU(), nn.ELU(0.5), nn.SELU(), nn.CELU(2.0), nn.CELU()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_rewrites_are_exact_and_nothing_else_changes(activation: nn.Module):
    model = nn.Sequential(nn.Conv1d(1, 4, 3), activation, nn.GELU(), nn.Linear(62, 3)).eval()
    x = 4 * sound()[..., :64]
    with quietly(), torch.no_grad():
        program = torch.export.export(model, (x,))
        found, held = rewritten(program)
        torch.testing.assert_close(found.module()(x), model(x), rtol=1e-6, atol=1e-6)
    assert len(held) == 1
    names = [str(node.target) for node in found.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "elu." in name and "gelu" not in name]
    assert {"aten.conv1d.default", "aten.gelu.default", "aten.linear.default"} <= set(names)


def test_a_program_without_such_operators_is_left_alone():
    with quietly():
        program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.zeros(1, 4),))
    assert rewritten(program) == (program, ())


def test_the_rewritten_parts_in_the_hosts_loop_answer_as_the_network(graph: fx.GraphModule):
    programs = programs_of(graph, dynamic=False)
    parts = parts_in(programs)
    assert list(parts) == ["front", "light", "full_front", "full_light", "full_full"]
    calls: list[str] = []
    with quietly():
        modules = {name: rewritten(part.exported)[0].module() for name, part in parts.items()}

    def call(name: str, inputs) -> tuple[Tensor, ...]:
        calls.append(name)
        with torch.no_grad():
            return modules[name](*inputs)

    def answer(trial):
        return routed(programs, trial.inputs, call, trial.thresholds)

    given = trials(graph)
    assert {trial.way for trial in given} == {"full", "light", "dsl", "dsl.full.dsl"}
    assert max(tried("It", given, answer).values()) < 1e-6
    calls.clear()
    answer(next(trial for trial in given if trial.way == "dsl.full.dsl"))
    assert calls == ["front", "full_front", "full_light"]

    honest = modules["full_light"]
    modules["full_light"] = lambda *inputs: [value * 1.001 for value in honest(*inputs)]
    with pytest.raises(ExportError, match=r"It differs from the network on the dsl\.full\.dsl route by 0\.001"):
        tried("It", given, answer)


def test_trials_leave_the_routes_as_they_were(graph: fx.GraphModule):
    layers = [module for module in graph.modules() if isinstance(module, DSLayer)]
    with dslify.route(graph, "both"):
        trials(graph)
        assert {layer.route for layer in layers} == {"both"}


@pytest.mark.parametrize(
    ("write", "package", "words"),
    [
        (write_executorch, "executorch", r"needs executorch.*pip install 'dslify\[executorch\]'"),
        (write_litert, "litert_torch", r"needs litert-torch and ai-edge-litert.*pip install 'dslify\[litert\]'"),
    ],
)
def test_a_missing_package_and_any_batch_are_one_sentence(
    write, package: str, words: str, graph: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=words):
        write(graph, tmp_path / "net")
    with pytest.raises(ExportError, match=r"a fixed number of samples; give it, as in --batch 1"):
        write(graph, tmp_path / "net", batch=ANY)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # of the packages' own
def test_executorch_holds_the_parts_and_delegates_them(graph: fx.GraphModule, tmp_path: Path):
    runtime = pytest.importorskip("executorch.runtime")
    written = write_executorch(graph, tmp_path / "net.pte")
    assert set(written.errors) == {"full", "light", "dsl", "dsl.full.dsl"}
    assert max(written.errors.values()) < 1e-5
    *delegated, lengths = written.notes
    assert [note.partition(":")[0] for note in delegated] == list(parts_in(programs_of(graph)))
    assert lengths == "It takes lengths up to the recorded ones, for which its memory is planned."
    assert not any("elu" in note for note in written.notes)
    assert written.notes[1].endswith("pieces: 1.")
    program = runtime.Runtime.get().load_program(tmp_path / "net.pte")
    assert program.load_method("threshold").execute([]) == [0.25]
    assert program.load_method("full_threshold").execute([]) == [0.25]
    assert json.loads(program.load_method("facts").execute([])[0])["cut"] == "1"
    shorter = sound()[..., :200]
    with torch.no_grad(), dslify.route(graph, "light"):
        expected = graph(shorter)
    masked, _, *passed = program.load_method("front").execute([shorter])
    torch.testing.assert_close(program.load_method("light").execute([masked, *passed])[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_litert_holds_the_parts_by_name(graph: fx.GraphModule, tmp_path: Path):
    pytest.importorskip("litert_torch")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    written = write_litert(graph, tmp_path / "net.tflite", dynamic=False)
    assert set(written.errors) == {"full", "light", "dsl", "dsl.full.dsl"}
    assert max(written.errors.values()) < 1e-5
    signatures = interpreter.Interpreter(str(tmp_path / "net.tflite")).get_signature_list()
    assert signatures["front"] == {"inputs": ["input"], "outputs": ["masked", "score"]}
    assert signatures["full_light"] == {"inputs": ["masked"], "outputs": ["output"]}
    model = schema.ModelT.InitFromPackedBuf((tmp_path / "net.tflite").read_bytes(), 0)
    (entry,) = [each for each in model.metadata if each.name == b"dslify"]
    assert json.loads(bytes(model.buffers[entry.buffer].data))["threshold"] == 0.25


def test_executorch_holds_int8_parts_where_they_pay(tmp_path: Path):
    pytest.importorskip("executorch.runtime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 64, 3), nn.ReLU(), *(nn.Conv1d(64, 64, 9) for _ in range(3)))
    net = dslify.insert(net.eval(), "1", 0.5, (torch.randn(1, 4, 400),))
    made = dslify.export(net, tmp_path / "net.pte", quantize="int8", dynamic=False)
    reports = {report.part: report for report in made.quantized}
    assert set(reports) == {"front", "light", "full"}
    assert reports["full"].quality_db > 20
    assert reports["full"].bytes_int8 < reports["full"].bytes_float / 2
    for report in made.quantized:
        assert report.kept == (report.latency_ratio < 1 and report.quality_db >= 20)
