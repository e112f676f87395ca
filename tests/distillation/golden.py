"""Inputs on which reference code was run, and its results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

VALUES: dict[str, float] = json.loads((Path(__file__).parent / "goldens.json").read_text())
"""Name of method, code base and options → loss on the inputs below, in float64."""


def det(shape, a, b, scale=1.0):
    """Return scale (sin(i a + b) + cos(0.37 i² a + 1.3 b) / 2) for i = 0, 1, ... in C order, float64."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return (scale * (np.sin(i * a + b) + 0.5 * np.cos(i * i * 0.37 * a + 1.3 * b))).reshape(shape)


# Logits of 8 samples for 10 classes, and labels.
z_s, z_t = det((8, 10), 1.7, 0.3, 3), det((8, 10), 2.3, 1.1, 3)
y = (3 * np.arange(8) + 1) % 10

# Feature maps of a student (fs); of teachers with other channels (ft), with the same channels (ft4), and with other
# channels and sizes (ft3). Vector features of a student (es), of a teacher of another width (et) and the same (et5).
fs, ft = det((8, 4, 6, 6), 0.9, 0.2), det((8, 6, 6, 6), 1.3, 0.7)
ft4, ft3 = det((8, 4, 6, 6), 1.3, 0.7), det((8, 6, 3, 3), 1.1, 0.5)
es, et, et5 = det((8, 5), 0.8, 0.9), det((8, 7), 1.9, 0.4), det((8, 5), 1.9, 0.4)

# Two stages of a student (g) and of a teacher (h) for FSP; of a student (a) and of a teacher (b) for KD-SVD.
g1, g2 = det((8, 4, 6, 6), 0.9, 0.2), det((8, 5, 3, 3), 1.5, 0.6)
h1, h2 = det((8, 4, 6, 6), 1.3, 0.7), det((8, 5, 3, 3), 0.6, 0.1)
a1, a2 = det((8, 4, 6, 6), 0.9, 0.2), det((8, 4, 6, 6), 1.5, 0.6)
b1, b2 = det((8, 4, 6, 6), 1.3, 0.7), det((8, 4, 6, 6), 0.6, 0.1)

# Hidden states and attention of a transformer; the mask keeps the first 4 of 6 positions.
hs, ht = det((8, 6, 5), 0.9, 0.2), det((8, 6, 5), 1.3, 0.7)
mask = np.tile(np.arange(6) < 4, (8, 1))
As, At = det((8, 2, 6, 6), 0.9, 0.2), det((8, 2, 6, 6), 1.3, 0.7)
