"""Inputs by formula, and the values that other code bases give for them when run in float64.

Anybody can make the inputs again and run another implementation on them. A value is claimed by the test that names it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

VALUES: dict[str, float] = json.loads(Path(__file__).with_name("goldens.json").read_text(encoding="utf-8"))
"""Method/code base and its settings → the value it gave."""


def det(shape, a, b, scale=1.0):
    """scale (sin(i a + b) + cos(0.37 i² a + 1.3 b) / 2) for i = 0, 1, ... in C order, float64."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return (scale * (np.sin(i * a + b) + 0.5 * np.cos(i * i * 0.37 * a + 1.3 * b))).reshape(shape)


# Scores (N, K) = (8, 10) and labels.
Z_S, Z_T = det((8, 10), 1.7, 0.3, 3), det((8, 10), 2.3, 1.1, 3)
Y = (3 * np.arange(8) + 1) % 10

# Maps (N, C, H, W): of the student, of a teacher with 6 channels, with 4, and at half the size.
FS, FT = det((8, 4, 6, 6), 0.9, 0.2), det((8, 6, 6, 6), 1.3, 0.7)
FT4, FT3 = det((8, 4, 6, 6), 1.3, 0.7), det((8, 6, 3, 3), 1.1, 0.5)

# Features (N, D): of the student, of a teacher with 7 units, with 5.
ES, ET, ET5 = det((8, 5), 0.8, 0.9), det((8, 7), 1.9, 0.4), det((8, 5), 1.9, 0.4)

# Two stages each of student (G) and teacher (H), for FSP; and (A, B) for KDSVD.
G1, G2 = det((8, 4, 6, 6), 0.9, 0.2), det((8, 5, 3, 3), 1.5, 0.6)
H1, H2 = det((8, 4, 6, 6), 1.3, 0.7), det((8, 5, 3, 3), 0.6, 0.1)
A1, A2 = det((8, 4, 6, 6), 0.9, 0.2), det((8, 4, 6, 6), 1.5, 0.6)
B1, B2 = det((8, 4, 6, 6), 1.3, 0.7), det((8, 4, 6, 6), 0.6, 0.1)

# Hidden states (N, L, D), scores of attention (N, heads, L, L), and a mask of which the first 4 of 6 positions count.
HS, HT = det((8, 6, 5), 0.9, 0.2), det((8, 6, 5), 1.3, 0.7)
AS, AT = det((8, 2, 6, 6), 0.9, 0.2), det((8, 2, 6, 6), 1.3, 0.7)
MASK = np.broadcast_to(np.arange(6) < 4, (8, 6))
