"""Alignment of causal models, frames of CTC, and the sieve for what a teacher generates."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kirsch.distillation.losses import soft_target
from kirsch.distillation.losses.sequences import (
    TargetLimits,
    causal,
    ctc_frames,
    mask_of_lengths,
    most_repeats,
    sift_targets,
)
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.testing import LOSS_CHECKS

FRAMEWORKS = [np.asarray, lambda values: torch.from_numpy(np.asarray(values))]
RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.standard_normal((2, 2, 6, 5))  # scores (N, L, K)
# A prompt of two tokens and an answer of three; a prompt of one, an answer of two, and padding.
LABELS = np.array([[-100, -100, 4, 1, 3, -100], [-100, 2, 0, -100, -100, -100]])

both = pytest.mark.parametrize("make", FRAMEWORKS, ids=["numpy", "torch"])


# ------------------------------------------------------------------------------------------------ alignment


@both
def test_a_position_is_aligned_with_the_token_after_it(make):
    scores, labels, mask = causal(make(STUDENT), make(LABELS))
    np.testing.assert_array_equal(scores, STUDENT[:, :5])
    np.testing.assert_array_equal(labels, LABELS[:, 1:])
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


def test_both_sides_are_aligned_at_once():
    sides, _, mask = causal({"student": STUDENT, "teacher": TEACHER}, LABELS)
    wanted = soft_target(causal(STUDENT, LABELS)[0], causal(TEACHER, LABELS)[0], mask=mask)
    assert soft_target(sides["student"], sides["teacher"], mask=mask) == wanted


def test_aligned_labels_are_those_of_transformers():
    """Its causal models drop the last scores and the first label, and leave out what is -100."""
    scores, labels, mask = causal(torch.from_numpy(STUDENT), torch.from_numpy(LABELS))
    other = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)
    mine = -F.log_softmax(scores, -1)[mask].gather(-1, labels[mask][:, None]).mean()
    assert float(mine) == pytest.approx(float(other), rel=1e-14)


def test_a_mask_without_the_shift_is_off_by_one_at_each_border_of_an_answer():
    """The first word of an answer is foretold by the last position of the prompt: position 1, that has no label."""

    def right(student):
        sides, _, mask = causal([student, TEACHER], LABELS)
        return soft_target(*sides, mask=mask)

    def wrong(student):
        return soft_target(student, TEACHER, mask=LABELS != -100)

    assert right(STUDENT) != pytest.approx(wrong(STUDENT), rel=1e-3)

    first = STUDENT.copy()
    first[0, 1] += np.arange(5)  # another guess for the first word of the answer
    assert right(first) != pytest.approx(right(STUDENT), rel=1e-3)
    assert wrong(first) == wrong(STUDENT)  # nothing is learned of it

    behind = STUDENT.copy()
    behind[0, 4] += np.arange(5)  # another guess for what follows the answer, where no label is
    assert right(behind) == right(STUDENT)
    assert wrong(behind) != pytest.approx(wrong(STUDENT), rel=1e-3)  # padding is learned


def test_labels_of_other_positions_are_refused():
    with pytest.raises(ShapeError, match=r"The labels have shape \(2, 5\); the scores are of \(2, 6\)"):
        causal(STUDENT, LABELS[:, 1:])
    with pytest.raises(ShapeError, match=r"shape \(2, 1\); \(N, L\) with L of at least 2 is needed"):
        causal(STUDENT[:, :1], LABELS[:, :1])


@both
def test_lengths_become_a_mask(make):
    np.testing.assert_array_equal(mask_of_lengths(make([0, 2, 3]), 3), [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("length", [-1, 4])
def test_lengths_beyond_the_padding_are_refused(length):
    with pytest.raises(DataError, match=rf"A sequence has length {length}; the padded ones have 3 positions"):
        mask_of_lengths(np.array([2, length]), 3)


# ------------------------------------------------------------------------------------------------ frames


def with_options(**options):
    @functools.wraps(ctc_frames)
    def stated(student, teacher, **others):
        return ctc_frames(student, teacher, **{**options, **others})

    return stated


OTHER_OPTIONS = [
    {"blank": "drop", "threshold": 0.5},
    {"blank": "weight"},
    {"blank": "weight", "blank_class": -1},
]


@pytest.mark.parametrize(
    "check",  # the weights of a batch add up to 1, so that parts do not add up to it
    [check for check in LOSS_CHECKS if check.__name__ != "check_parts_of_a_batch_add_up_to_it"],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=str)
def test_frames_conform_with_other_options(options, check):
    check(with_options(**options))


def test_frames_with_blanks_are_soft_targets_of_positions():
    mask = mask_of_lengths(np.array([6, 2]), 6)
    for temperature in (1.0, 3.0):
        found = ctc_frames(STUDENT, TEACHER, temperature=temperature, mask=mask)
        assert found == pytest.approx(soft_target(STUDENT, TEACHER, temperature=temperature, mask=mask), rel=1e-14)


# Two classes: the teacher gives the blank 3/4, 1/2 and 1/4; the student 1/2 always.
FRAMES = np.log([[[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]])
EVEN = np.zeros((1, 3, 2))
CHARGE = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # of the first frame, and of the last


@both
@pytest.mark.parametrize(
    ("options", "charge"),
    [
        ({"blank": "keep"}, (CHARGE + 0 + CHARGE) / 3),
        ({"blank": "drop", "threshold": 0.6}, (0 + CHARGE) / 2),
        ({"blank": "drop", "threshold": 0.4}, CHARGE),
        ({"blank": "drop", "threshold": 0.6, "blank_class": 1}, (CHARGE + 0) / 2),
        ({"blank": "weight"}, (0.25 * CHARGE + 0.5 * 0 + 0.75 * CHARGE) / 1.5),
        ({"blank": "weight", "blank_class": -1}, (0.75 * CHARGE + 0.5 * 0 + 0.25 * CHARGE) / 1.5),
    ],
    ids=str,
)
def test_blanks_in_closed_form(make, options, charge):
    assert float(ctc_frames(make(EVEN), make(FRAMES), **options)) == pytest.approx(charge, rel=1e-13)


def test_how_sure_of_a_blank_the_teacher_is_knows_no_temperature():
    """At temperature 100 the teacher's first frame would be half blank, and be kept."""
    hot = ctc_frames(EVEN, FRAMES, blank="drop", threshold=0.6, temperature=100.0)
    assert hot == pytest.approx(soft_target(EVEN[:, 1:], FRAMES[:, 1:], temperature=100.0), rel=1e-9)


