"""Small data sets."""

from __future__ import annotations

import numpy as np

from kirsch.data.dataset import DataSet, Split


def split(labels=(0, 1, 2), value=0.0):
    """Return samples of shape (2,), filled with `value`, with these labels."""
    return Split(np.full((len(labels), 2), value, np.float32), np.array(labels))


def data_set(classes=("a", "b", "c"), **parts):
    """Return the data set "d"; parts that are not given have one sample of each class."""
    return DataSet("d", **{"train": split(), "validation": split(), "test": split(), "classes": classes, **parts})


def normal(count, generator):
    """Return normal random inputs, shape (count, 6), for `kirsch.GeneratedData`."""
    return generator.standard_normal((count, 6))
