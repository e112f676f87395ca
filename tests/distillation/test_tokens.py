"""Losses on hidden states, attention and relations: closed forms, functions of PyTorch, and masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distillation.examples import softmax, with_options
from kirsch.distillation.losses.tokens import (
    attention_ce,
    attention_kl,
    attention_mse,
    cls_pkd,
    hidden_cosine,
    hidden_mse,
    minilm,
    token_fsp,
    token_nst,
)
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.testing import LOSS_CHECKS

RANDOM = np.random.default_rng(0)
STATES, OTHERS = RANDOM.standard_normal((2, 3, 5, 8))  # student and teacher, (N, L, D) = (3, 5, 8)
ATTENTION, ATTENTION_T = RANDOM.standard_normal((2, 3, 2, 5, 5))  # student and teacher, (N, heads, L, L)
VALUES, VALUES_T = RANDOM.standard_normal((3, 2, 5, 8)), RANDOM.standard_normal((3, 2, 5, 12))  # queries, keys, values
LENGTHS = np.array([5, 3, 1])
MASK = np.arange(5) < LENGTHS[:, None]


# ------------------------------------------------------------------------------------------------ other options


OTHER_OPTIONS = [
    with_options(attention_mse, convention="textbrewer"),
    with_options(minilm, heads=2),
    with_options(minilm, heads=3, pairs=((0, 1), (1, 1))),
]


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("loss", OTHER_OPTIONS, ids=["textbrewer", "two heads", "pairs"])
def test_losses_conform_with_other_options(loss, check):
    check(loss)


# ------------------------------------------------------------------------------------------------ hidden states


def test_hidden_mse_equals_its_closed_form(framework):
    """Differences 1 and 3 at the first position, 2 and 0 at the second: (1 + 9) / 2 = 5 and 2."""
    student, teacher = framework([[[1.0, 3.0], [2.0, 0.0]]]), framework(np.zeros((1, 2, 2)))
    assert float(hidden_mse(student, teacher)) == 3.5
    assert float(hidden_mse(student, teacher, mask=framework([[True, False]]))) == 5.0


def test_hidden_mse_without_a_mask_equals_mse_loss():
    student, teacher = torch.from_numpy(STATES), torch.from_numpy(OTHERS)
    assert float(hidden_mse(student, teacher)) == pytest.approx(float(F.mse_loss(student, teacher)), rel=1e-14)


def test_hidden_cosine_equals_cosine_embedding_loss_over_unmasked_tokens():
    """DistilBERT selects the tokens and applies CosineEmbeddingLoss with targets of 1."""
    chosen = [torch.from_numpy(side[MASK]) for side in (STATES, OTHERS)]  # (tokens, D)
    expected = torch.nn.CosineEmbeddingLoss()(*chosen, torch.ones(len(chosen[0])))
    value = hidden_cosine(torch.from_numpy(STATES), torch.from_numpy(OTHERS), mask=torch.from_numpy(MASK))
    assert float(value) == pytest.approx(float(expected), rel=1e-12)  # PyTorch adds 1e-12 to squared norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-25, 1e-6, 1.0, 1e10, 1e25])
def test_hidden_cosine_is_invariant_to_the_norm(length, dtype):
    states = torch.from_numpy(STATES).to(dtype)
    student = (length * states).requires_grad_()
    value = hidden_cosine(student, states)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(student.grad).all()
    assert float(hidden_cosine(-length * states, length * states)) == pytest.approx(2, abs=1e-6)


def test_hidden_cosine_of_zeros_is_1_with_a_finite_gradient():
    student = torch.zeros(1, 2, 3, requires_grad=True)
    value = hidden_cosine(student, torch.ones(1, 2, 3))
    value.backward()
    assert float(value.detach()) == 1
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("student", "expected"), [([3.0, 0.0], 0), ([0.0, 0.1], 1), ([-2.0, 0.0], 2), ([1.0, 1.0], None)]
)
def test_hidden_cosine_depends_on_the_angle_only(student, expected):
    expected = 1 - math.sqrt(0.5) if expected is None else expected
    value = hidden_cosine(np.array([[student]]), np.array([[[5.0, 0.0]]]))
    assert value == pytest.approx(expected, abs=1e-15)


def test_cls_pkd_equals_its_closed_form(framework):
    """(3, 4) and (0, 2) become (0.6, 0.8) and (0, 1): 0.36 + 0.04. Other positions do not count."""
    student, teacher = framework([[[3.0, 4.0], [9.0, 9.0]]]), framework([[[0.0, 2.0], [7.0, 0.0]]])
    assert float(cls_pkd(student, teacher)) == pytest.approx(0.4, rel=1e-14)


def test_token_fsp_equals_its_closed_form(framework):
    """At two positions, the first layer has the states (1, 2) and (3, 4), the second (1, 0) and (0, 1).

    The mean product of the two layers is [[1, 3], [2, 4]] / 2; that of the teacher is 0.
    """
    layers = [framework([[[1.0, 2.0], [3.0, 4.0]]]), framework([[[1.0, 0.0], [0.0, 1.0]]])]
    zeros = [framework(np.zeros((1, 2, 2)))] * 2
    assert float(token_fsp(layers, zeros)) == pytest.approx((1 + 9 + 4 + 16) / 4 / 4, rel=1e-14)
    # The first position alone: [[1, 0], [2, 0]] / 1.
    assert float(token_fsp(layers, zeros, mask=framework([[True, False]]))) == pytest.approx((1 + 4) / 4, rel=1e-14)


def test_token_nst_equals_its_closed_form_with_unequal_widths(framework):
    """[[1, 0], [0, 1]] times its transpose over a width of 2 gives 1/2 on the diagonal; the teacher gives ones."""
    student, teacher = framework([[[1.0, 0.0], [0.0, 1.0]]]), framework([[[1.0] * 4, [1.0] * 4]])
    value = token_nst([student, student], [teacher, teacher])
    assert float(value) == pytest.approx((0.25 + 1 + 1 + 0.25) / 4, rel=1e-14)
    first = token_nst([student, student], [teacher, teacher], mask=framework([[True, False]]))
    assert float(first) == pytest.approx(0.25, rel=1e-14)


# ------------------------------------------------------------------------------------------------ attention


def test_attention_scores_of_padding_count_as_0(framework):
    """BERT adds -10,000 to the scores of padding. One of the other scores differs by 1."""
    student, teacher = framework([[[[1.0, -1e4], [2.0, -9993.0]]]]), framework([[[[0.0, -9993.0], [2.0, -1e4]]]])
    assert float(attention_mse(student, teacher)) == 0.25


def test_attention_scores_of_minus_infinity_count_as_0():
    student, teacher = np.array([[[[1.0, -np.inf], [2.0, 3.0]]]]), np.array([[[[0.0, -np.inf], [2.0, 3.0]]]])
    assert attention_mse(student, teacher) == 0.25


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
def test_attention_equals_its_closed_form(framework, loss):
    """Teacher (1/2, 1/2), student (1/4, 3/4): KL is log(4/3) / 2, and the teacher's entropy is log 2."""
    student, teacher = framework([[[[0.0, math.log(3)]] * 2]]), framework(np.zeros((1, 1, 2, 2)))
    entropy = math.log(2) if loss is attention_ce else 0
    assert float(loss(student, teacher)) == pytest.approx(math.log(4 / 3) / 2 + entropy, rel=1e-14)


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
def test_attention_weights_give_the_loss_of_their_scores(framework, loss):
    weights = framework(softmax(ATTENTION)), framework(softmax(ATTENTION_T))
    value = float(loss(*weights, attention="weights"))
    assert value == pytest.approx(float(loss(framework(ATTENTION), framework(ATTENTION_T))), rel=1e-12)


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
def test_attention_weights_of_0_leave_loss_and_gradient_finite(loss):
    hidden = np.where(MASK[:, None, None, :], 0.0, -np.inf)
    weights = [softmax(side + hidden) for side in (ATTENTION, ATTENTION_T)]
    assert weights[0].min() == 0
    scores = loss(ATTENTION, ATTENTION_T, mask=MASK)
    assert loss(*weights, attention="weights", mask=MASK) == pytest.approx(scores, rel=1e-12)
    student = torch.from_numpy(weights[0]).requires_grad_()
    loss(student, torch.from_numpy(weights[1]), attention="weights", mask=torch.from_numpy(MASK)).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
