"""What a recipe set out to show: one claim, with what came out and whether it holds."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Figure = Mapping[str, Any]  # {"value": float or None, "interval": (low, high) or None}
_SIGNS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Line:
    """One claim. sign, bound: what the value has to be. words: what else there is to say; "" for nothing.

    judged: False where the claim means nothing here, which is never a pass. by_interval: it is enough that the interval
    reaches the bound, for a claim that there is no excess.
    """

    what: str
    figure: Figure
    sign: Literal[">=", "<="]
    bound: float
    words: str = ""
    judged: bool = True
    by_interval: bool = False

    @property
    def holds(self) -> bool | None:
        """None where it cannot be said: without a value, or where it is not judged."""
        value, interval = self.figure["value"], self.figure.get("interval")
        if not self.judged or value is None:
            return None
        if self.by_interval and interval:
            value = interval[0 if self.sign == "<=" else 1]
        return bool(_SIGNS[self.sign](value, self.bound))

    def to_json(self) -> dict[str, Any]:
        """{"what", "value", "interval", "sign", "bound", "words", "by_interval", "holds"}"""
        fields = asdict(self)
        figure = fields.pop("figure")
        del fields["judged"]
        return {**fields, "value": figure["value"], "interval": figure.get("interval"), "holds": self.holds}
