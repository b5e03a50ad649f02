"""finetune(): phases, the fast path, resuming to the same numbers, and what it says when it cannot go on."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from dslify.data import open_data
from dslify.errors import DataError, OptionError, TrainError
from dslify.insert import insert
from dslify.losses import difference
from dslify.samples import split
from dslify.switch import DSLayer, Layout, Mask, Switch, dsl_layers, route
from dslify.train import finetune

# Cached and live steps run the base on batches of other composition; convolutions then round differently.
LIVE_TOLERANCE = 1e-4  # relative, of losses and weights after 30 steps
LENGTH = 800
ROOT = Path(__file__).parent.parent
QUICK = {"steps": 30, "switch_steps": 20, "batch_size": 8, "progress": False, "threads": 1}


class Region(nn.Module):
    """A path: from the cut (and a skip) to a tuple."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Conv1d(8, width, 3, padding=1)
        self.outer = nn.Conv1d(width, 12, 4, stride=4)

    def forward(self, cut, skip):
        inner = nn.functional.elu(self.inner(cut))
        return (self.outer(inner) + nn.functional.avg_pool1d(skip, 16).mean(1, keepdim=True),)


class Net(nn.Module):
    """A small audio encoder with a Dynamic Switch Layer in it; `crossing` values reach the region past the cut."""

    def __init__(self, seed: int = 0, width: int = 2):
        super().__init__()
        torch.manual_seed(seed)
        self.front = nn.Conv1d(1, 8, 8, stride=4, padding=2)
        self.norm = nn.BatchNorm1d(8)
        layouts = [Layout(axis=0), Layout(axis=0)]
        self.dsl = DSLayer(
            Mask((8, 1)), Switch(8), Region(width), Region(24), layouts, [Layout(axis=0)], channel_axis=1
        )
        self.head = nn.Conv1d(12, 4, 1)

    def forward(self, x):
        return self.head(self.dsl(nn.functional.elu(self.norm(self.front(x))), x))


def sounds(count: int = 64, seed: int = 1) -> torch.Tensor:
    """(count, 1, LENGTH): every other one faint noise, the rest loud tones in noise."""
    draw = torch.Generator().manual_seed(seed)
    time = torch.arange(LENGTH) / LENGTH
    noise = torch.randn(count, 1, LENGTH, generator=draw)
    pitch = 5 + 60 * torch.rand(count, 1, 1, generator=draw)
    tone = torch.sin(2 * torch.pi * pitch * time) + 0.3 * torch.sin(4 * torch.pi * pitch * time)
    loud = (torch.arange(count) % 2).view(-1, 1, 1)
    return 0.02 * noise + loud * (0.2 * noise + tone)


def trained(net: nn.Module) -> dict[str, torch.Tensor]:
    layer = dsl_layers(net)[0]
    return {name: value.clone() for name, value in layer.state_dict().items() if not name.startswith("full.")}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def curves(history) -> dict[str, dict[str, tuple[float, ...]]]:
    return {phase.name: phase.losses for phase in history.phases}


# Phases ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished():
    """(network before, after, history) of one run with room to learn."""
    net = Net()
    before = copy.deepcopy(net).eval()
    history = finetune(net, sounds(128), **{**QUICK, "steps": 300, "switch_steps": 200, "batch_size": 16})
    return before, net, history


def test_light_and_switch_learn(finished):
    _, _, history = finished
    light, switch = history.phases
    assert (light.name, light.steps, switch.name, switch.steps) == ("light", 300, "switch", 200)
    assert light.last("light") < 0.5 * light.first("light")
    assert switch.last("switch") < 0.5 * switch.first("switch")
    assert history.cached


def test_only_light_and_switch_move_and_full_stays_the_original(finished):
    before, after, _ = finished
    for name, old in before.state_dict().items():
        new = after.state_dict()[name]
        moves = name.startswith(("dsl.light.", "dsl.switch.")) or name == "dsl.scale"
        assert torch.equal(old, new) != moves, name
    x = sounds(8, seed=5)
    with torch.no_grad(), route(before, "full"), route(after, "full"):
        assert torch.equal(before(x), after(x))


def test_scale_is_the_mean_absolute_full_output_of_the_light_phase_data(finished):
    _, net, history = finished
    light, _ = split(open_data(sounds(128)), (0.75, 0.25), 0)
    with torch.no_grad(), route(net, "full"):
        net(light.batch(range(len(light))))
    assert net.dsl.scale.item() == pytest.approx(net.dsl.paths.full[0].abs().mean().item(), rel=1e-5)
    assert history.scale == ((net.dsl.scale.item(),),)


