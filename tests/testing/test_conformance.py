"""Conformance suites: all registered losses and importances pass, and each check fails for a planted fault."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest

from kirsch import ops, testing
from kirsch.distillation.losses import LOSSES, soft_target
from kirsch.distillation.losses.loss import check_same_shape
from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.pytorch.inference.predict import predict
from kirsch.frameworks.trace import trace
from kirsch.pruning.importance import IMPORTANCES, magnitude
from kirsch.testing import IMPORTANCE_CHECKS, LOSS_CHECKS, PERMUTATION_CHECKS, importances, losses

RANDOM = {"random", "hessian"}
"""Importances that do not depend on the weights alone."""


def name_of(check):
    return check.__name__


EXCEPTIONS: dict[tuple[str, str], str] = {
    ("cc", "check_order_of_samples_does_not_matter"): "the authors' code relates each sample to the one after it",
    ("wsld", "check_gradient_equals_finite_differences"): "the weight of a sample is detached",
}
"""(loss, check) → reason why a registered loss cannot pass a check."""


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=name_of)
@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_registered_loss_passes_the_suite(loss, check):
    if (loss, check.__name__) in EXCEPTIONS:
        with pytest.raises(AssertionError):  # if the check passes, remove the entry
            check(LOSSES[loss])
    else:
        check(LOSSES[loss])


@pytest.mark.parametrize("check", IMPORTANCE_CHECKS, ids=name_of)
@pytest.mark.parametrize("importance", list(IMPORTANCES))
def test_every_registered_importance_passes_the_suite(importance, check):
    if importance == "bn_scale":  # the networks have groups without batch normalization
        with pytest.raises(UsageError, match="No batch normalization with a scale"):
            check(IMPORTANCES[importance])
    else:
        check(IMPORTANCES[importance])


@pytest.mark.parametrize("check", PERMUTATION_CHECKS, ids=name_of)
@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if name not in (*RANDOM, "bn_scale")])
def test_every_importance_without_random_numbers_passes_the_additional_suite(importance, check):
    check(IMPORTANCES[importance])


def test_suites_contain_every_check_of_their_modules():
    for module, suite in ((losses, LOSS_CHECKS), (importances, IMPORTANCE_CHECKS + PERMUTATION_CHECKS)):
        assert set(suite) == {value for name, value in vars(module).items() if name.startswith("check_")}
        assert len(set(suite)) == len(suite)
    assert all(getattr(testing, name) for name in testing.__all__)


def test_importing_the_suites_imports_no_framework():
    code = "import sys, kirsch.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ planted losses


def squared(student, teacher):
    check_same_shape(student, teacher)
    return ((student - ops.detach(teacher)) ** 2).sum(-1)


def naive_softmax(logits):
    return ops.exp(logits) / ops.exp(logits).sum(-1)[:, None]


def standardized(logits):
    """Standardize over classes; numpy divides the variance by K, PyTorch by K - 1."""
    return (logits - logits.mean(-1)[:, None]) / logits.std(-1)[:, None]


def centered_in_place(student, teacher, *, temperature):
    check_same_shape(student, teacher)
    if isinstance(student, np.ndarray):
        teacher -= teacher.mean()
    return squared(student, teacher).mean()


def without_numpy_warnings(loss):
    @functools.wraps(loss)
    def quiet(*args, **options):
        with np.errstate(all="ignore"):
            return loss(*args, **options)

    return quiet


BAD_LOSSES = [
    ("check_loss_is_a_finite_scalar", lambda s, t, temperature: squared(s, t), r"has shape \(5,\); expected a scalar"),
    (
        "check_loss_is_a_finite_scalar",
        without_numpy_warnings(lambda s, t, temperature: ops.log(s - s).mean()),
        "loss of ordinary values is -inf",
    ),
    (
        "check_loss_is_smallest_when_the_student_equals_the_teacher",
        lambda s, t, temperature: -soft_target(s, t, temperature=temperature),
        "is -.*, that of a student equal to the teacher",
    ),
    (
        "check_loss_is_smallest_when_the_student_equals_the_teacher",
        lambda s, t, temperature: squared(s, 1.001 * t).mean(),
        r"the loss of a student at distance 0\.0001 is",
    ),
    (
        "check_loss_is_smallest_when_the_student_equals_the_teacher",
        lambda s, t, temperature: 0 * s.sum(),
        "not above that of an equal one",
    ),
    (  # weights of the samples are normalized within the batch
        "check_parts_of_a_batch_add_up_to_it",
        lambda s, t, temperature: (squared(s, t) * (t * t).sum(-1)).sum() / (t * t).sum(),
        "the mean over samples of two parts is",
    ),
    (  # a detached weight: the gradient lacks its slope
        "check_gradient_equals_finite_differences",
        lambda s, t, temperature: (ops.detach(ops.log_softmax(s)) * (s - ops.detach(t))).mean(),
        r"the gradient at \(0, 0\) is",
    ),
    (
        "check_teacher_has_no_gradient",
        lambda s, t, temperature: ((s - t) ** 2).mean(),
        "the teacher has a gradient",
    ),
    ("check_teacher_has_no_gradient", lambda s, t, temperature: (t**2).mean(), "the student has no gradient"),
    (
        "check_numpy_and_pytorch_agree",
        lambda s, t, temperature: squared(standardized(s), standardized(t)).mean(),
        "the loss is .* in numpy, .* in PyTorch",
    ),
    (
        "check_loss_is_finite_for_huge_values",
        without_numpy_warnings(lambda s, t, temperature: squared(naive_softmax(s), naive_softmax(t)).mean()),
        "loss of huge values is nan",
    ),
    (  # the square root of zero has an infinite slope, and the loss is finite
        "check_loss_is_finite_for_huge_values",
        lambda s, t, temperature: squared(s, t).mean() ** 0.5,
        "gradient for huge values is not finite",
    ),
    (
        "check_loss_is_finite_in_half_precision",
        lambda s, t, temperature: squared(s, t).mean(),
        "expected torch.float32",
    ),
    (  # bfloat16 has 8 significant bits, too few for the differences of values near 100
        "check_loss_is_finite_in_half_precision",
        lambda s, t, temperature: squared(s + 100, t + 100).float().mean(),
        r"the loss of torch.bfloat16 values is .*; in 64 bits it is",
    ),
    (  # the value is 0 in each type, but the gradient in 16 bits is 1.5 times that in 64 bits
        "check_loss_is_finite_in_half_precision",
        lambda s, t, temperature: (
            (1.5 if s.dtype.itemsize == 2 else 1.0)
            * (squared(s.float(), t.float()).mean() - ops.detach(squared(s.float(), t.float()).mean()))
        ),
        r"the gradient of torch.bfloat16 values has the error",
    ),
    (  # the tenth power of 1e4 overflows float32
        "check_loss_is_finite_for_huge_values",
        lambda s, t, temperature: (squared(s, t).mean() + 1e-3) ** 5,
        "the loss of huge torch.float32 values is inf",
    ),
    (
        "check_masked_positions_contribute_nothing",
        lambda s, t, temperature, mask: soft_target(s, t, mask=mask if s.ndim == 2 else None),
        r"with 0\.0 at masked positions the loss is",
    ),
    (
        "check_masked_positions_contribute_nothing",
        lambda s, t, temperature, mask: (squared(s, t) * mask).sum() / mask.sum(),
        "with nan at masked positions the loss is nan",
    ),
    (
        "check_order_of_samples_does_not_matter",
        lambda s, t, temperature: squared(s, t)[0] + squared(s, t).mean(),
        "for the same samples in another order",
    ),
    ("check_loss_is_a_mean_over_samples", lambda s, t, temperature: squared(s, t).sum(), "with each sample twice"),
    (
        "check_unequal_shapes_are_refused",
        lambda s, t, temperature: ((s - ops.detach(t)) ** 2).mean(),
        r"shape \(5, 7\) and \(1, 7\) are accepted",
    ),
    (
        "check_unequal_shapes_are_refused",
        lambda s, t, temperature: ops.stack([s, ops.detach(t)]).mean(),
        "raise a ValueError; call check_same_shape first",
    ),
    ("check_inputs_are_not_changed", centered_in_place, "the teacher's values are changed"),
]


@pytest.mark.parametrize(("check", "loss", "sentence"), BAD_LOSSES)
def test_faulty_loss_fails_its_check(check, loss, sentence):
    with pytest.raises(AssertionError, match=sentence):
        getattr(losses, check)(loss)


# ------------------------------------------------------------------------------------------------ planted importances


def relative_to_the_largest(graph, group, *, norm, seed):
    scores = magnitude(graph, group, norm=norm, seed=seed) * weight_of(graph, group).max()
    with np.errstate(invalid="ignore"):
        return scores / scores.max()


def weight_of(graph, group):
    """Return the mean of |w| for each index of the axis of the group's first parameter."""
    name, axis = group.footprint[0]
    weights = np.abs(graph.values(name))
    return weights.mean(axis=tuple(other for other in range(weights.ndim) if other != axis))


