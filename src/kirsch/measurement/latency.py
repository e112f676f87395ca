"""Interleaved latency measurement on a machine that other processes use too.

The contenders are the callables whose times are compared. They are timed in turn within each round, in alternating
order (A B C, then C B A), and each call is repeated until the clock can resolve its time. Speedups are ratios within a
round, which are not affected by slow changes of the machine's speed. The reference is timed twice per round; the ratio
of its two times is the noise floor.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom

from kirsch import figures
from kirsch.annotations import FEWEST_ROUNDS
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

SLICE_S = 0.01
"""Approximate time in seconds for which a contender is repeated within a round."""

WARM_UP_CALLS, WARM_UP_S = 10, 0.2

TOLERANCE = 0.05
"""Largest relative difference between a speedup and the ratio of the median latencies on an undisturbed machine."""


@dataclass(frozen=True)
class Latency:
    """Time of one call, as percentiles over rounds.

    Args:
        median_us, p10_us, p90_us, p95_us: percentiles in microseconds.
        rounds: number of rounds.
        calls: number of calls in each round.
    """

    median_us: float
    p10_us: float
    p90_us: float
    p95_us: float
    rounds: int
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times.

    Args:
        value: median over rounds.
        low, high: 95 % confidence interval of the median.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields as JSON."""
        return asdict(self)


def disturbances(
    latencies: Mapping[str, Latency], speedups: Mapping[str, Ratio], aa: Ratio, reference: str
) -> list[str]:
    """Return a sentence for each sign that other processes disturbed a measurement; see `Timing` for the arguments.

    The signs are a noise floor whose interval excludes 1, and a speedup that contradicts the two median latencies.
    """
    texts = []
    if not aa.low <= 1 <= aa.high:
        found = figures.ratio(aa.value, aa.low, aa.high)
        texts.append(f"The machine was disturbed: A/A, {reference} against itself, is {found}, which excludes 1.")
    for name, speedup in speedups.items():
        of_medians = contradicting_medians(latencies[reference], latencies[name], speedup)
        if of_medians is not None:
            texts.append(
                f"The machine was disturbed: the latency of {reference} divided by that of {name} in the same round is "
                f"{figures.ratio(speedup.value)} (median), but the ratio of the two median latencies is "
                f"{figures.ratio(of_medians)}."
            )
    return [f"{text} Measure again on an idle machine." for text in texts]


def contradicting_medians(before: Latency, after: Latency, speedup: Ratio) -> float | None:
    """Return the ratio of two median latencies if it differs from the speedup by more than `TOLERANCE`, else None."""
    of_medians = before.median_us / after.median_us
    return of_medians if abs(of_medians / speedup.value - 1) > TOLERANCE else None


@dataclass(frozen=True)
class Timing:
    """Result of an interleaved measurement.

    Args:
        latencies: latency of each contender, keyed by name.
        speedups: time of the reference divided by the time of each contender, keyed by name.
        aa: ratio of the two times of the reference (A/A test), the noise floor.
        reference: name of the reference.
    """

    latencies: dict[str, Latency]
    speedups: dict[str, Ratio]
    aa: Ratio
    reference: str

    def significant(self, name: str) -> bool:
        """Return whether the interval of a speedup does not overlap the interval of the noise floor."""
        speedup = self.speedups[name]
        return speedup.low > self.aa.high or speedup.high < self.aa.low


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    reference: str,
    rounds: int = 30,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time several callables in turn.

    Args:
        contenders: callables without arguments, keyed by name.
        reference: name of the callable that the others are compared with.
        rounds: number of rounds, at least 6. With 30 rounds, the confidence interval of the median is from the 10th to
            the 21st ratio.
        clock: returns the time in seconds.

    Raises:
        UsageError: the reference is not a contender, or there are too few rounds.
    """
    if reference not in contenders:
        raise UsageError(f"The reference {reference!r} is not one of {', '.join(contenders)}.")
    if rounds < FEWEST_ROUNDS:
        raise UsageError(
            f"`rounds` is {rounds}, too few for a confidence interval.", fix=f"Use at least {FEWEST_ROUNDS}."
        )
    again = f"{max(contenders, key=len)} again"  # longer than every name, so different from all of them
    entries = [*contenders.items(), (again, contenders[reference])]
    calls = {name: _calls_per_round(call, clock) for name, call in entries}
    times: dict[str, list[float]] = {name: [] for name, _ in entries}
    gc_was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, call in entries if number % 2 == 0 else reversed(entries):
                started = clock()
                for _ in range(calls[name]):
                    call()
                times[name].append((clock() - started) / calls[name])
    finally:
        if gc_was_enabled:
            gc.enable()
    seconds = {name: np.array(values) for name, values in times.items()}
    return Timing(
        latencies={name: _latency(seconds[name], calls[name]) for name in contenders},
        speedups={name: median_ratio(seconds[reference] / seconds[name]) for name in contenders},
        aa=median_ratio(seconds[reference] / seconds[again]),
        reference=reference,
    )


def _calls_per_round(call: Callable[[], Any], clock: Callable[[], float]) -> int:
    """Warm up, and return the number of calls that take about `SLICE_S`."""
    started, calls = clock(), 0
    while calls < WARM_UP_CALLS or clock() - started < WARM_UP_S:
        call()
        calls += 1
    return max(1, round(SLICE_S * calls / max(clock() - started, 1e-9)))


def _latency(seconds: NDArray[np.float64], calls: int) -> Latency:
    p10, median, p90, p95 = (float(value) for value in np.percentile(seconds * 1e6, [10, 50, 90, 95]))
    return Latency(median, p10, p90, p95, len(seconds), calls)


def median_ratio(ratios: NDArray[np.float64]) -> Ratio:
    """Return the median with its distribution-free 95 % confidence interval from order statistics.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered = np.sort(ratios)
    low = max(int(binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
    return Ratio(float(np.median(ordered)), float(ordered[low]), float(ordered[len(ordered) - 1 - low]))
