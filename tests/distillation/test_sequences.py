"""The loss of CTC frames, and the filter for sequences that a teacher generated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillation.examples import with_options
from kirsch.distillation.losses import soft_target
from kirsch.distillation.losses.sequences import (
    TargetLimits,
    count_most_frequent,
    ctc_frames,
    filter_targets,
)
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.testing import LOSS_CHECKS

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.standard_normal((2, 2, 6, 5))  # logits (N, L, K)


# ------------------------------------------------------------------------------------------------ frames


OTHER_OPTIONS = [
    {"blank": "drop", "threshold": 0.5},
    {"blank": "weight"},
    {"blank": "weight", "blank_class": -1},
]


@pytest.mark.parametrize(
    "check",  # the weights are normalized over the batch, so the losses of parts do not add up
    [check for check in LOSS_CHECKS if check.__name__ != "check_parts_of_a_batch_add_up_to_it"],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=str)
def test_ctc_frames_conforms_with_other_options(options, check):
    check(with_options(ctc_frames, **options))


def test_ctc_frames_with_all_blanks_kept_equals_soft_targets():
    mask = np.arange(6) < np.array([[6], [2]])
    for temperature in (1.0, 3.0):
        value = ctc_frames(STUDENT, TEACHER, temperature=temperature, mask=mask)
        assert value == pytest.approx(soft_target(STUDENT, TEACHER, temperature=temperature, mask=mask), rel=1e-14)


# Two classes: the teacher's probability of blank is 3/4, 1/2 and 1/4; the student's is 1/2.
FRAMES = np.log([[[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]])
UNIFORM = np.zeros((1, 3, 2))
DIVERGENCE = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # KL divergence of the first and of the last frame


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blank": "keep"}, (DIVERGENCE + 0 + DIVERGENCE) / 3),
        ({"blank": "drop", "threshold": 0.6}, (0 + DIVERGENCE) / 2),
        ({"blank": "drop", "threshold": 0.4}, DIVERGENCE),
        ({"blank": "drop", "threshold": 0.6, "blank_class": 1}, (DIVERGENCE + 0) / 2),
        ({"blank": "weight"}, (0.25 * DIVERGENCE + 0.5 * 0 + 0.75 * DIVERGENCE) / 1.5),
        ({"blank": "weight", "blank_class": -1}, (0.75 * DIVERGENCE + 0.5 * 0 + 0.25 * DIVERGENCE) / 1.5),
    ],
    ids=str,
)
def test_weights_of_blank_frames_equal_their_closed_form(framework, options, expected):
    assert float(ctc_frames(framework(UNIFORM), framework(FRAMES), **options)) == pytest.approx(expected, rel=1e-13)


def test_the_temperature_does_not_change_which_frames_are_dropped():
    """At temperature 100 the blank probability of the first frame is below the threshold."""
    value = ctc_frames(UNIFORM, FRAMES, blank="drop", threshold=0.6, temperature=100.0)
    assert value == pytest.approx(soft_target(UNIFORM[:, 1:], FRAMES[:, 1:], temperature=100.0), rel=1e-9)


def test_loss_and_gradient_are_0_if_every_frame_is_dropped(framework):
    blanks = framework(np.log([[[0.99, 0.01]] * 3]))
    assert float(ctc_frames(framework(UNIFORM), blanks, blank="drop")) == 0
    student = torch.from_numpy(UNIFORM.copy()).requires_grad_()
    ctc_frames(student, torch.as_tensor(blanks), blank="drop").backward()
    assert not student.grad.any()


@pytest.mark.parametrize("blank", ["keep", "drop", "weight"])
def test_masked_frames_do_not_count(blank):
    mask = np.arange(6) < np.array([[4], [2]])
    student, teacher = (np.concatenate([side[0, :4], side[1, :2]])[None] for side in (STUDENT, TEACHER))
    options = {"blank": blank, "threshold": 0.4}
    value = ctc_frames(STUDENT, TEACHER, mask=mask, **options)
    assert value == pytest.approx(ctc_frames(student, teacher, **options), rel=1e-13)
    with pytest.raises(DataError, match="All targets are masked"):
        ctc_frames(STUDENT, TEACHER, mask=np.zeros((2, 6), bool), **options)


def test_unequal_numbers_of_frames_are_refused():
    message = (
        r"The student returns 3 frames, the teacher 6, for the same audio\. Their strides differ, so frame i is a "
        r"different time in each\. Use models with the same stride"
    )
    with pytest.raises(ShapeError, match=message):
        ctc_frames(STUDENT[:, ::2], TEACHER)
    with pytest.raises(ShapeError, match=r"shape \(2, 6, 5\), the teacher's \(2, 6, 4\)"):
        ctc_frames(STUDENT, TEACHER[..., :4])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"blank": "skip"}, UnknownNameError, "There is no value of `blank` 'skip'"),
        ({"blank_class": 5}, UsageError, "`blank_class` is 5; there are 5 classes"),
        ({"threshold": 95}, UsageError, "`threshold` is 95; a probability from 0 to 1 is needed"),
        ({"temperature": 0}, UsageError, "The temperature is 0"),
    ],
)
def test_invalid_options_of_ctc_frames_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ctc_frames(STUDENT, TEACHER, **options)


# ------------------------------------------------------------------------------------------------ generated targets


def reasons(filtered):
    return {record.index: record.reason for record in filtered.dropped}


def test_each_unsuitable_target_is_dropped_with_a_reason():
    sources = ["abcd", "abcd", "abcd", "abcd", "abcd", "efgh"]
    targets = ["wxyz", "", "w", "wxyzwxyzw", "wxyz", "wxyz"]
    filtered = filter_targets(targets, sources)
    assert filtered.kept == (0, 5)  # the same target with another source is not a duplicate
    assert reasons(filtered) == {1: "empty", 2: "short", 3: "long", 4: "duplicate"}
    assert filtered.counts == {"empty": 1, "short": 1, "long": 1, "duplicate": 1}
    details = {record.index: record.detail for record in filtered.dropped}
    assert details[2] == "It has 1 tokens, the source 4; the ratio must be at least 0.5."
    assert details[3] == "It has 9 tokens, the source 4; the ratio must be at most 2.0."
    assert details[4] == "It equals target 0."


def test_targets_exactly_at_a_limit_are_kept():
    limits = TargetLimits(min_length_ratio=0.5, max_length_ratio=2.0, min_log_probability=-1.0)
    filtered = filter_targets(["ab", "abcdefgh"], ["abcd", "abcd"], [-1.0, -0.5], limits=limits)
    assert filtered.kept == (0, 1)


def test_targets_with_repeated_ngrams_are_dropped():
    limits = TargetLimits(ngram=2, max_repeats=2)
    filtered = filter_targets([[1, 2, 3, 1, 2], [1, 2, 3, 1, 2, 4, 1, 2], [5, 5, 5, 5]], limits=limits)
    assert filtered.kept == (0,)
    assert filtered.dropped[0].detail == "An n-gram of 2 tokens occurs 3 times; the limit is 2."
    assert reasons(filtered) == {1: "repetitive", 2: "repetitive"}


def test_targets_with_a_low_log_probability_are_dropped():
    limits = TargetLimits(min_log_probability=-1.0)
    filtered = filter_targets(["ab", "cd", "ef"], log_probabilities=[-0.5, -1.5, math.nan], limits=limits)
    assert filtered.kept == (0,)
    assert reasons(filtered) == {1: "unlikely", 2: "unlikely"}
    assert filtered.dropped[0].detail == "Its mean log-probability is -1.5; the minimum is -1."


def test_without_sources_equal_targets_are_duplicates_and_lengths_are_not_checked():
    filtered = filter_targets(["abcdefghijkl", "a", "a"])
    assert filtered.kept == (0, 1)
    assert reasons(filtered) == {2: "duplicate"}


def test_overlapping_ngrams_are_counted():
    assert count_most_frequent("aaaa", 2) == 3
    assert count_most_frequent("abcabc", 3) == 2
    assert count_most_frequent("ab", 3) == 0


@given(st.lists(st.tuples(st.text("ab", max_size=6), st.text("xy", max_size=12)), max_size=12))
@settings(deadline=None, derandomize=True)
def test_each_target_is_kept_or_dropped_and_filtering_is_idempotent(pairs):
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    filtered = filter_targets(targets, sources)
    indices = sorted([*filtered.kept, *reasons(filtered)])
    assert indices == list(range(len(pairs)))
    again = filter_targets([targets[i] for i in filtered.kept], [sources[i] for i in filtered.kept])
    assert again.kept == tuple(range(len(filtered.kept)))
    for record in filtered.dropped:
        if record.reason == "duplicate":
            assert pairs[record.index] in pairs[: record.index]


def test_invalid_limits_and_inputs_of_the_filter_are_refused():
    with pytest.raises(UsageError, match="Log-probabilities of the teacher need a limit"):
        filter_targets(["a"], log_probabilities=[-1.0])
    with pytest.raises(UsageError, match="Log-probabilities of the teacher need a limit"):
        filter_targets(["a"], limits=TargetLimits(min_log_probability=-1.0))
    with pytest.raises(ShapeError, match="There are 2 targets and 1 sources; equal numbers are needed"):
        filter_targets(["a", "b"], ["a"])
    with pytest.raises(UsageError, match=r"`min_length_ratio` is 2\.0, `max_length_ratio` 1\.0"):
        TargetLimits(min_length_ratio=2.0, max_length_ratio=1.0)
    with pytest.raises(UsageError, match="`ngram` is 0, `max_repeats` 3; integers of at least 1"):
        TargetLimits(ngram=0)
    with pytest.raises(UsageError, match="`ngram` is 4, `max_repeats` 0; integers of at least 1"):
        TargetLimits(max_repeats=0)


def test_the_smallest_limits_leave_out_targets_that_repeat_a_token():
    limits = TargetLimits(min_length_ratio=0, max_length_ratio=0, ngram=1, max_repeats=1)
    assert filter_targets(["abc", "abca"], limits=limits).kept == (0,)
