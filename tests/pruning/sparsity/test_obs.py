"""SparseGPT, compared with optimal brain surgeon computed from exact inverses, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.pruning.sparsity import obs
from kirsch.pruning.sparsity.pattern import Pattern
from kirsch.pruning.sparsity.selection import smallest


def layer(rows=6, columns=16, samples=60, seed=0):
    """Return a weight, correlated inputs of shape (samples, columns), and their Gram matrix."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((samples, columns)) @ random.standard_normal((columns, columns))
    return random.standard_normal((rows, columns)), inputs, inputs.T @ inputs


def brute_force(weight, gram, choose, width, damping=obs.DAMPING):
    """Return mask and weights of optimal brain surgeon in the order of the columns.

    A weight w_j of a row becomes zero by the step -w_j / [F⁻¹]_jj · F⁻¹_j, where F is the Hessian of the weights from j
    on (LeCun et al. 1989; Hassibi, Stork 1992): the step that minimizes the error of the output with w_j = 0.
    """
    weight, mask = weight.copy(), np.ones(weight.shape, bool)
    hessian = gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    for j in range(len(gram)):
        if j % width == 0:
            end = min(j + width, len(gram))
            diagonal = np.array([np.linalg.inv(hessian[i:, i:])[0, 0] for i in range(j, end)])
            mask[:, j:end] = choose(j, weight[:, j:end] ** 2 / diagonal)
        inverse = np.linalg.inv(hessian[j:, j:])
        for row in range(len(weight)):
            if not mask[row, j]:
                weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
                weight[row, j] = 0
    return mask, weight


def half(_start, scores):
    return ~smallest(scores, scores.size // 2)


def two_of_four(_start, scores):
    return Pattern.read("2:4").ratio_mask(scores[None, :, None])[0, :, 0]


@pytest.mark.parametrize(("choose", "width"), [(half, 16), (half, 8), (half, 5), (two_of_four, 4)])
@pytest.mark.parametrize("lazy", [4, 8, 128])
def test_the_result_is_that_of_exact_inverses_in_each_row(choose, width, lazy):
    weight, _, gram = layer()
    mask, updated = obs.prune_columns(weight, obs.inverse_factor(gram), choose, width, lazy)
    expected_mask, expected = brute_force(weight, gram, choose, width)
    assert np.array_equal(mask, expected_mask)
    np.testing.assert_allclose(updated, expected, rtol=1e-8, atol=1e-9)


def test_one_zero_is_compensated_as_well_as_least_squares_can():
    """With one zero in the first column, all others are free: the error is that of the best weights."""
    weight, inputs, gram = layer(rows=1)

    def first(start, scores):
        return np.arange(start, start + scores.shape[1])[None] > 0

    _, updated = obs.prune_columns(weight, obs.inverse_factor(gram, damping=0.0), first, 16)
    best = np.linalg.lstsq(inputs[:, 1:], inputs @ weight[0], rcond=None)[0]
    np.testing.assert_allclose(updated[0, 1:], best, rtol=1e-8)


def test_the_score_is_the_increase_of_the_squared_error():
    weight, inputs, gram = layer(rows=1)
    seen = []

    def first(start, scores):
        seen.append(scores[0, 0])
        return np.arange(start, start + scores.shape[1])[None] > 0

    _, updated = obs.prune_columns(weight, obs.inverse_factor(gram, damping=0.0), first, 16)
    assert np.sum((inputs @ (updated - weight)[0]) ** 2) == pytest.approx(seen[0], rel=1e-8)


def test_the_error_of_the_output_is_below_that_of_the_same_mask_without_update():
    weight, inputs, gram = layer(rows=20, columns=32, samples=200)
    mask, updated = obs.prune_columns(weight, obs.inverse_factor(gram), half, 32)
    errors = [np.sum((inputs @ (new - weight).T) ** 2) for new in (updated, weight * mask)]
    assert errors[0] < 0.8 * errors[1]


def test_an_input_that_is_always_zero_does_not_make_the_matrix_singular():
    _, inputs, _ = layer()
    inputs[:, 3] = 0
    assert np.isfinite(obs.inverse_factor(inputs.T @ inputs)).all()
    assert np.isfinite(obs.inverse_factor(np.zeros((4, 4)))).all()


def test_linearly_dependent_inputs_without_damping_are_refused():
    with pytest.raises(np.linalg.LinAlgError):
        obs.inverse_factor(np.ones((4, 4)), damping=0.0)
