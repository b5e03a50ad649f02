"""What dslify.measure finds: times of one run by runtime, work, and energy as estimated and as read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .clock import Streamed
from .energy import Joules, Profile, Work, mixed


@dataclass(frozen=True)
class Latency:
    """One runtime's times of a sample, in seconds, all from one run.

    front (base, mask and switch), light, full: the parts alone. whole_light, whole_full: the network with everything on
    one route. mixed: the network in a stream of which `share` goes light. note: on the runtime.
    """

    runtime: str
    share: float
    note: str
    front: Streamed
    light: Streamed
    full: Streamed
    whole_light: Streamed
    whole_full: Streamed
    mixed: Streamed

    @property
    def ratio(self) -> float:
        """How many times faster the light path is than the full one, by their medians."""
        return self.full.p50 / self.light.p50

    @property
    def computed(self) -> float:
        """Mean seconds a sample of the stream, as the two routes promise it."""
        return self.share * self.whole_light.mean + (1 - self.share) * self.whole_full.mean

    @property
    def saved(self) -> float:
        """Share of the time of always full that the stream saves, as measured; negative if it takes longer."""
        return 1 - self.mixed.mean / self.whole_full.mean

    @property
    def saved_computed(self) -> float:
        """The same as the two routes promise it."""
        return 1 - self.computed / self.whole_full.mean

    @property
    def off(self) -> float:
        """By how much the stream takes longer than computed, as a share of that."""
        return self.mixed.mean / self.computed - 1

    def to_json(self) -> dict[str, Any]:
        names = ("ratio", "computed", "saved", "saved_computed", "off")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Energy:
    """An estimate of J per sample, and what it is made from. runtime: over whose times the static power was taken."""

    profile: Profile
    runtime: str
    light: Joules
    full: Joules
    mixed: Joules

    def to_json(self) -> dict[str, Any]:
        routes = {name: getattr(self, name).to_json() for name in ("light", "full", "mixed")}
        return {"estimate": True, "profile": self.profile.to_json(), "runtime": self.runtime, **routes}


@dataclass(frozen=True)
class Measurement:
    """What dslify.measure found, of samples taken one at a time.

    samples: in a stream. share: of them that went light. routed: how it was decided which. front, light, full: what a
    sample costs in front of the path, and in all on each route. between: bytes of what crosses the cut for one sample,
    dense; entering: of the network's inputs. counted: J per sample by runtime and route, read off the machine's
    counters, or None; why is then among the notes.
    """

    latencies: tuple[Latency, ...]
    threads: int
    share: float
    samples: int
    routed: str
    front: Work
    light: Work
    full: Work
    between: int
    entering: int
    energy: Energy
    counted: dict[str, dict[str, float]] | None
    notes: tuple[str, ...]

    @property
    def macs_ratio(self) -> float | None:
        """How many times fewer MACs the light path has than the full one; None if it has none."""
        light, full = (route.macs - self.front.macs for route in (self.light, self.full))
        return full / light if light else None

    @property
    def mixed(self) -> Work:
        """What a sample of the stream costs on average."""
        return mixed(self.light, self.full, self.share)

    @property
    def macs_saved(self) -> float | None:
        """Share of the MACs of always full that the stream saves; None for a network without any."""
        return 1 - self.mixed.macs / self.full.macs if self.full.macs else None

    def to_json(self) -> dict[str, Any]:
        names = ("threads", "share", "samples", "routed", "between", "entering", "macs_ratio", "macs_saved", "counted")
        return {
            "batch": 1,
            **{name: getattr(self, name) for name in names},
            "work": {name: getattr(self, name).to_json() for name in ("front", "light", "full", "mixed")},
            "latencies": [each.to_json() for each in self.latencies],
            "energy": self.energy.to_json(),
            "notes": list(self.notes),
        }
