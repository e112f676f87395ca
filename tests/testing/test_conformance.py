"""The conformance suites: everything registered passes them, and each check fails for a thing with its fault."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest

from kirsch import testing
from kirsch.distillation.arrays import check_same_shape, detach, log_softmax, namespace
from kirsch.distillation.losses import LOSSES, soft_target
from kirsch.errors import ShapeError
from kirsch.frameworks.port import trace
from kirsch.frameworks.pytorch.inference.predict import predict
from kirsch.pruning.importance import IMPORTANCES, magnitude
from kirsch.testing import IMPORTANCE_CHECKS, LOSS_CHECKS, WEIGHT_IMPORTANCE_CHECKS, importances, losses

DRAWS = {"random"}
"""Importances that do not follow from the weights."""


def name_of(check):
    return check.__name__


OTHERWISE: dict[tuple[str, str], str] = {
    ("cc", "check_order_of_samples_does_not_matter"): "the authors' code relates each sample to the one after it",
    ("wsld", "check_gradient_is_that_of_finite_differences"): "the weight of a sample is held constant",
}
"""(loss, check) → why a loss of ours cannot pass a check."""


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=name_of)
@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_conforms(loss, check):
    if (loss, check.__name__) in OTHERWISE:
        with pytest.raises(AssertionError):  # an exception that is none any more is to be struck out
            check(LOSSES[loss])
    else:
        check(LOSSES[loss])


@pytest.mark.parametrize("check", IMPORTANCE_CHECKS, ids=name_of)
@pytest.mark.parametrize("importance", list(IMPORTANCES))
def test_every_importance_conforms(importance, check):
    check(IMPORTANCES[importance])


@pytest.mark.parametrize("check", WEIGHT_IMPORTANCE_CHECKS, ids=name_of)
@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if name not in DRAWS])
def test_every_importance_that_draws_nothing_conforms_further(importance, check):
    check(IMPORTANCES[importance])


def test_the_suites_hold_every_check_that_their_files_define():
    for module, suite in ((losses, LOSS_CHECKS), (importances, IMPORTANCE_CHECKS + WEIGHT_IMPORTANCE_CHECKS)):
        assert set(suite) == {thing for name, thing in vars(module).items() if name.startswith("check_")}
        assert len(set(suite)) == len(suite)
    assert all(getattr(testing, name) for name in testing.__all__)


def test_to_list_the_checks_loads_no_framework():
    code = "import sys, kirsch.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ planted losses


def squared(student, teacher):
    check_same_shape(student, teacher)
    return ((student - detach(teacher)) ** 2).sum(-1)


def naive_softmax(scores):
    return namespace(scores).exp(scores) / namespace(scores).exp(scores).sum(-1)[:, None]


def standardized(scores):
    """Over classes; numpy divides the variance by K, PyTorch by K - 1."""
    return (scores - scores.mean(-1)[:, None]) / scores.std(-1)[:, None]


def centred_in_place(student, teacher, *, temperature):
    check_same_shape(student, teacher)
    if isinstance(student, np.ndarray):
        teacher -= teacher.mean()
    return squared(student, teacher).mean()


def with_numpys_warnings(loss):
    @functools.wraps(loss)
    def quiet(*args, **options):
        with np.errstate(all="ignore"):
            return loss(*args, **options)

    return quiet


BAD_LOSSES = [
    ("check_loss_is_a_finite_scalar", lambda s, t, temperature: squared(s, t), r"has shape \(5,\)"),
    (
        "check_loss_is_a_finite_scalar",
        with_numpys_warnings(lambda s, t, temperature: namespace(s).log(s - s).mean()),
        "loss of ordinary values is -inf",
    ),
    (
        "check_loss_is_smallest_when_the_student_equals_the_teacher",
        lambda s, t, temperature: -soft_target(s, t, temperature=temperature),
        "is charged -.*, one that equals the teacher",
    ),
    (
        "check_loss_is_smallest_when_the_student_equals_the_teacher",
        lambda s, t, temperature: squared(s, 1.001 * t).mean(),
        r"a student 0\.0001 away is charged",
    ),
    (
        "check_loss_is_smallest_when_the_student_equals_the_teacher",
        lambda s, t, temperature: 0 * s.sum(),
        "no more than one that equals it",
    ),
    (  # the weights of a batch are made to add up to 1
        "check_parts_of_a_batch_add_up_to_it",
        lambda s, t, temperature: (squared(s, t) * (t * t).sum(-1)).sum() / (t * t).sum(),
        "a mean over samples of two parts is",
    ),
    (  # a weight that is held constant, so that its slope is missing
        "check_gradient_is_that_of_finite_differences",
        lambda s, t, temperature: (detach(log_softmax(s)) * (s - detach(t))).mean(),
        r"the gradient for value \(0, 0\) is",
    ),
    (
        "check_teacher_takes_no_gradient",
        lambda s, t, temperature: ((s - t) ** 2).mean(),
        "the teacher takes a gradient",
    ),
    ("check_teacher_takes_no_gradient", lambda s, t, temperature: (t**2).mean(), "the student takes no gradient"),
    (
        "check_numpy_and_pytorch_agree",
        lambda s, t, temperature: squared(standardized(s), standardized(t)).mean(),
        "numpy gives .*, PyTorch",
    ),
    (
        "check_loss_is_finite_for_huge_values",
        with_numpys_warnings(lambda s, t, temperature: squared(naive_softmax(s), naive_softmax(t)).mean()),
        "loss of huge values is nan",
    ),
    (  # the root of zero has an infinite slope, and the loss itself looks well
        "check_loss_is_finite_for_huge_values",
        lambda s, t, temperature: squared(s, t).mean() ** 0.5,
        "gradient for huge values is not finite",
    ),
    (
        "check_loss_is_finite_in_half_precision",
        lambda s, t, temperature: squared(s, t).mean(),
        "32 bits are needed",
    ),
    (  # 100 is far beside the differences, in 8 bits
        "check_loss_is_finite_in_half_precision",
        lambda s, t, temperature: squared(s + 100, t + 100).float().mean(),
        r"the loss of torch.bfloat16 values is .*; in 64 bits it is",
    ),
    (  # of the right value, and of a slope that is half too long
        "check_loss_is_finite_in_half_precision",
        lambda s, t, temperature: (
            (1.5 if s.dtype.itemsize == 2 else 1.0)
            * (squared(s.float(), t.float()).mean() - detach(squared(s.float(), t.float()).mean()))
        ),
        r"the gradient of torch.bfloat16 values is .* from that in 64 bits",
    ),
    (  # 1e4 to the tenth power is beyond 32 bits
        "check_loss_is_finite_for_huge_values",
        lambda s, t, temperature: (squared(s, t).mean() + 1e-3) ** 5,
        "the loss of huge torch.float32 values is inf",
    ),
    (
        "check_masked_positions_contribute_nothing",
        lambda s, t, temperature, mask: soft_target(s, t, mask=mask if s.ndim == 2 else None),
        r"with 0\.0 under the mask the loss is",
    ),
    (
        "check_masked_positions_contribute_nothing",
        lambda s, t, temperature, mask: (squared(s, t) * mask).sum() / mask.sum(),
        "with nan under the mask the loss is nan",
    ),
    (
        "check_order_of_samples_does_not_matter",
        lambda s, t, temperature: squared(s, t)[0] + squared(s, t).mean(),
        "in another order",
    ),
    ("check_loss_is_a_mean_over_samples", lambda s, t, temperature: squared(s, t).sum(), "each sample twice"),
    (
        "check_unequal_shapes_are_refused",
        lambda s, t, temperature: ((s - detach(t)) ** 2).mean(),
        r"shape \(5, 7\) and \(1, 7\) are accepted",
    ),
    (
        "check_unequal_shapes_are_refused",
        lambda s, t, temperature: namespace(s).stack([s, detach(t)]).mean(),
        "raise a ValueError; call arrays.check_same_shape first",
    ),
    ("check_inputs_are_left_as_they_are", centred_in_place, "the teacher's values are changed"),
]


@pytest.mark.parametrize(("check", "loss", "sentence"), BAD_LOSSES)
def test_a_loss_with_a_fault_is_caught(check, loss, sentence):
    with pytest.raises(AssertionError, match=sentence):
        getattr(losses, check)(loss)


# ------------------------------------------------------------------------------------------------ planted importances


def relative_to_the_largest(graph, group, *, norm, seed):
    scores = magnitude(graph, group, norm=norm, seed=seed) * weight_of(graph, group).max()
    with np.errstate(invalid="ignore"):
        return scores / scores.max()


def weight_of(graph, group):
    """|w| along the first axis of the group's first parameter."""
    name, axis = group.footprint[0]
    weights = np.abs(graph.values(name))
    return weights.mean(axis=tuple(other for other in range(weights.ndim) if other != axis))


