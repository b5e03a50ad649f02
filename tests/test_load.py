"""Files and names become networks; files that would run something do not, and say why."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import io
import json
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchaudio
import torchvision
import transformers
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from dslify.capture import capture
from dslify.errors import LoadError, OptionError, UntrustedError
from dslify.example_inputs import example_for
from dslify.load import example_inputs_for, load_model

STRANGER = """
import pathlib
from torch import nn

pathlib.Path("was_imported").touch()


class Stranger(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.act = squared

    def forward(self, x):
        return self.act(self.inner(x))


def squared(x):
    return x * x


def factory():
    return Stranger(3)


network = Stranger()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; what it teaches Python is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("stranger", "household") or name.startswith("dslify_code"):
            del sys.modules[name]


def saved(content: Any, path: Path | str = "model.pt") -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.save of an old weight_norm
        torch.save(content, path)
    return str(path)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32)


def old_norms() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(
            torch.nn.utils.weight_norm(nn.Conv1d(1, 4, 3)), torch.nn.utils.spectral_norm(nn.Conv1d(4, 1, 3))
        )


def small_bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes))


WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.GELU("tanh"), nn.Dropout()), "2x1x16"),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, activation="gelu", batch_first=True), "1x4x8"),
    "lstm": (lambda: nn.Sequential(nn.LSTM(4, 4, batch_first=True)), "1x5x4"),
    "timm resnet": (lambda: timm.create_model("resnet18"), "1x3x64x64"),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), "1x3x224x224"),
    "torchvision vit, with partial(LayerNorm)": (small_vit, "1x3x32x32"),
    "torchaudio": (lambda: torchaudio.models.ConvTasNet(1, 16, 8, 3, 8, 8, 2, 1), "1x1x400"),
    "transformers": (small_bert, "1x5:int64"),
    "old weight and spectral norm": (old_norms, "1x1x16"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_modules_of_known_packages_come_back_as_they_were(name, folder):
    make, shape = WHOLE[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs, _ = example_inputs_for(model, shape)
    again = load_model(saved(model))
    assert type(again) is type(model)
    assert not again.training
    with torch.no_grad():
        mine, theirs = again(*inputs), model(*inputs)
    if hasattr(mine, "last_hidden_state"):
        mine, theirs = mine.last_hidden_state, theirs.last_hidden_state
    mine, theirs = (out[0] if isinstance(out, tuple) else out for out in (mine, theirs))
    assert torch.equal(mine, theirs)


def test_a_wrapped_module_is_taken_out_and_a_module_in_memory_passes_through(folder):
    model = nn.Linear(2, 2)
    assert load_model(model) is model
    for content in (nn.DataParallel(model), {"model": model, "epoch": 3}):
        assert torch.equal(load_model(saved(content)).weight, model.weight)


# Names


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("timm:resnet18", timm.models.ResNet),
        ("torchvision:squeezenet1_1", torchvision.models.SqueezeNet),
        ("torchaudio:wav2vec2_base", torchaudio.models.Wav2Vec2Model),
    ],
)
def test_names_give_the_same_random_weights_each_time_and_leave_the_generator_alone(name, kind):
    one = load_model(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    two = load_model(name)
    assert isinstance(one, kind)
    assert not one.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_no_backbone_is_downloaded_unasked(monkeypatch):
    def no_download(*_: Any, **__: Any) -> None:
        pytest.fail("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_download)
    load_model("torchvision:lraspp_mobilenet_v3_large")


def test_a_factory_in_the_working_folder(folder):
    (folder / "stranger.py").write_text(STRANGER)
    assert load_model("stranger:factory").inner.in_features == 3
    assert load_model("stranger:Stranger").inner.in_features == 4
    assert load_model("stranger:network") is sys.modules["stranger"].network
    assert str(folder) not in sys.path


# What is refused, and in which words. Each maker leaves a file and returns what load_model is called with.


def rewritten(path: str, change: Callable[[dict[str, bytes]], Any]) -> str:
    """The same zip archive after a change of its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def written(data: bytes, name: str = "model.pt") -> str:
    Path(name).write_bytes(data)
    return name


def scripted() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "model.pt")
    return "model.pt"


def bomb() -> str:
    with zipfile.ZipFile("model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(2**26))
    return "model.pt"


def old_pickle(content: Any) -> str:
    torch.save(content, "model.pt", _use_new_zipfile_serialization=False)
    return "model.pt"


def in_safetensors(state: dict[str, Tensor]) -> str:
    save_file(state, "model.safetensors")
    return "model.safetensors"


def cut(path: str, size: int = 700) -> str:
    return written(Path(path).read_bytes()[:size], path)


SENTENCES: dict[str, tuple[Callable[[], str], str, dict[str, Any]]] = {
    "missing": (lambda: "nowhere.pt", "nowhere.pt: there is no such file", {}),
    "missing, in a folder": (lambda: "some/where", "there is no such file", {}),
    "folder": (lambda: os.makedirs("model.pt") or "model.pt", "is a folder", {}),
    "empty": (lambda: written(b""), "is empty", {}),
    "text": (lambda: written(b"hello, world" * 9), "is no model file", {}),
    "zip": (lambda: rewritten(saved(1), lambda m: (m.clear(), m.update(a=b"1"))), "neither data.pkl nor", {}),
    "zip, cut short": (lambda: cut(saved(nn.Linear(9, 9))), "damaged or cut short", {}),
    "zip bomb": (bomb, "far more than its own size", {}),
    "damaged pickle": (lambda: rewritten(saved(1), lambda m: m.update({"model/data.pkl": b"\x80X"})), "damaged", {}),
    "TorchScript": (scripted, "TorchScript archive", {}),
    "tensor": (lambda: saved(torch.ones(2, 3)), "one tensor of shape 2x3", {}),
    "module without its parts": (
        lambda: saved(PassesForLinear(copyreg.__newobj__, nn.Linear, state={"training": True})),
        "holds a Linear without its parts",
        {},
    ),
    "module with other parts": (
        lambda: saved(PassesForLinear(copyreg.__newobj__, nn.Linear, state={"_modules": {"a": 1}})),
        "holds a Linear that is damaged",
        {},
    ),
    "list": (lambda: saved([1, 2]), "holds a list", {}),
    "dict": (lambda: saved({"a": 1, "b": 2}), "a dict with 'a', 'b'", {}),
    "weights alone": (lambda: saved(nn.Linear(2, 2).state_dict()), "weights only .2 tensors.*--arch", {}),
    "weights of another": (
        lambda: saved(nn.Linear(2, 2).state_dict()),
        "lacks conv1.weight, bn1.weight, bn1.bias and 119 more and has besides weight, bias",
        {"arch": "timm:resnet18"},
    ),
    "weights of another shape": (
        lambda: written(STRANGER.encode(), "stranger.py") and saved({f"inner.{k}": v for k, v in SHORT.items()}),
        "size mismatch for inner.*, the shape in current model is",
        {"arch": "stranger:factory"},
    ),
    "arch without weights": (lambda: saved(nn.Linear(2, 2)), "drop it", {"arch": "timm:resnet18"}),
    "arch for a name": (lambda: "timm:resnet18", "is a name and no file", {"arch": "timm:resnet18"}),
    "arch of no kind": (lambda: saved(SHORT), "no name of a network", {"arch": "resnet"}),
    "old format": (lambda: old_pickle(nn.Linear(2, 2)), "not in today's torch.save format", {}),
    "plain pickle": (lambda: written(pickle.dumps([1])), "not in today's torch.save format", {}),
    "other protocol": (lambda: torch.save(nn.Linear(2, 2), "m.pt", pickle_protocol=4) or "m.pt", "protocol", {}),
    "safetensors alone": (lambda: in_safetensors(SHORT), "--arch", {}),
    "safetensors, cut short": (lambda: cut(in_safetensors(SHORT), 90), "no readable safetensors file", {}),
    "dslified": (lambda: rewritten(saved(1), lambda m: m.update({"dslify.json": b"{}"})), "dslify.load", {}),
    "name of nothing": (lambda: "resnet18", "no such file, and it is no name", {}),
    "unknown model": (lambda: "timm:resnt18", "nearest are resnet18, ", {}),
    "model from a hub": (lambda: "timm:hf-hub:timm/resnet18", "timm knows no model", {}),
    "unknown option": (lambda: "timm:resnet18?weights", "only pretrained is known", {}),
    "model with arguments": (lambda: "torchaudio:hdemucs_high", "needs sources", {}),
    "no module": (lambda: "nowhere.at.all:x", "no module nowhere", {}),
    "no function": (lambda: "torchvision.models:resnt18", "has no resnt18; it has resnet18", {}),
    "no network": (lambda: "os:getcwd", "gives a str", {}),
    "module that fails": (lambda: written(b"1/0", "stranger.py") and "stranger:x", "ZeroDivisionError", {}),
    "trust in the standard library": (lambda: saved(nn.Linear(2, 2)), "Python's own library", {"trust": ["os"]}),
    "trust in no name": (lambda: saved(nn.Linear(2, 2)), "takes the name of a module", {"trust": ["a b"]}),
    "no code": (lambda: saved(nn.Linear(2, 2)), "--code lost.py: there is no such file", {"code": ["lost.py"]}),
    "code that exits": (
        lambda: written(b"raise SystemExit(3)", "mine.py") and saved(nn.Linear(2, 2)),
        "--code mine.py failed: SystemExit",
        {"code": ["mine.py"]},
    ),
    "code that fails": (
        lambda: written(b"1/0", "mine.py") and saved(nn.Linear(2, 2)),
        "--code mine.py failed: ZeroDivisionError",
        {"code": ["mine.py"]},
    ),
}
SHORT = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_cannot_be_loaded_gets_one_sentence(case, folder):
    make, words, options = SENTENCES[case]
    source = make()
    with pytest.raises(LoadError, match=words) as refusal:
        load_model(source, **options)
    text = str(refusal.value)
    assert "\n" not in text
    assert len(text) < 400
    assert text.endswith(".")


# Weights


def test_weights_from_every_kind_of_file_fill_the_arch(folder):
    (folder / "stranger.py").write_text(STRANGER)
    torch.manual_seed(1)
    state = {f"inner.{key}": value for key, value in nn.Linear(3, 3).state_dict().items()}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    for path in (
        saved(state, "a.pth"),
        saved({"state_dict": state, "epoch": 1}, "b.ckpt"),
        saved({"model": wrapped}, "c.pt"),
        in_safetensors(state),
        old_pickle(state),
    ):
        model = load_model(path, arch="stranger:factory")
        assert torch.equal(model.inner.weight, state["inner.weight"]), path
        assert not model.training


# Strangers


def stranger_file(folder: Path) -> tuple[str, nn.Module]:
    (folder / "household").mkdir()
    (folder / "household" / "__init__.py").touch()
    (folder / "household" / "stranger.py").write_text(STRANGER)
    sys.path.insert(0, str(folder))
    try:
        model = importlib.import_module("household.stranger").Stranger()
    finally:
        sys.path.remove(str(folder))
    path = saved(model)
    for name in ("household.stranger", "household"):
        del sys.modules[name]
    (folder / "was_imported").unlink()
    return path, model


def test_a_strangers_class_is_named_and_not_even_imported(folder):
    path, _ = stranger_file(folder)
    with pytest.raises(UntrustedError, match=r"household\.stranger\.Stranger.*--trust household\.stranger"):
        load_model(path)
    with pytest.raises(UntrustedError):
        load_model(path, trust=["house", "household.strange", "torch"])
    assert not (folder / "was_imported").exists()
    assert "household" not in sys.modules


@pytest.mark.parametrize("root", ["household.stranger", "household"])
def test_a_trusted_class_is_let_in_with_its_functions(folder, root):
    path, model = stranger_file(folder)
    again = load_model(path, trust=[root])
    assert (folder / "was_imported").exists()
    x = torch.ones(1, 4)
    assert torch.equal(again(x), model(x))


def test_code_stands_in_for_main_and_for_its_own_name(folder):
    (folder / "train_it.py").write_text(STRANGER + "\nif __name__ == '__main__':\n    1/0\n")
    for module_name in ("__main__", "train_it"):
        script = types.ModuleType(module_name)
        exec(STRANGER, vars(script))  # noqa: S102
        real = sys.modules.get(module_name)
        sys.modules[module_name] = script
        try:
            path = saved(script.Stranger())
        finally:
            if real is None:
                del sys.modules[module_name]
            else:
                sys.modules[module_name] = real
        (folder / "was_imported").unlink()
        with pytest.raises(UntrustedError, match="--code FILE.py" if module_name == "__main__" else "--trust train_it"):
            load_model(path)
        assert not (folder / "was_imported").exists()
        model = load_model(path, code=["train_it.py"])
        assert model(torch.ones(1, 4)).shape == (1, 4)
    (folder / "other.py").write_text("")
    saved_by_main = path if module_name == "__main__" else saved(types.SimpleNamespace())
    with pytest.raises(UntrustedError):
        load_model(saved_by_main, code=["other.py"])


# Hostile pickles. Each is shown to run when torch reads it without weights_only.


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


class PassesForLinear(Calls):
    __class__ = nn.Linear  # pickle asks whether the class is the one that __newobj__ names


def graph_module_with_source() -> Any:
    body = {"_code": "def forward(self):\n    pass\n", "_graphmodule_cls_name": "GraphModule"}
    return Calls(reduce_graph_module, body, "getattr(__import__('os'), 'mkdir')('was_run')\n")


class Remembering(nn.Module):
    """Its constructor leaves a mark, as those of transformers' models could be made to."""

    def __init__(self, *_: Any):
        super().__init__()
        os.mkdir("was_run")


def at_home_in(module: str, thing: Any) -> Any:
    """`thing` as a member of a known module, as if that package defined it."""
    thing.__module__ = module
    setattr(sys.modules[module], thing.__name__, thing)
    return thing


HOSTILE: dict[str, Callable[[], Any]] = {
    "os.mkdir": lambda: Calls(os.mkdir, "was_run"),
    "os.system": lambda: Calls(os.system, "mkdir was_run"),
    "eval": lambda: Calls(eval, "__import__('os').mkdir('was_run')"),
    "exec": lambda: Calls(exec, "__import__('os').mkdir('was_run')"),
    "subprocess": lambda: Calls(importlib.import_module("subprocess").check_call, ["mkdir", "was_run"]),
    "a method of a path": lambda: Calls(getattr(Path("was_run"), "mkdir")),  # noqa: B009
    "fx.GraphModule's source": graph_module_with_source,
    "inside a module": lambda: with_attribute(Calls(os.mkdir, "was_run")),
    "inside a state dict": lambda: {"weight": torch.ones(1), "bias": Calls(os.mkdir, "was_run")},
    "constructor of a known module": lambda: Calls(at_home_in("timm.layers.mlp", Remembering)),
    "rebuild with another function": lambda: Calls(
        torch._tensor._rebuild_from_type_v2, at_home_in("timm.layers.mlp", Remembering), Remembering, (), {}
    ),
}


def with_attribute(value: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].extra = value
    return model


@pytest.fixture
def tidy(folder: Path) -> Path:
    yield folder
    vars(sys.modules["timm.layers.mlp"]).pop("Remembering", None)
    Remembering.__module__ = __name__


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_and_runs_nothing(case, tidy):
    path = saved(HOSTILE[case]())
    with pytest.raises(UntrustedError) as refusal:
        load_model(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert not (tidy / "was_run").exists()
    with contextlib.suppress(TypeError, AttributeError, RuntimeError):  # after the deed: what was made fits nowhere
        torch.load(path, weights_only=False)
    assert (tidy / "was_run").exists()  # or else the refusal above would prove nothing


@pytest.mark.parametrize(
    "content",
    [
        lambda: Calls(functools.partial, eval, "1"),
        lambda: with_attribute(Calls(functools.partial, nn.LayerNorm, state=(eval, ("1",), {}, None))),
        lambda: with_attribute(Calls(functools.partial, small_bert().__class__, 1)),
        lambda: with_attribute(Calls(nn.Linear, 2, 2)),
        lambda: with_attribute(Calls(torch.load, "x")),
        lambda: with_attribute(Calls(torch.hub.load, "x", "y")),
        lambda: with_attribute(torch.nn.functional.interpolate),
        lambda: with_attribute(fx.symbolic_trace(nn.Linear(2, 2))),
        lambda: with_attribute(torch.jit.ScriptModule),
        lambda: with_attribute(torch.nn.utils.parametrize.register_parametrization),
    ],
)
def test_what_could_run_something_later_is_refused_too(content, folder):
    with pytest.raises(UntrustedError):
        load_model(saved(content()))


def test_hooks_and_replaced_methods_are_refused_though_their_globals_are_known(folder):
    for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_pre_hooks"):
        model = nn.Sequential(nn.Linear(2, 2))
        vars(model[0])[table][0] = nn.Identity
        for content in (model, {"model": model}):
            with pytest.raises(UntrustedError, match="hook"):
                load_model(saved(content))
    for name in ("forward", "modules", "eval", "train"):
        model = nn.Sequential(nn.Linear(2, 2))
        vars(model[0])[name] = torch.nn.functional.relu
        with pytest.raises(UntrustedError, match=f"replaces the method {name}"):
            load_model(saved(model))
    state = {**vars(nn.Linear(2, 2)), "_compiled_call_impl": torch.nn.functional.relu}
    model = with_attribute(None)
    model._modules["0"] = PassesForLinear(copyreg.__newobj__, nn.Linear, state=state)
    with pytest.raises(UntrustedError, match="_compiled_call_impl"):
        load_model(saved(model))


def test_an_ambiguous_archive_is_read_by_one_reader_only(folder):
    """Two members of one name: the pickle that is checked must be the one that torch reads."""
    good, bad = Path(saved(nn.Linear(2, 2), "good.pt")), Path(saved(Calls(os.mkdir, "was_run"), "bad.pt"))
    for first, second in ((good, bad), (bad, good)):
        with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as two, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the duplicate name
            with zipfile.ZipFile("model.pt", "w") as archive:
                for source in (one, two):
                    for name in source.namelist():
                        archive.writestr(f"m/{name.partition('/')[2]}", source.read(name))
        with contextlib.suppress(LoadError):
            load_model("model.pt")
        assert not (folder / "was_run").exists()


def test_trusting_a_package_does_not_let_in_what_it_imported(folder):
    (folder / "stranger.py").write_text("from os import mkdir, system\nfrom subprocess import Popen, run\n")
    for name in ("mkdir", "Popen", "run"):
        data = b"\x80\x02cstranger\n" + name.encode() + b"\nX\x07\x00\x00\x00was_run\x85R."
        path = rewritten(saved(1), lambda members, data=data: members.update({"model/data.pkl": data}))
        with pytest.raises(UntrustedError):
            load_model(path, trust=["stranger"])
        assert not (folder / "was_run").exists()


# Exported programs


class Exports(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.back = nn.Conv1d(4, 4, 1)
        self.twin = nn.Conv1d(4, 4, 1)
        self.twin.weight = self.back.weight
        self.register_buffer("gain", torch.ones(4, 1), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.twin(self.back(self.conv(x) * self.gain)).reshape(x.shape[0], -1, 2)
        return {"y": y, "mean": y.mean(-1)}


def exported(path: str = "model.pt2", **options: Any) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    model = Exports().eval()
    auto = torch.export.Dim.AUTO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, (torch.randn(2, 1, 16),), dynamic_shapes=({0: auto, 2: auto},), strict=False
        )
        torch.export.save(program, path)
    return path, model


def test_an_exported_program_comes_back_with_its_example_and_its_guards(folder):
    path, model = exported()
    again = load_model(path)
    x = torch.randn(3, 1, 8)
    assert torch.equal(again(x)["y"], model(x)["y"])
    assert not any(child.training for child in again.modules())
    assert again.back.weight is again.twin.weight
    inputs, note = example_inputs_for(again)
    assert inputs[0].shape == (2, 1, 16)
    assert "archive's own example" in note
    with pytest.raises(AssertionError, match="Guard failed"):
        again(torch.randn(3, 1, 2))  # 2 * 2 is an axis that the export took for another size
    with torch.no_grad():
        again.conv.weight += 1  # its memory is its own, not the archive's
    assert torch.equal(load_model(path).conv.weight, model.conv.weight)
    assert "batch" in capture(again, inputs).dynamic


def test_an_exported_transformer_with_its_own_output_type(folder):
    model = small_bert().eval()
    ids = torch.ones(1, 5, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (ids,), strict=False), "model.pt2")
    assert torch.equal(load_model("model.pt2")(ids).last_hidden_state, model(ids).last_hidden_state)


def changed_json(member: str, change: Callable[[Any], Any]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.endswith(member))
        data = json.loads(members[name])
        change(data)
        members[name] = json.dumps(data).encode()

    return apply


def replaced(member: str, content: Any) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        members[next(name for name in members if name.endswith(member))] = buffer.getvalue()

    return apply


def pickled(config: str, member: str) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        changed_json(config, lambda data: next(iter(data["config"].values())).update(use_pickle=True))(members)
        replaced(member, Calls(os.mkdir, "was_run"))(members)

    return apply


def custom_object(members: dict[str, bytes]) -> None:
    def change(data: Any) -> None:
        next(iter(data["config"].values())).update(path_name="custom_obj_0")  # torch goes by the name, not by the flag

    changed_json("constants_config.json", change)(members)
    prefix = next(iter(members)).partition("/")[0]
    members[f"{prefix}/data/constants/custom_obj_0"] = pickle.dumps(Calls(os.mkdir, "was_run"), 2)


def program(change: Callable[[Any], Any]) -> Callable[[dict[str, bytes]], None]:
    return changed_json("models/model.json", change)


def size_of_input(data: Any, text: str) -> None:
    data["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text


def tree_of_inputs(data: Any, change: Callable[[Any], Any]) -> None:
    signature = data["graph_module"]["module_call_graph"][0]["signature"]
    protocol, tree = json.loads(signature["in_spec"])
    change(tree)
    signature["in_spec"] = json.dumps([protocol, tree])


def text_input(data: Any) -> None:
    """A constant text as an input: torch writes it between quotes into the source of its guards."""
    text = "a' or __import__('os').mkdir('was_run') or '"
    inside = data["graph_module"]
    inside["graph"]["inputs"].append({"as_string": text})
    inside["signature"]["input_specs"].append({"constant_input": {"name": "note", "value": {"as_string": text}}})
    leaf = {"type": None, "context": None, "children_spec": []}
    tree_of_inputs(data, lambda tree: tree["children_spec"][0]["children_spec"].append(leaf))
    inside["module_call_graph"][0]["signature"]["forward_arg_names"] = ["x", "note"]


def run_text() -> str:
    return "__import__('os').mkdir('was_run')"


ARCHIVES: dict[str, Callable[[dict[str, bytes]], None]] = {
    "pickled weight": pickled("weights_config.json", "weights/weight_0"),
    "pickled constant": pickled("constants_config.json", "constants/tensor_0"),
    "size that is code": program(lambda d: size_of_input(d, run_text())),
    "guard that is code": program(lambda d: d["guards_code"].append(f"{run_text()} is None")),
    "guard that leaves its message": program(
        lambda d: d["guards_code"].append(
            """L['x'].size()[0] != len('" + str(__import__("os").mkdir("was_run")) + "')"""
        )
    ),
    "tree that names a module": program(
        lambda d: tree_of_inputs(
            d,
            lambda tree: tree["children_spec"][1].update(
                context=json.dumps({"__enum__": True, "fqn": "stranger:X", "name": "A"})
            ),
        )
    ),
    "example that is code": replaced("sample_inputs/model.pt", Calls(os.mkdir, "was_run")),
}
REFUSED_ONLY: dict[str, Callable[[dict[str, bytes]], None]] = {
    "custom object": custom_object,
    "text among the inputs": program(text_input),
    "name that is code": program(lambda d: d["graph_module"]["graph"]["nodes"][0].update(name=f"x={run_text()};y")),
    "operator that is none": program(lambda d: d["graph_module"]["graph"]["nodes"][0].update(target="torch.load")),
    "operator that reads files": program(
        lambda d: d["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.from_file.default")
    ),
    "text for a number": program(lambda d: d["graph_module"]["graph"]["outputs"].append({"as_int": run_text()})),
}


def try_to_run(path: str) -> None:
    """What a user without dslify would do with the archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.export.load(path).module()(torch.randn(2, 1, 16))
        except Exception as error:
            print(f"after the deed: {error}")


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_runs_nothing(case, folder):
    (folder / "stranger.py").write_text("import os, enum\nos.mkdir('was_run')\nclass X(enum.Enum):\n    A = 1\n")
    path = rewritten(exported()[0], ARCHIVES[case])
    if case == "example that is code":
        assert getattr(load_model(path), "example_input_array", None) is None  # dropped; the rest is fine
    else:
        with pytest.raises(UntrustedError, match="was not loaded") as refusal:
            load_model(path)
        assert "\n" not in str(refusal.value)
    assert not (folder / "was_run").exists()
    sys.path.insert(0, str(folder))
    try_to_run(path)
    sys.path.remove(str(folder))
    assert (folder / "was_run").exists()  # or else the refusal above would prove nothing


@pytest.mark.parametrize("case", REFUSED_ONLY)
def test_other_things_that_an_archive_may_not_hold(case, folder):
    path = rewritten(exported()[0], REFUSED_ONLY[case])
    with pytest.raises(UntrustedError, match="was not loaded"):
        load_model(path)
    assert not (folder / "was_run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda members: [members.pop(name) for name in list(members) if name.endswith("model.json")], "no archive"),
        (program(lambda d: d.update(schema_version={"major": 999, "minor": 0})), "cannot be read by PyTorch"),
        (program(lambda d: d.pop("graph_module")), "cannot be read by PyTorch"),
        (lambda members: members.update({name: b"{" for name in members if name.endswith(".json")}), "damaged"),
    ],
)
def test_a_damaged_archive_gets_one_sentence(change, words, folder, caplog):
    path = rewritten(exported()[0], change)
    caplog.clear()
    with pytest.raises(LoadError, match=words) as refusal:
        load_model(path)
    assert "\n" not in str(refusal.value)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]  # torch's tracebacks


# Example inputs


def conv(channels: int = 1) -> nn.Module:
    return nn.Conv1d(channels, 4, 8, stride=4)


class DecoderFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.ConvTranspose1d(4, 1, 8, stride=4), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.conv = nn.Linear(40, 2), nn.Conv1d(1, 40, 8, stride=4)  # (1, 40) runs too, by accident

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError("(batch, time)")
        return self.head(self.conv(x[:, None]).mean(-1))


class Folds(nn.Module):
    """Its first layer says nothing about the input, which it reshapes; another one's size happens to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.conv = nn.Linear(40, 40), nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.conv(x.reshape(1, 2, 20)).reshape(1, 40))


class Two(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x


class Minds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def with_example(value: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.example_input_array = value
    return model


def lenet(side: int, channels: int) -> nn.Module:
    flat = 6 * ((side - 4) // 2) ** 2
    return nn.Sequential(nn.Conv2d(channels, 6, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(flat, 3))


INFERRED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "sound": (lambda: nn.Sequential(conv(), nn.ELU()), (1, 1, 16000), "0, a Conv1d with 1 channel, proven"),
    "features": (lambda: conv(80), (1, 80, 512), "the network, a Conv1d with 80 channels"),
    "decoder registered first": (DecoderFirst, (1, 1, 16000), "encoder, a Conv1d"),
    "waves": (Waves, (1, 16000), "conv, a Conv1d with 1 channel"),
    "another layer's size": (Folds, (1, 40), "back, a Linear with 40 channels"),
    "images": (lambda: torchvision.models.squeezenet1_1(), (1, 3, 224, 224), "features.0, a Conv2d with 3 channels"),
    "digits": (lambda: lenet(28, 1), (1, 1, 28, 28), "0, a Conv2d with 1 channel"),
    "small images": (lambda: lenet(32, 3), (1, 3, 32, 32), "0, a Conv2d with 3 channels"),
    "rows": (lambda: nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), (1, 7), "0, a Linear with 7 channels"),
    "sequences": (lambda: nn.GRU(5, 4, batch_first=True), (1, 100, 5), "the network, a GRU"),
    "time first": (lambda: nn.LSTM(5, 4), (100, 1, 5), "the network, an LSTM"),
    "tokens": (lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)), (1, 16), "0, an Embedding with 3 entries"),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True), (1, 16, 8), "a TransformerEncoderLayer"),
    "timm": (lambda: timm.create_model("mobilenetv3_small_050"), (1, 3, 224, 224), "from the network's pretrained_cfg"),
    "brought": (lambda: with_example(torch.zeros(3, 2)), (3, 2), "the network's example_input_array"),
    "brought in a tuple": (lambda: with_example((torch.zeros(3, 2),)), (3, 2), "the network's example_input_array"),
}


@pytest.mark.parametrize("case", INFERRED)
def test_inputs_are_found_and_run(case):
    make, shape, words = INFERRED[case]
    model = make()
    before = [child.training for child in model.modules()]
    inputs, note = example_inputs_for(model)
    assert tuple(inputs[0].shape) == shape
    assert words in note
    assert note.startswith(f"input {'x'.join(map(str, shape))}")
    assert [child.training for child in model.modules()] == before
    assert not any(child._forward_pre_hooks for child in model.modules())
    with torch.no_grad():
        model.eval()(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, example_inputs_for(model)[0], strict=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Two, r"needs 2 inputs \(x, lengths\); give --input 1x1x16000,1x10"),
        (Minds, "--input 1x1x16000"),
        (lambda: with_example("text"), "holds no tensor"),
        (lambda: with_example({"x": torch.ones(1)}), r"by keyword \(x\)"),
    ],
)
def test_where_none_is_found_a_sentence_asks_for_it(make, words):
    with pytest.raises(LoadError, match=words):
        example_inputs_for(make())


