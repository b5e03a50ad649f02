"""A network as a folder for two processors: complete, checked, whole or not there."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest

from dslify import checked, split
from dslify.errors import ExportError, OptionError
from dslify.runtime import Runner, manifest
from tests.split_networks import exported


def write(made, folder, **options):
    return split.write_split(made.models, made.programs, made.graph, folder, **options)


def test_the_folder_holds_three_models_and_what_is_known_of_them():
    made = exported("sound")
    data = json.loads((made.folder / "manifest.json").read_text())
    assert {each.name for each in made.folder.iterdir()} == {each.name for each in made.written.files}
    assert sorted(each.name for each in made.written.files) == [
        "front.onnx", "full.onnx", "light.onnx", "manifest.json",
    ]  # fmt: skip
    assert (data["cut"], data["scope"], data["format"], data["batch"]) == ("stem", None, 1, None)
    assert data["threshold"] == pytest.approx(made.programs.layer.threshold.item(), abs=0)
    assert data["inputs"] == [{"name": "sound", "shape": [2, 1, 64], "dtype": "float32", "free": [0, 2]}]
    assert [(each["name"], each["shape"]) for each in data["outputs"]] == [("code", [1, 4, 16]), ("level", [1])]
    assert data["notes"]["example"] == [[[2, 1, 64], "float32"]]
    for part, entry in data["files"].items():
        file = made.folder / entry["file"]
        onnx.checker.check_model(onnx.load(file), full_check=True)
        assert (file.name, file.stat().st_size) == (f"{part}.onnx", entry["bytes"])
        assert manifest.digest(file) == entry["sha256"]


def test_both_routes_and_the_score_were_held_against_the_network():
    for name in ("sound", "turned", "nested"):
        errors = exported(name).written.errors
        assert set(errors) == {"full", "light", "score"}
        assert all(0 <= off <= 1e-5 for off in errors.values())
        assert "sent as fp16" in exported(name).written.notes[0]


def test_the_layouts_of_samples_that_are_not_on_the_first_axis_and_of_what_they_share():
    found, _ = manifest.read(exported("turned").folder)
    by_name = dict(zip(("masked", *found.passed), found.crossing, strict=True))
    assert by_name["masked"].axis == 1
    assert [place.axis for name, place in by_name.items() if name != "masked"] == [None]
    assert [place.axis for place in (*found.entering, *found.leaving)] == [0, 0]
    assert found.sent["masked"] == (1, 2)
    assert found.routable


def test_parts_that_decide_again_are_known():
    assert manifest.read(exported("nested").folder)[0].each == ("full",)
    assert manifest.read(exported("sound").folder)[0].each == ()


def test_samples_in_a_call_are_read_off_the_front_part():
    front = onnx.ModelProto()
    front.CopyFrom(exported("sound").models["front"])
    assert split._batch(front) is None
    front.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert split._batch(front) == 4


def test_what_full_does_not_read_is_not_sent():
    made = exported("sound")
    taken = {entry.name for entry in made.models["full"].graph.input}
    found, files = manifest.read(made.folder)
    assert set(found.sent) == {entry.name for entry in onnx.load(files["full"]).graph.input}
    wider = onnx.ModelProto()
    wider.CopyFrom(made.models["full"])
    wider.graph.input.append(onnx.helper.make_tensor_value_info("unread", onnx.TensorProto.FLOAT, [1]))
    assert {entry.name for entry in split._without_unread(wider).graph.input} == taken
    nested = exported("nested").models["full"]
    assert {entry.name for entry in split._without_unread(nested).graph.input} == {"masked"}


def test_samples_that_depend_on_each_other_are_not_routed_apart(monkeypatch):
    made = exported("sound")
    front = made.programs.front.module.forward

    def mixing(x):
        masked, *rest = front(x)
        return (masked - masked.mean(0, keepdim=True), *rest)

    monkeypatch.setattr(made.programs.front.module, "forward", mixing)
    assert not split.described(made.models, made.programs, made.graph, *_example(made))["routable"]


def _example(made):
    return checked.cases(made.graph)[0], None, "fp16"


@pytest.mark.parametrize("part", ["front", "light", "full"])
def test_a_part_that_differs_is_refused_and_nothing_is_left(part, tmp_path):
    made = exported("sound")
    wrong = onnx.ModelProto()
    wrong.CopyFrom(made.models[part])
    tensor = max(wrong.graph.initializer, key=lambda each: np.prod(each.dims))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name))
    models = {**made.models, part: wrong}
    with pytest.raises(ExportError, match=r"differs from the network on the .* route by"):
        split.write_split(models, made.programs, made.graph, tmp_path / "parts")
    assert not list(tmp_path.iterdir())
    found = split.write_split(models, made.programs, made.graph, tmp_path / "parts", tolerance=None)
    assert max(found.errors.values()) > 1e-4


def test_a_folder_is_replaced_with_force_alone_and_never_one_with_other_things(tmp_path):
    made, folder = exported("sound"), tmp_path / "parts"
    write(made, folder)
    with pytest.raises(ExportError, match="exists; give --force"):
        write(made, folder)
    (folder / "front.onnx").write_bytes(b"old")
    write(made, folder, force=True, number="int8")
    assert Runner(folder).number == "int8"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="no folder of parts alone"):
        write(made, folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ExportError, match="there is no folder"):
        write(made, tmp_path / "none" / "parts")
    with pytest.raises(OptionError, match="fp8"):
        write(made, tmp_path / "other", number="fp8")
    assert [each.name for each in tmp_path.iterdir()] == ["parts"]


def test_a_write_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    made, folder = exported("sound"), tmp_path / "parts"
    write(made, folder)
    before = (folder / "manifest.json").read_bytes()
    calls = []
    fill = split._fill

    def failing(target, *rest):
        calls.append(target)
        if target.parent == tmp_path:  # not the temporary ones of the check
            (target / "front.onnx").write_bytes(b"half")
            raise OSError(28, "No space left on device", str(target))
        return fill(target, *rest)

    monkeypatch.setattr(split, "_fill", failing)
    with pytest.raises(OSError, match="No space left"):
        write(made, folder, force=True)
    assert len(calls) == 3
    assert [each.name for each in tmp_path.iterdir()] == ["parts"]
    assert (folder / "manifest.json").read_bytes() == before


def test_the_runtime_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None\n"
        "import numpy as np; from dslify.runtime import Runner\n"
        f"found = Runner({str(exported('sound').folder)!r}).run(np.zeros((1, 1, 64), np.float32))\n"
        "print(found.route, [each.shape for each in found.outputs])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split(" ", 1)[1] == "[(1, 4, 16), (1,)]\n"
