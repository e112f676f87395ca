"""Losses on hidden states, attention and relations: closed forms, PyTorch's own functions, and masks."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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

FRAMEWORKS = [np.asarray, lambda values: torch.from_numpy(np.asarray(values))]
RANDOM = np.random.default_rng(0)
STATES, OTHERS = RANDOM.standard_normal((2, 3, 5, 8))  # two sides of (N, L, D) = (3, 5, 8)
ATTENTION, ATTENTION_T = RANDOM.standard_normal((2, 3, 2, 5, 5))  # two sides of (N, heads, L, L)
VALUES, VALUES_T = RANDOM.standard_normal((3, 2, 5, 8)), RANDOM.standard_normal((3, 2, 5, 12))  # queries, keys, values
LENGTHS = np.array([5, 3, 1])
MASK = np.arange(5) < LENGTHS[:, None]

both = pytest.mark.parametrize("make", FRAMEWORKS, ids=["numpy", "torch"])


def with_options(loss, **options):
    """The loss with other defaults, for the checks."""

    @functools.wraps(loss)
    def stated(student, teacher, **others):
        return loss(student, teacher, **{**options, **others})

    return stated


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


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


@both
def test_hidden_states_in_closed_form(make):
    """Differences 1 and 3 at the first position, 2 and 0 at the second: (1 + 9) / 2 = 5 and 2."""
    student, teacher = make([[[1.0, 3.0], [2.0, 0.0]]]), make(np.zeros((1, 2, 2)))
    assert float(hidden_mse(student, teacher)) == 3.5
    assert float(hidden_mse(student, teacher, mask=make([[True, False]]))) == 5.0


def test_hidden_states_without_a_mask_are_those_of_pytorch():
    student, teacher = torch.from_numpy(STATES), torch.from_numpy(OTHERS)
    assert float(hidden_mse(student, teacher)) == pytest.approx(float(F.mse_loss(student, teacher)), rel=1e-14)


def test_cosines_are_those_of_pytorch_over_the_tokens_that_are_no_padding():
    """As DistilBERT does it: pick the tokens, then CosineEmbeddingLoss with targets of 1."""
    chosen = [torch.from_numpy(side[MASK]) for side in (STATES, OTHERS)]  # (tokens, D)
    other = torch.nn.CosineEmbeddingLoss()(*chosen, torch.ones(len(chosen[0])))
    found = hidden_cosine(torch.from_numpy(STATES), torch.from_numpy(OTHERS), mask=torch.from_numpy(MASK))
    assert float(found) == pytest.approx(float(other), rel=1e-12)  # which adds 1e-12 to squared lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-25, 1e-6, 1.0, 1e10, 1e25])
def test_cosines_of_states_of_any_length_are_the_same(length, dtype):
    side = torch.from_numpy(STATES).to(dtype)
    student = (length * side).requires_grad_()
    found = hidden_cosine(student, side)
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(student.grad).all()
    assert float(hidden_cosine(-length * side, length * side)) == pytest.approx(2, abs=1e-6)


def test_states_of_zeros_have_no_direction():
    student = torch.zeros(1, 2, 3, requires_grad=True)
    found = hidden_cosine(student, torch.ones(1, 2, 3))
    found.backward()
    assert float(found.detach()) == 1
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("student", "charge"), [([3.0, 0.0], 0), ([0.0, 0.1], 1), ([-2.0, 0.0], 2), ([1.0, 1.0], None)]
)
def test_cosines_know_the_angle_alone(student, charge):
    charge = 1 - math.sqrt(0.5) if charge is None else charge
    found = hidden_cosine(np.array([[student]]), np.array([[[5.0, 0.0]]]))
    assert found == pytest.approx(charge, abs=1e-15)


@both
def test_the_first_positions_are_compared_at_length_one(make):
    """(3, 4) and (0, 2) become (0.6, 0.8) and (0, 1): 0.36 + 0.04. What lies behind them does not matter."""
    student, teacher = make([[[3.0, 4.0], [9.0, 9.0]]]), make([[[0.0, 2.0], [7.0, 0.0]]])
    assert float(cls_pkd(student, teacher)) == pytest.approx(0.4, rel=1e-14)


@both
def test_products_of_units_in_closed_form(make):
    """Layers (1, 2), (3, 4) and (1, 0), (0, 1) over two positions: products [[1, 3], [2, 4]] / 2, teacher 0."""
    layers = [make([[[1.0, 2.0], [3.0, 4.0]]]), make([[[1.0, 0.0], [0.0, 1.0]]])]
    zeros = [make(np.zeros((1, 2, 2)))] * 2
    assert float(token_fsp(layers, zeros)) == pytest.approx((1 + 9 + 4 + 16) / 4 / 4, rel=1e-14)
    # The first position alone: [[1, 0], [2, 0]] / 1.
    assert float(token_fsp(layers, zeros, mask=make([[True, False]]))) == pytest.approx((1 + 4) / 4, rel=1e-14)


@both
def test_likeness_of_positions_in_closed_form_over_unequal_widths(make):
    """[[1, 0], [0, 1]] times its transpose over a width of 2 gives 1/2 on the diagonal; the teacher gives ones."""
    student, teacher = make([[[1.0, 0.0], [0.0, 1.0]]]), make([[[1.0] * 4, [1.0] * 4]])
    found = token_nst([student, student], [teacher, teacher])
    assert float(found) == pytest.approx((0.25 + 1 + 1 + 0.25) / 4, rel=1e-14)
    first = token_nst([student, student], [teacher, teacher], mask=make([[True, False]]))
    assert float(first) == pytest.approx(0.25, rel=1e-14)


# ------------------------------------------------------------------------------------------------ attention


@both
def test_scores_that_hide_padding_count_as_zero(make):
    """BERT adds -10,000 to what is hidden. Student and teacher differ there by 7, and by 1 in one other place of 4."""
    student, teacher = make([[[[1.0, -1e4], [2.0, -9993.0]]]]), make([[[[0.0, -9993.0], [2.0, -1e4]]]])
    assert float(attention_mse(student, teacher)) == 0.25


def test_minus_infinity_hides_as_well():
    student, teacher = np.array([[[[1.0, -np.inf], [2.0, 3.0]]]]), np.array([[[[0.0, -np.inf], [2.0, 3.0]]]])
    assert attention_mse(student, teacher) == 0.25


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
@both
def test_attention_in_closed_form(make, loss):
    """The teacher attends (1/2, 1/2), the student (1/4, 3/4): KL is log(4/3) / 2, and the entropy of a half log 2."""
    student, teacher = make([[[[0.0, math.log(3)]] * 2]]), make(np.zeros((1, 1, 2, 2)))
    entropy = math.log(2) if loss is attention_ce else 0
    assert float(loss(student, teacher)) == pytest.approx(math.log(4 / 3) / 2 + entropy, rel=1e-14)


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
@both
def test_weights_of_attention_are_charged_as_the_scores_they_come_from(make, loss):
    weights = make(softmax(ATTENTION)), make(softmax(ATTENTION_T))
    found = float(loss(*weights, given="weights"))
    assert found == pytest.approx(float(loss(make(ATTENTION), make(ATTENTION_T))), rel=1e-12)


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
def test_weights_of_hidden_keys_are_zero_and_make_nothing_infinite(loss):
    hidden = np.where(MASK[:, None, None, :], 0.0, -np.inf)
    weights = [softmax(side + hidden) for side in (ATTENTION, ATTENTION_T)]
    assert weights[0].min() == 0
    scores = loss(ATTENTION, ATTENTION_T, mask=MASK)
    assert loss(*weights, given="weights", mask=MASK) == pytest.approx(scores, rel=1e-12)
    student = torch.from_numpy(weights[0]).requires_grad_()
    loss(student, torch.from_numpy(weights[1]), given="weights", mask=torch.from_numpy(MASK)).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [attention_ce, attention_kl])
@both
def test_weights_are_those_over_the_keys_that_count_even_where_the_model_hid_none(make, loss):
    """Half of the teacher's attention lies on padding. A student that has none there is charged by the rest alone."""
    teacher, student = [[[[0.25, 0.25, 0.3, 0.2]]]], [[[[0.25, 0.75, 0.0, 0.0]]]]
    mask = make([[[True, True, False, False]]])  # (N, queries, keys)
    found = float(loss(make(student), make(teacher), given="weights", mask=mask))
    entropy = math.log(2) if loss is attention_ce else 0
    assert found == pytest.approx(math.log(4 / 3) / 2 + entropy, rel=1e-12)
    scores = [make(np.log(np.maximum(side, 1e-12))) for side in (student, teacher)]
    assert found == pytest.approx(float(loss(*scores, mask=mask)), rel=1e-12)


