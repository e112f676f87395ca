"""Hard-concrete gates: random factors of units, between 0 and 1, of which a part is exactly 0 or 1.

Arrays have shape (units,). A gate has the location log α; the larger it is, the more often the gate is open.

Source: Louizos, Welling, Kingma 2018, arXiv:1712.01312, section 2.2, with the constants of section 4.
"""

from __future__ import annotations

import math
from typing import Any

from kirsch import ops

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature, and the ends of the interval to which a concrete variable is stretched."""


def sampled(location: Any, uniform: Any) -> Any:
    """Return random gates in [0, 1], equations 10 and 11.

    Args:
        location: log α.
        uniform: independent random numbers between 0 and 1 (exclusive).
    """
    return _stretched(_sigmoid((ops.log(uniform) - ops.log(1 - uniform) + location) / BETA))


def open_probability(location: Any) -> Any:
    """Return the probability that a random gate is not 0, equation 12."""
    return _sigmoid(location - BETA * math.log(-GAMMA / ZETA))


def fixed(location: Any) -> Any:
    """Return the gates in [0, 1] that are used after training, equation 13."""
    return _stretched(_sigmoid(location))


def _stretched(concrete: Any) -> Any:
    return ops.clip(concrete * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def _sigmoid(x: Any) -> Any:
    return ops.exp(ops.log_sigmoid(x))
