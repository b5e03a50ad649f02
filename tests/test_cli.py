"""The command line: the user's own words, the whole path through it, and what it prints where."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from torch import nn
from typer.testing import CliRunner, Result

import dslify
from dslify import demo
from dslify.cli import app
from dslify.explained import grouped
from tests.zoo import ZOO

LEAVES = ("inspect", "insert", "finetune", "calibrate", "evaluate", "export", "run", "measure", "compact", "demo")
RATE = 16_000
LENGTH = 4096  # samples in a segment of the autoencoder
PATIENCE = 120  # seconds for a child process: many times what it takes

OWN_CLASS = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv1d(16, 32, 4, 2, 1), nn.ReLU())
        self.decoder = nn.Sequential(nn.ConvTranspose1d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose1d(16, 1, 4, 2, 1))

    def forward(self, x):
        return self.decoder(self.encoder(x))
"""

TWO_INPUTS = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.last = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, *, tokens, mask):
        return self.last(self.inner(self.embed(tokens)).relu()) * mask.unsqueeze(-1)
"""

WHAT_HELP_IMPORTS = """
import sys
from dslify.cli import main
try:
    main()
except SystemExit:
    slow = {"torch", "numpy", "rich", "soundfile"} & set(sys.modules)
    sys.exit(f"imported {slow}" if slow else 0)
"""

INTERRUPTED = """
import os, signal
from dslify.cli import main
from dslify.run_folder import RunFolder

save = RunFolder.save

def saved(folder, step, *rest, **options):
    save(folder, step, *rest, **options)
    if step == 20:
        os.kill(os.getpid(), signal.SIGINT)