def test_attention_is_that_of_pytorch():
    student, teacher = torch.from_numpy(ATTENTION), torch.from_numpy(ATTENTION_T)
    logs = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    other = F.kl_div(*logs, reduction="none", log_target=True).sum(-1).mean()
    assert float(attention_kl(student, teacher)) == pytest.approx(float(other), rel=1e-13)


def test_cross_entropy_and_divergence_pull_alike():
    grads = []
    for loss in (attention_ce, attention_kl):
        student = torch.from_numpy(ATTENTION.copy()).requires_grad_()
        loss(student, torch.from_numpy(ATTENTION_T), mask=torch.from_numpy(MASK)).backward()
        grads.append(student.grad)
    np.testing.assert_allclose(*grads, atol=1e-16)


# ------------------------------------------------------------------------------------------------ relations


def relation(first, second, heads):
    """Softmax of the scaled products, one head after the other."""
    width = first.shape[-1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return np.stack([softmax(first[..., p] @ second[..., p].swapaxes(1, 2) / math.sqrt(width)) for p in parts], 1)


def divergence(student, teacher):
    return (teacher * np.log(teacher / student)).sum(-1).mean()


def test_relations_are_those_of_minilm_v2_between_unequal_widths():
    """Two heads: 4 numbers each in the student, 6 in the teacher."""
    student, teacher = VALUES, VALUES_T
    wanted = sum(divergence(relation(s, s, 2), relation(t, t, 2)) for s, t in zip(student, teacher, strict=True))
    assert minilm(list(student), list(teacher), heads=2) == pytest.approx(wanted, rel=1e-12)


def test_attention_and_value_relations_are_those_of_minilm():
    student, teacher = VALUES, VALUES_T
    chosen = (0, 1), (2, 2)
    wanted = sum(
        divergence(relation(student[i], student[j], 4), relation(teacher[i], teacher[j], 4)) for i, j in chosen
    )
    found = minilm(list(student), list(teacher), heads=4, pairs=((0, 1), (2, 2)))
    assert found == pytest.approx(wanted, rel=1e-12)


def test_relation_of_queries_and_keys_is_the_attention_itself():
    """Two ways: queries and keys related in the layer's own heads, or the scores of attention compared."""
    sides = np.stack([[STATES, OTHERS], [OTHERS - 1, STATES + 1]])  # of queries and keys
    heads = sides.reshape(2, 2, 3, 5, 2, 4).swapaxes(3, 4)  # (side, value, N, heads, L, d)
    scores = heads[:, 0] @ heads[:, 1].swapaxes(-1, -2) / 2
    found = minilm(list(sides[0]), list(sides[1]), heads=2, pairs=((0, 1),), mask=MASK)
    assert found == pytest.approx(attention_kl(*scores, mask=MASK), rel=1e-12)


def test_a_rotation_within_a_head_relates_positions_the_same_way():
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0]
    assert minilm([STATES @ turn], [STATES], heads=1) == pytest.approx(0, abs=1e-12)
    assert minilm([STATES @ turn], [STATES], heads=2) > 0.01


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
def test_one_sample_with_padding_is_charged_as_the_same_without(name):
    loss, student, teacher = PADDED[name]
    for sample, length in enumerate(LENGTHS):
        bare = loss(cut(student, sample, length), cut(teacher, sample, length))
        padded = loss(cut(student, sample, 5), cut(teacher, sample, 5), mask=MASK[sample : sample + 1])
        assert padded == pytest.approx(bare, rel=1e-12, abs=1e-15), length


