"""The estimate of energy: profiles, the work it is made of, arithmetic by hand; and a machine's own counters."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import dslify
from dslify.energy import Joules, Profile, Rapl, Work, estimate, mixed, profile, profiles, rapl, work
from dslify.errors import OptionError

WORDS = 'name = "mine"\nsource = "measured"\npj_per_mac = 2\npj_per_byte = 3.5\nstatic_watts = 0.5\n'


@pytest.fixture(scope="module")
def twice() -> nn.Module:
    """A layer inside the full path of another one."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)))
    once = dslify.insert(stack, at="0", width=0.25, example_inputs=(torch.randn(1, 16),))
    return dslify.insert(once, at="1", width=0.25, example_inputs=(torch.randn(1, 16),))


def test_profiles_that_come_along_say_where_they_are_from():
    assert profiles() == ("45nm-dram", "45nm-sram")
    for name in profiles():
        found = profile(name)
        assert found.name == name
        assert "ISSCC 2014" in found.source
        assert found.pj_per_mac == pytest.approx(0.9 + 3.7)
    assert profile("45nm-dram").pj_per_byte == pytest.approx(1300 / 8, rel=0.02)
    assert profile("45nm-sram").pj_per_byte == pytest.approx(100 / 8)


def test_profile_of_a_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(WORDS)
    assert profile(path) == Profile("mine", "measured", 2, 3.5, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS + "volts = 1\n", "has volts, which nothing reads: a profile has exactly name, source, pj_per_mac"),
        (WORDS.replace("static_watts = 0.5\n", ""), "lacks static_watts"),
        (WORDS.replace("2", "-2"), "pj_per_mac in the profile .* is a number of at least 0; got -2"),
        (WORDS.replace("3.5", "nan"), "pj_per_byte in the profile .* is a number of at least 0; got nan"),
        (WORDS.replace("3.5", "true"), "pj_per_byte in the profile .* got True"),
        (WORDS.replace('"measured"', '" "'), "source in the profile .* is a text"),
        ("name = ", "is no TOML file"),
    ],
)
def test_a_profile_that_is_none_is_refused_in_a_sentence(tmp_path: Path, words: str, message: str):
    path = tmp_path / "mine.toml"
    path.write_text(words)
    with pytest.raises(OptionError, match=message):
        profile(path)


@pytest.mark.parametrize("name", ["7nm", "no/such/file.toml", "pyproject.yaml"])
def test_an_unknown_profile_is_named_beside_the_known_ones(name: str):
    with pytest.raises(OptionError, match=f"one of 45nm-dram, 45nm-sram or a .toml file; got {name}"):
        profile(name)


def test_the_estimate_is_macs_bytes_and_static_power_over_time():
    found = estimate(Work(1e6, 2e6), Profile("p", "s", 4.6, 160, 0.25), seconds=0.01)
    assert found == Joules(pytest.approx(4.6e-6), pytest.approx(320e-6), pytest.approx(2.5e-3))
    assert found.total == pytest.approx(4.6e-6 + 320e-6 + 2.5e-3)
    assert found.to_json()["total"] == found.total


def test_the_mixture_lies_between_the_routes_by_its_share():
    light, full = Work(10, 100), Work(50, 700)
    assert mixed(light, full, 0.75) == Work(20, 250)
    assert mixed(light, full, 0) == full
    assert mixed(light, full, 1) == light


def test_work_is_base_and_switch_and_the_path_taken():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 4))
    net = dslify.insert(net, at="0", width=0.25, projection=False, example_inputs=(torch.randn(1, 8),))
    rows = {row.name: row for row in dslify.cost(net)}
    front, light, full = work(net, dslify.cost(net))
    assert front.macs == rows["base"].macs + rows["switch"].macs
    assert light.macs - front.macs == rows["light"].macs
    assert full.macs - front.macs == rows["full"].macs == 8 * 32 + 32 * 4
    parameters, activations = 8 * 32 + 32 + 32 * 4 + 4, 32 + 4
    assert full.bytes - front.bytes == 4 * parameters + 2 * 4 * activations


def test_work_of_a_nest_reaches_the_inner_layer_on_the_full_route_only(twice: nn.Module):
    rows = dslify.cost(twice)
    front, light, full = work(twice, rows)
    named = {row.name: row.macs for row in rows}
    outer = named["base"] + named["switch"]
    assert front.macs == outer
    assert light.macs == outer + named["light"]
    assert full.macs == outer + named["full"] + named["switch 2"] + named["full 2"]


class Counters:
    """A folder like the one where Linux shows the counters: two packages, a part of one, and the whole platform."""

    def __init__(self, root: Path):
        self.root = root
        for name, words in {
            "intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core",
            "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
        }.items():  # fmt: skip
            folder = root / name
            folder.mkdir()
            (folder / "name").write_text(f"{words}\n")
            (folder / "max_energy_range_uj").write_text("1000000\n")
            self.set(name, 990_000)

    def set(self, name: str, microjoules: int) -> None:
        (self.root / name / "energy_uj").write_text(f"{microjoules}\n")


def test_counters_of_the_packages_are_summed_and_may_begin_again(tmp_path: Path):
    shown = Counters(tmp_path)
    found = rapl(tmp_path)
    assert isinstance(found, Rapl)
    assert [domain.name for domain in found.domains] == ["intel-rapl:0", "intel-rapl:1"]

    def call() -> None:
        shown.set("intel-rapl:0", 995_000)  # 5 mJ
        shown.set("intel-rapl:1", 20_000)  # past its range: 30 mJ
        shown.set("intel-rapl:0:0", 999_000)

    assert found.joules(call) == pytest.approx(0.035)


def test_a_machine_without_counters_says_so(tmp_path: Path):
    assert rapl(tmp_path) == "no RAPL readings: this machine shows no energy counter"
    assert rapl(tmp_path / "missing") == "no RAPL readings: this machine shows no energy counter"


def test_counters_that_may_not_be_read_are_told_in_a_sentence(tmp_path: Path):
    shown = Counters(tmp_path)
    (shown.root / "intel-rapl:0" / "energy_uj").unlink()
    os.symlink("energy_uj", shown.root / "intel-rapl:0" / "energy_uj")  # cannot be opened, for root neither
    assert "intel-rapl:0/energy_uj cannot be read" in str(rapl(tmp_path))
