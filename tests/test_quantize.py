"""int8 of each part: it stays good, the switch stays in float, and a part is left alone where int8 does not pay."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

import dslify
from dslify import int8_report, quantize
from dslify.checked import cases
from dslify.clock import Timed
from dslify.errors import ExportError, OptionError
from dslify.int8 import folded, only_for_score
from dslify.int8_report import calibration_feeds, quality_db
from dslify.onnx_graph import models_of, one_file, with_thresholds
from dslify.onnx_session import session
from dslify.programs import Programs, host_graph, programs_of
from dslify.quantize import quantized

COUNT = 16  # inputs to calibrate and to judge with
ALL_LIGHT = 1e9  # threshold above every score
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}


class Subject:
    """A small network with a layer, its parts in ONNX, and inputs for them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = {"stem": nn.Conv2d(3, 16, 3, 2, 1), "mid": nn.Conv2d(16, 32, 3, 2, 1), "act": nn.ReLU()}
        network = nn.Sequential(OrderedDict(**layers, last=nn.Conv2d(32, 48, 3, 1, 1)))
        self.net = dslify.insert(network.eval(), "stem", 0.5, (torch.zeros(1, 3, 32, 32),))
        self.graph = host_graph(self.net)[1]
        self.programs: Programs = programs_of(self.graph)
        self.models = models_of(self.programs)
        self.feeds = calibration_feeds(self.graph, self.programs.inputs, count=COUNT).feeds


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject()


def clock(ratio: float) -> Callable[..., dict[str, Timed]]:
    """A clock that finds int8 to take this share of the time of float."""

    def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timed]:
        assert seconds > 0
        for call in calls.values():
            call()
        return {name: Timed(time, time, 1) for name, time in zip(calls, (1.0, ratio), strict=True)}

    return interleaved


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "interleaved", clock(0.5))