def test_a_spec_is_taken_literally():
    model = nn.Embedding(5, 2)
    inputs, note = example_inputs_for(model, "1x3x8x8, 2x10:int64,4:bool,2x2:float16")
    assert [(tuple(x.shape), x.dtype) for x in inputs] == [
        ((1, 3, 8, 8), torch.float32), ((2, 10), torch.int64), ((4,), torch.bool), ((2, 2), torch.float16)
    ]  # fmt: skip
    assert 0 <= inputs[1].min() <= inputs[1].max() < 5
    assert inputs[1].float().std() > 0
    assert 0 < inputs[0].abs().max() < 1
    assert note == "input 1x3x8x8, 2x10 int64, 4 bool, 2x2 (as given)"


@pytest.mark.parametrize("spec", ["", "1x", "ax3", "1,2,", "0x3", "1x-3", "1x3:float17", "1x3:", "1x99999x99999"])
def test_a_wrong_spec_gets_a_sentence(spec):
    with pytest.raises(OptionError, match=r"^--input .*(shape|type|elements)") as refusal:
        example_inputs_for(nn.Linear(1, 1), spec)
    assert "\n" not in str(refusal.value)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.embed(input_ids) * scale


def test_inputs_may_have_names():
    args, kwargs, note = example_for(Keywords(), "input_ids=2x3, mask=2x3:float32")
    assert args == ()
    assert (kwargs["input_ids"].dtype, tuple(kwargs["input_ids"].shape)) == (torch.int64, (2, 3))
    assert kwargs["input_ids"].max() < 7
    assert torch.equal(kwargs["mask"], torch.ones(2, 3))
    assert note == "input input_ids 2x3 int64, mask 2x3 (as given)"
    args, kwargs, note = example_for(Keywords(), "2x3:int64,mask=2x3")
    assert ([tuple(x.shape) for x in args], list(kwargs)) == ([(2, 3)], ["mask"])
    assert note == "input 2x3 int64, mask 2x3 int64 (as given)"
    with pytest.raises(LoadError, match=r"by keyword \(input_ids\); dslify.example_for"):
        example_inputs_for(Keywords(), "input_ids=2x3")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("input_ids=1x3,tokens=1x3", "no input 'tokens'; its inputs are input_ids, mask, scale"),
        ("mask=1x3,mask=1x3", "write each name once"),
        ("1x3:int64,input_ids=1x3", "'input_ids' cannot be the name of another input"),
        ("input_ids=1x3,1x3", "1x3 has no name"),
        ("input ids=1x3", "'input ids' cannot"),
        ("input_ids=", "'' is no shape"),
        ("input_ids=1x3:word", "type 'word'"),
    ],
)
def test_a_wrong_name_gets_a_sentence(spec, words):
    with pytest.raises(OptionError, match=r"^--input ") as refusal:
        example_for(Keywords(), spec)
    assert words in str(refusal.value)


