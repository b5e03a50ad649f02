"""insert(latency=...): the search by a clock that is made up, and what it finds by the real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import dslify
from dslify import fit_latency as room
from dslify.cli import app
from dslify.clock import Timed, interleaved
from dslify.errors import ExportError, OptionError
from dslify.fit_latency import candidates, search
from dslify.plan import Candidate, LatencyFit, Plan
from dslify.switch import dsl_layers
from tests.zoo import ZOO

MARGIN = 1.5  # on a target, when the same light path is timed again on a machine that others use
LEAST = 0.3  # what the clock that is made up finds for a light path without MACs


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv1d(channels, channels, 3, 1, 1), nn.ReLU(), nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 16, 3, 1, 1), nn.Conv1d(16, 64, 3, 1, 1), Residual(64), Residual(64), nn.Conv1d(64, 4, 1)]
    return nn.Sequential(*layers).eval()


EXAMPLE = (torch.randn(1, 2, 64),)


def by_macs(candidate: Candidate, seconds: float = 1.0) -> float:
    """A clock for which an operator costs something and its MACs the rest."""
    return LEAST * candidate.depth + (1 - LEAST) * candidate.macs


def region() -> torch.fx.GraphModule:
    (layer,) = dsl_layers(dslify.insert(network(), "0", 1.0, EXAMPLE))
    assert isinstance(layer.full, torch.fx.GraphModule)
    return layer.full


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[float]]:
    """Light takes this share of full, whatever it is; the seconds asked for."""
    asked: list[float] = []

    def always(share: float) -> list[float]:
        def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timed]:
            asked.append(seconds)
            for call in calls.values():
                call()
            return {"full": Timed(1.0, 1.0, 1), "light": Timed(share, share, 1)}

        monkeypatch.setattr(room, "interleaved", interleaved)
        return asked

    return always


ladder = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=25, unique=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(ladder, min_size=1, max_size=3), st.floats(0.01, 0.99))
def test_the_search_finds_the_most_macs_within_the_target_in_few_measurements(
    ladders: list[list[float]], target: float
):
    depths = (0.01, 0.5, 1.0)
    tall = [
        [Candidate(macs, depth, macs) for macs in sorted(column)]
        for depth, column in zip(depths, ladders, strict=False)
    ]
    fitting = [each for column in tall for each in column if by_macs(each) <= target]
    if not fitting:
        with pytest.raises(OptionError, match="cannot be reached in eager: the fastest light path found"):
            search(tall, target, "eager", by_macs)
        return
    found = search(tall, target, "eager", by_macs)
    assert found.chosen.macs == max(each.macs for each in fitting)
    assert found.chosen.share == by_macs(found.chosen) <= target
    assert found.chosen in found.candidates
    assert len(found.candidates) <= sum(1 + len(column).bit_length() for column in tall)


def test_what_is_taken_keeps_within_the_target_twice():
    column = [Candidate(width, 1.0, width) for width in (0.1, 0.2, 0.3, 0.4)]
    asked: list[tuple[float, float]] = []

    def lucky_once(candidate: Candidate, seconds: float) -> float:
        asked.append((candidate.macs, seconds))
        return 0.2 if seconds > room.SECONDS and candidate.macs > 0.25 else candidate.macs / 4

    found = search([column], 0.1, "eager", lucky_once)
    assert found.chosen.macs == 0.1
    assert [entry for entry in asked if entry[1] > room.SECONDS] == [(m, 4 * room.SECONDS) for m in (0.4, 0.3, 0.1)]
    assert {each.macs: each.share for each in found.candidates} == {0.1: 0.025, 0.3: 0.2, 0.4: 0.2}


def test_nothing_fast_enough_names_the_least_share_there_is():
    columns = [[Candidate(0.1, 0.5, 0.05), Candidate(0.2, 0.5, 0.1)], [Candidate(0.1, 1.0, 0.08)]]
    with pytest.raises(OptionError) as caught:
        search(columns, 0.15, "onnxruntime", by_macs)
    assert str(caught.value) == (
        "latency 0.15 cannot be reached in onnxruntime: the fastest light path found (width 0.1, depth 0.5) takes "
        "0.185 of the full region's time; ask for more than that, cut earlier, or take light 'exit' or 'head'."
    )


def test_candidates_rise_in_macs_and_differ_in_their_branches():
    columns = candidates(region())
    assert [{each.depth for each in column} for column in columns] == [{0.01}, {0.5}, {1.0}]
    for column in columns:
        macs = [each.macs for each in column]
        assert macs == sorted(set(macs))
    assert columns[2][-1] == Candidate(1.0, 1.0, 1.0)
    assert columns[0][-1].macs < columns[1][-1].macs < 1
    (layer,) = dsl_layers(dslify.insert(ZOO["shuffle"].build(), "stem", 1.0, (ZOO["shuffle"].batch(1),)))
    (only,) = candidates(layer.full)
    assert {each.depth for each in only} == {1.0}, "a region without residual branches has one depth"


def test_the_light_path_is_the_one_that_was_chosen_and_the_file_knows_how(
    fake_clock: Callable[[float], list[float]], tmp_path: Path
):
    asked = fake_clock(0.25)
    net = dslify.insert(network(), "0", example_inputs=EXAMPLE, latency=0.3, runtime="eager")
    (layer,) = dsl_layers(net)
    fit = layer.plan.latency
    assert isinstance(fit, LatencyFit)
    assert (fit.target, fit.runtime, fit.chosen.share) == (0.3, "eager", 0.25)
    assert (fit.chosen.width, fit.chosen.depth, fit.chosen.macs) == (1.0, 1.0, 1.0), "all are fast: full is the largest"
    assert (layer.plan.width, layer.plan.depth) == (1.0, 1.0)
    assert asked[-1] == room.CONFIRMED * room.SECONDS
    again = dslify.load(dslify.save(net, tmp_path / "net.dsl"))
    assert dsl_layers(again)[0].plan.latency == fit
    data = json.loads(json.dumps(layer.plan.to_json()))
    assert Plan.from_json(data) == layer.plan
    del data["latency"]
    assert Plan.from_json(data).latency is None, "files of before"


@pytest.mark.parametrize("runtime", ["onnxruntime", "eager"])
def test_a_measured_light_path_keeps_within_a_loose_target(runtime: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "WIDTHS", (0.25,))
    monkeypatch.setattr(room, "DEPTHS", (0.01,))
    monkeypatch.setattr(room, "SECONDS", 0.05)
    long = (torch.randn(1, 2, 4096),)
    net = dslify.insert(network(), "0", example_inputs=long, latency=0.7, runtime=runtime)
    (layer,) = dsl_layers(net)
    assert layer.plan.latency.chosen.width == 0.25
    assert layer.plan.dropped, "both residual branches are left out"
    masked = torch.randn(1, 16, 4096)
    calls = {name: room._CALLS[runtime](getattr(layer, name), (masked,), name) for name in ("full", "light")}
    times = interleaved(calls, 0.3)
    assert times["light"].p50 / times["full"].p50 <= 0.7 * MARGIN


def test_the_codecs_encoder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "WIDTHS", (0.1, 0.3))
    monkeypatch.setattr(room, "DEPTHS", (0.01, 1.0))
    monkeypatch.setattr(room, "SECONDS", 0.1)
    codec = ZOO["codec"]
    net = dslify.insert(
        codec.build(), codec.at, scope="encoder", example_inputs=(codec.batch(1),), latency=0.5,
        runtime="eager",
    )  # fmt: skip
    (layer,) = dsl_layers(net)
    fit = layer.plan.latency
    assert fit.chosen.share <= 0.5
    assert (fit.chosen.width, fit.chosen.depth) == (layer.plan.width, layer.plan.depth)
    assert fit.chosen.macs == pytest.approx(layer.plan.macs["light"] / layer.plan.macs["full"])
    masked = torch.randn(1, 32, 200)
    calls = {name: room._eager(getattr(layer, name), (masked,), name) for name in ("full", "light")}
    times = interleaved(calls, 0.5)
    assert times["light"].p50 / times["full"].p50 <= 0.5 * MARGIN


def test_numbers_that_cross_the_cut_are_those_of_the_example():
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Linear(8, 8), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            return self.last(stem.reshape(x.shape[0] * 2, -1)).reshape(x.shape[0], -1)

    net = dslify.insert(Repeated().eval(), "stem", 0.5, (torch.randn(3, 8),))
    (layer,) = dsl_layers(net)
    entered: list[tuple[object, ...]] = []
    layer.full.register_forward_pre_hook(lambda _, values: entered.append(values))
    with torch.no_grad():
        net(torch.randn(3, 8))
    ((masked, *numbers),) = entered
    assert numbers
    assert all(isinstance(number, int) for number in numbers), "the batch size crosses this cut"
    values = (masked, *numbers)
    assert isinstance(layer.full, torch.fx.GraphModule)
    (answer,) = room._onnxruntime(layer.full, values, "full")()
    assert torch.allclose(torch.from_numpy(answer), layer.full(*values)[0], atol=1e-5)


REFUSED = {
    "latency is the light path's share of the time of what lies behind the cut, between 0 and 1; got 1.5": {
        "latency": 1.5
    },
    "got latency 0.2 and width 0.1: give one of them": {"latency": 0.2, "width": 0.1},
    "got latency 0.2 and cost 0.1: give one of them": {"latency": 0.2, "cost": 0.1},
    "got latency 0.2 and depth 0.5: give one of them": {"latency": 0.2, "depth": 0.5},
    "runtime is one of onnxruntime, eager; got 'tpu'": {"latency": 0.2, "runtime": "tpu"},
    "got runtime 'eager' and no latency to reach": {"runtime": "eager"},
    "latency says how narrow a copy is, and light 'head' is no copy": {"latency": 0.2, "light": "head"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_options_that_do_not_go_together_are_one_sentence(sentence: str):
    with pytest.raises(OptionError) as caught:
        dslify.insert(network(), "0", example_inputs=EXAMPLE, **REFUSED[sentence])
    assert sentence in str(caught.value)


def test_without_onnxruntime_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ExportError, match=r"^latency in onnxruntime needs onnxruntime; install it with pip install"):
        dslify.insert(network(), "0", example_inputs=EXAMPLE, latency=0.3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save(network(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def insert_by_command(model: Path, *words: str) -> tuple[int, str, str]:
    argv = ["insert", str(model), "--at", "0", "--input", "1x2x64", "--trust", "tests.test_fit_latency", *words]
    result = CliRunner().invoke(app, argv, prog_name="dslify")
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_candidates_and_inspect_shows_them_again(
    model: Path, fake_clock: Callable[[float], list[float]]
):
    fake_clock(0.25)
    code, printed, said = insert_by_command(model, "--latency", "0.3", "--runtime", "eager")
    assert code == 0, said
    sentence = "width 1.00, depth 1.00: 25.0 % of the full region's latency, asked for 30 % (eager, one thread)"
    assert sentence in " ".join(printed.split())  # long lines are wrapped
    assert printed.count("25.0 %") == len(layer_of(model).plan.latency.candidates) + 1
    assert printed.count("taken") == 1
    shown = CliRunner().invoke(app, ["inspect", str(model.with_suffix(".dsl"))], prog_name="dslify")
    assert sentence in " ".join(shown.stdout.split())
    document = CliRunner().invoke(app, ["inspect", str(model.with_suffix(".dsl")), "--json"], prog_name="dslify")
    assert json.loads(document.stdout)["plan"]["latency"]["chosen"]["share"] == 0.25


def layer_of(model: Path) -> dslify.DSLayer:
    return dsl_layers(dslify.load(model.with_suffix(".dsl")))[0]


BAD_WORDS: dict[str, Sequence[str]] = {
    "latency must be above 0 and below 1; got 1.5.": ("--latency", "1.5"),
    "latency must be above 0 and below 1; got 'fast'.": ("--latency", "fast"),
    "got latency 0.2 and width 0.1: give one of them.": ("--latency", "0.2", "--width", "0.1"),
    "got runtime 'eager' and no latency to reach.": ("--runtime", "eager"),
    "takes 0.900 of the full region's time; ask for more than that": ("--latency", "0.2", "--runtime", "eager"),
}


@pytest.mark.parametrize("sentence", BAD_WORDS)
def test_bad_words_are_one_sentence_and_nothing_is_written(
    sentence: str, model: Path, fake_clock: Callable[[float], list[float]]
):
    fake_clock(0.9)
    code, printed, said = insert_by_command(model, *BAD_WORDS[sentence])
    assert code == 2
    assert sentence in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not printed
    assert [path.name for path in model.parent.iterdir()] == ["model.pt"]
