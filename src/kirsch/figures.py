"""Numbers as texts: three significant digits, with units and the prefixes k, M and G."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def digits(value: float, significant: int = 3) -> str:
    """Return a number with some significant digits, without an exponent: 1.21, 402, 0.00123.

    Further digits before the decimal point become zeros: 12300.
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else f"{value:g}"
    decimals = significant - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    decimals = significant - 1 - math.floor(math.log10(abs(rounded)))  # 9.996 has become 10.0
    return f"{rounded:.{max(decimals, 0)}f}"


def count(value: float) -> str:
    """Return a count with a prefix: "1.21 M", "402 k", "31"."""
    if not math.isfinite(value):
        return digits(value)
    for factor, prefix in PREFIXES:
        if abs(value) >= factor * 0.9995:
            return f"{digits(value / factor)} {prefix}"
    return digits(value) if value != int(value) else str(int(value))


def bytes_(value: float) -> str:
    """Return a file size in decimal units: "61.2 kB"."""
    text = count(value)
    return f"{text}B" if " " in text else f"{text} B"


def percent(value: float, decimals: int = 1) -> str:
    """Return a fraction as percent: "98.3 %"."""
    return f"{100 * value:z.{decimals}f} %"


def distinct_percents(first: float, second: float) -> tuple[str, str]:
    """Return two fractions as percent, with three digits or as many as distinguish them: "2.081%", "2.079%"."""
    texts = [(f"{100 * first:.{digits}g}%", f"{100 * second:.{digits}g}%") for digits in range(3, 18)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


def points(value: float) -> str:
    """Return a difference of fractions in percentage points: "1.2 points"."""
    text = f"{100 * value:z.1f}".replace("-", "−")
    return f"{text} point" if text == "1.0" else f"{text} points"


def counted(number: int, noun: str) -> str:
    """Return a number with a noun: "1 group", "2 groups"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(texts: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Return the first `most` texts and the number of the others: "a, b, c and 2 more"."""
    others = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + others


def interval(value: float, low: float, high: float) -> str:
    """Return a fraction with half the width of its interval: "98.3 % ± 1.2"."""
    return f"{percent(value)} ± {100 * (high - low) / 2:.1f}"


def micros(value: float) -> str:
    """Return a time in microseconds with a unit: "84.1 µs", "2.31 ms", "1.20 s"."""
    if value >= 999_500:  # noqa: PLR2004 - rounds to one second
        return f"{digits(value / 1e6)} s"
    return f"{digits(value / 1e3)} ms" if value >= 999.5 else f"{digits(value)} µs"  # noqa: PLR2004 - rounds to one ms


def seconds(value: float) -> str:
    """Return a duration in seconds with units: "0.4 s", "18 s", "2 min 05 s", "1 h 02 min"."""
    if value < 9.95 or not math.isfinite(value):  # noqa: PLR2004 - one decimal below ten seconds
        return f"{value:z.1f} s"
    rounded = round(value)
    if rounded < 60:  # noqa: PLR2004 - a minute
        return f"{rounded} s"
    minutes, rest = divmod(rounded, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"  # noqa: PLR2004


def ratio(value: float, low: float | None = None, high: float | None = None) -> str:
    """Return a speedup with its interval: "2.70× [2.51 – 2.93]"."""
    limits = f" [{digits(low)} – {digits(high)}]" if low is not None and high is not None else ""
    return f"{digits(value)}×{limits}"