def integer_kernels(model: ModelProto, folder: Path, feed: dict[str, np.ndarray]) -> tuple[list[np.ndarray], int]:
    """The answer, and how many kernels on whole numbers made it."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / str(len(list(folder.iterdir()))))
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    runner = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answer = runner.run(None, feed)
    events = json.loads(Path(runner.end_profiling()).read_text())
    return answer, sum(event.get("args", {}).get("op_name") in INTEGER for event in events)


@pytest.mark.usefixtures("faster")
def test_int8_parts_run_behind_the_if(subject: Subject, tmp_path: Path):
    models, reports = quantized(subject.models, subject.feeds, threshold=ALL_LIGHT)
    assert [report.part for report in reports] == ["front", "light", "full"]
    assert all(report.kept for report in reports), [report.reason for report in reports]
    assert all(report.quality_db is not None and report.quality_db > 25 for report in reports)
    full = reports[2]
    assert full.bytes_int8 is not None
    assert full.bytes_int8 < 0.6 * full.bytes_float
    whole = one_file(subject.programs, models=models)
    onnx.checker.check_model(whole)
    for case in cases(subject.graph):
        forced = with_thresholds(whole, {"threshold": 1e9 if case.route == "light" else -1})
        feed = dict(zip(subject.programs.inputs, case.inputs, strict=True))
        answer, ran = integer_kernels(forced, tmp_path, feed)
        assert quality_db(answer, case.outputs) > 20, case.route
        _, in_front = integer_kernels(models["front"], tmp_path, feed)
        assert ran > in_front > 0, f"no integer kernel inside the branch of the {case.route} route"


def test_a_part_that_int8_slows_down_stays_in_float(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantize, "interleaved", clock(1.2))
    models, reports = quantized(subject.models, subject.feeds, threshold=ALL_LIGHT)
    for report in reports:
        assert models[report.part] is subject.models[report.part]
        assert not report.kept
        assert report.latency_ratio == 1.2
        assert report.reason == "in float: int8 takes 1.20 of its time here"
        assert report.to_json()["quality_db"] == report.quality_db


@pytest.mark.usefixtures("faster")
def test_a_part_that_int8_spoils_stays_in_float(subject: Subject):
    models, reports = quantized(subject.models, subject.feeds, least_db=150)
    assert not any(report.kept for report in reports)
    assert models["full"] is subject.models["full"]
    assert reports[2].reason == f"in float: int8 has {reports[2].quality_db:.1f} dB, where 150 dB are asked for"


@pytest.mark.usefixtures("faster")
def test_the_switch_stays_in_float(subject: Subject, tmp_path: Path):
    ready = folded(subject.models["front"], tmp_path / "front.onnx")
    switch = [node.op_type for node in ready.graph.node if node.name in only_for_score(ready.graph)]
    assert switch.count("Gemm") == 2, "the two layers of the switch"
    assert not set(switch) & {"Conv", "Pad"}, "these make the activation at the cut, which is an output"
    models, _ = quantized(subject.models, subject.feeds, ALL_LIGHT)
    made = models["front"].graph
    stored = {tensor.name for tensor in made.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    gemms = [node for node in made.node if node.op_type == "Gemm"]
    assert len(gemms) == 2
    assert all(gemm.input[1] in stored for gemm in gemms), "its weights are numbers, and no node makes them from int8"
    assert any(node.op_type == "DequantizeLinear" for node in made.node), "the rest of the front is quantized"


@pytest.mark.usefixtures("faster")
def test_decisions_that_flip_are_counted_and_bounded(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    shifted = ModelProto()
    shifted.CopyFrom(subject.models["front"])
    bias = next(tensor for tensor in shifted.graph.initializer if tensor.name.endswith("switch.out.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 50, bias.name))
    runner = session(subject.models["front"])
    scores = np.array([runner.run(["score"], feed)[0][0] for feed in subject.feeds])
    monkeypatch.setattr(quantize, "int8", lambda part, *_: {**subject.models, "front": shifted}[part])
    for threshold in (0.0, float(scores.max()) + 1, float(scores.min()) / 2):
        _, reports = quantized(subject.models, subject.feeds, threshold)
        assert reports[0].flips == pytest.approx((scores < (threshold or np.median(scores))).mean())
        assert reports[0].kept == (threshold == 0 or reports[0].flips == 0), "one that is not calibrated binds nothing"
        assert reports[0].kept or "int8 turns 100.0% of the decisions round, where 5%" in reports[0].reason
    assert reports[2].flips is None


def test_what_holds_a_branch_or_nothing_to_quantize_is_left_alone(subject: Subject):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Tanh", ["masked"], ["output"])],
        "light",
        *([onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [])] for name in ("masked", "output")),
    )
    plain = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    whole = one_file(subject.programs, models=subject.models)
    models, reports = quantized({**subject.models, "light": plain, "full": whole}, subject.feeds, seconds=0.01)
    assert models["light"] is plain
    assert models["full"] is whole
    assert reports[1].reason == "in float: it has no convolution and no matrix product"
    assert reports[2].reason == "in float: it holds further layers, and nothing is quantized inside a branch"
    assert reports[1].quality_db is reports[2].latency_ratio is None


def test_quality_is_signal_to_noise_of_the_worst_output():
    one = np.array([[3.0, 4.0]], np.float32)
    assert quality_db([one], [one]) == int8_report.LOSSLESS_DB
    assert quality_db([one * 1.1], [one]) == pytest.approx(20, abs=1e-4)
    assert quality_db([one, one * 1.01, one * 1.1], [one] * 3) == pytest.approx(20, abs=1e-4)
    for wrong in (one[0], one * np.nan, one * np.inf):
        assert quality_db([wrong], [one]) == -int8_report.LOSSLESS_DB
    assert quality_db([one], [one * 0]) == -int8_report.LOSSLESS_DB
    assert quality_db([np.array([1, 2])], [np.array([1, 2])]) == int8_report.LOSSLESS_DB


def test_calibration_takes_data_spread_over_all_of_them_or_random_numbers_and_says_so(subject: Subject):
    names = subject.programs.inputs
    drawn = calibration_feeds(subject.graph, names, count=3)
    assert "random numbers" in drawn.notes[0]
    assert len({feed[names[0]].tobytes() for feed in drawn.feeds}) == 3
    values = torch.arange(10.0)[:, None, None, None].expand(10, 3, 32, 32).contiguous()
    given = calibration_feeds(subject.graph, names, values, count=5)
    assert not given.notes
    assert [float(feed[names[0]][0, 0, 0, 0]) for feed in given.feeds] == [0, 2, 4, 6, 8]
    assert given.feeds[0][names[0]].shape == (1, 3, 32, 32)
    pairs = calibration_feeds(subject.graph, names, dslify.open_data(values, subject.graph), batch=2)
    assert [feed[names[0]][:, 0, 0, 0].tolist() for feed in pairs.feeds] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_what_cannot_be_calibrated_is_one_sentence(subject: Subject):
    names = subject.programs.inputs
    with pytest.raises(ExportError, match=r"has 1 samples, and calibration needs at least 2\."):
        calibration_feeds(subject.graph, names, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ExportError, match=r"networks with one input, and this one reads 2 \(a, b\)"):
        calibration_feeds(subject.graph, ("a", "b"), torch.zeros(4, 3, 32, 32))
    with pytest.raises(ExportError, match="at least two inputs, one to judge by; got 1"):
        quantized(subject.models, subject.feeds[:1])
    with pytest.raises(OptionError, match="a number of dB; got nan"):
        quantized(subject.models, subject.feeds, least_db=float("nan"))


def test_what_the_quantizer_refuses_is_one_sentence(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no\nmore")

    monkeypatch.setattr("dslify.int8.quantize_static", refuse)
    with pytest.raises(ExportError, match=r"^ONNX Runtime cannot quantize the front part: no\.$"):
        quantized(subject.models, subject.feeds)


@pytest.mark.usefixtures("faster")
def test_the_exported_file_is_int8_and_says_what_that_did(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dslify.onnx_graph.models_of", lambda *_: subject.models)  # the exporter takes seconds
    plain = dslify.export(subject.net, tmp_path / "float.onnx")
    done = dslify.export(subject.net, tmp_path / "int8.onnx", quantize="int8")
    assert [report.part for report in done.quantized if report.kept] == ["front", "light", "full"]
    assert any("random numbers" in note for note in done.notes)
    assert json.loads(json.dumps(done.to_json()))["quantized"][2]["bytes_int8"] == done.quantized[2].bytes_int8
    assert done.files[0].stat().st_size < 0.7 * plain.files[0].stat().st_size
    assert plain.errors["full"] < 1e-4 < done.errors["full"] < 0.2
