"""Energy of a network per sample: an estimate from a stated model, and the readings of a machine that offers them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from .cascade import parents
from .cost import Cost
from .errors import OptionError, one_line
from .switch import dsl_layers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILES = Path(__file__).with_name("profiles")
POWERCAP = Path("/sys/class/powercap")
PICO = 1e-12


@dataclass(frozen=True)
class Profile:
    """What a device's work costs. source: where the numbers are from, in words.

    pj_per_mac: pJ of a multiply-accumulate. pj_per_byte: pJ of a byte that goes to or from memory. static_watts: W, for
    as long as a sample takes.
    """

    name: str
    source: str
    pj_per_mac: float
    pj_per_byte: float
    static_watts: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What a sample costs on a way through the network: multiply-accumulates, and bytes to and from memory."""

    macs: float
    bytes: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Joules:
    """An estimate, by what the energy goes into."""

    macs: float
    bytes: float
    static: float

    @property
    def total(self) -> float:
        return self.macs + self.bytes + self.static

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def profiles() -> tuple[str, ...]:
    """Names of the profiles that come with dslify."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.toml")))


def profile(name: str | Path) -> Profile:
    """A profile that comes with dslify, by its name, or that of a TOML file with the fields of Profile.

    Raises OptionError for a name that is neither, and for a file with other keys or values than these.
    """
    known = profiles()
    path = PROFILES / f"{name}.toml" if str(name) in known else Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise OptionError(f"A profile is one of {', '.join(known)} or a .toml file; got {name}.")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is no TOML file: {one_line(error)}.") from error
    keys = {field.name: field.type for field in fields(Profile)}
    if set(found) != set(keys):
        off = [f"lacks {key}" for key in keys if key not in found]
        off += [f"has {key}, which nothing reads" for key in found if key not in keys]
        raise OptionError(f"The profile {path} {'; '.join(off)}: a profile has exactly {', '.join(keys)}.")
    for key, kind in keys.items():
        value = found[key]
        if kind == "str" and not (isinstance(value, str) and value.strip()):
            raise OptionError(f"{key} in the profile {path} is a text; got {value!r}.")
        if kind == "float" and not _is_amount(value):
            raise OptionError(f"{key} in the profile {path} is a number of at least 0; got {value!r}.")
    return Profile(**found)


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def work(net: nn.Module, rows: Sequence[Cost]) -> tuple[Work, Work, Work]:
    """What a sample costs in front of the path, and in all when it goes light or full in every layer that it reaches.

    rows: cost(net). Bytes: every parameter is read once, every activation written once and read once.
    """
    above = parents(dsl_layers(net))
    width = next((parameter.element_size() for parameter in net.parameters()), 4)

    def total(*parts: str) -> Work:
        reached = [
            row
            for row in rows
            if row.name.split()[0] in parts and (row.layer == 0 or "full" in parts or above[row.layer - 1] is None)
        ]
        return Work(sum(row.macs for row in reached), sum(row.params * width + 2 * row.bytes for row in reached))

    return total("base", "switch"), total("base", "switch", "light"), total("base", "switch", "full")


def mixed(light: Work, full: Work, share: float) -> Work:
    """What a sample costs on average when this share goes light."""
    return Work(
        share * light.macs + (1 - share) * full.macs,
        share * light.bytes + (1 - share) * full.bytes,
    )


def estimate(done: Work, model: Profile, seconds: float) -> Joules:
    """Energy of some work that takes so long, as the profile has it."""
    return Joules(
        done.macs * model.pj_per_mac * PICO, done.bytes * model.pj_per_byte * PICO, model.static_watts * seconds
    )


@dataclass(frozen=True)
class Rapl:
    """The energy counters of a machine's processor packages: everything that runs on them, other programs included."""

    domains: tuple[Path, ...]

    def joules(self, call: Callable[[], Any]) -> float:
        """What the packages took while the call ran. A counter may start again from 0 once in that time."""
        before = [_microjoules(domain) for domain in self.domains]
        call()
        total = 0
        for domain, start in zip(self.domains, before, strict=True):
            gone = _microjoules(domain) - start
            total += gone if gone >= 0 else gone + int((domain / "max_energy_range_uj").read_text())
        return total * 1e-6


def rapl(root: Path = POWERCAP) -> Rapl | str:
    """The counters, or in one sentence why there are none to read."""
    packages = tuple(path for path in sorted(root.glob("intel-rapl:*")) if _read(path / "name").startswith("package"))
    if not packages:
        return "no RAPL readings: this machine shows no energy counter"
    try:
        for domain in packages:
            _microjoules(domain)
    except OSError as error:
        return f"no RAPL readings: {packages[0].name}/energy_uj cannot be read ({error.strerror}); root may"
    return Rapl(packages)


def _microjoules(domain: Path) -> int:
    return int((domain / "energy_uj").read_text())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
