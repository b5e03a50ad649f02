"""finetune(): kinds of losses, accumulation, precision, early stopping, gates, and what a mask's beta buys."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from torch import nn

from dslify.cli import app
from dslify.data import open_data
from dslify.early_stop import EarlyStop
from dslify.errors import OptionError, TrainError
from dslify.insert import insert
from dslify.losses import difference
from dslify.samples import split
from dslify.store import save
from dslify.switch import DSLayer, Layout, Mask, Switch, route
from dslify.train import finetune

from .test_train import QUICK, Net, Region, assert_same_bits, curves, in_a_process, resumed, sounds, trained

PARTS = 1e-5  # relative and absolute, of weights: sums over parts of a batch round differently
GATED = {"steps": 40, "switch_steps": 150, "batch_size": 16, "lr": 1e-2, "progress": False, "threads": 1}


def assert_close(one: nn.Module, other: nn.Module, tolerance: float = PARTS) -> None:
    mine, theirs = trained(one), trained(other)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "cosine", ["kl:1"], {0: "mse"}])
def test_the_light_path_learns_by_every_loss(loss):
    net = Net()
    history = finetune(net, sounds(), **{**QUICK, "steps": 100}, loss=loss)
    light = history.phases[0]
    assert light.last("light") < 0.8 * light.first("light")
    plain = Net()
    finetune(plain, sounds(), **{**QUICK, "steps": 100})
    assert not torch.equal(net.dsl.light.outer.weight, plain.dsl.light.outer.weight)
    json.dumps(history.to_json())


def test_losses_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    for settings, message in [
        ({"loss": "huber"}, "loss is one of l1, mse"),
        ({"loss": ["l1", "l1"]}, "loss has 2 entries and the layer 1 outputs"),
        ({"weights": [0.0]}, "weights are 0"),
        ({"precision": "64-true"}, "precision is one of 32-true, bf16-mixed, 16-mixed; got '64-true'"),
        ({"precision": "16-mixed"}, "precision 16-mixed needs a GPU"),
        ({"accumulate": 0}, "accumulate is at least 1; got 0"),
        ({"patience": 0}, "patience is at least 1; got 0"),
        ({"positive": "1"}, "positive labels are for gates, and this network has none"),
    ]:
        with pytest.raises(OptionError, match=message):
            finetune(Net(), sounds(), **QUICK, run_dir=tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()


# Accumulation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_accumulated_parts_make_the_step_of_the_whole_batch(cache_bytes):
    whole, parts = Net(), Net()
    settings = {**QUICK, "beta": 0.02, "cache_bytes": cache_bytes}
    one = finetune(whole, sounds(), **{**settings, "batch_size": 15})
    many = finetune(parts, sounds(), **{**settings, "batch_size": 5}, accumulate=3)
    assert_close(whole, parts)
    for name, values in one.phases[0].losses.items():
        assert values == pytest.approx(many.phases[0].losses[name], rel=1e-4, abs=1e-6)


# Precision ------------------------------------------------------------------------------------------------------------


def bfloat16_is_right() -> bool:
    """Whether this CPU convolves in bfloat16 as it should: with AMX torch 2.12.1 does not, and says nothing."""
    value, weight = torch.randn(4, 8, 200), torch.randn(24, 8, 3)
    exact = nn.functional.conv1d(value, weight)
    return bool((nn.functional.conv1d(value.bfloat16(), weight.bfloat16()).float() - exact).abs().mean() < 0.1)


def test_bfloat16_trains_like_single_precision_or_is_refused():
    net, exact = Net(), Net()
    if not bfloat16_is_right():
        with pytest.raises(OptionError, match="take precision 32-true"):
            finetune(net, sounds(), **QUICK, precision="bf16-mixed")
        return
    rough = finetune(net, sounds(), **{**QUICK, "steps": 100}, precision="bf16-mixed", cache_bytes=0)
    plain = finetune(exact, sounds(), **{**QUICK, "steps": 100}, cache_bytes=0)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert rough.phases[0].last() == pytest.approx(plain.phases[0].last(), rel=0.1)
    assert rough.phases[0].last() < 0.7 * rough.phases[0].first()
    assert rough.phases[0].losses["light"] != plain.phases[0].losses["light"]


class Fragile(Region):
    """A path that half precision ruins: a small difference of large numbers."""

    def forward(self, cut, skip):
        (answer,) = super().forward(cut, skip)
        return ((answer + nn.functional.conv1d(cut * 3e4, torch.ones(12, 8, 4), stride=4)) % 7,)


def test_a_precision_that_a_network_cannot_bear_is_refused(tmp_path):
    net = Net()
    net.dsl.full = Fragile(24)
    with pytest.raises(OptionError, match=r"In bf16-mixed the full path's answer is .* take precision 32-true"):
        finetune(net, sounds(), **QUICK, precision="bf16-mixed", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Early stopping -------------------------------------------------------------------------------------------------------


def test_a_phase_ends_when_nothing_gets_better_and_keeps_the_best(tmp_path):
    net = Net()
    settings = {**QUICK, "steps": 400, "switch_steps": 40, "lr": 1.0}  # so high that the first steps do harm
    history = finetune(net, sounds(), **settings, patience=2, checkpoint_every=5, run_dir=tmp_path / "run")
    light = history.phases[0]
    assert light.steps < 400
    assert history.kept["light"] == light.steps - 10  # two judgings without a better one
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    final = torch.load(tmp_path / "run" / "checkpoints" / "final.pt", weights_only=True)
    assert best["step"] == history.kept["switch"] or history.kept["switch"] == 400
    assert_same_bits(final["layers"][0]["light"], net.dsl.light.state_dict())


def test_the_state_that_is_kept_is_the_one_that_judged_best(tmp_path):
    run = tmp_path / "run"
    net = Net()
    history = finetune(net, sounds(), **{**QUICK, "switch_steps": 0}, patience=100, checkpoint_every=3, run_dir=run)
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    judged = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    assert sorted(judged) == list(range(3, 31, 3))
    assert history.kept == {"light": min(judged, key=judged.get)}
    data = open_data(sounds())
    chosen, held = EarlyStop((), 100).divide(data, 0)
    with torch.no_grad(), route(net, "both"):
        net(data.batch(held))
    found = difference(net.dsl.paths.light, net.dsl.paths.full, net.dsl.scale, net.dsl.outputs).mean().item()
    assert found == pytest.approx(min(judged.values()), rel=1e-4)
    assert sorted([*chosen.tolist(), *held.tolist()]) == list(range(64))
    assert len(held) == 6


def test_held_out_sources_are_not_learned_from():
    data = open_data(sounds(60), sources=[f"tape {at // 6}" for at in range(60)])
    chosen, held = EarlyStop((), 1).divide(data, 0)
    assert {data.sources[at] for at in held.tolist()}.isdisjoint(data.sources[at] for at in chosen.tolist())
    assert len(held) == 6
    everything, none = EarlyStop((), None).divide(data, 0)
    assert (len(everything), len(none)) == (60, 0)


def test_a_better_state_starts_the_count_again():
    net = Net()
    stop = EarlyStop((net.dsl,), 2)
    assert stop.offer(1.0, 0)
    assert not stop.offer(1.0, 1)
    kept = net.dsl.light.outer.weight.clone()
    assert stop.offer(0.5, 2)
    net.dsl.light.outer.weight.data += 1
    assert not stop.offer(math.nan, 3)
    assert not stop.exhausted
    assert not stop.offer(0.6, 4)
    assert stop.exhausted
    stop.keep("light")
    assert torch.equal(net.dsl.light.outer.weight, kept)
    assert stop.kept == {"light": 2}


IMPATIENT = {"beta": 0.02, "accumulate": 2, "patience": 2, "lr": 1.0}


@pytest.fixture(scope="module")
def impatient():
    net = Net()
    history = finetune(net, sounds(), **QUICK, checkpoint_every=7, **IMPATIENT)
    assert history.phases[0].steps == 14  # nothing gets better at that rate
    return trained(net), history


@pytest.mark.parametrize(
    ("at", "begins"), [(10, 7), (16, 14), (22, 35)], ids=["light phase", "stopped", "switch phase"]
)
def test_a_killed_run_with_accumulation_and_patience_resumes_to_the_same_bits(tmp_path, impatient, at, begins):
    run = tmp_path / "run"
    ended = in_a_process(run, at, signal.SIGKILL, **IMPATIENT)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    net, history = resumed(run, **IMPATIENT)
    assert history.resumed_at == begins
    assert_same_bits(trained(net), impatient[0])
    assert curves(history) == curves(impatient[1])
    assert history.kept == impatient[1].kept


def test_another_patience_is_another_run(tmp_path):
    finetune(Net(), sounds(), **{**QUICK, "steps": 4, "switch_steps": 0}, patience=1, run_dir=tmp_path / "run")
    with pytest.raises(TrainError, match="patience was 1 and is 2"):
        finetune(Net(), sounds(), **{**QUICK, "steps": 4, "switch_steps": 0}, patience=2, run_dir=tmp_path / "run",
                 resume=True)  # fmt: skip


# Gates ----------------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """The light path of an early exit: one answer for all samples."""

    def __init__(self):
        super().__init__()
        self.answer0 = nn.Parameter(torch.zeros(12, 50))

    def forward(self, cut, skip):
        return (self.answer0.expand(len(cut), 12, 50),)


class Gated(Net):
    def __init__(self, mask: str = "weight"):
        super().__init__()
        self.dsl = DSLayer(
            Mask((1, 8, 1), mask), Switch(8, kind="positive"), Constant(), self.dsl.full, self.dsl.inputs,
            [Layout(axis=0)], channel_axis=1,
        )  # fmt: skip


def labelled(count: int = 64, seed: int = 1):
    return open_data(sounds(count, seed), labels=["quiet" if at % 2 == 0 else "loud" for at in range(count)])


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("mask", ["weight", "activation"])
def test_a_gate_learns_which_samples_are_positive(mask, cache_bytes):
    net = Gated(mask)
    history = finetune(net, labelled(), **GATED, positive="loud", beta=0.005, cache_bytes=cache_bytes)
    names = ["gate", "mask", "anchor", "weight_sparsity", "activation_sparsity", "total"]
    assert [list(phase.losses) for phase in history.phases] == [names, ["gate", "total"]]
    assert history.phases[1].last("gate") < 0.2
    test = labelled(40, seed=9)
    with torch.no_grad():
        net(test.batch(range(40)))
    assert ((net.dsl.paths.score > 0.5) == torch.arange(40) % 2).float().mean() > 0.9


def test_the_constant_answer_is_the_mean_of_the_negatives_and_is_not_trained():
    net = Gated()
    data = labelled()
    light, _ = split(data, (0.75, 0.25), 0)
    finetune(net, data, **{**GATED, "switch_steps": 2}, positive="loud", beta=0.01, anchor=1.0)
    mask = net.dsl.mask.weight.data.clone()
    net.dsl.mask.weight.data.fill_(1)
    with torch.no_grad(), route(net, "full"):
        net(light.batch([at for at, label in enumerate(light.labels) if label == "quiet"]))
    torch.testing.assert_close(net.dsl.light.answer0, net.dsl.paths.full[0].mean(0), rtol=1e-5, atol=1e-5)
    assert not torch.equal(mask, torch.ones_like(mask))


def test_without_beta_only_the_gate_trains():
    net = Gated()
    history = finetune(net, labelled(), **GATED, positive={"loud"})
    assert [phase.name for phase in history.phases] == ["switch"]
    assert torch.equal(net.dsl.mask.weight, torch.ones(1, 8, 1))
    assert net.dsl.light.answer0.abs().sum() > 0


def test_a_gate_and_a_switch_train_side_by_side():
    both = nn.Sequential(Gated(), nn.ConvTranspose1d(4, 1, 16, stride=16), Net(seed=1))
    history = finetune(both, labelled(), **{**GATED, "steps": 20, "switch_steps": 20}, positive="loud")
    assert [list(phase.losses) for phase in history.phases] == [["light", "total"], ["switch", "gate", "total"]]
    assert all(phase.last() < phase.first() for phase in history.phases)


def test_gates_want_labels():
    with pytest.raises(OptionError, match="has a gate, which learns from labels"):
        finetune(Gated(), labelled(), **GATED)
    with pytest.raises(OptionError, match="no label"):
        finetune(Gated(), sounds(), **GATED, positive="loud")


@pytest.mark.parametrize(("switch_steps", "lost"), [(0, (10,)), (10, (16, 20))], ids=["light phase", "switch phase"])
def test_a_broken_gate_run_resumes_to_the_same_bits_with_the_same_labels_only(tmp_path, switch_steps, lost):
    settings = {**GATED, "steps": 10, "switch_steps": switch_steps, "beta": 0.02, "checkpoint_every": 4}
    run, whole, net = tmp_path / "run", Gated("activation"), Gated("activation")
    unbroken = finetune(whole, labelled(), **settings, positive="loud", run_dir=run)
    for name in ("final.pt", *(f"step-{step:06d}.pt" for step in lost)):
        (run / "checkpoints" / name).unlink()
    with pytest.raises(TrainError, match="positive was"):
        finetune(net, labelled(), **settings, positive="quiet", run_dir=run, resume=True)
    history = finetune(net, labelled(), **settings, positive="loud", run_dir=run, resume=True)
    assert history.resumed_at == (12 if switch_steps else 8)
    assert_same_bits(trained(net), trained(whole))
    assert curves(history) == curves(unbroken)


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_more_beta_makes_more_zeros_and_the_anchor_holds_the_answer(kind):
    zeros, lost = [], []
    for beta in (0.01, 0.06, 0.1):
        net = Net()
        net.dsl.mask = Mask((1, 8, 1), kind)
        settings = {"steps": 100, "switch_steps": 0, "batch_size": 16, "lr": 3e-2, "progress": False, "threads": 1}
        light = finetune(net, sounds(), **settings, beta=beta).phases[0]
        zeros.append(light.last("activation_sparsity"))
        lost.append(light.last("anchor"))
        if kind == "weight":
            assert light.losses["weight_sparsity"][-1] == pytest.approx(net.dsl.mask.sparsity(), abs=1e-6)
        else:
            assert light.last("weight_sparsity") == 0
        with torch.no_grad(), route(net, "full"):
            net(sounds(16, seed=7))
        assert (net.dsl.paths.masked == 0).float().mean().item() == pytest.approx(zeros[-1], abs=0.1)
    assert zeros[0] < zeros[1] < zeros[2], zeros
    assert lost[0] < 0.01, lost


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A dslified network in a file, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 8, 8, stride=8), nn.ELU(), nn.Conv1d(8, 16, 3), nn.ELU(), nn.Conv1d(16, 8, 3))
    save(insert(model, "1", 0.25, (sounds(2),)), tmp_path / "net.dsl")
    torch.save(sounds(40), tmp_path / "sounds.pt")
    return tmp_path


def command(folder, *words, capsys):
    """(exit code, stdout, stderr) of dslify finetune."""
    arguments = ["finetune", str(folder / "net.dsl"), "--data", str(folder / "sounds.pt"), *words]
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_the_command_passes_its_options_on(files, capsys):
    words = ["--loss", "kl:1", "--weights", "2", "--accumulate", "2", "--patience", "3", "--checkpoint-every", "2"]
    small = ["--steps", "6", "--switch-steps", "4", "--batch-size", "8", "--beta", "0.01", "--anchor", "0.5", "--json"]
    code, out, _ = command(files, *words, *small, capsys=capsys)
    assert code == 0
    told = json.loads(out)
    wanted = {"loss": "kl:1", "weights": [2.0], "accumulate": 2, "patience": 3, "anchor": 0.5, "precision": "32-true"}
    assert {name: told["options"][name] for name in wanted} == wanted
    assert set(told["kept"]) == {"light", "switch"}
    assert (files / "net.run" / "checkpoints" / "best.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "l3"], "loss is one of l1, mse, cosine, kl (kl:1 where axis 1 holds the classes); got 'l3'."),
        (["--loss", "l1,mse"], "loss has 2 entries and the layer 1 outputs; give one for each."),
        (["--weights", "1,x"], "weights must be 0 or above; got 'x'."),
        (["--weights", "1,2"], "weights has 2 entries and the layer 1 outputs; give one for each."),
        (["--precision", "8"], "precision is one of 32-true, bf16-mixed, 16-mixed; got '8'."),
        (["--precision", "16-mixed"], "precision 16-mixed needs a GPU; on a CPU take bf16-mixed or 32-true."),
        (["--accumulate", "0"], "accumulate must be a whole number of at least 1; got 0."),
        (["--patience", "none"], "patience must be a whole number of at least 1; got 'none'."),
        (["--positive", "1-9"], "positive labels are for gates, and this network has none; insert with mode='gc', or "
         "leave them out."),
    ],
)  # fmt: skip
def test_the_command_says_in_one_sentence_what_does_not_fit(files, words, message, capsys):
    before = (files / "net.dsl").read_bytes()
    code, _, err = command(files, *words, capsys=capsys)
    assert (code, err.strip().splitlines()[-1].removeprefix("error: ")) == (2, message)
    assert (files / "net.dsl").read_bytes() == before
    assert sorted(path.name for path in files.iterdir()) == ["net.dsl", "sounds.pt"]
