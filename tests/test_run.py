"""dslify run: samples through a .dsl file, a one-file model and a split folder take the same routes."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

import dslify
from dslify.cli import app
from dslify.data import open_data
from dslify.onnx_format import whole_model
from dslify.routed import delivered, routed
from tests.split_networks import exported


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """net.dsl, net.onnx, parts/ and data.npy"""
    root, made = tmp_path_factory.mktemp("run"), exported("sound")
    dslify.save(made.net, root / "net.dsl")
    onnx.save(whole_model(made.programs, made.models, made.graph, 0), root / "net.onnx")
    shutil.copytree(made.folder, root / "parts")
    np.save(root / "data.npy", made.x)
    return root


def run(*words):
    with pytest.raises(SystemExit) as stop:
        app(["run", *map(str, words)])
    return stop.value.code


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_kinds_of_models_take_the_same_routes(folder, tmp_path, capsys):
    taken = exported("sound").eager(exported("sound").x)[1]
    documents, tables = {}, {}
    for kind, name in (("dsl", "net.dsl"), ("split", "parts"), ("onnx", "net.onnx")):
        path = tmp_path / f"{kind}.csv"
        assert run(folder / name, "--data", folder / "data.npy", "-o", path, "--json") == 0
        documents[kind], tables[kind] = json.loads(capsys.readouterr().out), rows_of(path)
    for kind, document in documents.items():
        assert (document["kind"], document["light_share"], document["calls"]) == (kind, taken.mean(), 12)
        assert [row["route"] == "light" for row in tables[kind]] == taken.tolist()
        assert [float(row["score"]) for row in tables[kind]] == pytest.approx(
            [float(row["score"]) for row in tables["dsl"]], rel=1e-4
        )
        assert document["read"][0]["samples"] == 12
    for kind in ("dsl", "split"):
        assert documents[kind]["bytes_sent"] == sum(int(row["sent"]) for row in tables[kind])
        assert [int(row["sent"]) > 0 for row in tables[kind]] == [not light for light in taken]
        assert documents[kind]["bytes_sent"] < documents[kind]["bytes_dense"] < documents[kind]["bytes_always"]
    assert documents["dsl"]["bytes_sent"] == documents["split"]["bytes_sent"]
    assert documents["onnx"]["bytes_sent"] == 0


def test_the_threshold_and_the_wire_may_be_given(folder, capsys):
    for name in ("net.dsl", "parts", "net.onnx"):
        for threshold, share in (("1e9", 1.0), ("0", 0.0)):
            assert run(folder / name, "--data", folder / "data.npy", "--threshold", threshold, "--json") == 0
            assert json.loads(capsys.readouterr().out)["light_share"] == share
    sent = {}
    for name in ("net.dsl", "parts"):
        for number in ("fp32", "fp16", "int8"):
            words = ("--data", folder / "data.npy", "--threshold", "0", "--wire", number, "--json")
            assert run(folder / name, *words) == 0
            document = json.loads(capsys.readouterr().out)
            assert document["wire"] == number
            sent[name, number] = document["bytes_sent"]
        assert sent[name, "int8"] < sent[name, "fp16"] < sent[name, "fp32"] < document["bytes_dense"]


def test_what_is_printed(folder, capsys):
    assert run(folder / "parts", "--data", folder / "data.npy") == 0
    said = capsys.readouterr().out
    assert "50.0 % went light (6 of 12), the full part was woken" in said
    assert "outputs of 1x4x16, 1" in said
    for row in ("sent: what is not zero, fp16", "dense, fp32", "dense, int8", "without a switch"):
        assert row in said
    assert "note: the input itself takes 128 B at 2 bytes a number, less than what is sent" in said
    assert "next: dslify measure FILE.dsl --share 0.50" in said
    assert run(folder / "net.onnx", "--data", folder / "data.npy", "-q") == 0
    assert capsys.readouterr().out == ""


def test_a_file_that_does_not_show_its_routes_says_so(folder, tmp_path, capsys):
    made = exported("sound")
    other = onnx.ModelProto()
    other.CopyFrom(made.models["front"])
    onnx.save(other, tmp_path / "other.onnx")
    assert run(tmp_path / "other.onnx", "--data", folder / "data.npy") == 2
    assert "does not say how much that is" in capsys.readouterr().err
    other.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64
    onnx.save(other, tmp_path / "other.onnx")
    assert run(tmp_path / "other.onnx", "--data", folder / "data.npy", "-o", tmp_path / "rows.csv") == 0
    said = capsys.readouterr().out
    assert "this file does not show its routes" in said
    assert "went light" not in said
    assert {row["route"] for row in rows_of(tmp_path / "rows.csv")} == {""}


def test_classes_are_named(folder, tmp_path):
    model = delivered(folder / "parts")
    made = exported("sound")
    samples = open_data(made.x, (1, 64), labels=["a", "b"] * 6)
    several = replace(samples, classes=tuple(f"class{at}" for at in range(64)))  # code is 1 x 4 x 16
    answers = [row.answer for row in routed(model, several, progress=False).rows]
    codes = [made.eager(x)[0][0].argmax() for x in np.split(made.x, 12)]
    assert answers == [f"class{at}" for at in codes]
    assert {row.answer for row in routed(model, samples, progress=False).rows} == {""}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none.onnx",), "There is no model to run at none.onnx; give a .dsl file"),
        (("data.npy",), "There is no model to run at data.npy"),
        (("none.dsl",), "there is no such file"),
        (("net.onnx", "--wire", "fp16"), "is one file, and nothing is sent inside it; leave --wire out"),
        (("parts", "--wire", "fp8"), "one of fp32, fp16, int8, or none; got 'fp8'"),
        (("net.dsl", "--wire", "fp8"), "one of fp32, fp16, int8; got 'fp8'"),
        (("parts", "--threshold", "high"), "threshold must be a number; got 'high'"),
        (("parts", "--threads", "0"), "threads must be a whole number of at least 1; got 0"),
        (("parts", "-o", "parts"), "--output parts: it exists already"),
        (("parts", "-o", "none/rows.csv"), "--output none/rows.csv"),
        (("text.onnx",), "text.onnx is no ONNX model"),
        (("empty",), "empty is no folder of parts"),
    ],
)
def test_errors_are_one_sentence_and_nothing_is_written(folder, words, said, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "text.onnx").write_text("no model")
    before = sorted(folder.rglob("*"))
    assert run(*words, "--data", "data.npy") == 2
    told = capsys.readouterr().err
    assert said in told
    assert (told.startswith("error: "), told.count("\n")) == (True, 1)
    assert sorted(folder.rglob("*")) == before


def test_a_table_is_replaced_with_force_alone(folder, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("mine")
    assert run(folder / "parts", "--data", folder / "data.npy", "-o", path) == 2
    assert path.read_text() == "mine"
    assert run(folder / "parts", "--data", folder / "data.npy", "-o", path, "--force", "-q") == 0
    assert len(rows_of(path)) == 12
