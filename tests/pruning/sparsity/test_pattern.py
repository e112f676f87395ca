"""Patterns of zeros, compared with loops over the weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kirsch.errors import UsageError
from kirsch.pruning.sparsity.pattern import Pattern


@pytest.mark.parametrize(("text", "nonzero", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:8", 3, 8), ("1:2", 1, 2)])
def test_each_group_of_m_keeps_its_n_largest_weights(text, nonzero, of):
    scores = np.random.default_rng(0).random((2, 3, 5, 3 * of), np.float32)
    pattern = Pattern.read(text)
    mask = pattern.ratio_mask(scores)
    for index in np.ndindex(2, 3, 5):
        for start in range(0, 3 * of, of):
            group, kept = scores[index][start : start + of], mask[index][start : start + of]
            assert kept.sum() == nonzero
            assert group[kept].min() > group[~kept].max()
    assert 1 - mask.mean() == pytest.approx(pattern.sparsity)


def test_of_equal_weights_the_first_are_kept():
    mask = Pattern.read("2:4").ratio_mask(np.ones((1, 1, 1, 8), np.float32))
    assert mask.ravel().tolist() == [True, True, False, False] * 2


@pytest.mark.parametrize(("text", "rows", "columns"), [("1x4", 1, 4), ("16x1", 16, 1), ("2×3", 2, 3)])
def test_the_score_of_a_block_is_the_mean_of_its_weights(text, rows, columns):
    scores = np.random.default_rng(0).random((2, 32, 5, 12), np.float32)
    pattern = Pattern.read(text)
    units = pattern.units(scores)
    assert units.shape == (2, 32 // rows, 5, 12 // columns)
    for g, i, k, j in itertools.product(range(2), range(32 // rows), range(5), range(12 // columns)):
        block = scores[g, i * rows : (i + 1) * rows, k, j * columns : (j + 1) * columns]
        assert units[g, i, k, j] == pytest.approx(block.mean())


def test_a_mask_of_blocks_spreads_over_their_weights():
    units = np.array([[True, False], [False, True]])[None, :, None]  # (1, 2, 1, 2)
    mask = Pattern.read("2x3").spread(units)[0, :, 0]
    assert mask.tolist() == [[True] * 3 + [False] * 3] * 2 + [[False] * 3 + [True] * 3] * 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("4:4", "keeps 4 of 4"),
        ("0:4", "keeps 0 of 4"),
        ("5:4", "keeps 5 of 4"),
        ("1x1", "a block of one weight"),
        ("0x4", "not a pattern"),
        ("2of4", "not a pattern"),
        ("", "not a pattern"),
        ("-1:4", "not a pattern"),
    ],
)
def test_a_wrong_pattern_is_refused_with_the_forms(text, sentence):
    with pytest.raises(UsageError, match=sentence) as error:
        Pattern.read(text)
    assert "unstructured" in error.value.fix or "2:4" in error.value.fix