def test_attention_weights_are_renormalized_over_unmasked_keys(framework, loss):
    """Half of the teacher's attention is on masked keys, and none of the student's."""
    teacher, student = [[[[0.25, 0.25, 0.3, 0.2]]]], [[[[0.25, 0.75, 0.0, 0.0]]]]
    mask = framework([[[True, True, False, False]]])  # (N, queries, keys)
    value = float(loss(framework(student), framework(teacher), attention="weights", mask=mask))
    entropy = math.log(2) if loss is attention_ce else 0
    assert value == pytest.approx(math.log(4 / 3) / 2 + entropy, rel=1e-12)
    scores = [framework(np.log(np.maximum(side, 1e-12))) for side in (student, teacher)]
    assert value == pytest.approx(float(loss(*scores, mask=mask)), rel=1e-12)


def test_attention_kl_equals_kl_div():
    student, teacher = torch.from_numpy(ATTENTION), torch.from_numpy(ATTENTION_T)
    logs = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    expected = F.kl_div(*logs, reduction="none", log_target=True).sum(-1).mean()
    assert float(attention_kl(student, teacher)) == pytest.approx(float(expected), rel=1e-13)


def test_attention_ce_and_attention_kl_have_the_same_gradient():
    grads = []
    for loss in (attention_ce, attention_kl):
        student = torch.from_numpy(ATTENTION.copy()).requires_grad_()
        loss(student, torch.from_numpy(ATTENTION_T), mask=torch.from_numpy(MASK)).backward()
        grads.append(student.grad)
    np.testing.assert_allclose(*grads, atol=1e-16)


