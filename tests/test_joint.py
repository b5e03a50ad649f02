"""Joint training: the training network is the model in training mode, and what it learns the network has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from typer.testing import CliRunner

import dslify
from dslify.cli import app
from dslify.data import open_data
from dslify.errors import DslifyError, OptionError, TrainError
from dslify.joint import Joint
from dslify.runs import History
from dslify.samples import Samples
from dslify.training_network import training_network

SAME = 1e-5  # relative: training graph against the model's own forward in training mode


class Block(nn.Module):
    def __init__(self, channels: int, drop: float = 0.0, path: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.drop, self.path = nn.Dropout(drop), DropPath(path)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.path(self.drop(torch.relu(self.norm(self.conv(value)))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int, drop: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=drop, batch_first=True)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.attention(value, value, value, need_weights=False)[0]  # type: ignore[no-any-return]


class Coder(nn.Module):
    """A network whose capturable part is its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = images()
        self.decoder = nn.Linear(5, 7)

    def forward(self, value: Tensor) -> Tensor:
        return self.decoder(self.encoder(value))  # type: ignore[no-any-return]


def images(drop: float = 0.0, path: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(16, drop, path) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def batch(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_it_is_the_model_in_training_mode_and_its_running_statistics_are_the_networks() -> None:
    model = images()
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    trained = training_network(net, model, (batch(2),))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any(module.training != model.training for module in model.modules())
    mine = trained(batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    theirs = model.train()(batch())
    torch.testing.assert_close(mine, theirs, rtol=SAME, atol=SAME)
    evaluated = model.eval()(batch())
    with torch.no_grad(), dslify.route(net.eval(), "full"):
        torch.testing.assert_close(net(batch()), evaluated, rtol=SAME, atol=SAME)
    assert (mine - evaluated).abs().max() > 100 * SAME  # the two modes differ here, or nothing was compared


@pytest.mark.parametrize(("drop", "path"), [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_and_drop_path_are_there_in_training_and_not_in_the_network(drop: float, path: float) -> None:
    model = images(drop, path)
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    trained = training_network(net, model, (batch(2),))
    with torch.no_grad():
        assert not torch.equal(trained(batch()), trained(batch()))
        net.eval()
        assert torch.equal(net(batch()), net(batch()))


def test_dropout_of_attention_is_there() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Attention(8, 0.5), nn.Linear(8, 4))
    data = torch.randn(3, 5, 8)
    net = dslify.insert(model, "0", 0.5, (data,))
    trained = training_network(net, model, (data,))
    with torch.no_grad():
        assert not torch.equal(trained(data), trained(data))


@pytest.mark.parametrize("routes", ["full", "mixed"])
def test_one_step_reaches_base_full_light_switch_mask_and_stays_in_the_network(routes: str) -> None:
    model = images(0.1)
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    net.requires_grad_(True)
    trained = training_network(net, model, (batch(2),), routes=routes)
    loss = trained(batch()).square().mean() + dslify.dsl_loss(trained, beta=1e-3, anchor=0.0).total
    loss.backward()
    without = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert without == []
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    torch.optim.SGD(net.parameters(), 0.1).step()
    still = [name for name, value in net.named_parameters() if torch.equal(value, before[name])]
    assert all(".conv.bias" in name for name in still), still  # a BatchNorm takes the bias of its convolution away


def test_the_light_loss_gives_the_full_path_no_gradient_in_joint_training_either() -> None:
    model = images()
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    net.requires_grad_(True)
    trained = training_network(net, model, (batch(2),))
    trained(batch())
    dslify.dsl_loss(trained, beta=0.0, anchor=0.0).total.backward()
    (layer,) = dslify.dsl_layers(net)
    assert all(parameter.grad is None for parameter in layer.full.parameters())
    assert any(parameter.grad is not None for parameter in layer.light.parameters())


def test_the_light_path_learns_with_batch_statistics_and_keeps_running_ones() -> None:
    model = images()
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    trained = training_network(net, model, (batch(2),))
    (layer,) = dslify.dsl_layers(net)
    before = {name: value.clone() for name, value in layer.light.named_buffers() if "running" in name}
    assert before
    trained(batch())
    assert all(not torch.equal(layer.light.get_buffer(name), value) for name, value in before.items())


def test_mixed_routes_give_on_the_light_answer_where_the_score_is_lowest() -> None:
    model = images()
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    trained = training_network(net, model, (batch(2),), routes="mixed", share=1 / 3)
    given = trained(batch(6))
    (layer,) = dslify.dsl_layers(trained)
    paths = layer.paths
    assert paths is not None
    assert paths.light is not None
    assert paths.full is not None
    assert paths.light_taken is not None
    assert int(paths.light_taken.sum()) == 2
    assert paths.score[paths.light_taken].max() <= paths.score[~paths.light_taken].min()
    for at, light in enumerate(paths.light_taken.tolist()):
        chosen = (paths.light if light else paths.full)[0][at]
        assert torch.equal(given[at], chosen)


def test_with_a_scope_the_rest_of_the_model_trains_too() -> None:
    model = Coder()
    net = dslify.insert(model, "encoder.1", 0.3, (batch(1),), scope="encoder")
    net.requires_grad_(True)
    trained = training_network(net, model, (batch(2),))
    (trained(batch()).square().mean() + dslify.dsl_loss(trained, anchor=0.0).total).backward()
    assert net.decoder.weight.grad is not None  # type: ignore[union-attr]
    torch.testing.assert_close(trained(batch()), model.train()(batch()), rtol=SAME, atol=SAME)


def classes(count: int, seed: int = 0) -> Samples:
    """Pictures whose class is the channel that is brightest."""
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (count,), generator=random)
    pictures = torch.randn(count, 3, 12, 12, generator=random)
    pictures[torch.arange(count), label] += 1.0
    return open_data(pictures, (3, 12, 12), labels=[f"c{at}" for at in label], progress=False)


def cross_entropy(output: Tensor, batch: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    assert len(batch) == len(output)
    return nn.functional.cross_entropy(output, labels)


def jointly(net: nn.Module, model: nn.Module, steps: int = 40, **options: Any) -> History:
    joint = Joint(model, cross_entropy, steps=steps, lr=1e-2, routes=options.pop("routes", "full"))
    return dslify.finetune(
        net, classes(64), steps=6, switch_steps=6, batch_size=8, joint=joint, progress=False, **options
    )


@pytest.mark.parametrize("routes", ["full", "mixed"])
def test_finetune_learns_the_task_end_to_end_and_light_and_switch_after_it(routes: str) -> None:
    model = images(0.1)
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    given = {name: value.clone() for name, value in net.state_dict().items()}
    history = jointly(net, model, routes=routes, beta=1e-4)
    assert [phase.name for phase in history.phases] == ["joint", "light", "switch"]
    task = history.phases[0]
    assert task.last("task") < 0.6 * task.first("task")
    assert task.last("light") < task.first("light")
    assert {"task", "switch", "light", "mask"} <= set(task.losses)
    still = [name for name, value in net.state_dict().items() if torch.equal(value, given[name])]
    assert all(name.endswith(("threshold", ".on", "magnitude")) for name in still), still
    assert not any(module.training for module in net.modules())
    test = classes(90, 5)
    with torch.no_grad(), dslify.route(net, "full"):
        right = (net(test.batch(range(90))).argmax(1) == test.class_indices()).float().mean()
    assert right > 0.7  # of three classes; running statistics and weights are the network's own


def test_what_comes_before_a_gate_learns_for_it_and_what_comes_after_does_not() -> None:
    model = images()
    net = dslify.insert(model, "1", light="exit", mode="gc", example_inputs=(batch(1),))
    given = {name: value.clone() for name, value in net.state_dict().items()}
    history = dslify.finetune(
        net, classes(64), switch_data=classes(64), steps=0, switch_steps=10, batch_size=8, positive="c0",
        joint=Joint(model, lambda output, *_: 0 * output.sum(), steps=40, lr=1e-2), progress=False,
    )  # fmt: skip
    assert [phase.name for phase in history.phases] == ["joint", "switch"]
    assert {"task", "gate", "mask"} <= set(history.phases[0].losses)
    assert history.phases[0].last("gate") < 0.7 * history.phases[0].first("gate")
    turned = {
        name: 1 - nn.functional.cosine_similarity(value.flatten(), given[name].flatten(), 0).item()
        for name, value in net.state_dict().items()
        if value.dim() == 4
    }  # weight decay makes weights shorter, and only a gradient turns them
    before = [turn for name, turn in turned.items() if name.startswith(("0.", "1."))]
    after = [turn for name, turn in turned.items() if not name.startswith(("0.", "1."))]
    assert min(before) > 100 * SAME, turned
    assert max(after) < SAME, turned


def test_a_run_that_is_stopped_in_the_joint_phase_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = images(0.3)

    def fresh() -> nn.Module:
        return dslify.insert(model, "1", 0.3, (batch(1),))

    unbroken = fresh()
    jointly(unbroken, model, steps=12, run_dir=tmp_path / "one", checkpoint_every=5)
    broken, count = fresh(), 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise RuntimeError("power cut")

    def loss(output: Tensor, inputs: Tensor, labels: Tensor | None) -> Tensor:
        stop()
        return cross_entropy(output, inputs, labels)

    joint = Joint(model, loss, steps=12, lr=1e-2)
    options: dict[str, Any] = {"steps": 6, "switch_steps": 6, "batch_size": 8, "checkpoint_every": 5}
    with pytest.raises(RuntimeError, match="power cut"):
        dslify.finetune(broken, classes(64), joint=joint, run_dir=tmp_path / "two", progress=False, **options)
    again = fresh()
    history = jointly(again, model, steps=12, run_dir=tmp_path / "two", checkpoint_every=5, resume=True)
    assert history.resumed_at == 5
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_refusals_say_what_is_wrong() -> None:
    model = images()
    net = dslify.insert(model, "1", 0.3, (batch(1),))
    with pytest.raises(OptionError, match="routes is full or mixed"):
        training_network(net, model, (batch(2),), routes="light")
    other = images()
    other[6] = nn.Linear(16, 9)  # type: ignore[operator]
    with pytest.raises(DslifyError, match="does not have"):
        training_network(net, other, (batch(2),))
    with pytest.raises(TrainError, match="without `to`"):
        training_network(dslify.insert(model, "1", 0.3, (batch(1),), to="2"), model, (batch(2),))
    with pytest.raises(OptionError, match="at least 1"):
        Joint(model, cross_entropy, steps=0)
    joint = Joint(model, lambda output, *_: output, steps=1)
    with pytest.raises(TrainError, match="one number"):
        dslify.finetune(net, classes(16), joint=joint, progress=False)
    with pytest.raises(TrainError, match="2"):
        training_network(dslify.insert(net, "2", 0.3, (batch(1),)), model, (batch(2),))


def test_the_command_takes_the_plain_network_and_the_task_loss_together(tmp_path: Path) -> None:
    file = dslify.save(dslify.insert(images(), "1", 0.3, (batch(1),)), tmp_path / "net.dsl")
    before = file.read_bytes()
    for words in (("--joint", "timm:resnet18"), ("--task-loss", "pkg.mod:function")):
        result = CliRunner().invoke(app, ["finetune", str(file), "--data", str(tmp_path), *words])
        assert result.exit_code == 2
        assert "--joint and --task-loss go together" in result.output
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.dsl"]
