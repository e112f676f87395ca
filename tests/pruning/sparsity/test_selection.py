"""Selection of the smallest scores, compared with a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kirsch
from kirsch.errors import UsageError
from kirsch.pruning.sparsity import selection
from kirsch.pruning.sparsity.selection import smallest, smallest_in_rows, smallest_of_all

VALUES = st.floats(0, 2.0**120, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-40, 0.5])
ARRAYS = st.lists(st.lists(VALUES, min_size=1, max_size=20), min_size=1, max_size=4)


@given(ARRAYS, st.floats(0, 1))
def test_the_masks_of_all_arrays_select_the_smallest_values_and_no_others(lists, fraction):
    arrays = [np.array(values, np.float32) for values in lists]
    count = round(fraction * sum(map(len, arrays)))
    masks = dict(smallest_of_all([lambda array=array: array for array in arrays], count))
    selected = np.concatenate([array[masks[index]] for index, array in enumerate(arrays)])
    assert sorted(selected) == sorted(np.concatenate(arrays))[:count]


@given(ARRAYS, st.floats(0, 1))
def test_parts_of_an_array_are_counted_like_the_whole(lists, fraction):
    arrays = [np.array(values, np.float32) for values in lists]
    count = round(fraction * sum(map(len, arrays)))
    sources = [lambda array=array: array for array in arrays]
    whole = dict(smallest_of_all(sources, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PART", 3)
        parts = dict(smallest_of_all(sources, count))
    assert all(np.array_equal(whole[index], parts[index]) for index in whole)


def test_of_equal_values_those_of_the_first_arrays_are_selected():
    arrays = [np.ones(3, np.float32), np.ones((2, 2), np.float32)]
    masks = dict(smallest_of_all([lambda array=array: array for array in arrays], 4))
    assert masks[0].all()
    assert masks[1].tolist() == [[True, False], [False, False]]


def test_the_smallest_of_one_array_are_selected():
    scores = np.random.default_rng(0).random((5, 7))
    for count in (0, 1, 10, 35):
        mask = smallest(scores, count)
        assert mask.sum() == count
        assert np.array_equal(np.sort(scores[mask]), np.sort(scores, axis=None)[:count])


def test_the_smallest_of_each_row_are_selected(monkeypatch):
    monkeypatch.setattr(selection, "PART", 14)  # two rows at a time
    scores, counts = np.random.default_rng(0).random((5, 7)), np.array([0, 7, 3, 1, 2])
    mask = smallest_in_rows(scores, counts)
    for row, kept, count in zip(scores, mask, counts, strict=True):
        assert np.array_equal(np.sort(row[kept]), np.sort(row)[:count])


def test_a_plan_of_a_model_with_masks_is_refused_with_the_call_that_folds_them():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    masked = kirsch.sparsify(model, sparsity=0.5).model
    inputs = torch.randn(2, 4)
    with pytest.raises(UsageError, match="fold_masks"):
        kirsch.plan(kirsch.trace(masked, inputs), kirsch.Goal(macs=0.5), round_to=1)
    graph = kirsch.trace(kirsch.fold_masks(masked), inputs)
    assert kirsch.plan(graph, kirsch.Goal(macs=0.5), round_to=1).groups