# ------------------------------------------------------------------------------------------------ relations


def relation(first, second, heads):
    """Return the softmax of the scaled products, one head after the other."""
    width = first.shape[-1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return np.stack([softmax(first[..., p] @ second[..., p].swapaxes(1, 2) / math.sqrt(width)) for p in parts], 1)


def divergence(student, teacher):
    return (teacher * np.log(teacher / student)).sum(-1).mean()


def test_minilm_equals_the_formula_of_minilm_v2_with_unequal_widths():
    """The width of a head is 4 in the student and 6 in the teacher."""
    student, teacher = VALUES, VALUES_T
    expected = sum(divergence(relation(s, s, 2), relation(t, t, 2)) for s, t in zip(student, teacher, strict=True))
    assert minilm(list(student), list(teacher), heads=2) == pytest.approx(expected, rel=1e-12)


def test_attention_and_value_relations_equal_the_formula_of_minilm():
    student, teacher = VALUES, VALUES_T
    chosen = (0, 1), (2, 2)
    expected = sum(
        divergence(relation(student[i], student[j], 4), relation(teacher[i], teacher[j], 4)) for i, j in chosen
    )
    value = minilm(list(student), list(teacher), heads=4, pairs=((0, 1), (2, 2)))
    assert value == pytest.approx(expected, rel=1e-12)


def test_the_relation_of_queries_and_keys_equals_attention_kl():
    """The relation uses the heads of the layer, so it equals the attention of the layer."""
    sides = np.stack([[STATES, OTHERS], [OTHERS - 1, STATES + 1]])  # queries and keys
    heads = sides.reshape(2, 2, 3, 5, 2, 4).swapaxes(3, 4)  # (side, value, N, heads, L, d)
    scores = heads[:, 0] @ heads[:, 1].swapaxes(-1, -2) / 2
    value = minilm(list(sides[0]), list(sides[1]), heads=2, pairs=((0, 1),), mask=MASK)
    assert value == pytest.approx(attention_kl(*scores, mask=MASK), rel=1e-12)


def test_minilm_is_invariant_to_rotations_within_a_head():
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0]
    assert minilm([STATES @ rotation], [STATES], heads=1) == pytest.approx(0, abs=1e-12)
    assert minilm([STATES @ rotation], [STATES], heads=2) > 0.01


