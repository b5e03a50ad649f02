"""Promises that hold: what is certified keeps its bound on new data, and leaves little of what an oracle would take."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dslify import guarantee as g

DRAWS, N = 300, 1000
EPS, DELTA = 0.1, 0.1
ROUNDING = 1e-12  # of a mean of losses
STANDARD_ERRORS = 2.0  # of a mean over draws, that it may lie above what is promised for it
LEAST_SHARE = 0.8  # of the oracle threshold's

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def differences(random: np.random.Generator, n: int, middle: float) -> np.ndarray:
    """Spread as a codec's are: log-normal, a few above 1."""
    return np.minimum(random.lognormal(math.log(middle), 1.0, n), 1.0)


def calibrated(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    loss = differences(random, n, 0.08)
    return loss * np.exp(random.normal(0, 0.3, n)), loss


def noisy(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    loss = differences(random, n, 0.08)
    return loss * np.exp(random.normal(0, 1.0, n)), loss


def uninformative(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """All may go light, though the score says nothing."""
    return random.random(n), differences(random, n, 0.035)


def hopeless(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The score says nothing, and what goes light always costs more than is allowed."""
    return random.random(n), differences(random, n, 0.075)


class Population:
    """Scores and losses of everything there is, and what each threshold truly costs; calibration sets are drawn of it.

    units: the samples of one unit are drawn together; without them each sample is its own.
    """

    def __init__(self, scores: np.ndarray, losses: np.ndarray, units: np.ndarray | None = None):
        self.scores, self.losses = scores, losses
        self.whole = g.profile(losses, scores, units)
        self.ordered = np.sort(scores)
        self.members: list[np.ndarray] | None = None
        if units is not None:
            self.members = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])

    @classmethod
    def of(cls, draw: Draw) -> Population:
        return cls(*draw(np.random.default_rng(99), 60_000))

    def sample(self, random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, losses and units of n units, with replacement."""
        if self.members is None:
            at = random.integers(len(self.scores), size=n)
            return self.scores[at], self.losses[at], np.arange(n)
        chosen = [self.members[at] for at in random.integers(len(self.members), size=n)]
        at = np.concatenate(chosen)
        return self.scores[at], self.losses[at], np.repeat(np.arange(n), [len(part) for part in chosen])

    def at(self, threshold: float) -> int:
        return int(np.searchsorted(self.whole.light, np.searchsorted(self.ordered, threshold)))

    def oracle(self, risk: np.ndarray) -> float:
        """The largest share whose true risk stays within EPS."""
        return float(self.whole.light[np.flatnonzero(risk <= EPS)[-1]]) / len(self.scores)


def threshold(scores: np.ndarray, k: int) -> float:
    ordered = np.sort(scores)
    return -math.inf if k == 0 else math.inf if k == len(ordered) else float(ordered[k - 1] + ordered[k]) / 2


def controlled(losses: np.ndarray, scores: np.ndarray, units: np.ndarray) -> int:
    return g.conformal_risk_control(losses, scores, EPS, 1.0, units)


def learned(losses: np.ndarray, scores: np.ndarray, units: np.ndarray) -> int:
    return g.certified(losses, scores, EPS, DELTA, 1.0, units)


def outcomes(population: Population, rule: Callable[..., int]) -> np.ndarray:
    """Position in the population's profile of the threshold that each draw of N units gives, (draws,)."""
    random = np.random.default_rng(7)
    found = []
    for _ in range(DRAWS):
        scores, losses, units = population.sample(random, N)
        found.append(population.at(threshold(scores, rule(losses, scores, units))))
    return np.array(found)


def broken_at_most(count: int, draws: int, delta: float) -> bool:
    """Whether so many failures are no proof of a rate above delta: the binomial tail is over 1 %."""
    tail = sum(math.comb(draws, k) * delta**k * (1 - delta) ** (draws - k) for k in range(count, draws + 1))
    return tail > 0.01


def real(units: bool) -> Population:
    """What the switch of a fine-tuned codec says of real speech and sound (tests/make_scores.py)."""
    table = np.load(Path(__file__).parent / "scores.npz")
    scale = 0.11 / table["difference"].mean()  # so that EPS lies where routing has something to decide
    losses = np.minimum(table["difference"].astype(float) * scale, 1.0)
    return Population(table["score"].astype(float), losses, table["source"] if units else None)


POPULATIONS: dict[str, Callable[[], Population]] = {
    "calibrated": lambda: Population.of(calibrated),
    "noisy": lambda: Population.of(noisy),
    "uninformative": lambda: Population.of(uninformative),
    "hopeless": lambda: Population.of(hopeless),
    "real clips": lambda: real(units=False),
    "real recordings": lambda: real(units=True),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_conformal_risk_control_keeps_the_mean_risk_and_most_of_the_oracles_share(name: str):
    population = POPULATIONS[name]()
    found = outcomes(
        population, lambda losses, scores, units: g.conformal_risk_control(losses, scores, EPS, 1.0, units)
    )
    risk = population.whole.mean[found]
    assert risk.mean() <= EPS + STANDARD_ERRORS * risk.std() / math.sqrt(DRAWS)
    assert (population.whole.light[found] / len(population.scores)).mean() >= LEAST_SHARE * population.oracle(
        population.whole.mean
    )


@pytest.mark.parametrize("name", POPULATIONS)
def test_learn_then_test_seldom_breaks_its_bound_and_keeps_most_of_the_oracles_share(name: str):
    population = POPULATIONS[name]()
    found = outcomes(population, learned)
    broken = int((population.whole.routed[found] > EPS).sum())
    assert broken_at_most(broken, DRAWS, DELTA), f"{broken} of {DRAWS}"
    oracle = population.oracle(population.whole.routed)
    if oracle > 0.05:  # an oracle that takes next to nothing leaves nothing to measure
        assert (population.whole.light[found] / len(population.scores)).mean() >= LEAST_SHARE * oracle
    else:
        assert name == "hopeless"


def test_a_threshold_that_is_taken_as_it_looks_breaks_the_bound():
    """What the promise is worth: the largest threshold of small enough measured risk breaks it in half of the draws."""

    def naive(losses: np.ndarray, scores: np.ndarray, units: np.ndarray) -> int:
        found = g.profile(losses, scores, units)
        return int(found.light[np.flatnonzero(found.routed <= EPS)[-1]])

    population = Population.of(noisy)
    broken = int((population.whole.routed[outcomes(population, naive)] > EPS).sum())
    assert not broken_at_most(broken, DRAWS, DELTA)


def test_the_last_certified_is_returned_and_not_the_first_that_failed():
    p = g.hoeffding_bentkus(np.array([0.0, 0.012, 0.030, 0.562, 0.900]), 1000, 0.1)
    assert g.learn_then_test(p, 0.1) == 2


def test_a_walk_stops_at_its_first_failure_and_hands_its_level_on():
    fine, poor = 0.01, 0.9
    assert g.learn_then_test(np.array([fine, poor, fine]), 0.1) == 0
    assert g.learn_then_test(np.array([poor, fine, fine]), 0.1) == -1
    starts = ((0, 0.5), (2, 0.5))
    assert g.learn_then_test(np.array([poor, fine, fine, fine]), 0.1, starts) == 3
    assert g.learn_then_test(np.array([fine, fine, 0.08, fine]), 0.1, starts) == 3  # the second has both levels
    assert g.learn_then_test(np.array([fine, poor, 0.08, fine]), 0.1, starts) == 0  # the second has its own only
    assert g.learn_then_test(np.array([0.08, fine, fine, poor]), 0.1, starts) == 2


@pytest.mark.parametrize(
    ("risk", "n", "alpha"), [(0.03, 200, 0.1), (0.0, 59, 0.05), (0.049, 3000, 0.05), (0.3, 40, 0.5)]
)
def test_hoeffding_bentkus_by_hand(risk: float, n: int, alpha: float):
    divergence = (1 - risk) * math.log((1 - risk) / (1 - alpha)) + (risk * math.log(risk / alpha) if risk else 0)
    tail = sum(math.comb(n, k) * alpha**k * (1 - alpha) ** (n - k) for k in range(math.ceil(n * risk - 1e-9) + 1))
    expected = min(math.exp(-n * divergence), math.e * tail)
    assert g.hoeffding_bentkus(risk, n, alpha) == pytest.approx(expected, rel=1e-9)
    assert g.hoeffding_bentkus(alpha * 1.01, n, alpha) == 1
    assert g.hoeffding_bentkus(0.0, 0, alpha) == 1


@pytest.mark.parametrize("kind", ["coins", "spread"])
def test_neither_test_rejects_what_is_true_more_often_than_its_level(kind: str):
    """At the border, mean loss = alpha, where a wrong p-value shows most. All samples light, one threshold."""
    random, alpha, n, tries = np.random.default_rng(3), 0.1, 300, 800
    draws = random.random((tries, n)) < alpha if kind == "coins" else random.random((tries, n)) * 2 * alpha
    profiles = [g.profile(losses.astype(float), np.zeros(n)) for losses in draws]
    for test in (g.betting, g.p_values):
        p = np.array([test(found, alpha)[-1] for found in profiles])
        for level in (0.01, 0.05, 0.2):
            assert broken_at_most(int((p <= level).sum()), tries, level), (test.__name__, level)


def test_betting_by_hand():
    losses, alpha, n = np.random.default_rng(0).random(200) * 0.15, 0.1, 200
    bets = [0.95 / 0.9 / 2**at for at in range(10)]
    bets = [bet for bet in bets if bet == bets[0] or bet > 5 / math.sqrt(n)]
    stakes = np.array([0.5**at for at in range(len(bets))])
    wealth = [math.prod(1 + bet * (alpha - loss) for loss in losses) for bet in bets]
    found = g.betting(g.profile(losses, np.zeros(n)), alpha)
    assert found == pytest.approx([1, 1 / np.average(wealth, weights=stakes)], rel=1e-9)
    assert found[1] < 0.5
    both = g.p_values(g.profile(losses, np.zeros(n)), alpha)
    assert both[1] == min(found[1] / 0.75, g.hoeffding_bentkus(losses.mean(), n, alpha) / 0.25)
    coins = np.repeat([1.0, 0.0], [8, 192])  # where Hoeffding-Bentkus says more
    assert g.p_values(g.profile(coins, np.zeros(n)), alpha)[1] == g.hoeffding_bentkus(0.04, n, alpha) / 0.25


def test_betting_tells_what_varies_little_with_fewer_units():
    losses = np.full(120, 0.03) + np.random.default_rng(0).random(120) * 0.01
    found = g.profile(losses, np.zeros(120))
    assert g.betting(found, 0.08)[-1] < 0.05 < g.hoeffding_bentkus(losses.mean(), 120, 0.08)


samples = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 8).map(lambda at: at / 8), st.integers(0, 4)), min_size=1, max_size=25
)


@given(samples)
def test_profile_is_what_one_counts_by_hand(rows: list[tuple[int, float, int]]):
    scores, losses, units = (np.array(column, float) for column in zip(*rows, strict=True))
    found = g.profile(losses, scores, units)
    cuts = [*np.unique(scores), math.inf]
    assert found.light.tolist() == [int((scores < cut).sum()) for cut in cuts]
    assert found.total == len(set(units))
    for at, cut in enumerate(cuts):
        light = scores < cut
        means = [losses[light & (units == unit)].mean() for unit in np.unique(units[light])]
        whole = [np.where(light, losses, 0)[units == unit].mean() for unit in np.unique(units)]
        assert found.units[at] == len(means)
        assert found.mean[at] == pytest.approx(np.mean(whole), abs=1e-12)
        assert found.routed[at] == pytest.approx(np.mean(means) if means else 0, abs=1e-12)


@example([(0, 0.0, 0), (0, 0.0, 1), (0, 0.0, 1), (0, 0.0, 2), (0, 1.0, 1)], 1 / 3)
@given(samples, st.floats(0.01, 0.9))
def test_conformal_risk_control_takes_the_most_that_its_rule_allows(rows: list[tuple[int, float, int]], eps: float):
    scores, losses, units = (np.array(column, float) for column in zip(*rows, strict=True))
    k = g.conformal_risk_control(losses, scores, eps, 1.0, units)
    n = len(set(units))

    def most(limit: float) -> int:
        """The samples under the highest threshold that the rule allows."""
        found = 0
        for cut in [*np.unique(scores), math.inf]:
            means = [np.where(scores < cut, losses, 0)[units == unit].mean() for unit in np.unique(units)]
            if (n * np.mean(means) + 1.0) / (n + 1) <= limit:
                found = max(found, int((scores < cut).sum()))
        return found

    assert most(eps - ROUNDING) <= k <= most(eps + ROUNDING)  # equality of two sums is decided by their rounding


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_more_segments_of_a_recording_add_no_confidence(copies: int, seed: int):
    scores, losses = calibrated(np.random.default_rng(seed), 150)
    units = np.arange(150)
    many = [np.repeat(column, copies) for column in (losses, scores, units)]
    for rule in (controlled, learned):
        assert rule(*many) == copies * rule(losses, scores, units)
    assert g.certified(many[0], many[1], EPS, DELTA, 1.0) > copies * g.certified(losses, scores, EPS, DELTA, 1.0)


@pytest.mark.parametrize(("eps", "bound"), [(0.05, 1.0), (0.1, 1.0), (0.3, 0.5), (0.02, 0.3), (1 / 3, 1.0)])
def test_what_is_needed_is_enough_and_one_less_is_not(eps: float, bound: float):
    for rule, need in (
        (lambda n: g.conformal_risk_control(np.zeros(n), np.arange(n), eps, bound), g.needed(eps, bound)),
        (lambda n: g.certified(np.zeros(n), np.arange(n), eps, DELTA, bound), g.needed(eps, bound, DELTA)),
    ):
        assert rule(need) == need
        assert need == 1 or rule(need - 1) == 0


def test_where_a_walk_begins_looks_at_no_loss():
    scores, losses = calibrated(np.random.default_rng(0), N)
    mine, other = (g.starts(g.profile(column, scores), EPS, DELTA) for column in (losses, losses[::-1] / 9))
    assert mine == other
    assert len(mine) == 2
    few = g.profile(losses[:30], scores[:30])
    assert g.starts(few, EPS, DELTA) == ((30, 1.0),)


def test_bounds_of_single_thresholds_hold():
    """A threshold fixed beforehand: the bound of learn-then-test lies under the true risk in at most DELTA of draws."""
    population, random = Population.of(noisy), np.random.default_rng(5)
    fixed, under = float(np.quantile(population.scores, 0.6)), 0
    true = population.whole.routed[population.at(fixed)]
    for _ in range(25):
        scores, losses, units = population.sample(random, 300)
        found = g.profile(losses, scores, units)
        at = np.searchsorted(found.light, [(scores < fixed).sum()])
        (bound,) = g.upper_bound(found, at, DELTA)
        assert bound > found.routed[at[0]]
        under += bound < true
        assert g.p_values(found, bound, at)[0] <= DELTA
    assert broken_at_most(under, 25, DELTA)