@both
def test_a_batch_of_silence_is_charged_nothing_and_pulls_nothing(make):
    silence = make(np.log([[[0.99, 0.01]] * 3]))
    assert float(ctc_frames(make(EVEN), silence, blank="drop")) == 0
    student = torch.from_numpy(EVEN.copy()).requires_grad_()
    ctc_frames(student, torch.as_tensor(silence), blank="drop").backward()
    assert not student.grad.any()


@pytest.mark.parametrize("blank", ["keep", "drop", "weight"])
def test_frames_behind_the_end_of_the_sound_do_not_count(blank):
    lengths = np.array([4, 2])
    student, teacher = (np.concatenate([side[0, :4], side[1, :2]])[None] for side in (STUDENT, TEACHER))
    options = {"blank": blank, "threshold": 0.4}
    found = ctc_frames(STUDENT, TEACHER, mask=mask_of_lengths(lengths, 6), **options)
    assert found == pytest.approx(ctc_frames(student, teacher, **options), rel=1e-13)
    with pytest.raises(DataError, match="All targets are masked"):
        ctc_frames(STUDENT, TEACHER, mask=np.zeros((2, 6), bool), **options)


def test_unequal_strides_are_refused():
    sentence = (
        r"The student puts out 3 frames, the teacher 6, for the same sound\. Their strides differ, and frame i is not "
        r"the same moment in both\. Give both the same stride"
    )
    with pytest.raises(ShapeError, match=sentence):
        ctc_frames(STUDENT[:, ::2], TEACHER)
    with pytest.raises(ShapeError, match=r"shape \(2, 6, 5\), the teacher's \(2, 6, 4\)"):
        ctc_frames(STUDENT, TEACHER[..., :4])


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"blank": "skip"}, UnknownNameError, "There is no way with blanks 'skip'"),
        ({"blank_class": 5}, UsageError, "The blank is class 5; there are 5 classes"),
        ({"threshold": 95}, UsageError, "The threshold of blanks is 95; a probability from 0 to 1 is needed"),
        ({"temperature": 0}, UsageError, "The temperature is 0"),
    ],
)
def test_options_of_frames_that_are_none_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        ctc_frames(STUDENT, TEACHER, **options)


