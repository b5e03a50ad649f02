"""Times of parts, routes and a mixed stream: that the right things are timed, and that the arithmetic is right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import dslify
from dslify import clock, engines, latency
from dslify.checked import case, error
from dslify.cli import app
from dslify.console import COLUMNS
from dslify.device_engines import executorch, litert
from dslify.engines import Engine, compiled, eager, onnxruntime
from dslify.errors import ExportError, OptionError
from dslify.latency import measure
from dslify.measured import in_unit, verdict
from dslify.measurement import Latency, Measurement
from dslify.onnx_session import session
from dslify.programs import example_of, host_graph
from tests import cascades, zoo

SHORT = 0.02  # s of measuring: what is tested here is not how fast this machine is
FRONT, LIGHT, FULL = 3, 1, 11  # µs that a made-up runtime takes


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)), nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return dslify.insert(stack(), at="0", width=0.25, example_inputs=(torch.randn(2, 16),))


@pytest.fixture(scope="module")
def twice(net: nn.Module) -> nn.Module:
    return dslify.insert(net, at="1", width=0.25, example_inputs=(torch.randn(2, 16),))


def unet() -> nn.Module:
    return dslify.insert(zoo.UNet().eval(), at="down2", width=0.25, example_inputs=(torch.randn(1, 3, 32, 32),))


def answers_on_both_routes(engine: Engine, graph: fx.GraphModule) -> None:
    inputs = example_of(graph, seed=5)
    given = engine.arrays(inputs)
    crossing = engine.front(given)
    found = {}
    for light, way, path in ((True, "light", engine.light), (False, "full", engine.full)):
        wanted = case(graph, way, inputs).outputs
        found[way] = [np.asarray(value) for value in latency._values(engine.whole(given, light))]
        assert error(found[way], wanted) < 1e-5
        assert error(latency._values(path(crossing)), wanted) < 1e-5
    assert error(found["light"], found["full"]) > 1e-2


@pytest.mark.parametrize("make", [eager, compiled])
def test_an_engine_takes_the_route_that_it_is_told(make: Callable[..., Engine], net, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    _, graph = host_graph(net)
    with torch.no_grad():
        answers_on_both_routes(make(graph, 1, True), graph)


def test_onnx_runtime_decides_inside_one_session(net, monkeypatch):
    """The whole network is one model with the If in it, and its threshold the only thing that a route changes."""
    opened: list[tuple[Any, int]] = []
    fed: list[dict[str, Any]] = []

    class Recorded:
        """A session that notes what it is fed."""

        def __init__(self, model: Any, threads: int):
            opened.append((model, threads))
            self.own = session(model, threads)
            self.get_inputs, self.get_outputs = self.own.get_inputs, self.own.get_outputs

        def run(self, names: Any, feeds: Any) -> Any:
            fed.append(feeds)
            return self.own.run(names, feeds)

    monkeypatch.setattr(engines, "session", Recorded)
    _, graph = host_graph(net)
    made = onnxruntime(graph, 3, True)
    with torch.no_grad():
        answers_on_both_routes(made, graph)
    assert [threads for _, threads in opened] == [3, 3, 3, 3]
    whole = opened[3][0].graph
    assert [node.op_type for node in whole.node].count("If") == 1
    assert not any(tensor.name == "threshold" for tensor in whole.initializer)
    assert [feeds["threshold"].item() for feeds in fed if "threshold" in feeds] == [math.inf, -math.inf]


@pytest.mark.parametrize("make", [eager, onnxruntime])
@pytest.mark.parametrize("name", ["nested", "in a row", "unet"])
def test_engines_with_several_layers_and_several_outputs(make: Callable[..., Engine], name: str, twice):
    held = {"nested": lambda: twice, "in a row": lambda: cascades._built("in a row"), "unet": unet}[name]()
    _, graph = host_graph(held)
    with torch.no_grad():
        answers_on_both_routes(make(graph, 1, False), graph)


def test_a_network_that_does_not_compile_is_a_sentence(net, monkeypatch):
    def refuse(module: Any, **_: Any) -> Any:
        def call(*_inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler\nmore about it")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(ExportError, match=r"torch.compile cannot hold this network here: no C\+\+ compiler\.$"):
        compiled(host_graph(net)[1])


@pytest.mark.parametrize("make", [executorch, litert])
def test_device_runtimes_are_for_one_layer(make: Callable[..., Engine], twice):
    with pytest.raises(ExportError, match="networks with one layer are timed; this one holds 2"):
        make(host_graph(twice)[1], 1, True)


@pytest.mark.parametrize(("make", "package"), [(executorch, "executorch"), (litert, "ai_edge_litert")])
def test_device_runtimes_where_they_are_installed(make: Callable[..., Engine], package: str, net):
    pytest.importorskip(package)
    _, graph = host_graph(net)
    with torch.no_grad():
        answers_on_both_routes(make(graph, 1, True), graph)


class Made:
    """A runtime on a clock that its calls move; notes what it was called for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.whole = 0, []
        monkeypatch.setattr(clock, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(clock, "perf_counter", lambda: self.now * 1e-9)
        monkeypatch.setitem(latency.ENGINES, "made", lambda graph, *_: self.engine(graph))

    def takes(self, microseconds: int, answer: Any = None) -> Any:
        self.now += 1000 * microseconds
        return answer

    def engine(self, graph: fx.GraphModule) -> Engine:
        own = eager(graph)

        def whole(given: Any, light: bool) -> Any:
            self.whole.append((given[0][0], light))
            return self.takes(FRONT + (LIGHT if light else FULL), own.whole(given, light))

        return Engine(
            "made", own.arrays, lambda given: self.takes(FRONT, own.front(given)), lambda _: self.takes(LIGHT),
            lambda _: self.takes(FULL), whole, "a remark",
        )  # fmt: skip

    def stream(self, found: Measurement) -> list[tuple[Tensor, bool]]:
        """The last stream of samples on both routes."""
        count, light = found.samples, round(found.share * found.samples)
        for at in range(len(self.whole) - count, -1, -1):
            part = self.whole[at : at + count]
            if sum(way for _, way in part) == light and len({value.data_ptr() for value, _ in part}) == count:
                return part
        raise AssertionError("no such stream")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


def test_ratios_and_mixture_by_hand(net, made: Made):
    found = measure(net, ["made"], share=0.8, seconds=1e-6)
    (one,) = found.latencies
    assert (one.runtime, one.note, found.share, found.samples) == ("made", "a remark", 0.8, 10)
    times = {"front": 3, "light": 1, "full": 11, "whole_light": 4, "whole_full": 14}
    for name, microseconds in times.items():
        assert getattr(one, name).p50 == getattr(one, name).p90 == pytest.approx(microseconds * 1e-6), name
    assert one.mixed.p50 == pytest.approx(4e-6)
    assert one.mixed.p90 == pytest.approx(14e-6)
    assert one.mixed.mean == one.computed == pytest.approx((0.8 * 4 + 0.2 * 14) * 1e-6)
    assert one.ratio == pytest.approx(11)
    assert one.saved == one.saved_computed == pytest.approx(1 - 6 / 14)
    assert one.off == pytest.approx(0)


def test_a_stream_that_costs_more_than_its_parts_is_off(net, made: Made):
    found = measure(net, ["made"], seconds=1e-6).latencies[0]
    slower = Latency("x", 0.8, "", *(getattr(found, name) for name in ("front", "light", "full", "whole_light")),
                     found.whole_full, clock.Streamed(0, 0, 1, 7.5e-6))  # fmt: skip
    assert slower.off == pytest.approx(0.25)
    assert slower.saved == pytest.approx(1 - 7.5 / 14)
    assert slower.saved_computed == pytest.approx(1 - 6 / 14)


@pytest.mark.parametrize(
    ("share", "samples", "light"), [(0.8, 10, 8), (0.75, 12, 9), (0, 10, 0), (1, 10, 10), (0.5, 10, 5)]
)
def test_the_share_is_met_by_the_length_of_the_stream(net, made: Made, share: float, samples: int, light: int):
    found = measure(net, ["made"], share=share, seconds=1e-6)
    assert (found.samples, found.share) == (samples, share)
    assert sum(way for _, way in made.stream(found)) == light


def test_random_routes_are_those_of_a_fixed_seed_and_no_block(net, made: Made):
    ways = []
    for _ in range(2):
        found = measure(net, ["made"], share=0.5, seconds=1e-6)
        ways.append([way for _, way in made.stream(found)])
    assert ways[0] == ways[1]
    assert ways[0] != sorted(ways[0])
    assert ways[0] != sorted(ways[0], reverse=True)


def test_of_real_data_the_lowest_scores_go_light(net, made: Made):
    data = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 40)[:, None]
    found = measure(net, ["made"], share=0.5, data=data, seconds=1e-6)
    assert found.routed.endswith("lowest scores light")
    stream = made.stream(found)
    (layer,) = dslify.dsl_layers(net)
    scores = {True: [], False: []}
    with torch.no_grad(), dslify.route(net, "full"):
        for value, way in stream:
            assert any(torch.equal(value[0], row) for row in data)
            net(value)
            scores[way].append(layer.paths.score.item())
    assert len(scores[True]) == len(scores[False]) == 5
    assert max(scores[True]) < min(scores[False])


