"""How far a rising risk may be followed: against exact sums, by simulation with a known risk, and by its own laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dslify.rising import BOLDEST, Rising, bet, least_epsilon, needed_units, rising

TRIALS = 400
SAMPLING = 3 / TRIALS**0.5  # three standard errors of a share of one half, which has the largest


def reached(found: Rising, epsilon: float, delta: float | None) -> float:
    """The highest place that is let through."""
    at = found.last(epsilon, delta)
    return 0.0 if at < 0 else float(found.ends[at])


places = st.lists(
    st.tuples(st.integers(0, 9).map(float) | st.just(math.inf), st.integers(0, 14)), min_size=1, max_size=60
)


@settings(max_examples=30, deadline=None)
@given(places, st.sampled_from([0.5, 2.0, 3.5, 9.0, 20.0]))
def test_what_is_lost_is_counted_by_unit(drawn: Any, place: float):
    critical, unit = (np.array(column) for column in zip(*drawn, strict=True))
    found = rising(critical, unit)
    at = int(np.searchsorted(found.ends, place))
    assert found.begins[at] < place <= found.ends[at]
    assert found.samples[at] == (critical < place).sum()
    shares = [(critical[unit == one] < place).mean() for one in np.unique(unit)]
    assert found.mean[at] == pytest.approx(np.mean(shares))
    assert found.units == len(shares)
    assert found.whole == (len(shares) == len(unit))


@settings(max_examples=30, deadline=None)
@given(places, st.sampled_from([0.02, 0.1, 0.4]), st.sampled_from([0.05, 0.2]), st.data())
def test_the_certified_place_follows_what_is_asked_and_what_is_lost(
    drawn: Any, epsilon: float, delta: float, data: st.DataObject
):
    critical, unit = (np.array(column) for column in zip(*drawn, strict=True))
    found = rising(critical, unit)
    p = found.p_values(epsilon, delta)
    assert ((p >= 0) & (p <= 1)).all()
    assert (np.diff(p) >= 0).all()
    assert (np.diff(found.p_values(epsilon * 1.5, delta)) >= 0).all()
    asked = reached(found, epsilon, delta)
    assert asked <= reached(found, 1.5 * epsilon, delta)
    assert asked <= reached(found, epsilon, 2 * delta)
    assert asked <= reached(found, epsilon, None) + 1e-9  # no promise goes beyond the point estimate
    sooner = critical.copy()
    sooner[data.draw(st.integers(0, len(critical) - 1))] = -1.0
    assert reached(rising(sooner, unit), epsilon, delta) <= asked


@pytest.mark.parametrize(("n", "alpha"), [(299, 0.01), (700, 0.01), (120, 0.05)])
def test_of_single_samples_the_test_is_the_binomial_tail(n: int, alpha: float):
    found = rising(np.arange(n, dtype=float), np.arange(n))
    exact = np.cumsum([math.comb(n, k) * alpha**k * (1 - alpha) ** (n - k) for k in range(6)])
    exact[np.arange(6) >= n * alpha] = 1.0  # as many as expected are no evidence
    np.testing.assert_allclose(found.p_values(alpha, 0.05)[:6], exact, rtol=1e-9)


@pytest.mark.parametrize("place", [0.01, 0.1, 0.2, 0.9])
def test_of_larger_units_the_test_is_one_bet_on_each(place: float):
    critical, unit = np.random.default_rng(3).random(200), np.repeat(np.arange(50), 4)
    found = rising(critical, unit)
    shares = (critical < place).reshape(50, 4).mean(1)
    wealth = np.prod(1 + bet(50, 0.3, 0.1) * (0.3 - shares))
    at = int(np.searchsorted(found.ends, place))
    assert found.p_values(0.3, 0.1)[at] == pytest.approx(min(1.0, 1 / wealth))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 0.05), (0.05, 0.1), (0.02, 1e-4)])
def test_the_fewest_units_are_the_fewest(epsilon: float, delta: float, whole: bool):
    n = needed_units(epsilon, delta, whole)
    for units, enough in ((n, True), (n - 1, False)):
        unit = np.repeat(np.arange(units), 1 if whole else 2)
        assert (rising(np.full(len(unit), math.inf), unit).last(epsilon, delta) == 0) == enough
    assert least_epsilon(n, delta, whole) <= epsilon < least_epsilon(n - 1, delta, whole)
    assert needed_units(0.01, 0.05) == 299


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5000), st.floats(0.002, 0.2), st.floats(0.001, 0.5))
def test_no_loss_ruins_a_bet_and_more_units_let_it_be_smaller(units: int, alpha: float, delta: float):
    assert 0 < bet(units, alpha, delta) * (1 - alpha) < 1
    enough = needed_units(alpha, delta, whole=False)
    assert bet(enough, alpha, delta) * (1 - alpha) == pytest.approx(BOLDEST)
    assert bet(100 * enough, alpha, delta) < bet(enough, alpha, delta)


def single(random: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    return random.random(units), np.arange(units)


def copies(random: np.random.Generator, units: int, each: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Half of the units are lost whole, of the others each sample by itself: either way a place is its own risk."""
    alone = random.random((units, each))
    together = random.random((units, 1)) + np.zeros((1, each))
    return np.where(random.random((units, 1)) < 0.5, together, alone).ravel(), np.repeat(np.arange(units), each)


def fine(random: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Many copies that are lost one by one: losses hardly vary."""
    return random.random(units * 12), np.repeat(np.arange(units), 12)


@pytest.mark.parametrize("draw", [single, copies, fine])
def test_the_promise_holds_as_often_as_it_says(draw: Any):
    """The risk at a place is the place itself, so a promise is broken where the certified place lies above epsilon."""
    random, epsilon, delta = np.random.default_rng(7), 0.05, 0.2
    found = np.array([reached(rising(*draw(random, 160)), epsilon, delta) for _ in range(TRIALS)])
    assert (found > epsilon).mean() <= delta + SAMPLING
    assert np.median(found) > 0.45 * epsilon  # and is no empty one
    estimates = np.array([reached(rising(*draw(random, 160)), epsilon, None) for _ in range(100)])
    assert (estimates > epsilon).mean() > 2 * delta  # a point estimate promises nothing


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 30), st.sampled_from([0.05, 0.2]))
def test_a_bound_is_where_the_test_turns(lost: int, delta: float):
    critical = np.full(200, math.inf)
    critical[:lost] = np.arange(lost)
    found = rising(critical, np.arange(200))
    for at, bound in zip((0, -1), found.upper_bound(delta)[[0, -1]], strict=True):
        assert found.p_values(bound, delta)[at] <= delta < found.p_values(0.95 * bound, delta)[at]
