"""UCI digits from scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.data.sources import load_data
from kirsch.errors import DataError

datasets = pytest.importorskip("sklearn.datasets")


def digits(seed=0, **options):
    return load_data("digits", options, seed=seed)


def as_sets(data):
    """Return the samples of each part as a set of bytes."""
    return [{sample.tobytes() for sample in part.inputs} for part in (data.train, data.validation, data.test)]


def test_each_sample_is_in_exactly_one_part():
    """All 1,797 images are different, so that sets can be compared."""
    parts = as_sets(digits())
    assert [len(part) for part in parts] == [1078, 360, 359]
    assert len(set.union(*parts)) == 1078 + 360 + 359 == 1797


def test_each_class_is_split_by_the_fractions():
    data = digits(train=0.5, validation=0.3)
    totals = np.bincount(datasets.load_digits().target)
    assert np.bincount(data.train.labels).tolist() == [round(0.5 * n) for n in totals]
    assert np.bincount(data.test.labels).tolist() == [n - round(0.8 * n) for n in totals]


def test_inputs_keep_their_labels_and_are_standardized_by_the_training_part():
    data = digits()
    assert data.train.inputs.shape == (1078, 1, 8, 8)
    assert data.train.inputs.mean() == pytest.approx(0, abs=1e-5)  # float32 over 69,000 pixels
    assert data.train.inputs.std() == pytest.approx(1, abs=1e-5)
    bunch = datasets.load_digits()
    mean, deviation = _scale(data, bunch)
    known = {
        np.rint(image).astype(int).tobytes(): label for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    for part in (data.train, data.validation, data.test):
        pixels = np.rint(part.inputs[:, 0].astype(float) * deviation + mean).astype(int)
        assert [known[image.tobytes()] for image in pixels] == part.labels.tolist()


def _scale(data, bunch):
    """Return mean and deviation of the standardization, from the known range of pixels, 0 to 16."""
    low = min(part.inputs.min() for part in (data.train, data.validation, data.test))
    high = max(part.inputs.max() for part in (data.train, data.validation, data.test))
    deviation = bunch.images.max() / (float(high) - float(low))
    return -float(low) * deviation, deviation


def test_split_depends_on_the_seed():
    assert digits(1).sha256 == digits(1).sha256
    assert digits(1).sha256 != digits(2).sha256


@pytest.mark.parametrize(
    ("options", "part"), [({"train": 0.7, "validation": 0.3}, "test"), ({"validation": 0}, "validation")]
)
def test_empty_part_is_refused(options, part):
    with pytest.raises(DataError, match=f"The {part} part of digits is empty"):
        digits(**options)
