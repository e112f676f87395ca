"""Numbers as people read them: three significant digits, k, M and G for thousands, one unit."""

from __future__ import annotations

import math

STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def digits(value: float, significant: int = 3) -> str:
    """A number with some significant digits, without an exponent: 1.21, 402, 0.00123.

    A number with more digits before the point is filled up with zeros: 12300.
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else f"{value:g}"
    places = significant - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    places = significant - 1 - math.floor(math.log10(abs(rounded)))  # 9.996 has become 10.0
    return f"{rounded:.{max(places, 0)}f}"


def count(value: float) -> str:
    """How many: "1.21 M", "402 k", "31"."""
    if not math.isfinite(value):
        return digits(value)
    for step, name in STEPS:
        if abs(value) >= step * 0.9995:
            return f"{digits(value / step)} {name}"
    return digits(value) if value != int(value) else str(int(value))


def bytes_(value: float) -> str:
    """A size of a file in decimal units: "61.2 kB"."""
    text = count(value)
    return f"{text}B" if " " in text else f"{text} B"


def percent(value: float, places: int = 1) -> str:
    """A share as percent: "98.3 %"."""
    return f"{100 * value:z.{places}f} %"


def points(value: float) -> str:
    """A difference of shares as percentage points: "1.2 points"."""
    text = f"{100 * value:z.1f}"
    return f"{text} point" if text == "1.0" else f"{text} points"


def interval(value: float, low: float, high: float) -> str:
    """A share with half its interval: "98.3 % ± 1.2"."""
    return f"{percent(value)} ± {100 * (high - low) / 2:.1f}"


def micros(value: float) -> str:
    """A time given in microseconds: "84.1 µs", "2.31 ms", "1.20 s"."""
    if value >= 999_500:  # noqa: PLR2004 - rounds to one second
        return f"{digits(value / 1e6)} s"
    return f"{digits(value / 1e3)} ms" if value >= 999.5 else f"{digits(value)} µs"  # noqa: PLR2004 - rounds to one ms


def seconds(value: float) -> str:
    """A duration: "0.4 s", "18 s", "2 min 05 s", "1 h 02 min"."""
    if value < 9.95 or not math.isfinite(value):  # noqa: PLR2004 - below ten seconds a tenth matters
        return f"{value:z.1f} s"
    whole = round(value)
    if whole < 60:  # noqa: PLR2004 - a minute
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"  # noqa: PLR2004


def ratio(value: float, low: float | None = None, high: float | None = None) -> str:
    """A speedup with its interval: "2.70× [2.51 – 2.93]"."""
    span = f" [{digits(low)} – {digits(high)}]" if low is not None and high is not None else ""
    return f"{digits(value)}×{span}"