RunFolder.save = saved
main()
"""


def call(*argv: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in argv], prog_name="dslify")


def done(*argv: object) -> Result:
    result = call(*argv)
    assert result.exit_code == 0, result.output
    return result


def document(*argv: object) -> dict:
    """With --json: all of stdout is one document."""
    return json.loads(done(*argv, "--json").stdout)


def child(folder: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dslify", *map(str, argv)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)


def make_sound(folder: Path, files: int, seed: int) -> Path:
    """Sound files of eight segments, half of them loud and half quiet, in a folder for each kind."""
    rng = numpy.random.default_rng(seed)
    for at in range(files):
        kind, level = (("loud", 0.3), ("quiet", 0.003))[at % 2]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        tone = numpy.sin(numpy.cumsum(rng.uniform(0.01, 0.5, 8 * LENGTH))) + 0.1 * rng.standard_normal(8 * LENGTH)
        soundfile.write(folder / kind / f"{at}.flac", level * tone / 1.5, RATE)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sounds")
    return {name: make_sound(folder / name, 6, seed) for seed, name in enumerate(("train", "valid", "more", "test"))}


@pytest.fixture
def scaling(tmp_path: Path) -> Path:
    """An autoencoder without biases: its answer to a quiet sound is small, and so is what the light path gets wrong."""

    def down(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(i, o, 4, 2, 1, bias=False), nn.ReLU())

    def up(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.ConvTranspose1d(i, o, 4, 2, 1, bias=False))

    torch.manual_seed(0)
    encoder = OrderedDict(block1=down(1, 16), block2=down(16, 24), block3=down(24, 32))
    decoder = OrderedDict(block1=up(32, 24), block2=up(24, 16), block3=up(16, 1))
    torch.save(
        nn.Sequential(OrderedDict(encoder=nn.Sequential(encoder), decoder=nn.Sequential(decoder))),
        tmp_path / "model.pt",
    )
    return tmp_path / "model.pt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pickled plain autoencoder: torch.nn classes in Sequentials, nothing else."""
    torch.save(ZOO["autoencoder"].build(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_the_users_own_words(model: Path) -> None:
    before = model.read_bytes()
    ran = child(model.parent, "insert", "model.pt", "--at", "encoder.block3", "--width", "0.1")
    assert ran.returncode == 0, ran.stderr
    assert "model.pt: Sequential, input 1x1x" in ran.stdout  # what was assumed
    assert "wrote model.dsl" in ran.stdout
    assert "next: dslify finetune model.dsl --data FOLDER" in ran.stdout
    assert "cut behind encoder.block3" in ran.stdout
    for row in ("base", "switch", "light", "full"):
        assert row in ran.stdout
    assert model.read_bytes() == before
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.dsl", "model.pt"]
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["timm:resnet18", "--at", "layer2"], "resnet18.dsl"),
        (["timm:vit_tiny_patch16_224", "--at", "blocks.5"], "vit_tiny_patch16_224.dsl"),
        (["recipes.soundstream.model:pretrained", "--at", "encoder.block2", "--scope", "encoder"], "pretrained.dsl"),
        (["tests.zoo:wav2vec2", "--at", "encoder.transformer.layers.0", "--input", "1x4000"], "wav2vec2.dsl"),
    ],
    ids=lambda words: words if isinstance(words, str) else "",
)
def test_names(words: list[str], written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    found = document("insert", *words)
    assert found["file"] == written
    assert [path.name for path in tmp_path.iterdir()] == [written]
    costs = {row["name"]: row for row in found["cost"]}
    assert set(costs) == {"base", "switch", "light", "full"}
    assert costs["light"]["macs"] < costs["full"]["macs"] / 2
    assert dslify.dsl_layers(dslify.load(tmp_path / written))


def test_own_class_needs_code_or_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(OWN_CLASS)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        torch.manual_seed(0)
        torch.save(importlib.import_module("own_network").Net(), "own.pt")
    del sys.modules["own_network"]  # the user's other program made the file
    words = ["insert", "own.pt", "--at", "encoder.2", "--input", "1x1x512"]
    refused = call(*words)
    assert refused.exit_code == 2
    assert "own_network.Net" in refused.stderr
    assert not (tmp_path / "own.dsl").exists()
    first = document(*words, "--code", "own_network.py")
    again = document(*words, "--trust", "own_network", "--force")
    assert first["cost"] == again["cost"]


def test_whole_path(scaling: Path, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scaling.parent)
    points = document("inspect", "model.pt", "--input", f"1x1x{LENGTH}")
    assert "encoder.block3" in [point["path"] for point in points["cut_points"]]
    document("insert", "model.pt", "--at", "encoder.block2", "--width", "0.2", "--input", f"1x1x{LENGTH}")
    steps = ["--steps", 60, "--switch-steps", 60, "--switch-data", sounds["valid"]]
    trained = document("finetune", "model.dsl", "--data", sounds["train"], *steps)
    light, switch = trained["phases"]
    assert light["last"]["total"] < light["first"]["total"]
    assert switch["last"]["total"] < switch["first"]["total"]
    assert trained["run_dir"] == "model.run"
    calibrated = document("calibrate", "model.dsl", "--data", sounds["more"], "--light-share", 0.5)
    assert calibrated["share"] == 0.5
    shown = document("inspect", "model.dsl")
    assert shown["threshold"] == calibrated["threshold"]
    judged = document("evaluate", "model.dsl", "--data", sounds["test"])
    rows = {row["name"]: row for row in judged["rows"]}
    assert set(rows) == {"full", "light", "mixed", "random", "oracle", "loudness"}
    assert rows["mixed"]["difference"] < rows["random"]["difference"]
    shares = {kind["label"]: kind["share"] for kind in judged["kinds"]}
    assert shares["quiet"] > shares["loud"]
    assert document("evaluate", "model.dsl", "--data", sounds["test"]) == judged
    assert sorted(path.name for path in scaling.parent.iterdir()) == ["model.dsl", "model.pt", "model.run"]


def test_what_is_said_after_each_command(model: Path, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    seen = done("inspect", "model.pt", "--input", f"1x1x{LENGTH}").stdout
    assert "next: dslify insert model.pt --at" in seen
    done("insert", "model.pt", "--at", "encoder.block2", "--input", f"1x1x{LENGTH}")
    steps = ["--steps", 4, "--switch-steps", 4]
    seen = done("finetune", "model.dsl", "--data", sounds["train"], *steps, "-o", "trained.dsl").stdout
    assert "48 samples from 6 files" in seen
    assert "wrote trained.dsl" in seen
    assert "model.run/" in seen
    assert "next: dslify calibrate trained.dsl" in seen
    seen = done("calibrate", "trained.dsl", "--data", sounds["more"], "--max-difference", 0.5).stdout
    assert "threshold" in seen
    assert "next: dslify evaluate trained.dsl" in seen
    seen = done("evaluate", "trained.dsl", "--data", sounds["test"]).stdout
    for word in ("full", "light", "mixed", "random", "oracle", "loudness", "loud", "quiet"):
        assert word in seen
    assert done("evaluate", "trained.dsl", "--data", sounds["test"], "--quiet").output == ""
    by_source = done("evaluate", "trained.dsl", "--data", sounds["test"], "--by", "source").stdout
    assert "quiet/1.flac" in by_source


def test_segments_of_another_length(model: Path, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    done("insert", "model.pt", "--at", "encoder.block2", "--input", f"1x1x{LENGTH}")
    for part, expected in ((1, 48), (2, 96)):
        judged = document("evaluate", "model.dsl", "--data", sounds["test"], "--segment", LENGTH / RATE / part)
        assert judged["n"] == expected


def test_explain_names_every_tensor_of_the_light_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    said = done("insert", "model.pt", "--at", "encoder.block3", "--explain").stdout
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    layer = dslify.dsl_layers(dslify.load("model.dsl"))[0]
    explained = {tensor.name: row.name for row in grouped(layer.plan.tensors) for tensor in row.tensors}
    for name, parameter in layer.light.named_parameters():
        if not name.startswith("projection"):
            sizes = ["x".join(map(str, tensor.shape)) for tensor in (layer.full.get_parameter(name), parameter)]
            assert " ".join(sizes) in " ".join(rows[explained[name]]), name
    again = done("inspect", "model.dsl", "--explain").stdout
    assert again[again.index("What each tensor") :].strip() in said
    shown = document("inspect", "model.dsl", "--explain")
    assert {tensor["name"] for tensor in shown["plan"]["tensors"]} == set(explained)


def test_inspect_shows_and_draws_what_a_cut_would_save(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    words = ["inspect", "model.pt", "--input", f"1x1x{LENGTH}", "--width", "0.2"]
    said = done(*words, "--levels", "1", "--picture", "cost.svg").stdout
    assert "model.pt: Sequential, 41.7 k parameters" in said
    assert "block3 *" in said  # shown in spite of --levels, because auto takes it
    assert "* --at auto: encoder.block3, the end of a block" in said
    assert "modules are not shown; --levels 3 shows all of them" in said
    assert "wrote cost.svg" in said
    assert "next: dslify insert model.pt --at encoder.block3 --width 0.2 --input 1x1x4096" in said
    assert "encoder.block3: base" in Path("cost.svg").read_text()
    found = document(*words, "--picture", "cost.svg", "--force")
    assert found["auto"]["at"] == "encoder.block3"
    assert found["width"] == 0.2
    points = {point["path"]: point for point in found["cut_points"]}
    made = document("insert", "model.pt", "--at", "encoder.block3", "--width", "0.2", "--input", f"1x1x{LENGTH}")
    light = next(row for row in made["cost"] if row["name"] == "light")
    assert (points["encoder.block3"]["light_macs"], points["encoder.block3"]["light_params"]) == (
        light["macs"],
        light["params"],
    )
    assert points["decoder"]["reason"] == "nothing comes after it"
    assert sorted(path.name for path in model.parent.iterdir()) == ["cost.svg", "model.dsl", "model.pt"]


def test_insert_at_auto_takes_the_cut_that_inspect_marks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    said = " ".join(done("insert", "model.pt", "--at", "auto", "--input", f"1x1x{LENGTH}").stdout.split())
    assert "cut behind encoder.block3" in said
    assert "chosen by --at auto: encoder.block3, the end of a block: 32 % of the MACs lie before it" in said
    assert "next best: encoder" in said
    assert dslify.dsl_layers(dslify.load("model.dsl"))[0].plan.at == "encoder.block3"


def test_a_second_layer_goes_into_the_file_of_the_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    done("insert", "model.pt", "--at", "encoder.block2", "--input", f"1x1x{LENGTH}", "-o", "one.dsl")
    said = done("insert", "one.dsl", "--at", "encoder.block4", "-o", "two.dsl").stdout
    assert f"input 1x1x{LENGTH} (as it was cut before)" in said
    assert "2 Dynamic Switch Layers" in said
    found = document("inspect", "two.dsl")
    assert [layer["plan"]["at"] for layer in found["layers"]] == ["encoder.block2", "encoder.block4"]
    assert len(dslify.dsl_layers(dslify.load("two.dsl"))) == 2


def test_depth_leaves_branches_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["insert", "tests.zoo:vit", "--at", "blocks.1", "--force"]
    whole, half = (document(*words, *more)["plan"] for more in ([], ["--depth", "0.5"]))
    assert (whole["depth"], whole["dropped"]) == (1.0, [])
    assert (half["depth"], len(half["dropped"])) == (0.5, 2), "of the two blocks' four branches"
    assert 0.3 * whole["macs"]["light"] < half["macs"]["light"] < 0.7 * whole["macs"]["light"]
    assert half["macs"]["full"] == whole["macs"]["full"]


def test_inputs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_inputs.py").write_text(TWO_INPUTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["two_inputs:Net", "--input", "tokens=2x5:int64,mask=2x5"]
    found = document("inspect", *words)
    assert found["input"] == "input tokens 2x5 int64, mask 2x5 int64 (as given)"
    assert "inner" in {point["path"] for point in found["cut_points"] if not point["reason"]}
    made = document("insert", *words, "--at", "inner")
    assert made["plan"]["at"] == "inner"


def test_scope_is_kept_by_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.soundstream.model import CUT, pretrained

    monkeypatch.chdir(tmp_path)
    numpy.save("sound.npy", numpy.random.default_rng(0).standard_normal((24, 1, RATE)).astype(numpy.float32))
    done("insert", "recipes.soundstream.model:pretrained", "--at", CUT, "--scope", "encoder", "-o", "codec.dsl")
    done("finetune", "codec.dsl", "--data", "sound.npy", "--steps", 2, "--switch-steps", 2)
    done("calibrate", "codec.dsl", "--data", "sound.npy", "--light-share", 0.5)
    codec = pretrained()
    whole = dslify.load("codec.dsl", into=codec)
    example = codec.example_input_array + 0.1
    with torch.no_grad(), dslify.route(whole, "full"):
        assert torch.equal(whole(example), codec(example))


def test_every_second_run_has_its_own_folder(
    model: Path, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    done("insert", "model.pt", "--at", "encoder.block2", "--input", f"1x1x{LENGTH}")
    words = ["finetune", "model.dsl", "--data", sounds["train"], "--steps", 2, "--switch-steps", 2]
    assert [document(*words)["run_dir"] for _ in range(2)] == ["model.run", "model.run2"]
    assert document(*words, "--resume")["run_dir"] == "model.run2"


def test_interrupted_and_resumed_is_the_same_as_unbroken(
    model: Path, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model.parent
    words = ["finetune", "model.dsl", "--data", sounds["train"], "--batch-size", 4, "--threads", 1]
    words += ["--steps", 30, "--switch-steps", 15, "--checkpoint-every", 10]
    done("insert", model, "--at", "encoder.block2", "--input", f"1x1x{LENGTH}")
    before = (folder / "model.dsl").read_bytes()
    command = [sys.executable, "-c", INTERRUPTED, *map(str, words)]
    running = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    err = running.stderr
    assert running.returncode == 130, err
    assert err.count("\n") == 1
    assert "--resume --run-dir model.run" in err
    assert "Traceback" not in err
    assert (folder / "model.dsl").read_bytes() == before
    assert (folder / "model.run" / "checkpoints" / "step-000021.pt").exists(), "the step at hand is finished and kept"
    monkeypatch.chdir(folder)
    done(*words, "--resume", "-o", "resumed.dsl")
    done(*words, "--run-dir", "other.run", "-o", "unbroken.dsl")
    states = [dslify.load(folder / name).state_dict() for name in ("resumed.dsl", "unbroken.dsl")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.parametrize("leaf", LEAVES)
def test_help_shows_an_example(leaf: str) -> None:
    said = done(leaf, "--help").stdout
    assert f"Example: dslify {leaf}" in " ".join(said.split())
    assert "--json" in said
    assert "--quiet" in said


def test_exactly_these_commands() -> None:
    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == list(LEAVES)


def test_without_a_command_it_shows_help() -> None:
    assert call().stdout == done("--help").stdout


def test_version() -> None:
    assert done("--version").stdout == f"dslify {dslify.__version__}\n"


def test_help_and_import_do_without_torch() -> None:
    for argv in (["--help"], ["insert", "--help"], ["--version"]):
        subprocess.run(
            [sys.executable, "-c", WHAT_HELP_IMPORTS, *argv], check=True, capture_output=True, timeout=PATIENCE
        )


def test_json_stays_one_document_whatever_the_model_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatty_network.py").write_text(OWN_CLASS + "\nprint('hello')\n")
    monkeypatch.chdir(tmp_path)
    result = done("inspect", "chatty_network:Net", "--input", "1x1x512", "--json")
    assert json.loads(result.stdout)["class"] == "Net"
    assert "hello" in result.stderr


def test_numbers_of_a_plain_sequential_with_flat_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = OrderedDict(block1=nn.Linear(8, 32), act=nn.ReLU(), block2=nn.Linear(32, 32), block3=nn.Linear(32, 4))
    torch.save(nn.Sequential(blocks), tmp_path / "my model.pt")
    monkeypatch.chdir(tmp_path)
    said = done("insert", "my model.pt", "--at", "block1", "--width", "0.25").stdout
    assert "wrote my model.dsl" in said
    assert "next: dslify finetune 'my model.dsl' --data FOLDER" in said  # can be pasted


def test_demo_twice_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 8)
    monkeypatch.setattr(demo, "SWITCH_STEPS", 8)
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(2):
        report = document("demo")
        del report["seconds"]
        for phase in report["training"]["phases"]:
            del phase["seconds"]
        found.append(report)
    assert found[0] == found[1]
    assert sorted(path.name for path in (tmp_path / "demo-out").iterdir()) == sorted(
        name.rstrip("/") for name in found[0]["files"]
    )


def test_pipe_that_closes_early(model: Path) -> None:
    command = f"{sys.executable} -m dslify inspect {model} --input 1x1x{LENGTH} | head -n 1"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.stderr == ""
    assert ran.stdout.startswith(str(model))