class Scoped(nn.Module):
    """Only `inner` is captured; what enters it is not what enters the network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def forward(self, value: Tensor) -> Tensor:
        return self.inner(value * 3 + 1).sum(1)


def test_with_scope_real_data_goes_through_what_comes_first(made: Made):
    net = dslify.insert(Scoped().eval(), at="inner.0", scope="inner", width=0.25, example_inputs=(torch.randn(1, 16),))
    data = torch.arange(16.0).repeat(20, 1) + torch.arange(20.0)[:, None]
    found = measure(net, ["made"], data=data, seconds=1e-6)
    for value, _ in made.stream(found):
        assert any(torch.equal(value[0], row * 3 + 1) for row in data)
    assert found.entering == 16 * 4


def test_the_network_is_left_as_it_was(net):
    (layer,) = dslify.dsl_layers(net)
    net.train()
    layer.threshold.fill_(0.25)
    before, threads = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_num_threads()
    try:
        measure(net, ["eager"], threads=threads + 1, seconds=SHORT)
        assert torch.get_num_threads() == threads
        assert net.training
        assert layer.training
        assert layer.route is None
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    finally:
        net.eval()
        layer.threshold.zero_()


def test_what_is_found_is_json_and_holds_what_the_parts_cost(net, monkeypatch):
    monkeypatch.setitem(latency.ENGINES, "onnxruntime", lambda graph, *_: replace(eager(graph), name="onnxruntime"))
    found = measure(net, threads=1, share=0.6, seconds=SHORT, energy="45nm-sram")
    assert [each.runtime for each in found.latencies] == ["eager", "onnxruntime"]
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["batch"] == document["threads"] == 1
    assert document["share"] == 0.6
    assert document["energy"]["estimate"] is True
    assert document["energy"]["profile"]["name"] == "45nm-sram"
    assert document["latencies"][1]["whole_full"]["p50"] > 0
    rows = {row.name: row.macs for row in dslify.cost(net)}
    assert found.macs_ratio == pytest.approx(rows["full"] / rows["light"])
    base = rows["base"] + rows["switch"]
    assert found.macs_saved == pytest.approx(
        1 - (base + 0.6 * rows["light"] + 0.4 * rows["full"]) / (base + rows["full"])
    )
    assert found.between == found.entering == 16 * 4
    joules = document["energy"]
    assert joules["mixed"]["total"] == pytest.approx(0.6 * joules["light"]["total"] + 0.4 * joules["full"]["total"])


def test_static_power_is_taken_over_the_measured_times(net, made: Made, tmp_path: Path):
    from dslify.energy import Profile

    found = measure(net, ["made"], seconds=1e-6, energy=Profile("p", "s", 0, 0, 2.0)).energy
    assert found.light.total == found.light.static == pytest.approx(8e-6)
    assert found.full.total == pytest.approx(28e-6)
    assert found.mixed.total == pytest.approx(12e-6)


def test_counters_of_the_machine_are_read_by_route(net, made: Made, monkeypatch, tmp_path: Path):
    from dslify.energy import Rapl

    ticks = iter(range(10**6))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks) * 0.2)

    class Fixed(Rapl):
        def joules(self, call: Callable[[], Any]) -> float:
            before = made.now
            call()
            return (made.now - before) * 1e-9  # 1 W

    monkeypatch.setattr(latency, "rapl", lambda: Fixed(()))
    found = measure(net, ["made"], seconds=1e-6)
    assert found.counted == {
        "made": {"light": pytest.approx(4e-6), "full": pytest.approx(14e-6), "mixed": pytest.approx(6e-6)}
    }
    assert not any("RAPL" in note for note in found.notes)


def test_a_runtime_that_answers_otherwise_is_refused_or_left_out(net, monkeypatch):
    def wrong(graph: fx.GraphModule, *_: Any) -> Engine:
        own = eager(graph)
        swapped = lambda given, light: own.whole(given, not light)  # noqa: E731
        return Engine("onnxruntime", own.arrays, own.front, own.light, own.full, swapped)

    monkeypatch.setitem(latency.ENGINES, "onnxruntime", wrong)
    with pytest.raises(ExportError, match="onnxruntime answers otherwise than the network on the light route, by"):
        measure(net, ["onnxruntime"], seconds=SHORT)
    found = measure(net, seconds=SHORT)
    assert [each.runtime for each in found.latencies] == ["eager"]
    assert any(note.startswith("onnxruntime is left out: onnxruntime answers otherwise") for note in found.notes)


def test_without_onnx_runtime_eager_is_timed_and_the_way_out_told(net, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = measure(net, seconds=SHORT)
    assert [each.runtime for each in found.latencies] == ["eager"]
    assert any("pip install 'dslify[onnx]'" in note for note in found.notes)
    with pytest.raises(ExportError, match="The runtime onnxruntime needs"):
        measure(net, ["onnxruntime"], seconds=SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"runtimes": ["tensorrt"]},
            "runtime is one of eager, compiled, onnxruntime, executorch, litert; got 'tensorrt'",
        ),
        ({"share": 1.2}, "share is 0 to 1; got 1.2"),
        ({"threads": 0}, "threads is a whole number of at least 1; got 0"),
        ({"seconds": 0.0, "runtimes": ["eager"]}, "a time above 0 s"),
        ({"energy": "5nm"}, "A profile is one of"),
    ],
)
def test_values_out_of_range_are_told_in_a_sentence(net, options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        measure(net, **options)


def test_small_numbers_have_three_digits_and_a_prefix():
    assert [in_unit(value, "s") for value in (0.000447, 1.2, 0.0123, 1e-6, 0)] == [
        "447 µs", "1.20 s", "12.3 ms", "1.00 µs", "0 s",
    ]  # fmt: skip
    assert in_unit(3.2e-13, "J") == "0.320 pJ"


def test_a_network_that_only_loses_is_told_so(net, made: Made):
    one = measure(net, ["made"], seconds=1e-6).latencies[0]
    worse = Latency("x", 0.8, "", one.front, one.light, one.full, one.whole_full, one.whole_light, one.whole_full)
    assert "the network takes 250 % more time than always full, measured; computed 200 % more time" in verdict(worse)


def command(*words: str) -> Any:
    return CliRunner().invoke(app, ["measure", *words], prog_name="dslify", env={"COLUMNS": str(COLUMNS)})


@pytest.fixture(scope="module")
def file(net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dslify.save(net, tmp_path_factory.mktemp("measure") / "net.dsl")


def test_the_command_prints_tables_a_sentence_and_what_to_run_next(file: Path, tmp_path: Path):
    profile = tmp_path / "mine.toml"
    profile.write_text('name = "bench-7"\nsource = "own readings"\npj_per_mac = 1\npj_per_byte = 1\nstatic_watts = 1\n')
    found = command(str(file), "--share", "0.75", "--seconds", "0.02", "--profile", str(profile))
    assert found.exit_code == 0, found.output
    for words in (
        "one sample at a time, 1 thread", "network, 75 % light", "estimate by profile bench-7", "own readings",
        "eager: at 75 % light the network takes", "onnxruntime: at 75 %", "RAPL",
        f"next: dslify export {file} --to onnx",
    ):  # fmt: skip
        assert words in found.output, words


def test_the_command_as_one_document(file: Path, tmp_path: Path):
    data = tmp_path / "data.pt"
    torch.save(torch.randn(30, 16), data)
    found = command(str(file), "--runtime", "eager", "--seconds", "0.02", "--data", str(data), "--json")
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["routed"].endswith("lowest scores light")
    assert document["read"][0]["samples"] == 30
    assert document["file"] == str(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "2"], "share must be 0 to 1; got 2"),
        (["--threads", "0"], "threads must be a whole number of at least 1"),
        (["--seconds", "no"], "seconds must be above 0; got 'no'"),
        (["--runtime", "abacus"], "runtime is one of"),
        (["--profile", "none.toml"], "A profile is one of"),
    ],
)
def test_the_command_refuses_in_a_sentence(file: Path, words: list[str], message: str):
    found = command(str(file), *words)
    assert found.exit_code == 2
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert "Traceback" not in found.output
