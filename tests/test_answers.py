"""Light paths that are no narrow copy, over networks of the zoo and one that answers in every awkward way."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from typer.testing import CliRunner

import dslify
from dslify.answers import mean_answer
from dslify.cli import app
from dslify.errors import CutError, OptionError
from dslify.switch import Layout
from tests.test_switch import Spotter
from tests.zoo import ZOO, Network

NETWORKS = {**ZOO, "keywords": Network(Spotter, (1, 1, 2000), "front")}
# network, light, at, to: an identity needs two places of the same shape
CASES = [
    ("codec", "exit", "encoder.block1", None),
    ("codec", "identity", "encoder.block3.1", "encoder.block3.2"),
    ("resnet18", "exit", "layer2", None),
    ("vit", "head", "blocks.1", None),
    ("vit", "identity", "blocks.0", "blocks.2"),
    ("keywords", "head", "rnn", None),
    ("autoencoder", "exit", "encoder.block2", None),
]
OTHER_LENGTH = {"codec": 9600, "autoencoder": 5120}  # of a second input, where the length may vary
CLOSE = 1e-5  # of the largest value: other batch sizes take other kernels


@dataclass(frozen=True)
class Case:
    light: str
    network: Network
    model: nn.Module
    net: nn.Module
    example: Tensor

    @property
    def layer(self) -> Any:
        return dslify.dsl_layers(self.net)[0]

    def run(self, x: Tensor, mode: str, net: nn.Module | None = None) -> list[Tensor]:
        net = net or self.net
        with torch.no_grad(), dslify.route(net, mode):
            return tensors(net(x))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    name, light, at, to = request.param
    network = NETWORKS[name]
    model = network.build()
    example = network.batch(1 if name == "keywords" else 2)  # an LSTM captured at two samples takes no single one
    net = dslify.insert(model, at, example_inputs=(example,), scope=network.scope, to=to, light=light)
    return Case(light, network, model, net, example)


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def close(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    pairs = zip(mine, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=CLOSE * b.abs().max().item() + 1e-12) for a, b in pairs)


def batches(network: Network) -> list[Tensor]:
    """One sample, three, and three of another length where the network takes it."""
    found = [network.batch(1), network.batch(3)]
    length = next((size for name, size in OTHER_LENGTH.items() if NETWORKS[name].make is network.make), None)
    return found if length is None else [*found, torch.randn(3, 1, length, generator=torch.Generator().manual_seed(2))]


def test_full_is_the_network_and_light_has_its_shapes(case):
    for x in batches(case.network):
        with torch.no_grad():
            expected = tensors(case.model(x))
        assert same(case.run(x, "full"), expected)
        case.run(x, "both")
        pairs = list(zip(case.layer.paths.light, case.layer.paths.full, strict=True))
        assert all(light.shape == full.shape and light.dtype == full.dtype for light, full in pairs)
        assert all(value.isfinite().all() for value in case.run(x, "light"))


def test_a_batch_answers_as_its_samples_do(case):
    x = case.network.batch(3)
    one_by_one = [case.run(sample, "light") for sample in x.split(1)]
    assert close(case.run(x, "light"), [torch.cat(parts) for parts in zip(*one_by_one, strict=True)])


def test_untrained_it_gives_the_mean_answer_to_the_example_or_what_entered(case):
    case.run(case.example, "both")
    (full,) = case.layer.paths.full
    expected = full.mean([0, 2] if full.dim() == 3 else [0], keepdim=True)  # sound varies in length
    case.run(case.network.batch(3), "both")
    (light,) = case.layer.paths.light
    if case.light == "identity":
        expected = case.layer.paths.masked
    assert close([light], [expected.expand_as(light)])
    names = {name for name, _ in case.layer.light.named_parameters()}
    assert names == {"exit": {"answer0"}, "head": {"head0_weight", "head0_bias"}, "identity": set()}[case.light]


def test_it_learns(case):
    if case.light == "identity":
        assert not list(case.layer.light.parameters())
        return
    seen: list[tuple[Any, ...]] = []
    hook = case.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    case.run(3 + 2 * case.network.batch(8, seed=5), "full")
    hook.remove()
    light = copy.deepcopy(case.layer.light)
    optimizer = torch.optim.Adam(light.parameters(), 0.003)
    (target,) = case.layer.paths.full
    losses = []
    for _ in range(40):
        loss = (light(*seen[0])[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_plan_and_cost_agree(case):
    plan, rows = case.layer.plan, {row.name: row for row in dslify.cost(case.net)}
    assert plan.light == case.light
    assert plan.projections == plan.tensors == ()
    for name in ("light", "full"):
        assert (rows[name].params, rows[name].macs) == (plan.params[name], plan.macs[name]), name
    assert rows["light"].macs < 0.02 * rows["full"].macs
    assert type(plan).from_json(plan.to_json()) == plan


def test_a_batch_is_routed_sample_by_sample_and_only_the_taken_path_runs(case):
    x, layer = case.network.batch(4), case.layer
    full, light = case.run(x, "full"), case.run(x, "light")
    threshold = layer.paths.score.sort().values[1:3].mean()
    ran: list[tuple[str, int]] = []

    def watch(name: str) -> Any:
        part = getattr(layer, name)
        return part.register_forward_pre_hook(lambda _, inputs: ran.append((name, len(inputs[0]))))

    hooks = [watch("light"), watch("full")]
    try:
        layer.threshold.copy_(threshold)
        mixed = case.run(x, "mixed")
        assert ran == [("light", 2), ("full", 2)]
        taken = layer.paths.light_taken
        for at in range(4):
            assert close([out[at] for out in mixed], [out[at] for out in (light if taken[at] else full)])
        layer.threshold.fill_(float("inf"))
        assert close(case.run(x, "mixed"), light)
        assert ran[2:] == [("light", 4)], "early stopping stops"
    finally:
        layer.threshold.zero_()
        for hook in hooks:
            hook.remove()


def test_it_is_stored_and_removed(case, tmp_path):
    scope, x = case.network.scope, case.network.batch(3)
    path = dslify.save(case.net, tmp_path / "model.dsl")
    again = dslify.load(path, into=case.model if scope else None)
    assert dslify.dsl_layers(again)[0].plan == case.layer.plan
    assert list(again.state_dict()) == list(case.net.state_dict())
    for mode in ("full", "light"):
        assert same(case.run(x, mode, again), case.run(x, mode)), mode
    removed = dslify.remove(again)
    assert not dslify.dsl_layers(removed)
    with torch.no_grad():
        assert same(tensors(removed(x)), tensors(case.model(x)))


class Awkward(nn.Module):
    """Numbers of every kind leave it: windows in the batch axis, whole numbers, truth values, a value that all samples
    share, the size of the batch, and half a length."""

    def __init__(self):
        super().__init__()
        self.stem, self.inside = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 4, 3, padding=1)
        self.down, self.back = nn.Conv1d(4, 4, 3, 2), nn.Conv1d(4, 6, 1)

    def forward(self, x):
        batch, channels, _ = (y := self.stem(x)).shape
        windows = y.view(batch, channels, 4, 8).permute(0, 2, 1, 3).reshape(batch * 4, channels, 8)
        inner = self.inside(windows).relu()
        return {
            "windows": inner,
            "turned": inner.transpose(0, 1),
            "best": inner.mean(2).argmax(1),
            "loud": inner.view(batch, -1).mean(1) > 0.2,
            "shared": self.inside.weight.sum((1, 2)),
            "samples": batch,
            "level": inner.view(batch, -1).std(1),
        }


@pytest.mark.parametrize("light", ["exit", "head"])
def test_outputs_of_every_kind(light, tmp_path):
    torch.manual_seed(0)
    model = Awkward().eval()
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(3))
    net = dslify.insert(model, "stem", example_inputs=(x[:2],), light=light)
    with torch.no_grad(), dslify.route(net, "light"):
        example, found = model(x[:2]), net(x)
        assert same(tensors(dslify.load(dslify.save(net, tmp_path / "odd.dsl"))(x)), tensors(model(x)))
    assert found["samples"] == 5
    assert torch.equal(found["shared"], example["shared"])
    windows = example["windows"].view(2, 4, 4, 8).mean(0)
    assert torch.allclose(found["windows"], windows.repeat(5, 1, 1), atol=1e-6)
    assert torch.allclose(found["turned"], windows.repeat(5, 1, 1).transpose(0, 1), atol=1e-6)
    assert torch.equal(found["best"], example["best"].view(2, 4).double().mean(0).round().long().repeat(5))
    assert torch.equal(found["loud"], example["loud"].double().mean(0).round().bool().expand(5))
    assert torch.allclose(found["level"], example["level"].mean().expand(5), atol=1e-6)
    assert all(value.is_contiguous() for value in tensors(found)[:1])


def test_a_gate_answers_with_buffers_and_any_other_exit_with_parameters():
    network = ZOO["shuffle"]
    options = {"at": network.at, "example_inputs": (network.batch(2),), "light": "exit"}
    gate, dsl = (dslify.dsl_layers(dslify.insert(network.build(), mode=mode, **options))[0] for mode in ("gc", "dsl"))
    assert [name for name, _ in gate.light.named_buffers()] == [name for name, _ in dsl.light.named_parameters()]
    assert not list(gate.light.parameters())
    assert torch.equal(gate.light.answer0, dsl.light.answer0)
    assert (gate.switch.kind, dsl.switch.kind) == ("positive", "difference")


@pytest.mark.parametrize(("mask", "kind"), [("channel", "weight"), ("element", "weight"), ("activation", "activation")])
def test_kinds_of_masks(mask, kind, tmp_path):
    network = ZOO["unet"]
    x = network.batch(2)
    model = network.build()
    net = dslify.insert(model, network.at, example_inputs=(x,), mask=mask, mode="gc", light="head")
    (layer,) = dslify.dsl_layers(net)
    assert layer.mask.kind == kind
    assert tuple(layer.mask.weight.shape) == ((1, 32, 8, 8) if mask == "element" else (1, 32, 1, 1))
    with torch.no_grad():
        assert same(tensors(net(x)), tensors(model(x)))
    if kind == "activation":
        layer.mask.turn_on(layer.paths.masked)
        again = dslify.load(dslify.save(net, tmp_path / "masked.dsl"))
        with torch.no_grad():
            assert same(tensors(again(x)), tensors(net(x)))
            assert not close(tensors(again(x)), tensors(model(x)))
        assert dslify.dsl_layers(again)[0].mask.activation_sparsity(layer.paths.masked) > 0


NO_COPY = "says how narrow a copy is, and light 'exit' is no copy"
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "width": ({"light": "exit", "width": 0.2}, OptionError, f"width {NO_COPY}"),
    "the width that is usual": ({"mode": "gc", "width": 0.1}, OptionError, f"width {NO_COPY}"),
    "cost": ({"light": "exit", "cost": 0.2}, OptionError, f"cost {NO_COPY}"),
    "depth": ({"light": "exit", "depth": 0.5}, OptionError, f"depth {NO_COPY}"),
    "identity without an end": ({"light": "identity"}, OptionError, "name the last of them with `to`"),
    "identity of two values": (
        {"light": "identity", "to": "down2"},
        CutError,
        "one tensor that leaves the region, and 2 values do; name with `to`",
    ),
    "light": ({"light": "none"}, OptionError, "light is one of narrow, separable, exit, head, identity; got 'none'"),
    "mode": ({"mode": "gate"}, OptionError, "mode is one of dsl, gc; got 'gate'"),
    "mask": ({"mask": "weight"}, OptionError, "mask is one of channel, element, activation; got 'weight'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path, monkeypatch):
    options, kind, words = REFUSED[name]
    network = ZOO["unet"]
    with pytest.raises(kind, match=words) as refusal:
        dslify.insert(network.build(), "down1", example_inputs=(network.batch(1),), **options)
    monkeypatch.chdir(tmp_path)
    argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    told = CliRunner().invoke(app, ["insert", "tests.zoo:UNet", "--at", "down1", "--input", "1x3x32x32", *argv])
    assert told.exit_code == 2
    assert told.stderr.splitlines() == [f"error: {refusal.value}"]
    assert list(tmp_path.iterdir()) == []


def test_any_length_that_convolutions_make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 4, 2, 1), nn.Conv1d(4, 4, 5, 3, 1), nn.Conv1d(4, 4, 3, 2), nn.ConvTranspose1d(4, 2, 3, 4)
    ).eval()
    net = dslify.insert(model, "0", example_inputs=(torch.randn(2, 1, 200),), light="head")
    lengths = set()
    with torch.no_grad(), dslify.route(net, "light"):
        for length in range(150, 250):
            x = torch.zeros(2, 1, length)
            assert net(x).shape == model(x).shape, length
            lengths.add(net(x).shape[2])
    assert len(lengths) > 5


class Echo(nn.Module):
    """Its answer is as long as the value at the cut and a third of that, rounded down."""

    def __init__(self):
        super().__init__()
        self.pool, self.mix = nn.Conv1d(1, 4, 4, 4), nn.Conv1d(4, 8, 1)

    def forward(self, x):
        y = self.pool(x)
        return self.mix(torch.cat([y, y[:, :, : y.shape[2] // 3]], 2))


def test_shapes_that_do_not_fit_are_told():
    x = torch.randn(2, 1, 4000)
    words = r"whose size follows .* of shape \*x8x\*, does not; end the light path earlier"
    with pytest.raises(CutError, match=words):
        dslify.insert(Echo(), "pool", example_inputs=(x,), light="exit")
    with pytest.raises(CutError, match=r"\*x4x\* of torch.float32 enters, \*x8x\* of torch.float32 leaves; name with"):
        dslify.insert(Echo(), "pool", example_inputs=(x,), light="identity", to="mix")


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["tests.test_switch:images", "--input", "1x3x24x24", "--at", "0"]

    def insert(*more: str) -> str:
        told = CliRunner().invoke(app, ["insert", *more], prog_name="dslify")
        assert told.exit_code == 0, told.output
        return told.stdout

    printed = insert(*words, "--mode", "gc", "--mask", "activation", "--explain", "-o", "gate.dsl")
    assert "The light path (exit) is a constant for each output" in printed
    assert "next: dslify finetune gate.dsl --data FOLDER --positive LABELS" in printed
    second = ["--at", "1.0", "--to", "1.2", "--light", "identity", "-o", "two.dsl"]
    insert("gate.dsl", "--input", "1x3x24x24", *second)
    outer, inner = dslify.dsl_layers(dslify.load("two.dsl"))
    assert (outer.switch.kind, outer.mask.kind, outer.plan.light) == ("positive", "activation", "exit")
    assert (inner.switch.kind, inner.mask.kind, inner.plan.light) == ("difference", "weight", "identity")


def test_mean_answer_puts_a_samples_entries_first():
    value = torch.arange(24.0).view(2, 6, 2)  # three samples of two entries, in the middle axis
    found = mean_answer(value, Layout(axis=1, per_sample=2))
    assert torch.equal(found, value.view(2, 3, 2, 2).mean(1).transpose(0, 1))
    assert torch.equal(mean_answer(value, Layout(axis=1, per_sample=2), [0]), found.mean(1, keepdim=True))