def test_the_switch_learns_from_sources_that_the_light_path_has_not_seen(finished):
    _, _, history = finished
    assert history.data["light"]["samples"] + history.data["switch"]["samples"] == 128
    assert len(history.fingerprints) == 128
    assert "no data was given for the switch" in history.notes[0]


def test_the_score_ranks_new_samples(finished):
    _, net, _ = finished
    with torch.no_grad(), route(net, "both"):
        net(sounds(64, seed=9))
    paths = net.dsl.paths
    actual = difference(paths.light, paths.full, net.dsl.scale, net.dsl.outputs)
    assert torch.corrcoef(torch.stack([paths.score.log(), actual.log()]))[0, 1] > 0.8


def test_the_score_of_cached_features_is_the_switch(finished):
    _, net, _ = finished
    value = torch.randn(5, 30, 8)
    assert torch.equal(net.dsl.switch.score(net.dsl.switch.features(value)), net.dsl.switch(value))


def test_the_network_is_handed_back_in_order():
    net = Net()
    finetune(net, sounds(), **{**QUICK, "steps": 2, "switch_steps": 2}, beta=0.1, cache_bytes=0)
    assert not any(module.training for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert net.dsl.paths is None
    assert net.dsl.route is None
    copy.deepcopy(net)


def test_flags_and_random_state_of_the_caller_survive():
    net = Net()
    net.front.weight.requires_grad_(False)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    finetune(net, sounds(), **{**QUICK, "steps": 2, "switch_steps": 2})
    assert torch.equal(torch.rand(1), expected)
    assert not net.front.weight.requires_grad
    assert net.front.bias.requires_grad


def test_same_seed_same_numbers_other_seed_other_numbers():
    runs = []
    for seed in (0, 0, 1):
        net = Net()
        finetune(net, sounds(), **QUICK, seed=seed)
        runs.append(trained(net))
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0]["light.inner.weight"], runs[2]["light.inner.weight"])


@pytest.mark.parametrize("beta", [0.0, 0.02])
def test_the_fast_path_gives_the_numbers_of_the_plain_one(beta):
    fast, plain = Net(), Net()
    quick = finetune(fast, sounds(), **QUICK, beta=beta)
    slow = finetune(plain, sounds(), **QUICK, beta=beta, cache_bytes=0)
    assert quick.cached
    assert not slow.cached
    for phase, other in zip(quick.phases, slow.phases, strict=True):
        for name, losses in phase.losses.items():
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(other.losses[name]), rtol=LIVE_TOLERANCE, atol=LIVE_TOLERANCE
            )
    for name, value in trained(fast).items():
        torch.testing.assert_close(value, trained(plain)[name], rtol=LIVE_TOLERANCE, atol=LIVE_TOLERANCE)


def test_data_that_does_not_fit_is_not_cached():
    assert not finetune(Net(), sounds(), **QUICK, cache_bytes=10_000).cached


class Shifted(nn.Module):
    """A path that also reads a value which all samples of a batch share."""

    def __init__(self, region: nn.Module):
        super().__init__()
        self.region = region

    def forward(self, cut, skip, shift):
        return (self.region(cut, skip)[0] + shift,)


class Sharing(Net):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift
        self.dsl.full, self.dsl.light = Shifted(self.dsl.full), Shifted(self.dsl.light)
        self.dsl.inputs = (*self.dsl.inputs, Layout())

    def forward(self, x):
        return self.dsl(self.front(x), x, self.shift(x))


def test_an_input_that_depends_on_the_whole_batch_switches_the_fast_path_off():
    assert not finetune(Sharing(torch.mean), sounds(), **QUICK).cached
    assert finetune(Sharing(lambda x: torch.ones(())), sounds(), **QUICK).cached