@pytest.mark.parametrize("name", ["hidden-mse", "hidden-cosine", "attention-ce", "attention-kl", "minilm"])
def test_each_position_weighs_the_same_whatever_sample_it_is_in(name):
    loss, student, teacher = PADDED[name]
    each = [loss(cut(student, n, length), cut(teacher, n, length)) for n, length in enumerate(LENGTHS)]
    wanted = (np.array(each) * LENGTHS).sum() / LENGTHS.sum()
    assert loss(student, teacher, mask=MASK) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["attention-mse", "token-nst"])
def test_each_pair_of_positions_weighs_the_same_whatever_sample_it_is_in(name):
    loss, student, teacher = PADDED[name]
    each = [loss(cut(student, n, length), cut(teacher, n, length)) for n, length in enumerate(LENGTHS)]
    wanted = (np.array(each) * LENGTHS**2).sum() / (LENGTHS**2).sum()
    assert loss(student, teacher, mask=MASK) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["attention-mse", "attention-ce", "attention-kl"])
@pytest.mark.parametrize("axis", [2, 3], ids=["query", "key"])
def test_a_padded_position_counts_neither_as_a_query_nor_as_a_key(name, axis):
    loss, student, teacher = PADDED[name]
    wanted = loss(student, teacher, mask=MASK)
    for other in (50.0, np.nan):
        spoilt = student.copy()
        np.moveaxis(spoilt, axis, 2)[1, :, 3:] = other  # sample 1 has 3 positions
        assert loss(spoilt, teacher, mask=MASK) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", list(PADDED))
