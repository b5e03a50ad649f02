"""What a run gives, and what a stream of runs comes to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

Taken = Literal["light", "full", "mixed"]


@dataclass(frozen=True, eq=False)
class Result:
    """The answer to one call.

    outputs: arrays, flat. route: "mixed" where the samples of a batch went both ways; None where the model does not
    tell, as do score and light_taken, (batch,). bytes_sent: of the message to the full part, 0 on the light route.
    bytes_dense, bytes_int8: of the same values as plain arrays of fp32 or of int8, whichever route was taken.
    """

    outputs: tuple[np.ndarray, ...]
    route: Taken | None
    score: np.ndarray | None = None
    light_taken: np.ndarray | None = None
    bytes_sent: int = 0
    bytes_dense: int = 0
    bytes_int8: int = 0


@dataclass(frozen=True)
class Statistics:
    """Of the calls of a stream.

    light: calls that went light. wakes: how often the big processor was woken. bytes_sent: of all messages.
    bytes_dense, bytes_int8: of what those messages hold, as plain arrays of fp32 or of int8. bytes_always: as fp32 for
    every call, which a split without a switch sends.
    """

    calls: int = 0
    light: int = 0
    wakes: int = 0
    bytes_sent: int = 0
    bytes_dense: int = 0
    bytes_int8: int = 0
    bytes_always: int = 0
    awake: bool = False

    @property
    def light_share(self) -> float:
        """Of the calls; 0 without any."""
        return self.light / self.calls if self.calls else 0.0

    def after(self, result: Result, always: int | None = None) -> Statistics:
        """With one call more. always: what it adds to bytes_always, where that is not the result's bytes_dense."""
        light = result.route == "light"
        return replace(
            self,
            calls=self.calls + 1,
            light=self.light + light,
            wakes=self.wakes + (not light and not self.awake),
            bytes_sent=self.bytes_sent + result.bytes_sent,
            bytes_dense=self.bytes_dense + (0 if light else result.bytes_dense),
            bytes_int8=self.bytes_int8 + (0 if light else result.bytes_int8),
            bytes_always=self.bytes_always + (result.bytes_dense if always is None else always),
            awake=not light,
        )

    def to_json(self) -> dict[str, Any]:
        return {"light_share": self.light_share, **asdict(self)}
