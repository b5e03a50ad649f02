"""A .dsl file gives back the same network, in a process that never saw its source, and never harms what was there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor, nn

import dslify
from dslify.errors import StoreError
from dslify.functional import copied
from dslify.store import FORMAT
from dslify.switch import DSLayer, Mask
from tests.zoo import ZOO, Network

SOURCE = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.front, self.middle, self.back = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.middle.weight
        self.register_buffer("gain", torch.full((8,), 0.5))

    def forward(self, x):
        y = torch.tanh(self.front(x)) * self.gain
        return {"y": self.back(torch.tanh(self.again(torch.tanh(self.middle(y))))), "sum": y.sum(-1)}
"""
IN_A_FRESH_PROCESS = """
import hashlib, json, sys
import torch, dslify

torch.set_num_threads(1)
net = dslify.load("model.dsl")
assert "odd_network" not in sys.modules
batch = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
layer, = dslify.dsl_layers(net)
with torch.no_grad():
    out = net(batch)
taken = layer.paths.light_taken.tolist()
net.train()
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
losses = []
for _ in range(3):
    loss = net(batch)["y"].square().mean() + layer.paths.light[0].square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
digest = hashlib.sha256(out["y"].numpy().tobytes() + out["sum"].numpy().tobytes()).hexdigest()
print(json.dumps({"digest": digest, "taken": taken, "losses": losses}))
"""


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def same(mine: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(mine), leaves(theirs), strict=True))


def halve(net: nn.Module, batch: Tensor) -> None:
    """Set the threshold so that about half of a batch goes light."""
    (layer,) = dslify.dsl_layers(net)
    with torch.no_grad(), dslify.route(net, "full"):
        net(batch)
    layer.threshold.fill_(layer.paths.score.median().item())


def test_networks_of_the_zoo_come_back_bit_for_bit(inserted, tmp_path):
    network: Network = inserted.network
    net = inserted.net(0.1)
    path = dslify.save(net, tmp_path / "model.dsl")
    before = torch.get_rng_state()
    again = dslify.load(path, into=inserted.original if network.scope else None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in again.modules())
    assert [(n, p.shape, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in net.named_parameters()
    ]  # in this order: optimizers count parameters
    assert list(again.state_dict()) == list(net.state_dict())
    assert dslify.dsl_layers(again)[0].plan == dslify.dsl_layers(net)[0].plan
    for mode in ("full", "light"):
        with dslify.route(net, mode), dslify.route(again, mode), torch.no_grad():
            assert same(again(network.batch(2)), net(network.batch(2))), mode
    assert [(row.name, row.params, row.macs) for row in dslify.cost(again)] == [
        (row.name, row.params, row.macs) for row in dslify.cost(net)
    ]


@pytest.fixture(scope="module")
def odd() -> nn.Module:
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)  # noqa: S102
    torch.manual_seed(0)
    network = scope["Odd"]()
    net = dslify.insert(network, "front", 0.5, (torch.randn(2, 6),))
    halve(net, torch.randn(64, 6))
    return net


