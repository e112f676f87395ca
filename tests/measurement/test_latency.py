"""Interleaved timing of contenders (the compared functions), with a clock controlled by the test."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest

from kirsch.errors import UsageError
from kirsch.measurement.latency import Latency, Ratio, Timing, disturbances, interleaved, median_ratio

ROUNDING = 1e-9
"""Tolerance for sums of seconds in float64, whose relative error is about 1e-14."""


class Clock:
    """A clock that only contenders advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spender(self, *seconds):
        """Return a contender that takes these seconds: the first for each warm-up call, then one after the other."""
        state = {"call": 0}

        def call():
            self.now += seconds[min(max(state["call"] - WARM_UP, 0), len(seconds) - 1)]
            state["call"] += 1

        return call


WARM_UP = 10
"""Warm-up calls of a contender that takes more than 20 ms."""


def test_equal_contenders_have_ratio_one():
    clock = Clock()
    result = interleaved({"a": clock.spender(0.1), "b": clock.spender(0.1)}, reference="a", rounds=6, clock=clock)
    for ratio in (*result.speedups.values(), result.aa):
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1, 1, 1), abs=ROUNDING)


def test_a_speedup_is_the_time_of_the_reference_over_the_time_of_the_contender():
    clock = Clock()
    contenders = {"slow": clock.spender(0.2), "fast": clock.spender(0.1), "slowest": clock.spender(0.8)}
    result = interleaved(contenders, reference="slow", rounds=6, clock=clock)
    assert {name: ratio.value for name, ratio in result.speedups.items()} == pytest.approx(
        {"slow": 1, "fast": 2, "slowest": 0.25}, abs=ROUNDING
    )
    assert result.reference == "slow"


def test_rounds_alternate_in_order_and_time_the_reference_twice():
    clock, order = Clock(), []

    def named(name):
        def call():
            order.append(name)
            clock.now += 0.1

        return call

    interleaved({name: named(name) for name in "abc"}, reference="b", rounds=6, clock=clock)
    assert order[: 4 * WARM_UP] == [*"a" * WARM_UP, *"b" * WARM_UP, *"c" * WARM_UP, *"b" * WARM_UP]
    assert order[4 * WARM_UP :] == [*"abcb", *"bcba"] * 3