# ------------------------------------------------------------------------------------------------ padding


PADDED = {
    "hidden-mse": (hidden_mse, STATES, OTHERS),
    "hidden-cosine": (hidden_cosine, STATES, OTHERS),
    "cls-pkd": (cls_pkd, STATES, OTHERS),
    "token-fsp": (token_fsp, [STATES, OTHERS], [OTHERS, STATES + 1]),
    "token-nst": (token_nst, [STATES, OTHERS], [OTHERS, STATES + 1]),
    "attention-mse": (attention_mse, ATTENTION, ATTENTION_T),
    "attention-ce": (attention_ce, ATTENTION, ATTENTION_T),
    "attention-kl": (attention_kl, ATTENTION, ATTENTION_T),
    "minilm": (with_options(minilm, heads=2), [STATES, OTHERS], [OTHERS, STATES + 1]),
}


def cut(side, sample, length):
    if isinstance(side, list):
        return [cut(part, sample, length) for part in side]
    return side[sample : sample + 1, :, :length, :length] if side.ndim == 4 else side[sample : sample + 1, :length]


@pytest.mark.parametrize("name", list(PADDED))
def test_masked_padding_does_not_change_the_loss(name):
    loss, student, teacher = PADDED[name]
    for sample, length in enumerate(LENGTHS):
        unpadded = loss(cut(student, sample, length), cut(teacher, sample, length))
        padded = loss(cut(student, sample, 5), cut(teacher, sample, 5), mask=MASK[sample : sample + 1])
        assert padded == pytest.approx(unpadded, rel=1e-12, abs=1e-15), length


@pytest.mark.parametrize("name", ["hidden-mse", "hidden-cosine", "attention-ce", "attention-kl", "minilm"])
def test_every_unmasked_position_has_the_same_weight(name):
    loss, student, teacher = PADDED[name]
    losses = [loss(cut(student, n, length), cut(teacher, n, length)) for n, length in enumerate(LENGTHS)]
    expected = (np.array(losses) * LENGTHS).sum() / LENGTHS.sum()
    assert loss(student, teacher, mask=MASK) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["attention-mse", "token-nst"])
def test_every_unmasked_pair_of_positions_has_the_same_weight(name):
    loss, student, teacher = PADDED[name]
    losses = [loss(cut(student, n, length), cut(teacher, n, length)) for n, length in enumerate(LENGTHS)]
    expected = (np.array(losses) * LENGTHS**2).sum() / (LENGTHS**2).sum()
    assert loss(student, teacher, mask=MASK) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["attention-mse", "attention-ce", "attention-kl"])
@pytest.mark.parametrize("axis", [2, 3], ids=["query", "key"])
def test_a_masked_position_counts_neither_as_a_query_nor_as_a_key(name, axis):
    loss, student, teacher = PADDED[name]
    expected = loss(student, teacher, mask=MASK)
    for value in (50.0, np.nan):
        changed = student.copy()
        np.moveaxis(changed, axis, 2)[1, :, 3:] = value  # sample 1 has 3 positions
        assert loss(changed, teacher, mask=MASK) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [attention_ce, attention_kl, attention_mse])
def test_a_query_without_unmasked_keys_does_not_count(loss, framework):
    """The mask (N, queries, keys) keeps the first three queries with all keys."""
    pairs = np.zeros((3, 5, 5), bool)
    pairs[:, :3] = True
    value = float(loss(framework(ATTENTION), framework(ATTENTION_T), mask=framework(pairs)))
    assert value == pytest.approx(float(loss(ATTENTION[:, :, :3], ATTENTION_T[:, :, :3])), rel=1e-12)


