"""Times taken in turn, with a clock that the tests move."""

import gc
import subprocess
import sys

import pytest

from dslify import clock
from dslify.clock import LEAST, interleaved, quantile, streamed, timed
from dslify.errors import OptionError


class Hands:
    """A clock that only stands still or is moved: nanoseconds since it was made."""

    def __init__(self) -> None:
        self.now = 0

    def takes(self, *microseconds: int):
        """A call that takes these times, one after the other and round again."""
        state = {"at": 0}

        def call() -> None:
            self.now += 1000 * microseconds[state["at"] % len(microseconds)]
            state["at"] += 1

        return call


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    made = Hands()
    monkeypatch.setattr(clock, "perf_counter_ns", lambda: made.now)
    monkeypatch.setattr(clock, "perf_counter", lambda: made.now * 1e-9)
    return made


def test_median_and_90th_percentile_of_each_call(hands: Hands):
    found = interleaved({"a": hands.takes(*range(1, 12)), "b": hands.takes(500)}, seconds=10.5 * 506e-6, warmup=0)
    assert found["a"].count == found["b"].count == 11
    assert found["a"].p50 == pytest.approx(6e-6)
    assert found["a"].p90 == pytest.approx(10e-6)
    assert found["b"].p50 == found["b"].p90 == pytest.approx(500e-6)


def test_a_slow_moment_hits_all_alike(hands: Hands):
    slow = {"factor": 1}

    def call(cost: int):
        def run() -> None:
            hands.now += 1000 * cost * slow["factor"]

        return run

    def gone(share: float) -> None:
        slow["factor"] = 3 if share > 0.1 else 1

    found = interleaved({"one": call(100), "two": call(200)}, seconds=0.05, gone=gone)
    assert found["one"].p50 == pytest.approx(300e-6)
    assert found["two"].p50 / found["one"].p50 == pytest.approx(2)


def test_warm_up_is_not_counted_and_few_rounds_are_enough_for_slow_calls(hands: Hands):
    calls = []
    found = timed(lambda: (calls.append(None), hands.takes(3_000_000)()), seconds=0.001, warmup=2)
    assert len(calls) == 2 + LEAST
    assert found.count == LEAST
    assert found.p50 == pytest.approx(3.0)


def test_every_round_runs_each_once_and_not_always_in_one_order(hands: Hands):
    seen: list[str] = []

    def call(name: str):
        return lambda: (seen.append(name), hands.takes(10)())

    interleaved({name: call(name) for name in "abc"}, seconds=19.5 * 30e-6, warmup=0)
    rounds = ["".join(seen[at : at + 3]) for at in range(0, len(seen), 3)]
    assert len(rounds) == 20
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3


def test_a_stream_has_the_mean_of_its_calls_beside_their_percentiles(hands: Hands):
    light, full = hands.takes(10), hands.takes(100)
    found = streamed({"mixed": [light, light, full, light, light]}, seconds=0.01)["mixed"]
    assert found.p50 == pytest.approx(10e-6)
    assert found.p90 == pytest.approx(100e-6)
    assert found.mean == pytest.approx(28e-6)


def test_interruptions_do_not_move_the_mean_even_if_they_hit_most_streams(hands: Hands):
    light, full = hands.takes(10, 10, 900_000), hands.takes(100, 100, 900_000)
    found = streamed({"stream": [light] * 8 + [full] * 2}, seconds=60.0, warmup=0)["stream"]
    assert found.mean == pytest.approx(28e-6)


def test_calls_of_a_stream_follow_each_other(hands: Hands):
    seen: list[str] = []

    def call(name: str):
        return lambda: (seen.append(name), hands.takes(10)())

    streamed({"x": [call("x")] * 4, "y": [call("y")] * 4}, seconds=8 * 10e-6 * 5.5, warmup=0)
    assert len(seen) == 6 * 8
    assert all(len(set(seen[at : at + 4])) == 1 for at in range(0, len(seen), 4))


def test_garbage_waits_until_the_end(hands: Hands):
    states = []
    interleaved({"a": lambda: (states.append(gc.isenabled()), hands.takes(10)())}, seconds=1e-4, warmup=0)
    assert states
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, seconds=1e-4, warmup=0)
    assert gc.isenabled()


def test_quantile_lies_between_the_two_nearest():
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2], 0.5) == 1.5
    assert quantile([5], 0.9) == 5
    assert quantile(range(11), 0.9) == 9


@pytest.mark.parametrize(
    ("streams", "options"), [({}, {}), ({"a": []}, {}), ({"a": [int]}, {"seconds": 0}), ({"a": [int]}, {"warmup": -1})]
)
def test_a_measurement_of_nothing_is_refused(streams, options):
    with pytest.raises(OptionError, match="needs calls, a time above 0 s"):
        streamed(streams, **options)


def test_real_calls_take_real_time():
    import time

    found = interleaved({"short": lambda: None, "long": lambda: time.sleep(0.002)}, seconds=0.1)
    assert found["long"].p50 >= 0.002
    assert found["short"].p50 < found["long"].p50
    assert found["long"].count >= LEAST


def test_the_clock_needs_no_torch():
    code = "import sys, dslify.clock; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
