"""How long something takes, on a machine that other things run on too.

Contenders are timed in turn within each round, forwards and backwards (A B C, C B A), each long enough for the clock.
What is compared is the ratio within a round: it holds while the machine's speed drifts. The reference runs twice under
two names; the ratio of the two is the noise floor.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom

from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

SLICE_S = 0.01
"""A contender is repeated within a round until it takes about this long."""

WARM_CALLS, WARM_S = 10, 0.2

FEWEST_ROUNDS = 6
"""Of five ratios, even the smallest and the largest hold the median in 94 % of cases only."""


@dataclass(frozen=True)
class Latency:
    """Time of one call, over rounds.

    Args:
        median_us, p10_us, p90_us, p95_us: percentiles in microseconds.
        rounds: how many rounds.
        calls: calls timed in each.
    """

    median_us: float
    p10_us: float
    p90_us: float
    p95_us: float
    rounds: int
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times with the 95 % interval of its median.

    Args:
        value: median over rounds.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """What an interleaved run found.

    Args:
        latencies: contender → its time.
        speedups: contender → time of the reference divided by its time.
        aa: the reference against itself: the noise floor.
        reference: which contender that is.
    """

    latencies: dict[str, Latency]
    speedups: dict[str, Ratio]
    aa: Ratio
    reference: str

    def significant(self, name: str) -> bool:
        """Whether a speedup lies outside the noise floor."""
        found = self.speedups[name]
        return found.low > self.aa.high or found.high < self.aa.low


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    reference: str,
    rounds: int = 30,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time several callables in turn.

    Args:
        contenders: name → callable without arguments.
        reference: the one that the others are compared with.
        rounds: at least 6; 30 give an interval of the median from the 10th to the 21st ratio.
        clock: seconds.

    Raises:
        UsageError: there is no such reference, or too few rounds.
    """
    if reference not in contenders:
        raise UsageError(f"The reference {reference!r} is none of {', '.join(contenders)}.")
    if rounds < FEWEST_ROUNDS:
        raise UsageError(
            f"`rounds` is {rounds}; a confidence interval needs more.", fix=f"Give at least {FEWEST_ROUNDS}."
        )
    again = f"{max(contenders, key=len)} again"  # longer than every name, so that it is none of them
    entries = [*contenders.items(), (again, contenders[reference])]
    calls = {name: _calls(call, clock) for name, call in entries}
    times: dict[str, list[float]] = {name: [] for name, _ in entries}
    collecting = gc.isenabled()
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
        if collecting:
            gc.enable()
    seconds = {name: np.array(values) for name, values in times.items()}
    return Timing(
        latencies={name: _latency(seconds[name], calls[name]) for name in contenders},
        speedups={name: median_ratio(seconds[reference] / seconds[name]) for name in contenders},
        aa=median_ratio(seconds[reference] / seconds[again]),
        reference=reference,
    )


def _calls(call: Callable[[], Any], clock: Callable[[], float]) -> int:
    """Warm up, and find how many calls fill a slice."""
    started, done = clock(), 0
    while done < WARM_CALLS or clock() - started < WARM_S:
        call()
        done += 1
    return max(1, round(SLICE_S * done / max(clock() - started, 1e-9)))


def _latency(seconds: NDArray[np.float64], calls: int) -> Latency:
    p10, median, p90, p95 = (float(value) for value in np.percentile(seconds * 1e6, [10, 50, 90, 95]))
    return Latency(median, p10, p90, p95, len(seconds), calls)


def median_ratio(ratios: NDArray[np.float64]) -> Ratio:
    """The median with its distribution-free 95 % interval from order statistics.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered = np.sort(ratios)
    lowest = int(binom.ppf(0.025, len(ordered), 0.5))
    place = max(lowest - 1, 0)
    return Ratio(float(np.median(ordered)), float(ordered[place]), float(ordered[len(ordered) - 1 - place]))