def logarithm_of_scales(graph, group, *, norm, seed):
    scales = next((graph.values(name) for name, _ in group.footprint if "norm" in name), np.ones(group.size))
    with np.errstate(invalid="ignore"):
        return np.log(scales)


def one_for_each_layer(graph, group, *, norm, seed):
    return np.ones(group.size * max(len(group.layers) - 2, 1))


def that_writes(graph, group, *, norm, seed):
    weights = graph.values(group.footprint[0][0])
    np.abs(weights, out=weights)
    return weight_of(graph, group)


def that_seeds_the_world(graph, group, *, norm, seed):
    np.random.seed(seed)  # noqa: NPY002 - the fault
    return np.random.uniform(size=group.size)  # noqa: NPY002 - the fault


def that_draws_from_the_world(graph, group, *, norm, seed):
    return np.random.uniform(size=group.size)  # noqa: NPY002 - the fault


def that_draws_from_pytorch(graph, group, *, norm, seed):
    import torch

    return torch.rand(group.size).numpy()


def that_changes_its_mind():
    """Scores that are turned upside down at every other look at a group."""
    looks = itertools.count()
    size_of_network = 2

    def scores(graph, group, *, norm, seed):
        assert len(graph.groups) == size_of_network
        return np.arange(group.size) * (-1.0) ** (next(looks) // size_of_network)

    return scores


BAD_IMPORTANCES = [
    (
        "check_scores_are_one_finite_number_a_unit",
        lambda graph, group, *, norm, seed: magnitude(graph, group, norm=norm, seed=seed).mean(),
        r"'0' has 8 units; the scores have shape \(\)",
    ),
    (  # sound for norm 2 alone
        "check_scores_are_one_finite_number_a_unit",
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
        one_for_each_layer,
        "'stem' has 8 units; the scores have shape",
    ),
    (
        "check_scores_where_a_unit_is_many_channels",
        lambda graph, group, *, norm, seed: weight_of(graph, group),
        r"'0' has 4 units; the scores have shape \(8,\)",
    ),
    ("check_scores_of_zero_weights_are_finite", relative_to_the_largest, "the scores of '0' are .*nan"),
    (
        "check_scores_follow_from_the_seed",
        lambda graph, group, *, norm, seed: np.random.default_rng().uniform(size=group.size),
        "the same call gives other scores for 'stem'",
    ),
    ("check_scores_follow_from_the_seed", that_seeds_the_world, "moves the random state"),
    ("check_scores_follow_from_the_seed", that_draws_from_the_world, "moves the random state"),
    ("check_scores_follow_from_the_seed", that_draws_from_pytorch, "moves the random state"),
    ("check_weights_are_left_as_they_are", that_writes, r"stem\.weight is changed"),
    ("check_plan_removes_exactly_the_lowest_scores", that_changes_its_mind(), "goes with .*, while one with .* stays"),
    (
        "check_scores_move_along_with_the_units",
        lambda graph, group, *, norm, seed: np.arange(group.size) + magnitude(graph, group, norm=norm, seed=seed),
        "when their order is another",
    ),
    ("check_scores_move_along_with_the_units", IMPORTANCES["random"], "when their order is another"),
]


@pytest.mark.parametrize(("check", "importance", "sentence"), BAD_IMPORTANCES)
def test_an_importance_with_a_fault_is_caught(check, importance, sentence):
    known = list(IMPORTANCES)
    with pytest.raises(AssertionError, match=sentence):
        getattr(importances, check)(importance)
    assert list(IMPORTANCES) == known


def test_a_fault_is_planted_for_every_check():
    planted = {check for check, _, _ in BAD_LOSSES + BAD_IMPORTANCES}
    assert planted == {check.__name__ for check in LOSS_CHECKS + IMPORTANCE_CHECKS + WEIGHT_IMPORTANCE_CHECKS}


def test_units_in_another_order_compute_the_same():
    """What `check_scores_move_along_with_the_units` relies on."""
    image = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    for build in (importances._chain, importances._residual, importances._grouped):
        plain, moved = build(), build()
        graph = trace(plain, importances._image())
        for group in graph.groups:
            importances._reorder(moved, graph, group, np.roll(np.arange(group.size), 1))
        first, second = (predict(model, (image,)) for model in (plain, moved))
        assert not np.array_equal(*(next(iter(model.state_dict().values())) for model in (plain, moved)))
        np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-4)  # float32; sums run in another order


def test_a_loss_that_raises_its_own_shape_error_is_taken():
    def strict(student, teacher, *, temperature):
        if student.shape != teacher.shape:
            raise ShapeError("no")
        return squared(student, teacher).mean()

    losses.check_unequal_shapes_are_refused(strict)