def logarithm_of_scales(graph, group, *, norm, seed):
    scales = next((graph.values(name) for name, _ in group.footprint if "norm" in name), np.ones(group.size))
    with np.errstate(invalid="ignore"):
        return np.log(scales)


def one_score_per_layer(graph, group, *, norm, seed):
    return np.ones(group.size * max(len(group.layers) - 2, 1))


def writes_to_weights(graph, group, *, norm, seed):
    weights = graph.values(group.footprint[0][0])
    np.abs(weights, out=weights)
    return weight_of(graph, group)


def seeds_the_global_state(graph, group, *, norm, seed):
    np.random.seed(seed)  # noqa: NPY002 - the fault
    return np.random.uniform(size=group.size)  # noqa: NPY002 - the fault


def draws_from_the_global_state(graph, group, *, norm, seed):
    return np.random.uniform(size=group.size)  # noqa: NPY002 - the fault


def draws_from_pytorch(graph, group, *, norm, seed):
    import torch

    return torch.rand(group.size).numpy()


def inconsistent():
    """Return an importance that reverses its scores at every second call for the network."""
    calls = itertools.count()
    size_of_network = 2

    def scores(graph, group, *, norm, seed):
        assert len(graph.groups) == size_of_network
        return np.arange(group.size) * (-1.0) ** (next(calls) // size_of_network)

    return scores


BAD_IMPORTANCES = [
    (
        "check_each_unit_has_one_finite_score",
        lambda graph, group, *, norm, seed: magnitude(graph, group, norm=norm, seed=seed).mean(),
        r"'0' has 8 units; the scores have shape \(\)",
    ),
    (  # NaN for norm 1
        "check_each_unit_has_one_finite_score",
        lambda graph, group, *, norm, seed: np.full(group.size, np.nan if norm == 1 else 1.0),
        "the scores of '0' are .*nan",
    ),
    (
        "check_scores_where_normalization_and_a_residual_couple_layers",
        logarithm_of_scales,
        "the scores of 'stem' are .*nan",
    ),
    (
        "check_scores_where_normalization_and_a_residual_couple_layers",
        one_score_per_layer,
        "'stem' has 8 units; the scores have shape",
    ),
    (
        "check_scores_where_a_unit_is_many_channels",
        lambda graph, group, *, norm, seed: weight_of(graph, group),
        r"'0' has 4 units; the scores have shape \(8,\)",
    ),
    ("check_scores_of_zero_weights_are_finite", relative_to_the_largest, "the scores of '0' are .*nan"),
    (
        "check_scores_depend_on_the_seed_alone",
        lambda graph, group, *, norm, seed: np.random.default_rng().uniform(size=group.size),
        "the same call returns different scores for 'stem'",
    ),
    ("check_scores_depend_on_the_seed_alone", seeds_the_global_state, "changes the global random state"),
    ("check_scores_depend_on_the_seed_alone", draws_from_the_global_state, "changes the global random state"),
    ("check_scores_depend_on_the_seed_alone", draws_from_pytorch, "changes the global random state"),
    ("check_weights_are_not_changed", writes_to_weights, r"stem\.weight is changed"),
    (
        "check_plan_removes_exactly_the_lowest_scores",
        inconsistent(),
        "removes a unit of .* with score .* and keeps one",
    ),
    (
        "check_scores_are_permuted_with_the_units",
        lambda graph, group, *, norm, seed: np.arange(group.size) + magnitude(graph, group, norm=norm, seed=seed),
        "the permuted units of .* have the scores",
    ),
    ("check_scores_are_permuted_with_the_units", IMPORTANCES["random"], "the permuted units of .* have the scores"),
]


@pytest.mark.parametrize(("check", "importance", "sentence"), BAD_IMPORTANCES)
def test_faulty_importance_fails_its_check(check, importance, sentence):
    known = list(IMPORTANCES)
    with pytest.raises(AssertionError, match=sentence):
        getattr(importances, check)(importance)
    assert list(IMPORTANCES) == known


def test_every_check_has_a_planted_fault():
    planted = {check for check, _, _ in BAD_LOSSES + BAD_IMPORTANCES}
    assert planted == {check.__name__ for check in LOSS_CHECKS + IMPORTANCE_CHECKS + PERMUTATION_CHECKS}


def test_permuted_units_compute_the_same_function():
    """`check_scores_are_permuted_with_the_units` depends on this."""
    image = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    for build in (importances._chain, importances._residual, importances._grouped):
        plain, permuted = build(), build()
        graph = trace(plain, importances._image())
        for group in graph.groups:
            importances._permute(permuted, graph, group, np.roll(np.arange(group.size), 1))
        first, second = (predict(model, (image,)) for model in (plain, permuted))
        assert not np.array_equal(*(next(iter(model.state_dict().values())) for model in (plain, permuted)))
        np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-4)  # float32, and the order of summation differs


def test_loss_with_its_own_shape_check_passes():
    def strict(student, teacher, *, temperature):
        if student.shape != teacher.shape:
            raise ShapeError("The shapes differ.")
        return squared(student, teacher).mean()

    losses.check_unequal_shapes_are_refused(strict)
