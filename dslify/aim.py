"""What a threshold is asked to keep to: a share, or a bound on what the light path costs, with or without a promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .errors import OptionError
from .guarantee import certified, conformal_risk_control, needed, profile
from .thresholds import largest_count, levels, nearest_count, risk_by_count
from .tradeoff import BOUND, CONFIDENCE

Guarantee = Literal["mean", "routed"]
GUARANTEES: tuple[Guarantee, ...] = ("mean", "routed")


def only_target(
    light_share: float | None = None,
    max_difference: float | None = None,
    max_metric: float | None = None,
    max_lost: float | None = None,
) -> str:
    """The name of the one that is given. Raises OptionError for none or several."""
    targets = {
        "light_share": light_share,
        "max_difference": max_difference,
        "max_metric": max_metric,
        "max_lost": max_lost,
    }
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        got = f"both {' and '.join(given)}" if given else "neither"
        raise OptionError(f"Calibration takes exactly one of {', '.join(targets)}; got {got}.")
    return given[0]


@dataclass(frozen=True)
class Aim:
    """One layer's. light_share: of the samples; or else epsilon: the bound on the mean loss. judged: the loss is a
    metric's excess and not the difference. guarantee: "mean", "routed" with confidence 1 - delta, or None for a point
    estimate. bound: where losses are cut off; None where they are not.
    """

    light_share: float | None
    epsilon: float | None
    judged: bool
    guarantee: Guarantee | None
    delta: float | None
    bound: float | None

    @classmethod
    def of(
        cls,
        light_share: float | None,
        max_difference: float | None,
        max_metric: float | None,
        guarantee: Guarantee | None,
        confidence: float | None,
        bound: float | None,
        metric: bool,
    ) -> Aim:
        """From the arguments of calibrate(). Raises OptionError for what does not go together or is out of range."""
        only_target(light_share=light_share, max_difference=max_difference, max_metric=max_metric)
        if light_share is not None and not 0 <= light_share <= 1:
            raise OptionError(f"light_share is the part of the samples that goes light, 0 to 1; got {light_share:g}.")
        if max_difference is not None and not 0 < max_difference < math.inf:
            raise OptionError(
                f"max_difference is a mean relative difference above 0, such as 0.05; got {max_difference:g}."
            )
        if max_metric is not None and not 0 < max_metric < math.inf:
            raise OptionError(f"max_metric is a mean excess of the metric above 0; got {max_metric:g}.")
        if metric != (max_metric is not None):
            raise OptionError("metric and max_metric go together: the error to measure, and how much more it may be.")
        if confidence is not None and not 0 < confidence < 1:
            raise OptionError(f"confidence lies between 0 and 1, such as 0.95; got {confidence:g}.")
        if guarantee is None and confidence is not None:
            guarantee = "routed"
        if guarantee not in (None, *GUARANTEES):
            raise OptionError(f"guarantee is one of {', '.join(GUARANTEES)}; got {guarantee!r}.")
        if guarantee == "mean" and confidence is not None:
            raise OptionError(
                "guarantee 'mean' holds on average over calibrations and takes no confidence; leave one of them out."
            )
        epsilon = max_difference if max_metric is None else max_metric
        if guarantee and epsilon is None:
            raise OptionError("A guarantee is about a bound: give max_difference or max_metric, and no light_share.")
        if bound is not None and not 0 < bound < math.inf:
            raise OptionError(f"bound is where a loss is cut off, above 0; got {bound:g}.")
        if bound is not None and not guarantee and not metric:
            raise OptionError("bound cuts off losses under a guarantee or of a metric; leave it out here.")
        cut = (BOUND if bound is None else bound) if guarantee or metric else None
        if guarantee and epsilon is not None and cut is not None and epsilon >= cut:
            raise OptionError(
                f"A guarantee of {epsilon:g} says nothing where losses are cut off at {cut:g}: bound has to be larger."
            )
        delta = 1 - (CONFIDENCE if confidence is None else confidence) if guarantee == "routed" else None
        return cls(light_share, epsilon, metric, guarantee, delta, cut)

    def split(self, layers: int) -> Aim:
        """What each of several layers has to keep to, so that together they keep to this."""
        epsilon = None if self.epsilon is None else self.epsilon / layers
        return replace(self, epsilon=epsilon, delta=None if self.delta is None else self.delta / layers)

    @property
    def needs(self) -> int:
        """Units without which nothing can be promised; 0 without a guarantee."""
        if self.guarantee is None or self.epsilon is None or self.bound is None:
            return 0
        return needed(self.epsilon, self.bound, self.delta)

    def cut_off(self, loss: np.ndarray) -> np.ndarray:
        return loss if self.bound is None else np.minimum(loss, self.bound)

    def count(self, score: np.ndarray, loss: np.ndarray, units: np.ndarray) -> int:
        """How many of the samples, those of lowest score, go light; loss: cut off, (n,). units: their sources, (n,)."""
        _, counts = levels(score)
        if self.light_share is not None:
            return nearest_count(counts, self.light_share * len(score))
        epsilon, bound = self.epsilon or 0.0, self.bound or 0.0
        if self.guarantee == "mean":
            return conformal_risk_control(loss, score, epsilon, bound, units)
        if self.guarantee == "routed":
            return certified(loss, score, epsilon, self.delta or 0.0, bound, units)
        return largest_count(counts, risk_by_count(score, loss), epsilon)

    def risk(self, score: np.ndarray, loss: np.ndarray, units: np.ndarray, k: int) -> float:
        """What epsilon bounds, on these samples with k of them light: a mean over samples, or over sources."""
        if self.guarantee is None:
            return float(risk_by_count(score, loss)[k])
        found = profile(loss, score, units)
        at = int(np.searchsorted(found.light, k))
        return float((found.mean if self.guarantee == "mean" else found.routed)[at])

    @property
    def of_what(self) -> str:
        return "excess of the metric" if self.judged else "difference"

    def how(self, k: int, n: int, units: int, risk: float, what: str = "samples") -> str:
        """How the threshold was found, with k of n samples from so many sources light. what: samples or segments."""
        data = f"{n} {what} from {units} sources"
        if self.light_share is not None:
            return (
                f"share: {k} of {data} score under it ({100 * k / n:.1f} %, asked for {100 * self.light_share:.1f} %)"
            )
        if self.guarantee is None:
            return (
                f"bounded mean {self.of_what}: the largest at which the mean over all {data} "
                f"({risk:.4g}) stays within {self.epsilon:g}, a point estimate without a guarantee for other data"
            )
        if self.guarantee == "mean":
            within = ((units + 1) * (self.epsilon or 0.0) - (self.bound or 0.0)) / units
            return (
                f"conformal risk control: the largest at which the mean {self.of_what} over all {data} "
                f"({risk:.4g}, every source counted once) stays within {within:.4g}"
            )
        return (
            f"learn-then-test: the last that was certified, from safe to risky, on {data}; "
            f"the mean {self.of_what} of what goes light is {risk:.4g}, every source counted once"
        )

    def promise(self, units: int, recordings: bool, what: str = "samples") -> str | None:
        """What holds for new data, or None. recordings: a source has several samples. what: as in `how`."""
        if self.guarantee is None:
            return None
        like = f"like these {units}, {'every one counted once, ' if recordings else ''}"
        cut = f" (above {self.bound:g} it counts as {self.bound:g})"
        new = f"for new {'recordings' if recordings else 'samples'} {like}"
        if self.guarantee == "mean":
            return f"{new}the mean {self.of_what} over all {what} is at most {self.epsilon:g} on average{cut}"
        sure = f"with {100 * (1 - (self.delta or 0.0)):.4g} % confidence, {new}"
        return f"{sure}the mean {self.of_what} among what goes light is at most {self.epsilon:g}{cut}"