def test_a_sample_without_a_position_adds_nothing(name):
    loss, student, teacher = PADDED[name]
    mask = MASK.copy()
    mask[1] = False
    rest = [[part[[0, 2]] for part in side] if isinstance(side, list) else side[[0, 2]] for side in (student, teacher)]
    assert loss(student, teacher, mask=mask) == pytest.approx(loss(*rest, mask=mask[[0, 2]]), rel=1e-12)
    with pytest.raises(DataError, match="All targets are masked: there is nothing to learn from"):
        loss(student, teacher, mask=np.zeros_like(mask))


@pytest.mark.parametrize("name", list(PADDED))
@both
def test_a_mask_of_another_shape_is_refused(name, make):
    loss, student, teacher = PADDED[name]
    sides = [[make(part) for part in side] if isinstance(side, list) else make(side) for side in (student, teacher)]
    with pytest.raises(ShapeError, match=r"The mask has shape \(3, 4\); \(3, 5\) is needed"):
        loss(*sides, mask=make(MASK[:, :4].copy()))


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_related_is_refused():
    with pytest.raises(ShapeError, match=r"States of 3 layers are given; two are related\. Give a layer twice for one"):
        token_fsp([STATES] * 3, [OTHERS] * 3)
    with pytest.raises(ShapeError, match="The student gives 2 values, the teacher 1"):
        token_nst([STATES] * 2, [OTHERS])
    with pytest.raises(ShapeError, match="The student gives one array; a list of values is needed"):
        minilm(STATES, [OTHERS])
    with pytest.raises(ShapeError, match=r"samples and positions \(3, 4\) and \(3, 5\) cannot be related"):
        minilm([STATES[:, :4]], [OTHERS], heads=2)
    with pytest.raises(ShapeError, match=r"3 relation heads do not divide a width of 8\. Choose another `heads`"):
        minilm([STATES], [OTHERS], heads=3)
    with pytest.raises(UsageError, match="A pair names value 2; there are 2, from 0 on"):
        minilm([STATES] * 2, [OTHERS] * 2, heads=2, pairs=((0, 2),))


def test_unknown_conventions_are_refused():
    with pytest.raises(UnknownNameError, match="There is no convention 'textbrewr'"):
        attention_mse(ATTENTION, ATTENTION_T, convention="textbrewr")
    with pytest.raises(UnknownNameError, match="There is no convention 'tinybert'"):
        attention_ce(ATTENTION, ATTENTION_T, convention="tinybert")
    with pytest.raises(UnknownNameError, match="There is no kind of attention 'logits'"):
        attention_kl(ATTENTION, ATTENTION_T, given="logits")
    with pytest.raises(UsageError, match="The convention 'textbrewer' is one of scores; 'weights' are given"):
        attention_ce(ATTENTION, ATTENTION_T, given="weights", convention="textbrewer")


@both
@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine, cls_pkd, token_fsp, token_nst, minilm])
def test_masks_of_samples_alone_are_refused(loss, make):
    sides = [make(side) for side in (STATES, OTHERS)]
    sides = [[side] * 2 for side in sides] if loss in (token_fsp, token_nst, minilm) else sides
    options = {"heads": 2} if loss is minilm else {}
    with pytest.raises(ShapeError, match=r"The mask has shape \(3,\); \(3, 5\) is needed"):
        loss(*sides, mask=make(MASK[:, 0]), **options)


def test_relations_of_nothing_are_refused():
    with pytest.raises(ShapeError, match=r"A side gives no arrays\. Give at least one: relations are compared"):
        minilm([], [])
    with pytest.raises(UsageError, match="There are no pairs, so there is nothing to relate"):
        minilm([STATES], [OTHERS], heads=2, pairs=())
