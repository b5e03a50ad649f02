"""Several processes: torchrun ends with the weights of one process, dsl_loss in DistributedDataParallel, who writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import dslify
from dslify.data import open_data
from dslify.losses import dsl_loss
from dslify.processes import NAMES, Place, place
from dslify.team import Team
from dslify.train import finetune

from .test_train import ROOT, Net, sounds, trained

SAME = 1e-5  # relative and absolute: sums over two halves of a batch round differently
SETTINGS = {"steps": 25, "switch_steps": 15, "batch_size": 7, "beta": 0.02, "checkpoint_every": 10}


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, talking through gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False, timeout=240)


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=SAME, atol=SAME, msg=name)


# What the processes do themselves -------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from tests.test_processes import SETTINGS, deep, gradients, loss_of
    from tests.test_train import Net, sounds, trained
    from dslify.errors import TrainError
    from dslify.processes import place
    from dslify.train import finetune

    torch.set_num_threads(1)
    rank = place().rank
    found = {}
    net = Net()
    finetune(net, sounds(), **SETTINGS, progress=False, threads=1, accumulate=2, run_dir="run")
    found["trained"] = trained(net)
    net = Net()
    finetune(net, sounds(), **SETTINGS, progress=False, threads=1, accumulate=2, run_dir="run", resume=True)
    found["resumed"] = trained(net)
    try:
        finetune(Net(), sounds(seed=rank), **SETTINGS, progress=False, threads=1)
        found["other data"] = ""
    except TrainError as error:
        found["other data"] = str(error)
    try:
        finetune(Net(), sounds(), **SETTINGS, progress=False, threads=1, run_dir="run")
    except TrainError as error:
        found["taken"] = str(error)
    for low in (False, True):
        model = deep()
        wrapped = DistributedDataParallel(model)
        loss_of(wrapped, sounds(16)[rank::2], low).backward()
        found[f"gradients {low}"] = gradients(model)
    torch.save(found, f"found{rank}.pt")
"""


def deep() -> nn.Module:
    """A network with a measured layer inside a larger one; BatchNorm with the statistics it has."""
    net = Net().train()
    net.norm.eval()
    net.dsl.scale.fill_(0.3)
    net.dsl.mask.weight.data[0] = 0.5
    return nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), net, nn.Conv1d(4, 2, 1))


def loss_of(model: nn.Module, x: torch.Tensor, low: bool) -> torch.Tensor:
    """A step of a user's own loop: the task's loss and the layer's."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        return model(x).float().square().mean() + dsl_loss(model, beta=0.01).total


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "two.py").write_text(textwrap.dedent(SCRIPT))
    ended = torchrun(folder, "two.py")
    assert ended.returncode == 0, ended.stderr
    return folder, [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_end_with_the_weights_of_one(found):
    net = Net()
    finetune(net, sounds(), **{**SETTINGS, "batch_size": 14}, progress=False, threads=1)
    _, (first, second) = found
    for name, value in first["trained"].items():
        assert torch.equal(value, second["trained"][name]), name
    assert_close(first["trained"], trained(net))


def test_a_run_of_two_processes_is_written_once_and_resumes(found):
    folder, (first, second) = found
    assert len((folder / "run" / "history.jsonl").read_text().splitlines()) == 40
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    for rank in (first, second):
        assert all(torch.equal(value, rank["trained"][name]) for name, value in rank["resumed"].items())


def test_processes_that_read_other_data_are_told(found):
    _, (first, second) = found
    assert first["other data"].startswith("Another process has another configuration than the first one;")
    assert second["other data"].startswith("Process 1 has another light_data, switch_data than the first one;")


def test_what_the_first_process_is_refused_reaches_all(found):
    _, (first, second) = found
    assert "holds a run already" in first["taken"]
    assert second["taken"] == first["taken"]


def test_gradients_in_distributed_data_parallel_are_those_of_the_joined_batch(found):
    _, ranks = found
    model = deep()
    loss_of(model, sounds(16), False).backward()
    for rank in ranks:
        assert_close(rank["gradients False"], gradients(model))
        for name, rough in rank["gradients True"].items():
            exact = gradients(model)[name]
            assert (rough - exact).norm() < 0.1 * exact.norm() + 1e-3, name  # bfloat16 has 8 bits


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_under_torchrun_writes_and_prints_once(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 8, 8, stride=8), nn.ELU(), nn.Conv1d(8, 16, 3), nn.ELU(), nn.Conv1d(16, 8, 3))
    net = dslify.insert(model, "1", 0.25, (sounds(2),))
    dslify.save(net, tmp_path / "net.dsl")
    torch.save(sounds(40), tmp_path / "sounds.pt")
    options = ["--steps", "8", "--switch-steps", "4", "--batch-size", "6", "--accumulate", "2", "--run-dir", "run"]
    words = ["finetune", "net.dsl", "--data", "sounds.pt", *options, "-o", "two.dsl", "--json"]
    ended = torchrun(tmp_path, "-m", "dslify", *words)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["file"] == "two.dsl"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.dsl", "run", "sounds.pt", "two.dsl"]
    dslify.finetune(net, open_data(tmp_path / "sounds.pt"), steps=8, switch_steps=4, batch_size=12, progress=False)
    assert_close(trained(dslify.load(tmp_path / "two.dsl")), trained(net))


# What torchrun says ---------------------------------------------------------------------------------------------------


def test_a_process_alone_is_the_first_of_one(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert place() == Place(0, 0, 1, 1)
    monkeypatch.setenv("RANK", "3")  # some clusters set it for every job
    assert place() == Place()
    team = Team(torch.device("cpu"), "32-true")
    assert team.first
    assert team.part(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_torchrun_says_which_process_this_is(monkeypatch):
    for name, value in zip(NAMES, ("5", "1", "8", "4"), strict=True):
        monkeypatch.setenv(name, value)
    assert place() == Place(rank=5, local_rank=1, world=8, local_world=4)
    assert place().nodes == 2
