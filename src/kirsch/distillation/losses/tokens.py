"""Losses on what a transformer holds inside: hidden states, attention, and relations of positions.

A mask (N, L) is true where a position holds a token. Where positions meet in pairs, as in attention, a padded one
counts neither as a key nor as a query.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kirsch.distillation.arrays import (
    blank,
    constant,
    log_softmax,
    mean_over,
    namespace,
    normalized,
    relative,
    same_shape,
)
from kirsch.distillation.losses.loss import loss
from kirsch.errors import ShapeError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

TINY = 1e-12
"""The least weight of attention that has a logarithm."""

NEVER = -1e30
"""The score of a key that is padding: its weight is exactly 0, and its logarithm finite."""

FLOORS = {None: -1e2, "textbrewer": -1e-3}
"""Convention → scores of attention down to here are those of padding, and count as 0."""


# ------------------------------------------------------------------------------------------------ hidden states


@loss("hidden-mse", takes="tokens")
def hidden_mse(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """Squared difference of the hidden states, averaged over the width and the positions that count.

    Args:
        student, teacher: hidden states, shape (N, L, D).
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0; 0 when the states agree.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Jiao et al. 2020, arXiv:1909.10351, equation 8, with a learned matrix from the student's width to the
        teacher's; weight 1 for each pair of layers. With a mask as TextBrewer's `hidden_mse`.
    """
    same_shape(student, teacher, "hidden states")
    difference = blank(student, mask) - blank(teacher, mask)
    return mean_over((difference * difference).mean(-1), mask)


@loss("hidden-cosine", takes="tokens")
def hidden_cosine(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """One minus the cosine between the hidden states of a position, averaged over the positions that count.

    Args:
        student, teacher: hidden states, shape (N, L, D).
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar from 0 to 2; 0 when the states point the same way, whatever their lengths; 1 for states of zeros.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Sanh et al. 2019, arXiv:1910.01108, section 3; its training code weighs it with 1, beside 5 for the scores
        at temperature 2 and 2 for masked words.
    """
    same_shape(student, teacher, "hidden states")
    student, teacher = (_direction(blank(side, mask)) for side in (student, teacher))
    return mean_over(1.0 - (student * teacher).sum(-1), mask)


def _direction(states: Any) -> Any:
    """States (..., D) of length 1, or of 0; divided by the largest number first, whose square may overflow or be 0."""
    xp = namespace(states)
    top = constant(xp.amax(xp.abs(states), axis=-1, keepdims=True))
    return normalized(states / xp.where(top > 0, top, xp.ones_like(top)))


@loss("cls-pkd", takes="tokens", over="samples")
def cls_pkd(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """Squared distance of the first position's states ([CLS]), each of length 1, averaged over samples.

    Args:
        student, teacher: hidden states, shape (N, L, D), of which position 0 stands for the sample.
        mask: shape (N, L); a sample whose position 0 is masked does not count.

    Returns:
        Scalar from 0 to 4; 0 when the states point the same way.

    Raises:
        ShapeError: the shapes differ.
        DataError: position 0 is masked in every sample.

    Source: Sun et al. 2019, arXiv:1908.09355, section 3.2; its weight β is 10 to 1000, searched for each task.
    """
    same_shape(student, teacher, "hidden states")
    _check_mask(mask, student)
    student, teacher = blank(student, mask), blank(teacher, mask)
    difference = normalized(student[:, 0]) - normalized(teacher[:, 0])
    return mean_over((difference * difference).sum(-1), None if mask is None else mask[:, 0])


@loss("token-fsp", takes="relations", over="samples")
def token_fsp(student: Sequence[Any], teacher: Sequence[Any], *, mask: Any = None) -> Any:
    """Squared difference of how two layers go together: of the products of their units, averaged over positions.

    Args:
        student, teacher: hidden states of two layers, each (N, L, D); the pair may be one layer twice.
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0: mean over the D × D products and the samples that have a position; 0 when the states agree.

    Raises:
        ShapeError: the shapes differ, or there are not two layers.
        DataError: the mask is false everywhere.

    Source: Yim et al. 2017 (CVPR), equations 1 and 2, in TextBrewer's form for sequences (`fsp_loss`).
    """
    _same_positions(student, teacher)
    _two_layers(student)
    _check_mask(mask, student[0])
    for one, other in zip(student, teacher, strict=True):
        same_shape(one, other, "hidden states")
    difference = _products(student, mask) - _products(teacher, mask)
    return mean_over((difference * difference).mean((1, 2)), None if mask is None else (mask != 0).any(1))


def _products(layers: Sequence[Any], mask: Any) -> Any:
    """Of the units of two layers, averaged over the positions of a sample: (N, D, D)."""
    first, second = (blank(layer, mask) for layer in layers)
    count = first.shape[1] if mask is None else (mask != 0).sum(1).clip(min=1)[:, None, None]
    return first.swapaxes(1, 2) @ second / count


@loss("token-nst", takes="relations", widths="any", over="pairs")
def token_nst(student: Sequence[Any], teacher: Sequence[Any], *, mask: Any = None) -> Any:
    """Squared difference of how alike two layers make the positions: of the products of their states, over the width.

    Args:
        student, teacher: hidden states of two layers, each (N, L, D); D may be another in the teacher. The pair may be
            one layer twice.
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0: mean over the pairs of positions that count; 0 when the states agree.

    Raises:
        ShapeError: the positions differ, or there are not two layers.
        DataError: the mask is false everywhere.

    Source: Huang, Wang 2017, arXiv:1707.01219, section 4, in TextBrewer's form for sequences (`mmd_loss`).
    """
    _same_positions(student, teacher)
    _two_layers(student)
    _check_mask(mask, student[0])
    difference = _likeness(student, mask) - _likeness(teacher, mask)
    return mean_over(difference * difference, None if mask is None else _both(mask))


def _likeness(layers: Sequence[Any], mask: Any) -> Any:
    """Of the positions in two layers: (N, L, L), a mean over the width."""
    first, second = (blank(layer, mask) for layer in layers)
    return first @ second.swapaxes(1, 2) / first.shape[-1]


# ------------------------------------------------------------------------------------------------ attention


@loss("attention-mse", takes="attention", over="pairs")
def attention_mse(student: Any, teacher: Any, *, convention: str | None = None, mask: Any = None) -> Any:
    """Squared difference of the scores of attention, averaged over heads and pairs of positions that count.

    Args:
        student, teacher: scores before the softmax, or weights behind it, shape (N, heads, queries, keys).
        convention: None: scores of -100 and below, by which code hides padding and what comes later, count as 0.
            "textbrewer": without a mask, all scores of -0.001 and below do, and with a mask none.
        mask: shape (N, L), true where a position counts, or (N, queries, keys), where both do; None counts all.

    Returns:
        Scalar, >= 0; 0 when the scores agree.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Jiao et al. 2020, arXiv:1909.10351, equation 7 (scores, not weights), and its code for the -100; weight 1
        for each pair of layers.
    """
    xp = namespace(student)
    floor = _known(convention)
    same_shape(student, teacher, "attention")
    pairs = _pairs(mask, student)
    student, teacher = blank(student, pairs), blank(teacher, pairs)
    if convention is None or mask is None:
        student, teacher = (xp.where(side <= floor, xp.zeros_like(side), side) for side in (student, teacher))
    difference = student - teacher
    return mean_over(difference * difference, pairs)


@loss("attention-ce", takes="attention")
def attention_ce(
    student: Any, teacher: Any, *, given: str = "scores", convention: str | None = None, mask: Any = None
) -> Any:
    """Cross-entropy of the student's attention against the teacher's, averaged over heads and queries that count.

    Args:
        student, teacher: shape (N, heads, queries, keys).
        given: "scores" before the softmax, or "weights" behind it, as transformers puts them out; those of the keys
            that count are divided by their sum. They hold the dropout of attention, too: switch it off in the student.
        convention: None: the softmax runs over the keys that count. "textbrewer": it runs over all keys, of which those
            that do not count are left out of the sum; without a mask, those whose score is -0.001 or below are.
        mask: shape (N, L), true where a position counts, or (N, queries, keys), where both do; None counts all.

    Returns:
        Scalar in nats, >= 0; when both agree, the mean entropy of the teacher's attention, which is the least. Not so
        for "textbrewer" where keys do not count: a student that gives them less weight than the teacher pays less.

    Raises:
        ShapeError: the shapes differ.
        UnknownNameError: there is no such convention, or kind of values.
        UsageError: a convention is named for weights.
        DataError: the mask is false everywhere.

    Source: TextBrewer's `att_ce_loss`; its gradient is that of the attention transfer of MiniLM.
    """
    if convention is None:
        log_s, log_t = _logarithms(student, teacher, given, mask)
        entropy = -(namespace(log_t).exp(log_t) * log_s).sum(-1)
        return mean_over(entropy, _queries(mask, entropy))
    floor = _known(convention)
    if given != "scores":
        raise UsageError(f"The convention {convention!r} is one of scores; {given!r} are given.")
    same_shape(student, teacher, "attention")
    xp = namespace(student)
    keys = (
        teacher > floor
        if mask is None
        else (mask != 0)[:, None, None, :]
        if mask.ndim == len("NL")
        else (mask != 0)[:, None]
    )
    shared = xp.where(keys, xp.exp(log_softmax(teacher)), xp.zeros_like(teacher))
    entropy = -(shared * log_softmax(student)).sum(-1)
    return mean_over(entropy, _queries(mask, entropy))


@loss("attention-kl", takes="attention")
def attention_kl(student: Any, teacher: Any, *, given: str = "scores", mask: Any = None) -> Any:
    """Kullback-Leibler divergence from the teacher's attention to the student's, averaged over heads and queries.

    Args:
        student, teacher: shape (N, heads, queries, keys).
        given: "scores" before the softmax, or "weights" behind it, as transformers puts them out; those of the keys
            that count are divided by their sum. They hold the dropout of attention, too: switch it off in the student.
        mask: shape (N, L), true where a position counts, or (N, queries, keys), where both do; None counts all. The
            softmax runs over the keys that count.

    Returns:
        Scalar in nats, >= 0; 0 when the attention agrees.

    Raises:
        ShapeError: the shapes differ.
        UnknownNameError: there is no such kind of values.
        DataError: the mask is false everywhere.

    Source: Wang et al. 2020, arXiv:2002.10957, section 3.1; of the last layer alone.
    """
    log_s, log_t = _logarithms(student, teacher, given, mask)
    divergence = relative(log_t, log_s).sum(-1)
    return mean_over(divergence, _queries(mask, divergence))


def _logarithms(student: Any, teacher: Any, given: str, mask: Any) -> tuple[Any, Any]:
    """Of the weights of attention, over the keys that count."""
    if given not in ("scores", "weights"):
        raise UnknownNameError("kind of attention", given, ("scores", "weights"))
    same_shape(student, teacher, "attention")
    pairs = _pairs(mask, student)
    if given == "weights":  # their logarithms are scores, and a softmax divides by what the keys that count leave of 1
        log = namespace(student).log
        student, teacher = (log(blank(side, pairs).clip(min=TINY)) for side in (student, teacher))
    return _over_keys(student, pairs), _over_keys(teacher, pairs)


@loss("minilm", takes="relations", widths="any")
def minilm(
    student: Sequence[Any],
    teacher: Sequence[Any],
    *,
    heads: int = 12,
    pairs: Sequence[tuple[int, int]] | None = None,
    mask: Any = None,
) -> Any:
    """Divergence of how the positions relate in the queries, keys or values of a layer, in each of several heads.

    The vectors of a position are split into relation heads, whatever heads the layer has, so that neither widths nor
    numbers of heads need agree. The relation of two values A and B is softmax(A Bᵀ / √d), d the width of a head.

    Args:
        student, teacher: values of one layer with their heads side by side, such as [queries, keys, values], each
            (N, L, D); D is any multiple of `heads`.
        heads: in which both sides are split. 12 as BERT base has; MiniLMv2 takes 48 for that width and 64 for 1024.
        pairs: which values are related. None: each to itself, as MiniLMv2 does. ((0, 1), (2, 2)) of
            [queries, keys, values]: attention and value relations, as MiniLM does.
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0: summed over the relations, averaged over heads and the positions that count; 0 when the
        values agree.

    Raises:
        ShapeError: the positions differ, or the heads do not divide a width.
        UsageError: there are no pairs, or one names a value that is not there.
        DataError: the mask is false everywhere.

    Source: Wang et al. 2020, arXiv:2002.10957, sections 3.1 and 3.2; Wang et al. 2021, arXiv:2012.15828, section 3.1.
        Of the last layer of base teachers; of layer 21 of 24 of BERT large, 19 of RoBERTa large.
    """
    _same_positions(student, teacher)
    chosen = [(i, i) for i in range(len(student))] if pairs is None else list(pairs)
    if not chosen:
        raise UsageError("There are no pairs, so there is nothing to relate.", fix="Give one, or leave `pairs` out.")
    for place in (place for pair in chosen for place in pair):
        if not 0 <= place < len(student):
            raise UsageError(f"A pair names value {place}; there are {len(student)}, from 0 on.")
    student, teacher = [_split(side, heads, mask) for side in student], [_split(side, heads, mask) for side in teacher]
    total: Any = 0.0
    for i, j in chosen:
        log_s, log_t = (_relation(side[i], side[j], mask) for side in (student, teacher))
        divergence = relative(log_t, log_s).sum(-1)
        total = total + mean_over(divergence, _queries(mask, divergence))
    return total


def _split(states: Any, heads: int, mask: Any) -> Any:
    """(N, L, D) as (N, heads, L, D / heads)."""
    n, length, width = states.shape
    if heads < 1 or width % heads:
        raise ShapeError(f"{heads} relation heads do not divide a width of {width}.", fix="Choose another `heads`.")
    return blank(states, mask).reshape(n, length, heads, width // heads).swapaxes(1, 2)


def _relation(first: Any, second: Any, mask: Any) -> Any:
    """Logarithm of how much each position of the first relates to each of the second: (N, heads, L, L)."""
    scores = first @ second.swapaxes(-1, -2) / math.sqrt(first.shape[-1])
    return _over_keys(scores, _pairs(mask, scores))


# ------------------------------------------------------------------------------------------------ masks and shapes


def _both(mask: Any) -> Any:
    """(N, L) as (N, L, L): true where both positions count."""
    counts = mask != 0
    return counts[:, :, None] & counts[:, None, :]


def _check_mask(mask: Any, states: Any) -> None:
    """Raise a ShapeError unless there is one truth a position, or no mask."""
    if mask is not None and tuple(mask.shape) != tuple(states.shape[:2]):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(states.shape[:2])} is needed.")


def _pairs(mask: Any, attention: Any) -> Any:
    """(N, L) or (N, queries, keys) as the shape of the attention: true where both query and key count."""
    if mask is None:
        return None
    n, _, queries, keys = attention.shape
    wanted = (n, queries, keys) if mask.ndim == len("NQK") or queries != keys else (n, queries)
    if tuple(mask.shape) != wanted:
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {wanted} is needed.")
    both = _both(mask) if mask.ndim == len("NL") else mask != 0
    return namespace(attention).broadcast_to(both[:, None], tuple(attention.shape))


def _queries(mask: Any, like: Any) -> Any:
    """(N, L), or (N, queries, keys) of which a query counts with any key, as (N, heads, queries)."""
    if mask is None:
        return None
    counts = mask != 0 if mask.ndim == len("NL") else (mask != 0).any(-1)
    return namespace(like).broadcast_to(counts[:, None], tuple(like.shape))


def _over_keys(scores: Any, pairs: Any) -> Any:
    """Logarithm of the softmax over the keys that count."""
    if pairs is None:
        return log_softmax(scores)
    return log_softmax(namespace(scores).where(pairs, scores, NEVER))


def _known(convention: str | None) -> float:
    """The floor of a convention."""
    if convention not in FLOORS:
        raise UnknownNameError("convention", str(convention), (name for name in FLOORS if name))
    return FLOORS[convention]


def _same_positions(student: Sequence[Any], teacher: Sequence[Any]) -> None:
    """Raise a ShapeError unless both sides have as many values, of the same samples and positions."""
    for side, values in (("student", student), ("teacher", teacher)):
        if not isinstance(values, (list, tuple)):
            raise ShapeError(f"The {side} gives one array; a list of values is needed, each of shape (N, L, D).")
    if len(student) != len(teacher):
        raise ShapeError(f"The student gives {len(student)} values, the teacher {len(teacher)}.")
    places = {tuple(value.shape[:2]) for value in (*student, *teacher)}
    if len(places) > 1:
        found = " and ".join(str(place) for place in sorted(places))
        raise ShapeError(
            f"Values of samples and positions {found} cannot be related.", "They must be of the same tokens."
        )


def _two_layers(layers: Sequence[Any]) -> None:
    if len(layers) != 2:  # noqa: PLR2004 - a relation has two ends
        raise ShapeError(
            f"States of {len(layers)} layers are given; two are related.", fix="Give a layer twice for one."
        )
