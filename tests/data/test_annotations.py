"""Annotations of arguments accept values with samples, and no others."""

from types import SimpleNamespace

import numpy as np
import pytest

from kirsch.data.annotations import has_arrays


@pytest.mark.parametrize(
    "container", [lambda array: array, lambda array: [array], lambda array: SimpleNamespace(x=array)]
)
def test_only_arrays_with_an_axis_for_the_samples_count(container):
    assert has_arrays(container(np.zeros(3)))
    assert not has_arrays(container(np.array(3.0)))