@pytest.mark.parametrize("name", list(PADDED))
def test_a_fully_masked_sample_adds_nothing(name):
    loss, student, teacher = PADDED[name]
    mask = MASK.copy()
    mask[1] = False
    rest = [[part[[0, 2]] for part in side] if isinstance(side, list) else side[[0, 2]] for side in (student, teacher)]
    assert loss(student, teacher, mask=mask) == pytest.approx(loss(*rest, mask=mask[[0, 2]]), rel=1e-12)
    with pytest.raises(DataError, match="All targets are masked"):
        loss(student, teacher, mask=np.zeros_like(mask))


@pytest.mark.parametrize("name", list(PADDED))
def test_a_mask_of_another_shape_is_refused(name, framework):
    loss, student, teacher = PADDED[name]
    sides = [
        [framework(part) for part in side] if isinstance(side, list) else framework(side) for side in (student, teacher)
    ]
    with pytest.raises(ShapeError, match=r"The mask has shape \(3, 4\); \(3, 5\) is needed"):
        loss(*sides, mask=framework(MASK[:, :4].copy()))


# ------------------------------------------------------------------------------------------------ errors


def test_invalid_inputs_of_relations_are_refused():
    with pytest.raises(ShapeError, match=r"states of 3 layers; two are needed\. Pass a single layer twice"):
        token_fsp([STATES] * 3, [OTHERS] * 3)
    with pytest.raises(ShapeError, match="The student has 2 arrays, the teacher 1"):
        token_nst([STATES] * 2, [OTHERS])
    with pytest.raises(ShapeError, match="The student has one array; a list of arrays is needed"):
        minilm(STATES, [OTHERS])
    with pytest.raises(ShapeError, match=r"samples and positions \(3, 4\) and \(3, 5\)"):
        minilm([STATES[:, :4]], [OTHERS], heads=2)
    with pytest.raises(ShapeError, match=r"`heads` is 3, which does not divide the width 8\. Use a divisor"):
        minilm([STATES], [OTHERS], heads=3)
    with pytest.raises(UsageError, match="`pairs` contains the index 2; there are 2 arrays"):
        minilm([STATES] * 2, [OTHERS] * 2, heads=2, pairs=((0, 2),))


def test_unknown_conventions_are_refused():
    with pytest.raises(UnknownNameError, match="There is no convention 'textbrewr'"):
        attention_mse(ATTENTION, ATTENTION_T, convention="textbrewr")
    with pytest.raises(UnknownNameError, match="There is no convention 'tinybert'"):
        attention_ce(ATTENTION, ATTENTION_T, convention="tinybert")
    with pytest.raises(UnknownNameError, match="There is no kind of attention 'probabilities'"):
        attention_kl(ATTENTION, ATTENTION_T, attention="probabilities")
    with pytest.raises(UsageError, match="The convention 'textbrewer' applies to scores; `attention` is 'weights'"):
        attention_ce(ATTENTION, ATTENTION_T, attention="weights", convention="textbrewer")


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine, cls_pkd, token_fsp, token_nst, minilm])
def test_masks_without_positions_are_refused(loss, framework):
    sides = [framework(side) for side in (STATES, OTHERS)]
    sides = [[side] * 2 for side in sides] if loss in (token_fsp, token_nst, minilm) else sides
    options = {"heads": 2} if loss is minilm else {}
    with pytest.raises(ShapeError, match=r"The mask has shape \(3,\); \(3, 5\) is needed"):
        loss(*sides, mask=framework(MASK[:, 0]), **options)


def test_empty_relations_and_pairs_are_refused():
    with pytest.raises(
        ShapeError, match=r"The student or the teacher has no arrays\. Pass at least one: the loss compares relations"
    ):
        minilm([], [])
    with pytest.raises(UsageError, match="`pairs` is empty"):
        minilm([STATES], [OTHERS], heads=2, pairs=())