def test_a_fresh_process_without_the_source_gives_the_same_routes_and_trains_on(odd, tmp_path):
    import hashlib

    dslify.save(odd, tmp_path / "model.dsl")
    batch = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
    net = copied(odd)
    (layer,) = dslify.dsl_layers(net)
    with torch.no_grad():
        out = net(batch)
    taken = layer.paths.light_taken.tolist()
    assert 4 < sum(taken) < 28  # both ways are taken
    environment = {**os.environ, "PYTHONPATH": str(Path(dslify.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_A_FRESH_PROCESS], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["taken"] == taken
    assert found["digest"] == hashlib.sha256(out["y"].numpy().tobytes() + out["sum"].numpy().tobytes()).hexdigest()
    assert found["losses"][0] > found["losses"][1] > found["losses"][2]


def test_tied_weights_are_stored_once_and_stay_tied(odd, tmp_path):
    path = dslify.save(odd, tmp_path / "model.dsl")
    (layer,) = dslify.dsl_layers(odd)
    (again,) = dslify.dsl_layers(dslify.load(path))
    names = [name for name, _ in layer.full.named_parameters(remove_duplicate=False)]
    assert [name for name, _ in again.full.named_parameters(remove_duplicate=False)] == names
    assert len(list(again.full.parameters())) == len(list(layer.full.parameters()))
    net = copied(odd)
    (layer,) = dslify.dsl_layers(net)
    net.register_parameter("twin", next(layer.full.parameters()))
    loaded = dslify.load(dslify.save(net, tmp_path / "twin.dsl"))
    (again,) = dslify.dsl_layers(loaded)
    assert loaded.twin is next(again.full.parameters())


def test_frozen_and_channels_last_and_half_weights_come_back(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net = dslify.insert(network, "0", 0.5, (torch.randn(1, 3, 16, 16),))
    (layer,) = dslify.dsl_layers(net)
    layer.full.to(memory_format=torch.channels_last)
    first = next(iter(layer.light.parameters()))
    first.requires_grad_(False)
    net.register_buffer("ramp", torch.arange(5).bfloat16(), persistent=False)
    again = dslify.load(dslify.save(net, tmp_path / "model.dsl"))
    for (name, mine), (other, theirs) in zip(again.named_parameters(), net.named_parameters(), strict=True):
        assert name == other
        assert mine.stride() == theirs.stride()
        assert mine.requires_grad == theirs.requires_grad
        assert torch.equal(mine, theirs)
    assert torch.equal(again.ramp, net.ramp)
    assert "ramp" not in again.state_dict()


def test_a_layer_inside_the_full_path_of_another(odd, tmp_path):
    net = copied(odd)
    (outer,) = dslify.dsl_layers(net)
    inner = copied(outer)
    inner.light, inner.full = Twice(), nn.Sequential(nn.Linear(8, 8), nn.Identity())
    outer.full.add_module("inner", inner)
    placeholder = next(node for node in outer.full.graph.nodes if node.op == "placeholder")
    with outer.full.graph.inserting_after(placeholder):
        outer.full.graph.call_module("inner", (placeholder,))
    outer.full.recompile()
    with pytest.raises(StoreError, match=r"dsl\.full\.inner\.light is a Twice"):
        dslify.save(net, tmp_path / "model.dsl")
    assert not list(tmp_path.iterdir())
    inner.light = nn.Sequential(nn.Linear(8, 2, bias=False), nn.GELU("tanh"), nn.LayerNorm(2), nn.Linear(2, 8))
    again = dslify.load(dslify.save(net, tmp_path / "model.dsl"))
    assert len(dslify.dsl_layers(again)) == 2
    assert list(again.state_dict()) == list(net.state_dict())
    assert same(list(again.state_dict().values()), list(net.state_dict().values()))
    inner.mask = Mask((1, 3))
    with pytest.raises(StoreError, match=r"mask of shape \(1, 3\) does not fit"):  # what cannot be read is not written
        dslify.save(net, tmp_path / "other.dsl")
    assert not (tmp_path / "other.dsl").exists()
    x = torch.randn(3, 8)
    assert torch.equal(again.dsl.full.inner.light(x), inner.light(x))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * 2,)


def test_saving_twice_gives_the_same_bytes(odd, tmp_path):
    one, two = dslify.save(odd, tmp_path / "one.dsl"), dslify.save(odd, tmp_path / "two.dsl")
    assert one.read_bytes() == two.read_bytes()


# With a scope


@pytest.fixture(scope="module")
def scoped(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module, Path]:
    network = ZOO["codec"]
    model = network.build()
    net = dslify.insert(model, network.at, 0.25, (network.batch(1),), scope=network.scope)
    path = dslify.save(net, tmp_path_factory.mktemp("scoped") / "model.dsl")
    return model, net, path


def test_a_scope_alone_says_where_it_belongs(scoped):
    _, net, path = scoped
    alone = dslify.load(path)
    assert alone.meta["dslify"]["scope"] == ZOO["codec"].scope
    x = ZOO["codec"].batch(2)
    with dslify.route(alone, "light"), dslify.route(net, "light"), torch.no_grad():
        assert same(alone(x), net.get_submodule(ZOO["codec"].scope)(x))


def test_the_outer_weights_are_those_that_were_stored(scoped):
    _, net, path = scoped
    other = ZOO["codec"].build()
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.1)
    whole = dslify.load(path, into=other)
    x = ZOO["codec"].batch(2)
    with dslify.route(whole, "full"), dslify.route(net, "full"), torch.no_grad():
        assert same(whole(x), net(x))
    assert not dslify.dsl_layers(other)


def test_a_model_that_does_not_fit_is_refused(scoped, odd, tmp_path):
    _, _, path = scoped
    with pytest.raises(StoreError, match="belongs at encoder"):
        dslify.load(path, into=nn.Linear(2, 2))
    shell = nn.ModuleDict({"encoder": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    with pytest.raises(StoreError, match="not the one it was cut from"):
        dslify.load(path, into=shell)
    with pytest.raises(StoreError, match="nothing to put it into"):
        dslify.load(dslify.save(odd, tmp_path / "model.dsl"), into=shell)


# What goes wrong


def test_an_existing_file_stays_without_force(odd, tmp_path):
    path = tmp_path / "model.dsl"
    path.write_text("mine")
    with pytest.raises(StoreError, match="--force"):
        dslify.save(odd, path)
    assert path.read_text() == "mine"
    dslify.save(odd, path, force=True)
    dslify.load(path)
    with pytest.raises(StoreError, match="it is a folder"):
        dslify.save(odd, tmp_path, force=True)
    with pytest.raises(StoreError, match="there is no folder"):
        dslify.save(odd, tmp_path / "none" / "model.dsl")
    with pytest.raises(StoreError, match="holds no Dynamic Switch Layer"):
        dslify.save(nn.Linear(2, 2), tmp_path / "linear.dsl")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_what_was_there(odd, tmp_path, monkeypatch, function):
    path = dslify.save(odd, tmp_path / "model.dsl")
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, full_disk)
    with pytest.raises(StoreError, match="cannot be written: No space left on device"):
        dslify.save(odd, path, force=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_what_was_there(odd, tmp_path):
    path = dslify.save(odd, tmp_path / "model.dsl")
    before = path.read_bytes()
    code = (
        "import os, signal, dslify\n"
        "net = dslify.load('model.dsl')\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "dslify.save(net, 'model.dsl', force=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dslify.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dslify.json")), read_tensors(archive.read("weights.safetensors"))


def pack(path: Path, text: bytes, weights: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("dslify.json", text)
        archive.writestr("weights.safetensors", weights)


def layer_in(data: dict[str, Any]) -> dict[str, Any]:
    return data["net"]["modules"]["dsl"]


RUN = "__import__('os').mkdir('was_run')"
CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "newer format": (lambda d, w: d.update(format=FORMAT + 1, dslify="9.9"), r"format 3.*dslify 9\.9.*newer dslify"),
    "no format": (lambda d, w: d.pop("format"), "format None"),
    "missing weight": (lambda d, w: w.pop(next(iter(w))), "damaged"),
    "mask of another shape": (lambda d, w: w.update({"dsl.mask.weight": torch.ones(3, 3)}), "mask .* does not fit"),
    "switch of another shape": (lambda d, w: w.update({"dsl.switch.out.weight": torch.ones(2, 2)}), "has the shape"),
    "threshold of another shape": (lambda d, w: w.update({"dsl.threshold": torch.ones(2)}), "has the shape"),
    "buffer as a parameter": (lambda d, w: d["tensors"]["dsl.threshold"].update(parameter=True), "has the shape"),
    "axes": (lambda d, w: d["tensors"]["dsl.scale"].update(order=[1]), "axes of dsl.scale"),
    "tensor too many": (lambda d, w: layer_in(d)["tensors"].update(more="dsl.scale"), "other tensors"),
    "unknown part": (lambda d, w: layer_in(d).update(kind="module"), "unknown kind"),
    "unknown layer": (lambda d, w: layer_in(d).update(light={"kind": "layer", "type": "Bilinear"}), "unknown kind"),
    "settings of a layer": (
        lambda d, w: layer_in(d).update(
            light={"kind": "layer", "type": "Linear", "settings": {"in_features": 10**12}, "tensors": {}}
        ),
        "unknown kind",
    ),
    "a layer too large": (
        lambda d, w: layer_in(d).update(
            light={
                "kind": "layer",
                "type": "Linear",
                "settings": {"in_features": 10**9, "out_features": 10**6, "bias": True},
                "tensors": {"weight": "dsl.scale", "bias": "dsl.scale"},
            }
        ),
        "has the shape",
    ),
    "switch of another kind": (lambda d, w: layer_in(d)["switch"].update(kind="gate"), "switch of an unknown kind"),
    "mask of another kind": (lambda d, w: layer_in(d)["mask"].update(kind="none"), "mask of an unknown kind"),
    "mask of the other kind": (lambda d, w: layer_in(d)["mask"].update(kind="activation"), "has other tensors than"),
    "plan of another version": (lambda d, w: layer_in(d)["plan"].update(more=1), "plan"),
    "layout": (lambda d, w: layer_in(d).update(inputs=[[1, 2, 3, 4]]), "damaged"),
    "no network": (lambda d, w: d.update(net={"kind": "sequence", "parts": []}), "no dslified network"),
    "name that is code": (lambda d, w: d["net"]["codegen"]["arguments"].__setitem__(0, f"x={RUN}"), "cannot be a name"),
    "node that is code": (lambda d, w: d["net"]["nodes"][0].update(op="placeholder", target=RUN), "cannot be a name"),
    "call of eval": (lambda d, w: d["net"]["nodes"][-2].update(op="call_function", target="builtins.eval"), "not call"),
    "check that is no expression": (lambda d, w: guards_of(d).update(checks=[f"{RUN};"]), "damaged"),
    "parts of another kind": (lambda d, w: d.update(net=[]), "damaged"),
    "tensors of another kind": (lambda d, w: d.update(tensors=[]), "damaged"),
}


def guards_of(data: dict[str, Any]) -> dict[str, Any]:
    return next(part for part in data["net"]["modules"].values() if part and part.get("kind") == "guards")


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_file_gets_one_sentence_and_runs_nothing(odd, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, words = CHANGES[case]
    path = dslify.save(odd, tmp_path / "model.dsl")
    data, weights = contents(path)
    change(data, weights)
    pack(path, json.dumps(data).encode(), write_tensors(weights))
    with pytest.raises(StoreError, match=words) as refusal:
        dslify.load(path)
    text = str(refusal.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
    assert not (tmp_path / "was_run").exists()


def test_an_unchanged_file_passes_the_same_way(odd, tmp_path):
    """Or else the test above could not fail."""
    path = dslify.save(odd, tmp_path / "model.dsl")
    data, weights = contents(path)
    pack(path, json.dumps(data).encode(), write_tensors(weights))
    assert isinstance(dslify.dsl_layers(dslify.load(path))[0], DSLayer)


def test_a_file_that_says_no_kinds_is_one_from_before_there_were_two(odd, tmp_path):
    path = dslify.save(odd, tmp_path / "model.dsl")
    data, weights = contents(path)
    assert layer_in(data).pop("mask") == {"kind": "weight"}
    assert layer_in(data).pop("switch") == {"kind": "difference", "unmasked": False}
    pack(path, json.dumps(data).encode(), write_tensors(weights))
    (layer,) = dslify.dsl_layers(dslify.load(path))
    assert (layer.mask.kind, layer.switch.kind, layer.unmasked) == ("weight", "difference", False)


def test_a_check_that_is_code_is_not_run_when_the_network_is(odd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = dslify.save(odd, tmp_path / "model.dsl")
    data, weights = contents(path)
    guards_of(data)["checks"] = [f"{RUN} is None"]
    pack(path, json.dumps(data).encode(), write_tensors(weights))
    with pytest.raises(dslify.DslifyError):
        dslify.load(path)(torch.randn(2, 6))
    assert not (tmp_path / "was_run").exists()


def test_other_files_get_a_sentence(odd, tmp_path):
    path = dslify.save(odd, tmp_path / "model.dsl")
    whole = path.read_bytes()
    data, weights = (json.dumps(contents(path)[0]).encode(), write_tensors(contents(path)[1]))
    with pytest.raises(StoreError, match="there is no such file"):
        dslify.load(tmp_path / "none.dsl")
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match="damaged or cut short"):
            dslify.load(path)
    path.write_bytes(whole[:400] + bytes(40) + whole[440:])
    with pytest.raises(StoreError, match="damaged"):
        dslify.load(path)
    pack(path, data, weights, zipfile.ZIP_DEFLATED)
    with pytest.raises(StoreError, match="unpack to more"):
        dslify.load(path)
    pack(path, data, weights[:-20])
    with pytest.raises(StoreError, match="damaged"):
        dslify.load(path)
    pack(path, b"[1", weights)
    with pytest.raises(StoreError, match="damaged"):
        dslify.load(path)
    pack(path, b"[" * 100_000 + b"]" * 100_000, weights)
    with pytest.raises(StoreError, match="damaged"):
        dslify.load(path)
    deep = b'{"kind":"sequence","parts":[' * 400 + b"]}" * 400
    pack(path, b'{"format":%d,"tensors":{},"net":' % FORMAT + deep + b"}", weights)
    with pytest.raises(StoreError, match=r"no dslified network|damaged"):
        dslify.load(path)
    pack(path, b"[1]", weights)
    with pytest.raises(StoreError, match="format None"):
        dslify.load(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(StoreError, match="is no dslified network"):
        dslify.load(path)
    with pytest.raises(dslify.DslifyError, match=r"dslify\.load"):
        dslify.load_model(dslify.save(odd, tmp_path / "two.dsl"))


HUGGING_FACE = """
import sys
import torch, dslify

torch.set_num_threads(1)
net = dslify.load("bert.dsl")
assert "transformers.models.bert.modeling_bert" not in sys.modules
inputs = torch.load("inputs.pt")
with torch.no_grad():
    for route in ("full", "light"):
        with dslify.route(net, route):
            out = net(**inputs)
        assert type(out).__module__ == "transformers.modeling_outputs", type(out)
        assert out.hidden_states is None
        torch.save({"last": out.last_hidden_state, "pooled": out["pooler_output"]}, f"{route}.pt")
"""


def test_keyword_inputs_and_output_classes_of_transformers_come_back_in_a_fresh_process(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    example = {"input_ids": torch.randint(0, 50, (1, 9)), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    net = dslify.insert(model, "encoder.layer.0", 0.5, example_inputs=(), example_kwargs=example)
    inputs = {"attention_mask": torch.ones(3, 12, dtype=torch.long), "input_ids": torch.randint(0, 50, (3, 12))}
    inputs["attention_mask"][1, 7:] = 0
    dslify.save(net, tmp_path / "bert.dsl")
    torch.save(inputs, tmp_path / "inputs.pt")
    root = str(Path(dslify.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", HUGGING_FACE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, check=True
    )
    with torch.no_grad():
        plain = dslify.remove(net)(**inputs)
        for name, wanted in (("full", model(**inputs)), ("light", None), ("full", plain)):
            found = torch.load(tmp_path / f"{name}.pt")
            if wanted is None:
                with dslify.route(net, "light"):
                    wanted = net(**inputs)
            torch.testing.assert_close(found["last"], wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["pooled"], wanted.pooler_output, rtol=1e-5, atol=1e-5)
