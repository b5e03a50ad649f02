"""What insert() was asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from .answers import ANSWERS
from .errors import OptionError
from .switch import SwitchKind

COPIES = ("narrow", "separable")  # light paths that are made from the region, and narrower
LIGHTS = (*COPIES, *ANSWERS)
INITS = ("inherited", "random")
MASKS = ("channel", "element", "activation")
MODES: dict[str, tuple[SwitchKind, str]] = {"dsl": ("difference", "narrow"), "gc": ("positive", "exit")}
RUNTIMES = ("onnxruntime", "eager")  # that a latency is measured in
WIDTH = 0.1  # of a narrow light path, if no width, cost or latency is asked for


@dataclass(frozen=True)
class Request:
    """The arguments of insert() but for the network and its inputs; paths without the scope. Raises OptionError."""

    at: str
    width: float | None = None
    scope: str | None = None
    to: str | None = None
    mask: str = "channel"
    projection: bool = True
    cost: float | None = None
    depth: float = 1.0
    seed: int = 0
    light: str | None = None
    mode: str = "dsl"
    latency: float | None = None
    runtime: str | None = None
    init: str = INITS[0]
    route_every: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("light", (None, *LIGHTS)), ("mask", MASKS), ("init", INITS)):
            if getattr(self, name) not in known:
                words = ", ".join(word for word in known if word)
                raise OptionError(f"{name} is one of {words}; got {getattr(self, name)!r}.")
        if not 0 < self.kept <= 1:
            raise OptionError(
                f"width is the share of channels that the light path keeps, above 0 and at most 1; got {self.width}."
            )
        if self.cost is not None and not 0 < self.cost < 1:
            raise OptionError(
                f"cost is the light path's share of the MACs behind the cut, between 0 and 1; got {self.cost}."
            )
        if not 0 < self.depth <= 1:
            raise OptionError(
                f"depth is the share of residual branches that the light path keeps, above 0 and at most 1; got "
                f"{self.depth}."
            )
        if self.route_every is not None and self.route_every < 1:
            raise OptionError(
                f"route_every is a number of entries of the network's input, at least 1; got {self.route_every}."
            )
        self._check_latency()
        if self.answer not in COPIES:
            self._check_no_copy()
        if self.at == "auto" and self.to:
            raise OptionError("at=auto chooses a cut for everything behind it, so it excludes `to`; give one of them.")
        if self.scope:
            for name in ("at", "to"):
                path = getattr(self, name)
                object.__setattr__(self, name, path and path.removeprefix(f"{self.scope}."))

    def _check_latency(self) -> None:
        if self.latency is None:
            if self.runtime is not None:
                raise OptionError(
                    f"runtime says where a latency is measured; got runtime {self.runtime!r} and no latency to reach."
                )
            return
        if not 0 < self.latency < 1:
            raise OptionError(
                f"latency is the light path's share of the time of what lies behind the cut, between 0 and 1; got "
                f"{self.latency}."
            )
        if self.runtime not in (None, *RUNTIMES):
            raise OptionError(f"runtime is one of {', '.join(RUNTIMES)}; got {self.runtime!r}.")
        if self.answer == "separable":
            raise OptionError(
                f"latency looks for a narrow copy; got latency {self.latency} and light 'separable': give one of them."
            )
        asked = {"width": self.width, "cost": self.cost, "depth": None if self.depth == 1 else self.depth}
        for name, given in asked.items():
            if given is not None:
                raise OptionError(
                    f"latency looks for width and depth itself; got latency {self.latency} and {name} {given}: give "
                    "one of them."
                )

    def _check_no_copy(self) -> None:
        asked = {
            "width": self.width is not None, "cost": self.cost is not None, "depth": self.depth < 1,
            "latency": self.latency is not None, "init": self.init != INITS[0],
        }  # fmt: skip
        for name in (name for name, given in asked.items() if given):
            says = "how a copy begins" if name == "init" else "how narrow a copy is"
            raise OptionError(
                f"{name} says {says}, and light {self.answer!r} is no copy; leave out {name}, or ask for light "
                "'narrow'."
            )
        if self.answer == "identity" and self.to is None:
            raise OptionError(
                "light 'identity' leaves out the modules from the cut to another one; name the last of them with `to`."
            )

    @property
    def answer(self) -> str:
        """The kind of light path."""
        return self.light or MODES[self.mode][1]

    @property
    def kind(self) -> SwitchKind:
        """Of the switch."""
        return MODES[self.mode][0]

    @property
    def kept(self) -> float:
        """The width, as a number."""
        return WIDTH if self.width is None else self.width