def test_an_example_by_keyword_is_taken_as_it_is():
    brought = {"input_ids": torch.ones(3, 2, dtype=torch.int64)}
    model = Keywords()
    model.example_input_array = brought
    args, kwargs, note = example_for(model)
    assert (args, list(kwargs)) == ((), ["input_ids"])
    assert kwargs["input_ids"] is brought["input_ids"]
    assert note == "input input_ids 3x2 int64 (the network's example_input_array)"


HUB = {
    "Bert": ({"vocab_size": 50}, [(3, 5)], [], "the network's dummy_inputs"),
    "T5": (
        {"vocab_size": 50, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}, [],
        ["decoder_attention_mask", "decoder_input_ids", "input_ids"], "the network's dummy_inputs",
    ),
    "ViT": ({"image_size": 32, "patch_size": 8}, [(1, 3, 32, 32)], [], "config and its main input, pixel_values"),
    "Whisper": (
        {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8,
         "max_source_positions": 50, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1,
         "eos_token_id": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
         "decoder_ffn_dim": 16},
        [], ["decoder_input_ids", "input_features"], "config and its main input, input_features",
    ),
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize("name", HUB)
def test_a_network_of_transformers_gets_inputs_that_run(name):
    import transformers

    settings, shapes, names, words = HUB[name]
    config = getattr(transformers, f"{name}Config")(**({**SMALL, **settings} if name in ("Bert", "ViT") else settings))
    model = getattr(transformers, f"{name}Model")(config).eval()
    args, kwargs, note = example_for(model)
    assert [tuple(value.shape) for value in args] == shapes
    assert sorted(kwargs) == names
    assert words in note
    assert note.endswith("proven by a forward pass)")
    with torch.no_grad():
        model(*args, **kwargs)


def test_a_slow_network_is_given_up(monkeypatch):
    import time

    import dslify.first_layer as room

    class Sleeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(Exception):
                time.sleep(30)
            return self.inner(x)

    monkeypatch.setattr(room, "SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(LoadError, match="No input was found"):
        example_inputs_for(Sleeps())
    assert time.monotonic() - start < 5  # seconds; far below the 30 that one forward would sleep