class Scaled(nn.Module):
    """A path that also reads a number which grows with the batch, as view sizes do."""

    def __init__(self, region: nn.Module):
        super().__init__()
        self.region = region

    def forward(self, cut, skip, size):
        return (self.region(cut, skip)[0].reshape(size // 3, 12, -1),)


def test_a_size_that_grows_with_the_batch_is_kept_in_proportion():
    net = Net()
    net.dsl.full, net.dsl.light = Scaled(net.dsl.full), Scaled(net.dsl.light)
    net.dsl.inputs = (*net.dsl.inputs, Layout(scales=True))
    net.forward = lambda x: net.dsl(net.front(x), x, 3 * len(x))
    assert finetune(net, sounds(61), **QUICK).cached


@pytest.mark.parametrize(("anchor", "held"), [(1.0, True), (0.0, False)])
def test_the_mask_collapses_without_the_anchor_and_is_held_with_it(anchor, held):
    net = Net()
    settings = {"steps": 500, "switch_steps": 0, "batch_size": 16, "lr": 1e-2, "beta": 0.02, "anchor": anchor}
    history = finetune(net, sounds(), **settings, progress=False, threads=1)
    x = sounds(16, seed=7)
    with torch.no_grad(), route(net, "full"):
        net(x)
        masked = net.dsl.paths.full
    net.dsl.mask.weight.data.fill_(1)
    with torch.no_grad(), route(net, "full"):
        net(x)
    lost = difference(masked, net.dsl.paths.full, net.dsl.scale, net.dsl.outputs).mean().item()
    assert (lost < 0.2) == held
    assert held or history.phases[0].last("mask") < 0.5


def test_leaving_a_phase_out():
    net = Net()
    history = finetune(net, sounds(), **{**QUICK, "steps": 0})
    assert [phase.name for phase in history.phases] == ["switch"]
    assert net.dsl.scale > 0
    assert torch.equal(net.dsl.light.inner.weight, Net().dsl.light.inner.weight)
    history = finetune(net, sounds(), **{**QUICK, "switch_steps": 0})
    assert [phase.name for phase in history.phases] == ["light"]
    assert history.data["light"]["samples"] == 64


def test_sharing_samples_between_phases_is_said():
    history = finetune(Net(), sounds(), switch_data=sounds(), **{**QUICK, "steps": 2, "switch_steps": 2})
    assert "64 samples taught both" in history.notes[0]


def test_history_is_json():
    history = finetune(Net(), sounds(), **{**QUICK, "steps": 2, "switch_steps": 2})
    told = json.loads(json.dumps(history.to_json()))
    assert told["phases"][0]["losses"]["light"] == list(history.phases[0].losses["light"])
    assert told["phases"][0]["first"]["light"] == history.phases[0].first("light")


def test_a_network_from_the_surgery_inside_a_larger_model(tmp_path):
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv1d(1, 8, 8, stride=8), nn.ELU(), nn.Conv1d(8, 32, 3), nn.ELU(), nn.Conv1d(32, 8, 3)
    )  # fmt: skip
    net = insert(Codec(encoder), at="encoder.1", width=0.25, scope="encoder", example_inputs=(sounds(2),))
    history = finetune(net, sounds(), **QUICK, run_dir=tmp_path / "run")
    assert history.cached
    assert history.phases[0].last() < history.phases[0].first()
    with torch.no_grad(), route(net, "full"):
        assert torch.equal(net(sounds(4)), Codec(encoder)(sounds(4)))


class Codec(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = encoder, nn.ConvTranspose1d(8, 1, 8, stride=8)

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Counting(Net):
    """Counts what runs behind the layer."""

    def __init__(self):
        super().__init__()
        self.ran = 0
        self.head.register_forward_hook(self.count)

    def count(self, *_):
        self.ran += 1


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_what_lies_behind_the_last_layer_does_not_run(cache_bytes):
    net, plain = Counting(), Net()
    finetune(net, sounds(), **QUICK, cache_bytes=cache_bytes)
    finetune(plain, sounds(), **QUICK, cache_bytes=cache_bytes)
    assert net.ran == 2  # the first forward of each phase tells how often a layer runs
    assert_same_bits(trained(net), trained(plain))


class Twice(Net):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(-1))


def test_a_layer_that_runs_twice_in_a_forward_is_trained_without_the_fast_path():
    net = Twice()
    history = finetune(net, sounds(), **QUICK)
    assert not history.cached
    assert history.phases[0].last() < history.phases[0].first()


def test_two_layers_train_together():
    both = nn.Sequential(Net(), nn.ConvTranspose1d(4, 1, 16, stride=16), Net(seed=1))
    history = finetune(both, sounds(), **QUICK)
    assert history.cached
    assert len(history.scale) == 2
    assert history.phases[0].last() < history.phases[0].first()
    history = finetune(both, sounds(), **QUICK, beta=0.01)
    assert not history.cached  # the second layer's input moves with the first one's mask


# Runs that end early --------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from tests.test_train import QUICK, Net, finetune, sounds

    steps = 0
    def count(*_):
        global steps
        steps += 1
        if steps == {at}:
            os.kill(os.getpid(), {signal})
    register_optimizer_step_post_hook(count)
    {extra}
    try:
        finetune(Net(), sounds(), **QUICK, checkpoint_every=7, run_dir={run!r}, **{settings!r})
    except KeyboardInterrupt as stopped:
        print(stopped)
        sys.exit(130)
"""


def in_a_process(run: Path, at: int, number: int, extra: str = "", **settings):
    script = textwrap.dedent(SCRIPT).format(
        root=str(ROOT), at=at, signal=number, run=str(run), extra=extra, settings=settings
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )


def resumed(run: Path, **more):
    net = Net()
    return net, finetune(net, sounds(), **QUICK, checkpoint_every=7, run_dir=run, resume=True, **more)


@pytest.fixture(scope="module")
def unbroken():
    net = Net()
    history = finetune(net, sounds(), **QUICK)
    return trained(net), curves(history)


def steps_on_disk(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("at", [3, 18, 41], ids=["before the first checkpoint", "light phase", "switch phase"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, unbroken, at):
    run = tmp_path / "run"
    ended = in_a_process(run, at, signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    net, history = resumed(run)
    assert history.resumed_at == max([step for step in (0, 7, 14, 21, 28, 30, 35) if step < at])
    assert_same_bits(trained(net), unbroken[0])
    assert curves(history) == unbroken[1]


def test_a_kill_in_the_middle_of_saving_costs_nothing(tmp_path, unbroken):
    run = tmp_path / "run"
    tear = """
saved = torch.save
def torn(state, where):
    saved(state, where)
    if state["step"] == 14:
        with open(where, "r+b") as file:
            file.truncate(200)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn
"""
    ended = in_a_process(run, 0, signal.SIGKILL, extra=tear)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ".step-000014.pt.tmp" in steps_on_disk(run)
    assert len((run / "history.jsonl").read_text().splitlines()) == 14  # ahead of the last whole checkpoint
    net, history = resumed(run)
    assert history.resumed_at == 7
    assert_same_bits(trained(net), unbroken[0])
    assert curves(history) == unbroken[1]
    assert len((run / "history.jsonl").read_text().splitlines()) == 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_that_very_step(tmp_path, unbroken, number):
    run = tmp_path / "run"
    ended = in_a_process(run, 17, number)
    assert ended.returncode == 130, ended.stderr
    assert ended.stdout.startswith("stopped after step 17; resume with the run folder")
    assert ended.stderr == ""
    net, history = resumed(run)
    assert history.resumed_at == 17
    assert_same_bits(trained(net), unbroken[0])


def test_a_killed_run_with_a_training_mask_resumes_to_the_same_bits(tmp_path):
    whole = Net()
    finetune(whole, sounds(), **QUICK, beta=0.02)
    run = tmp_path / "run"
    assert in_a_process(run, 18, signal.SIGKILL, beta=0.02).returncode == -signal.SIGKILL
    net, _ = resumed(run, beta=0.02)
    assert_same_bits(trained(net), trained(whole))


def test_a_finished_run_resumes_to_itself(tmp_path, unbroken):
    net = Net()
    finetune(net, sounds(), **QUICK, run_dir=tmp_path / "run", checkpoint_every=7)
    assert steps_on_disk(tmp_path / "run") == ["final.pt", "step-000042.pt", "step-000049.pt", "step-000050.pt"]
    again, history = resumed(tmp_path / "run")
    assert_same_bits(trained(again), unbroken[0])
    assert curves(history) == unbroken[1]
    assert history.unseen is not None


def test_the_run_folder_tells_the_run(tmp_path):
    run = tmp_path / "run"
    history = finetune(Net(), sounds(), **QUICK, run_dir=run)
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 51))
    assert [line["total"] for line in lines[:30]] == list(history.phases[0].losses["total"])
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    assert json.loads((run / "config.json").read_text())["lr"] == 3e-3
    seen = json.loads((run / "data.json").read_text())
    assert {*seen["light"], *seen["switch"]} == history.fingerprints
    assert list((run / "tensorboard").iterdir())


# What it says ---------------------------------------------------------------------------------------------------------


def refusal(kind, **settings) -> str:
    net = settings.pop("net", None) or Net()
    data = settings.pop("data", None)
    before = trained(net) if dsl_layers(net) else {}
    with pytest.raises(kind) as caught:
        finetune(net, sounds() if data is None else data, **{**QUICK, **settings})
    if dsl_layers(net):
        assert dsl_layers(net)[0].route is None
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert settings.get("lr") or not before.keys() - trained(net).keys()
    return str(caught.value)


def test_options_out_of_range():
    assert refusal(OptionError, lr=-1.0) == "lr is a positive number; got -1.0."
    assert refusal(OptionError, beta=float("nan")) == "beta is a non-negative number; got nan."
    assert refusal(OptionError, steps=-1) == "steps is 0 or more; got -1."
    assert refusal(OptionError, batch_size=0) == "batch_size is at least 1; got 0."
    assert "checkpoint_every" in refusal(OptionError, checkpoint_every=0)
    assert "no Dynamic Switch Layer" in refusal(OptionError, net=nn.Conv1d(1, 1, 1))


def test_resuming_what_cannot_be_resumed(tmp_path):
    assert "no run folder was given" in refusal(TrainError, resume=True)
    assert f"no run to resume in {tmp_path / 'none'}" in refusal(TrainError, resume=True, run_dir=tmp_path / "none")
    run = tmp_path / "run"
    finetune(Net(), sounds(), **QUICK, run_dir=run)
    said = refusal(TrainError, run_dir=run, resume=True, steps=31)
    assert "steps was 30 and is 31" in said
    assert "light_data was" in refusal(TrainError, run_dir=run, resume=True, data=sounds(seed=2))
    assert "network was" in refusal(TrainError, run_dir=run, resume=True, net=Net(seed=1))
    assert "network was" in refusal(TrainError, run_dir=run, resume=True, net=Net(width=3))
    assert "holds a run already" in refusal(TrainError, run_dir=run)
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    assert "No checkpoint" in refusal(TrainError, run_dir=run, resume=True)


def test_a_damaged_last_checkpoint_leaves_the_one_before(tmp_path, unbroken):
    run = tmp_path / "run"
    in_a_process(run, 18, signal.SIGKILL)
    (run / "checkpoints" / "step-000014.pt").write_bytes(b"damaged")
    net, history = resumed(run)
    assert history.resumed_at == 7
    assert_same_bits(trained(net), unbroken[0])


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refusal(TrainError, run_dir=tmp_path / "file")


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, unbroken):
    saved = torch.save

    def full_disk(state, where):
        if state["step"] == 21:
            Path(where).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved(state, where)

    monkeypatch.setattr(torch, "save", full_disk)
    run = tmp_path / "run"
    assert "No space left on device" in refusal(TrainError, run_dir=run, checkpoint_every=7)
    assert steps_on_disk(run) == ["step-000000.pt", "step-000007.pt", "step-000014.pt"]
    monkeypatch.undo()
    net, history = resumed(run)
    assert history.resumed_at == 14
    assert_same_bits(trained(net), unbroken[0])


def test_a_run_that_diverges_names_the_step_and_keeps_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    said = refusal(TrainError, lr=1e38, run_dir=run, checkpoint_every=1)
    assert "(light phase)" in said
    assert "try a lower learning rate than 1e+38" in said
    step = int(said.split("at step ")[1].split(" ")[0])
    state = torch.load(run / "checkpoints" / f"step-{step - 1:06d}.pt", weights_only=True)
    assert state["step"] == step - 1


def test_a_network_whose_answer_is_not_finite_names_the_sample():
    data = sounds()
    data[5] *= 1e38
    said = refusal(TrainError, data=data, switch_data=sounds(seed=3))
    assert said.startswith("The network's answer is not finite for sample[5]")


def test_data_of_a_wrong_shape_is_told_with_the_expected_one():
    net = Net()
    net.meta = {"dslify": {"example": [[[1, 1, LENGTH], "float32"]]}}
    said = refusal(TrainError, net=net, data=torch.randn(40, 2, LENGTH))
    assert "cannot take a batch of shape 8x2x800" in said
    assert "captured with samples of 1x800" in said


def test_one_source_cannot_teach_both_phases():
    one = open_data(sounds(), sources=["tape"] * 64)
    assert "has 1 source" in refusal(DataError, data=one)


def test_a_start_that_is_refused_leaves_nothing_behind(tmp_path):
    run = tmp_path / "run"
    assert "NaN" in refusal(DataError, data=torch.full((4, 1, LENGTH), float("nan")), run_dir=run)
    assert "cannot take a batch" in refusal(TrainError, data=torch.randn(40, 2, LENGTH), run_dir=run)
    assert not run.exists()
    run.mkdir()
    assert "cannot take a batch" in refusal(TrainError, data=torch.randn(40, 2, LENGTH), run_dir=run)
    assert not list(run.iterdir())


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "data.json").write_text("mine")
    assert "holds other files (data.json) and no run" in refusal(TrainError, run_dir=tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").write_text("mine")
    assert "holds other files (best.pt) and no run" in refusal(TrainError, run_dir=tmp_path)
    assert (tmp_path / "data.json").read_text() == "mine"