# ------------------------------------------------------------------------------------------------ pseudo-targets


def reasons(found):
    return {record.index: record.reason for record in found.dropped}


def test_each_bad_target_is_dropped_for_its_reason():
    sources = ["abcd", "abcd", "abcd", "abcd", "abcd", "efgh"]
    targets = ["wxyz", "", "w", "wxyzwxyzw", "wxyz", "wxyz"]
    found = sift_targets(targets, sources)
    assert found.kept == (0, 5)  # the same target of another source is no duplicate
    assert reasons(found) == {1: "empty", 2: "short", 3: "long", 4: "duplicate"}
    assert found.counts == {"empty": 1, "short": 1, "long": 1, "duplicate": 1}
    details = {record.index: record.detail for record in found.dropped}
    assert details[2] == "It has 1 tokens for 4 of the source; 0.5 for each are the least."
    assert details[3] == "It has 9 tokens for 4 of the source; 2.0 for each are the most."
    assert details[4] == "It is the same as number 0."


def test_limits_themselves_are_kept():
    limits = TargetLimits(least_per_source=0.5, most_per_source=2.0, least_log_probability=-1.0)
    found = sift_targets(["ab", "abcdefgh"], ["abcd", "abcd"], [-1.0, -0.5], limits=limits)
    assert found.kept == (0, 1)


def test_targets_that_repeat_themselves_are_dropped():
    limits = TargetLimits(ngram=2, most_repeats=2)
    found = sift_targets([[1, 2, 3, 1, 2], [1, 2, 3, 1, 2, 4, 1, 2], [5, 5, 5, 5]], limits=limits)
    assert found.kept == (0,)
    assert found.dropped[0].detail == "2 tokens in a row occur 3 times; 2 is the most."
    assert reasons(found) == {1: "repetitive", 2: "repetitive"}


def test_targets_that_the_teacher_doubts_are_dropped():
    limits = TargetLimits(least_log_probability=-1.0)
    found = sift_targets(["ab", "cd", "ef"], log_probabilities=[-0.5, -1.5, math.nan], limits=limits)
    assert found.kept == (0,)
    assert reasons(found) == {1: "unlikely", 2: "unlikely"}
    assert found.dropped[0].detail == "Its mean log-probability is -1.5; -1 is the least."


def test_without_sources_equal_targets_are_duplicates_and_lengths_are_free():
    found = sift_targets(["abcdefghijkl", "a", "a"])
    assert found.kept == (0, 1)
    assert reasons(found) == {2: "duplicate"}


def test_runs_that_overlap_are_counted():
    assert most_repeats("aaaa", 2) == 3
    assert most_repeats("abcabc", 3) == 2
    assert most_repeats("ab", 3) == 0


@given(st.lists(st.tuples(st.text("ab", max_size=6), st.text("xy", max_size=12)), max_size=12))
@settings(deadline=None, derandomize=True)
def test_each_target_is_kept_or_dropped_and_what_is_kept_is_kept_again(pairs):
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    found = sift_targets(targets, sources)
    places = sorted([*found.kept, *reasons(found)])
    assert places == list(range(len(pairs)))
    again = sift_targets([targets[i] for i in found.kept], [sources[i] for i in found.kept])
    assert again.kept == tuple(range(len(found.kept)))
    for record in found.dropped:
        if record.reason == "duplicate":
            assert pairs[record.index] in pairs[: record.index]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UsageError, match="log-probabilities and a limit for them go together"):
        sift_targets(["a"], log_probabilities=[-1.0])
    with pytest.raises(UsageError, match="log-probabilities and a limit for them go together"):
        sift_targets(["a"], limits=TargetLimits(least_log_probability=-1.0))
    with pytest.raises(ShapeError, match="There are 2 targets and 1 sources; as many are needed"):
        sift_targets(["a", "b"], ["a"])
    with pytest.raises(UsageError, match=r"2\.0 to 1\.0 tokens for each of the source; two numbers from 0 on"):
        TargetLimits(least_per_source=2.0, most_per_source=1.0)
    with pytest.raises(UsageError, match="0 tokens in a row may occur 3 times; numbers of at least 1"):
        TargetLimits(ngram=0)