def test_speedups_do_not_change_while_the_machine_slows_down():
    """In round r all calls take r times as long: times vary by a factor of eleven, ratios do not."""
    clock, state = Clock(), {"calls": -3 * WARM_UP}

    def slowing(seconds):
        def call():
            clock.now += seconds * (1 + max(state["calls"], 0) // 3)  # two contenders and the reference again
            state["calls"] += 1

        return call

    result = interleaved({"a": slowing(0.2), "b": slowing(0.1)}, reference="a", rounds=11, clock=clock)
    assert result.latencies["b"].median_us == pytest.approx(0.6e6, abs=1)
    assert result.latencies["b"].p90_us == pytest.approx(1.0e6, abs=1)
    assert result.speedups["b"] == Ratio(*(pytest.approx(2, abs=ROUNDING),) * 3)


def test_the_noise_floor_includes_a_slower_first_call_of_each_round():
    """The first call of each round takes 1.25 times as long.

    A round times the reference twice, as its first and as its last entry. The order is reversed in every second round.
    """
    clock, state = Clock(), {"calls": -4 * WARM_UP}

    def disturbed(seconds):
        def call():
            first = state["calls"] >= 0 and state["calls"] % 4 == 0
            clock.now += seconds * (1.25 if first else 1)
            state["calls"] += 1

        return call

    contenders = {"a": disturbed(0.1), "near": disturbed(0.09), "far": disturbed(0.05)}
    result = interleaved(contenders, reference="a", rounds=10, clock=clock)
    assert (result.aa.low, result.aa.high) == pytest.approx((1 / 1.25, 1.25), abs=ROUNDING)
    assert result.aa.value == pytest.approx((1.25 + 1 / 1.25) / 2, abs=ROUNDING)
    assert not result.significant("near")
    assert result.significant("far")


@pytest.mark.parametrize(
    ("ratio", "significant"),
    [((2, 1.11, 3), True), ((2, 1.1, 3), False), ((0.5, 0.4, 0.89), True), ((0.5, 0.4, 0.9), False)],
)
def test_a_speedup_is_significant_if_its_interval_is_outside_the_noise_floor(ratio, significant):
    timing = Timing({}, {"x": Ratio(*ratio)}, Ratio(1, 0.9, 1.1), "a")
    assert timing.significant("x") is significant


def test_short_calls_are_repeated_within_a_round():
    """A call takes 1 ms: 200 calls warm up, a round times ten calls, and the reported time is that of one call."""
    clock = Clock()
    result = interleaved({"a": clock.spender(0.001)}, reference="a", rounds=6, clock=clock)
    assert result.latencies["a"].calls == 10
    assert result.latencies["a"].rounds == 6
    assert result.latencies["a"].median_us == pytest.approx(1000, rel=ROUNDING)
    assert clock.now == pytest.approx(2 * (0.2 + 6 * 0.01), rel=0.01)  # rounding may add one call


def test_percentiles_are_over_rounds_and_in_microseconds():
    """For times of 1 s to 11 s, the k-th is the quantile (k - 1) / 10, so p95 is halfway between the last two."""
    clock = Clock()
    seconds = (7, 3, 11, 1, 5, 9, 2, 10, 4, 8, 6)
    contenders = {"a": clock.spender(0.1), "b": clock.spender(*seconds)}
    result = interleaved(contenders, reference="a", rounds=11, clock=clock).latencies["b"]
    assert result == Latency(
        *(pytest.approx(value * 1e6, rel=ROUNDING) for value in (6, 2, 10, 10.5)), rounds=11, calls=1
    )


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_collection_is_off_while_timing_and_restored_after_an_error(collecting):
    clock, enabled = Clock(), []

    def fails():
        clock.now += 0.1
        enabled.append(gc.isenabled())
        if len(enabled) > WARM_UP * 2 + 3:
            raise ZeroDivisionError

    try:
        if not collecting:
            gc.disable()
        with pytest.raises(ZeroDivisionError):
            interleaved({"a": fails}, reference="a", rounds=6, clock=clock)
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert enabled[-1] is False


def test_a_contender_can_have_the_name_of_the_second_entry_of_the_reference():
    clock = Clock()
    contenders = {"a": clock.spender(0.1), "a again": clock.spender(0.2)}
    result = interleaved(contenders, reference="a", rounds=6, clock=clock)
    assert result.speedups["a again"].value == pytest.approx(0.5, abs=ROUNDING)
    assert result.aa.value == pytest.approx(1, abs=ROUNDING)
    assert list(result.latencies) == ["a", "a again"]


def test_an_unknown_reference_raises():
    with pytest.raises(UsageError, match=r"The reference 'c' is not one of a, b\."):
        interleaved({"a": int, "b": int}, reference="c")


def test_too_few_rounds_for_a_confidence_interval_raise():
    """With five rounds, even the full range covers the median in only 1 - 2 / 2⁵ = 93.75 % of cases."""
    with pytest.raises(UsageError, match=r"`rounds` is 5, too few for a confidence interval\. Use at least 6\."):
        interleaved({"a": int}, reference="a", rounds=5)


def test_the_interval_is_the_narrowest_with_a_coverage_of_95_percent():
    """The interval from the r-th to the s-th of n values covers the median if n coins show r to s - 1 heads."""
    for n in range(6, 201):
        ratio = median_ratio(np.arange(n, 0, -1.0))
        low, high = int(ratio.low), int(ratio.high)
        assert low + high == n + 1
        coverage = [sum(math.comb(n, k) for k in range(r, n + 1 - r)) / 2**n for r in (low, low + 1)]
        assert coverage[0] >= 0.95 > coverage[1]


def test_the_interval_of_thirty_rounds_is_from_the_tenth_to_the_twenty_first_ratio():
    """As in Conover 1999, table A3, and in the docstring of `interleaved`."""
    assert median_ratio(np.arange(1.0, 31.0)) == Ratio(15.5, 10, 21)


@pytest.mark.parametrize(
    ("aa", "is_noted"), [((1.0, 0.98, 1.02), False), ((1.03, 1.001, 1.05), True), ((0.9, 0.8, 0.99), True)]
)
def test_noise_floor_whose_interval_excludes_1_is_noted(aa, is_noted):
    notes = disturbances({}, {}, Ratio(*aa), "teacher")
    assert len(notes) == is_noted
    assert all("A/A, teacher against itself, is" in note for note in notes)


@pytest.mark.parametrize(
    ("value", "is_noted"), [(1.19, False), (1.14, False), (1.24, False), (1.39, True), (1.05, True)]
)
def test_speedup_that_contradicts_the_medians_is_noted(value, is_noted):
    latencies = {"teacher": Latency(250, 0, 0, 0, 30, 10), "exported": Latency(210, 0, 0, 0, 30, 10)}
    notes = disturbances(latencies, {"exported": Ratio(value, 1.0, 2.0)}, Ratio(1, 1, 1), "teacher")
    assert (
        notes
        == [
            (
                "The machine was disturbed: the latency of teacher divided by that of exported in the same round is "
                f"{value:.2f}× (median), but the ratio of the two median latencies is 1.19×. Measure again on an idle "
                "machine."
            )
        ]
        * is_noted
    )
