"""The runner answers as the one-file model and the network do, on single inputs, batches and streams."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from dslify.errors import ExportError, OptionError
from dslify.onnx_graph import one_file
from dslify.runtime import Runner, Single, Statistics, wire
from dslify.runtime.layout import Layout
from tests.split_networks import exported

EXACT = 1e-5  # of the largest value, with numbers that are not rounded
FP16 = 2e-3  # through the layers behind the wire


def off(found, wanted):
    assert [each.shape for each in found] == [each.shape for each in wanted]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(exported("sound").folder, tmp_path / "parts")


@pytest.mark.parametrize("name", ["sound", "turned"])
def test_single_inputs_are_answered_as_by_the_one_file_model_and_the_network(name):
    made = exported(name)
    single = Single(one_file(made.programs, models=made.models).SerializeToString())
    exact, sent = Runner(made.folder, number="fp32"), Runner(made.folder)
    routes = []
    for x in np.split(made.x, len(made.x)):
        wanted, light = made.eager(x)
        found = exact.run(x)
        routes.append(found.route)
        assert found.route == ("light" if light[0] else "full")
        assert off(found.outputs, single.run(x).outputs) < EXACT
        assert off(found.outputs, wanted) < EXACT
        rounded = sent.run(x)
        assert off(rounded.outputs, wanted) < FP16
        if light[0]:
            assert (found.bytes_sent, off(rounded.outputs, wanted) < EXACT) == (0, True)
        else:
            assert off(rounded.outputs, wanted) > EXACT / 100, "what full reads has gone over the wire"
            assert 0 < rounded.bytes_sent < found.bytes_sent < found.bytes_dense + 100
    assert set(routes) == {"light", "full"}


@pytest.mark.parametrize("name", ["sound", "turned"])
def test_a_batch_is_gathered_by_route_and_put_back_in_order(name):
    made = exported(name)
    runner = Runner(made.folder, number="fp32")
    shuffled = made.x[np.random.default_rng(0).permutation(len(made.x))]
    wanted, taken = made.eager(shuffled)
    found = runner.run_batch(shuffled)
    assert found.route == "mixed"
    assert found.light_taken.tolist() == taken.tolist()
    assert off(found.outputs, wanted) < EXACT
    singles = [runner.run(x) for x in np.split(shuffled, len(shuffled))]
    assert np.allclose(found.score, [one.score[0] for one in singles], rtol=1e-5)
    assert [one.route == "light" for one in singles] == taken.tolist()
    for route in ("light", "full"):
        forced = runner.run_batch(shuffled, route=route)
        assert (forced.route, off(forced.outputs, wanted) > 1e-3) == (route, True)
        assert off(forced.outputs, runner.run(shuffled, route=route).outputs) < EXACT


def test_several_samples_in_one_call_go_light_only_if_all_may():
    made = exported("sound")
    runner = Runner(made.folder)
    light = made.eager(made.x)[1]
    assert runner.run(made.x).route == "full"
    assert runner.run(made.x[light]).route == "light"
    assert runner.run_batch(made.x[light]).bytes_sent == 0


def test_a_model_of_one_sample_is_called_for_each(monkeypatch):
    made = exported("sound")
    runner = Runner(made.folder, number="fp32")
    runner.manifest = replace(runner.manifest, batch=1)
    sizes = []
    named = runner._front.named
    monkeypatch.setattr(runner._front, "named", lambda arrays: sizes.append(len(arrays[0])) or named(arrays))
    wanted, taken = made.eager(made.x)
    found = runner.run_batch(made.x)
    assert (found.route, found.light_taken.tolist()) == ("mixed", taken.tolist())
    assert off(found.outputs, wanted) < EXACT
    assert sizes == [1] * 12
    assert found.bytes_sent == sum(runner.run(x).bytes_sent for x in np.split(made.x, len(made.x)))


def test_layers_inside_the_parts_decide_for_every_sample():
    made = exported("nested")
    wanted, taken = made.eager(made.x)
    runner = Runner(made.folder, number="fp32")
    found = runner.run_batch(made.x)
    assert found.light_taken.tolist() == taken.tolist()
    assert off(found.outputs, wanted) < EXACT
    runner.manifest = replace(runner.manifest, each=())
    assert off(runner.run_batch(made.x).outputs, wanted) > 1e-3, "together they go full inside"


def test_a_stream_wakes_the_big_core_at_each_change_and_lets_it_sleep_at_the_end():
    made = exported("sound")
    heard = []
    runner = Runner(made.folder, on_wake=lambda: heard.append("wake"), on_sleep=lambda: heard.append("sleep"))
    light, full = (made.x[made.eager(made.x)[1] == taken][:1] for taken in (True, False))
    assert not runner.full_loaded
    stream = runner.stream(iter([light, light, full, full, light, full]))
    steps = []
    for result in stream:
        steps.append((result.route, tuple(heard), runner.full_loaded))
        heard.clear()
    assert steps == [
        ("light", (), False), ("light", (), False), ("full", ("wake",), True), ("full", (), True),
        ("light", ("sleep",), True), ("full", ("wake",), True),
    ]  # fmt: skip
    assert heard == ["sleep"]
    one = runner.run(full)
    assert runner.statistics == Statistics(
        6, 3, 2, 3 * one.bytes_sent, 3 * one.bytes_dense, 3 * one.bytes_int8, 6 * one.bytes_dense, True
    )
    assert runner.statistics.light_share == 0.5
    assert runner.statistics.to_json()["light_share"] == 0.5


def test_a_stream_that_is_left_early_or_fails_lets_the_big_core_sleep():
    made = exported("sound")
    heard = []
    runner = Runner(made.folder, on_wake=lambda: heard.append("wake"), on_sleep=lambda: heard.append("sleep"))
    full = made.x[~made.eager(made.x)[1]][:1]
    stream = runner.stream([full, full])
    next(stream)
    stream.close()
    assert heard == ["wake", "sleep"]
    with pytest.raises(OptionError):
        list(runner.stream([full, full[0]]))
    assert heard == ["wake", "sleep"] * 2


def test_the_big_part_is_loaded_at_once_where_that_is_asked_for():
    assert Runner(exported("sound").folder, lazy=False).full_loaded


def test_the_threshold_may_change_while_it_runs():
    made = exported("sound")
    x = made.x[:1]
    runner = Runner(made.folder, threshold=0.0)
    assert runner.run(x).route == "full"
    runner.threshold = 1e9
    assert runner.run(x).route == "light"
    assert runner.run(x, route="full").route == "full"
    score = runner.run(x).score[0]
    runner.threshold = float(score)
    assert runner.run(x).route == "full", "light is below the threshold, not at it"


def test_bytes_are_those_of_the_messages():
    made = exported("sound")
    runner = Runner(made.folder)
    x = made.x[-1:]
    values, _ = runner._scored((x,))
    crossing = [values[name] for name in runner.manifest.sent]
    found = runner.run(x, route="full")
    assert found.bytes_sent == len(wire.encode(crossing, "fp16", list(runner.manifest.sent.values())))
    assert found.bytes_dense == 4 * sum(value.size for value in crossing)
    assert found.bytes_int8 == sum(value.size for value in crossing)
    assert runner.run(x, route="light").bytes_dense == found.bytes_dense
    (masked,) = (value for name, value in values.items() if name == "masked")
    assert not masked[:, ::2].any(), "half of the mask is zero"
    assert len(wire.encode([masked], "fp16", [(0, 1)])) < masked.nbytes / 4 + 30


def test_a_one_file_model_that_offers_its_score_tells_the_route():
    made = exported("sound")
    model = one_file(made.programs, models=made.models)
    assert Single(model.SerializeToString()).run(made.x[:1]).route is None
    make = onnx.helper.make_tensor_value_info
    model.graph.output.append(make("front/score", onnx.TensorProto.FLOAT, [None]))
    model.graph.output.append(make("threshold/light", onnx.TensorProto.BOOL, []))
    single = Single(model.SerializeToString())
    assert single.outputs == ("code", "level")
    found = list(single.stream(np.split(made.x, len(made.x))))
    taken = made.eager(made.x)[1]
    assert [one.route == "light" for one in found] == taken.tolist()
    assert all(len(one.outputs) == 2 for one in found)
    assert single.statistics.light == taken.sum()


def test_arrays_that_do_not_fit_are_told():
    runner = Runner(exported("sound").folder)
    x = exported("sound").x[:1]
    assert off(runner.run(x.astype(np.float64)).outputs, runner.run(x).outputs) == 0
    with pytest.raises(OptionError, match=r"takes 1 arrays \(sound\); got 2"):
        runner.run(x, x)
    with pytest.raises(OptionError, match=r"sound is an array of \w+ x 1 x \w+; got 1 x 64"):
        runner.run(x[0])
    with pytest.raises(OptionError, match="sound holds float32 numbers; got int64"):
        runner.run(x.astype(np.int64))
    with pytest.raises(OptionError, match="light or full, or None to let the score decide; got 'mixed'"):
        runner.run(x, route="mixed")
    with pytest.raises(OptionError, match="got 'fp8'"):
        Runner(exported("sound").folder, number="fp8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json; write one with dslify export"),
        (lambda folder: (folder / "full.onnx").unlink(), "lacks full.onnx, its full part"),
        (lambda folder: (folder / "light.onnx").write_bytes(b"other"), "light.onnx is not the file that manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged, or none of dslify's"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "is damaged, or none of dslify's"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1}'), "is damaged, or none of dslify's"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"format": 7}'),
            "in format 7, and this dslify reads format 1",
        ),
    ],
)
def test_a_damaged_or_foreign_folder_is_told_in_one_sentence(copied, change, said):
    Runner(copied)
    change(copied)
    with pytest.raises(ExportError, match=said) as told:
        Runner(copied)
    assert "\n" not in str(told.value)
    assert str(told.value).endswith(".")


def test_a_file_that_onnx_runtime_refuses_is_told(copied):
    text = json.loads((copied / "manifest.json").read_text())
    (copied / "front.onnx").write_bytes(b"no model")
    text["files"]["front"]["sha256"] = "0327166d6bf58cc8a5ab7e1b1d5a5e3f05b02b7f9c7e4d0b0b2d6a1b5c3e2f10"
    (copied / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(ExportError, match="SHA-256 differs"):
        Runner(copied)
    with pytest.raises(ExportError, match="cannot be run by ONNX Runtime"):
        Single(copied / "front.onnx")


def test_layouts_take_and_join_what_lies_side_by_side():
    value = np.arange(24).reshape(2, 12)  # three samples of four entries each
    place = Layout(1, 4)
    some = place.take(value, np.array([2, 0]))
    assert some.tolist() == [[8, 9, 10, 11, 0, 1, 2, 3], [20, 21, 22, 23, 12, 13, 14, 15]]
    rest = place.take(value, np.array([1]))
    assert (place.join([(np.array([2, 0]), some), (np.array([1]), rest)], 3) == value).all()
    assert (place.count(value), Layout().count(value)) == (3, None)
    assert Layout().take(value, np.array([0])) is value
    assert Layout().join([(np.array([0]), rest), (np.array([1]), value)], 2) is value
