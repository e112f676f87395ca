"""UCI digits from scikit-learn: 1,797 gray images of 8 x 8 pixels, ten classes. Nothing is downloaded."""

from __future__ import annotations

import numpy as np

from kirsch.data.dataset import DataSet, Split
from kirsch.data.sources.registry import SOURCES
from kirsch.errors import MissingExtraError


@SOURCES.register("digits")
def digits(*, seed: int, train: float = 0.6, validation: float = 0.2) -> DataSet:
    """Return the digits, split by class.

    Args:
        seed: seed of the split.
        train, validation: fractions of each class; the rest is the test part.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - optional dependency
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "tasks", "for the digits data") from error
    bunch = load_digits()
    images, labels = bunch.images[:, None].astype(np.float32), bunch.target.astype(np.int64)
    random = np.random.default_rng(seed)
    parts: list[list[int]] = [[], [], []]
    for label in range(10):
        members = random.permutation(np.flatnonzero(labels == label))
        first, second = round(train * len(members)), round((train + validation) * len(members))
        for part, chosen in zip(parts, (members[:first], members[first:second], members[second:]), strict=True):
            part.extend(chosen.tolist())
    mean, deviation = images[parts[0]].mean(), images[parts[0]].std()
    first_part, second_part, third_part = (
        Split((images[part] - mean) / deviation, labels[part]) for part in map(sorted, parts)
    )
    return DataSet("digits", first_part, second_part, third_part, classes=tuple(str(label) for label in range(10)))
