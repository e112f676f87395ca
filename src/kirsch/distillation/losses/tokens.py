"""Losses on the internal values of transformers: hidden states, attention, and relations of positions.

A mask (N, L) is true where a position holds a token. In pairs of positions, as in attention, a masked position counts
neither as a key nor as a query.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kirsch import figures, ops
from kirsch.distillation.losses.loss import check_same_shape, loss
from kirsch.errors import ShapeError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALLEST_WEIGHT = 1e-12
"""Lower bound of attention weights before the logarithm."""

MASKED_SCORE = -1e30
"""Attention score of a masked key: its weight is exactly 0, and the logarithm of the weight is finite."""

PADDING_SCORES = {None: -1e2, "textbrewer": -1e-3}
"""Attention scores at or below this value count as padding, by convention of a loss."""


# ------------------------------------------------------------------------------------------------ hidden states


@loss("hidden-mse", takes="tokens")
def hidden_mse(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """Return the squared difference of the hidden states, averaged over the width and the unmasked positions.

    Args:
        student, teacher: hidden states, shape (N, L, D).
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0; 0 if the states agree.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Jiao et al. 2020, arXiv:1909.10351, equation 8, with a learned projection from the student's width to the
        teacher's; weight 1 for each pair of layers. The mask is as in TextBrewer's `hidden_mse`.
    """
    check_same_shape(student, teacher, "hidden states")
    difference = ops.zero_masked(student, mask) - ops.zero_masked(teacher, mask)
    return ops.masked_mean(ops.mean(difference * difference, -1), mask)


@loss("hidden-cosine", takes="tokens")
def hidden_cosine(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """Return 1 - cosine of the hidden states of each position, averaged over the unmasked positions.

    Args:
        student, teacher: hidden states, shape (N, L, D).
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar from 0 to 2; 0 if the states agree up to a positive factor; 1 for states of zeros.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Sanh et al. 2019, arXiv:1910.01108, section 3; its training code uses weight 1, beside 5 for the logits at
        temperature 2 and 2 for masked language modeling.
    """
    check_same_shape(student, teacher, "hidden states")
    student, teacher = (_direction(ops.zero_masked(side, mask)) for side in (student, teacher))
    return ops.masked_mean(1.0 - ops.sum(student * teacher, -1), mask)


def _direction(states: Any) -> Any:
    """Scale states (..., D) to norm 1; dividing by the largest magnitude first prevents overflow and underflow."""
    largest = ops.detach(ops.amax(ops.abs(states), axis=-1, keepdims=True))
    return ops.normalize(states / ops.where(largest > 0, largest, ops.ones_like(largest)))


@loss("cls-pkd", takes="tokens", over="samples")
def cls_pkd(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """Return the squared distance of the first token's states ([CLS]), each scaled to norm 1, averaged over samples.

    Args:
        student, teacher: hidden states, shape (N, L, D); position 0 represents the sample.
        mask: shape (N, L); a sample whose position 0 is masked does not count.

    Returns:
        Scalar from 0 to 4; 0 if the states agree up to a positive factor.

    Raises:
        ShapeError: the shapes differ.
        DataError: position 0 is masked in every sample.

    Source: Sun et al. 2019, arXiv:1908.09355, section 3.2; the weight β is 10 to 1000, tuned for each task.
    """
    check_same_shape(student, teacher, "hidden states")
    _check_mask(mask, student)
    student, teacher = ops.zero_masked(student, mask), ops.zero_masked(teacher, mask)
    difference = ops.normalize(student[:, 0]) - ops.normalize(teacher[:, 0])
    return ops.masked_mean(ops.sum(difference * difference, -1), None if mask is None else mask[:, 0])


@loss("token-fsp", takes="relations", over="samples")
def token_fsp(student: Sequence[Any], teacher: Sequence[Any], *, mask: Any = None) -> Any:
    """Return the squared difference of the inner products, over positions, of the units of two layers.

    Args:
        student, teacher: hidden states of two layers, each (N, L, D); both may be the same layer.
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0: mean over the D × D products and the samples with unmasked positions; 0 if the states agree.

    Raises:
        ShapeError: the shapes differ, or the number of layers is not two.
        DataError: the mask is false everywhere.

    Source: Yim et al. 2017 (CVPR), equations 1 and 2, in TextBrewer's form for sequences (`fsp_loss`).
    """
    _check_same_positions(student, teacher)
    _check_two_layers(student)
    _check_mask(mask, student[0])
    for states_s, states_t in zip(student, teacher, strict=True):
        check_same_shape(states_s, states_t, "hidden states")
    difference = _flow_matrix(student, mask) - _flow_matrix(teacher, mask)
    return ops.masked_mean(ops.mean(difference * difference, (1, 2)), None if mask is None else ops.any(mask != 0, 1))


def _flow_matrix(layers: Sequence[Any], mask: Any) -> Any:
    """Return the products of the units of two layers, averaged over the positions of a sample: (N, D, D)."""
    first, second = (ops.zero_masked(layer, mask) for layer in layers)
    products = ops.swapaxes(first, 1, 2) @ second
    if mask is None:
        return products / first.shape[1]
    counts = ops.cast(ops.count_nonzero(mask, 1), ops.dtype(products))  # (N,)
    return products / ops.clip(counts, 1)[:, None, None]


@loss("token-nst", takes="relations", widths="any", over="pairs")
def token_nst(student: Sequence[Any], teacher: Sequence[Any], *, mask: Any = None) -> Any:
    """Return the squared difference of the inner products, over units, of the positions of two layers.

    Args:
        student, teacher: hidden states of two layers, each (N, L, D); D may differ in the teacher. Both may be the
            same layer.
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0: mean over the unmasked pairs of positions; 0 if the states agree.

    Raises:
        ShapeError: the positions differ, or the number of layers is not two.
        DataError: the mask is false everywhere.

    Source: Huang, Wang 2017, arXiv:1707.01219, section 4, in TextBrewer's form for sequences (`mmd_loss`).
    """
    _check_same_positions(student, teacher)
    _check_two_layers(student)
    _check_mask(mask, student[0])
    difference = _similarities(student, mask) - _similarities(teacher, mask)
    return ops.masked_mean(difference * difference, None if mask is None else _pair_positions(mask))


def _similarities(layers: Sequence[Any], mask: Any) -> Any:
    """Return the inner products of the positions of two layers, averaged over the width: (N, L, L)."""
    first, second = (ops.zero_masked(layer, mask) for layer in layers)
    return first @ ops.swapaxes(second, 1, 2) / first.shape[-1]


# ------------------------------------------------------------------------------------------------ attention


@loss("attention-mse", takes="attention", over="pairs")
def attention_mse(student: Any, teacher: Any, *, convention: str | None = None, mask: Any = None) -> Any:
    """Return the squared difference of the attention scores, averaged over heads and unmasked pairs of positions.

    Args:
        student, teacher: scores before the softmax, or weights after it, shape (N, heads, queries, keys).
        convention: None sets scores of -100 and below, which mark padding and later positions, to 0. "textbrewer" sets
            scores of -0.001 and below to 0 if there is no mask; with a mask it changes no scores.
        mask: shape (N, L), true where a position counts, or (N, queries, keys), for pairs; None counts all.

    Returns:
        Scalar, >= 0; 0 if the scores agree.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Jiao et al. 2020, arXiv:1909.10351, equation 7 (scores, not weights); -100 is from its code; weight 1
        for each pair of layers.
    """
    padding_score = _padding_score(convention)
    check_same_shape(student, teacher, "attention")
    pairs = _pair_mask(mask, student)
    student, teacher = ops.zero_masked(student, pairs), ops.zero_masked(teacher, pairs)
    if convention is None or mask is None:
        student, teacher = (ops.where(side <= padding_score, ops.zeros_like(side), side) for side in (student, teacher))
    difference = student - teacher
    return ops.masked_mean(difference * difference, pairs)


@loss("attention-ce", takes="attention")
def attention_ce(
    student: Any, teacher: Any, *, attention: str = "scores", convention: str | None = None, mask: Any = None
) -> Any:
    """Return the cross-entropy of the student's attention with the teacher's, averaged over heads and queries.

    Args:
        student, teacher: shape (N, heads, queries, keys).
        attention: "scores" before the softmax, or "weights" after it, as transformers returns them. Weights are
            divided by their sum over the unmasked keys. They include attention dropout, so disable it in the student.
        convention: None takes the softmax over the unmasked keys. "textbrewer" takes it over all keys and leaves the
            masked ones out of the sum; without a mask, keys with a score of -0.001 or below are left out.
        mask: shape (N, L), true where a position counts, or (N, queries, keys), for pairs; None counts all.

    Returns:
        Scalar in nats, >= 0. The minimum, for equal attention, is the mean entropy of the teacher's attention. With
        "textbrewer" and masked keys, a student that gives masked keys less weight has a lower loss.

    Raises:
        ShapeError: the shapes differ.
        UnknownNameError: `convention` or `attention` is unknown.
        UsageError: a convention is set for weights.
        DataError: the mask is false everywhere.

    Source: TextBrewer's `att_ce_loss`; the gradient equals that of MiniLM's attention transfer.
    """
    if convention is None:
        log_s, log_t = _log_weights(student, teacher, attention, mask)
        entropy = -ops.sum(ops.exp(log_t) * log_s, -1)
        return ops.masked_mean(entropy, _query_mask(mask, entropy))
    padding_score = _padding_score(convention)
    if attention != "scores":
        raise UsageError(f"The convention {convention!r} applies to scores; `attention` is {attention!r}.")
    check_same_shape(student, teacher, "attention")
    if mask is None:
        counted = teacher > padding_score
    elif len(mask.shape) == len("NL"):
        counted = (mask != 0)[:, None, None, :]
    else:
        counted = (mask != 0)[:, None]
    weights_t = ops.where(counted, ops.exp(ops.log_softmax(teacher)), ops.zeros_like(teacher))
    entropy = -ops.sum(weights_t * ops.log_softmax(student), -1)
    return ops.masked_mean(entropy, _query_mask(mask, entropy))


@loss("attention-kl", takes="attention")
def attention_kl(student: Any, teacher: Any, *, attention: str = "scores", mask: Any = None) -> Any:
    """Return the KL divergence from the teacher's attention to the student's, averaged over heads and queries.

    Args:
        student, teacher: shape (N, heads, queries, keys).
        attention: "scores" before the softmax, or "weights" after it, as transformers returns them. Weights are
            divided by their sum over the unmasked keys. They include attention dropout, so disable it in the student.
        mask: shape (N, L), true where a position counts, or (N, queries, keys), for pairs; None counts all. The
            softmax is taken over the unmasked keys.

    Returns:
        Scalar in nats, >= 0; 0 if the attention agrees.

    Raises:
        ShapeError: the shapes differ.
        UnknownNameError: `attention` is unknown.
        DataError: the mask is false everywhere.

    Source: Wang et al. 2020, arXiv:2002.10957, section 3.1; last layer only.
    """
    log_s, log_t = _log_weights(student, teacher, attention, mask)
    divergence = ops.sum(ops.kl_terms(log_t, log_s), -1)
    return ops.masked_mean(divergence, _query_mask(mask, divergence))


def _log_weights(student: Any, teacher: Any, attention: str, mask: Any) -> tuple[Any, Any]:
    """Return the logarithms of the attention weights over the unmasked keys."""
    if attention not in ("scores", "weights"):
        raise UnknownNameError("kind of attention", attention, ("scores", "weights"))
    check_same_shape(student, teacher, "attention")
    pairs = _pair_mask(mask, student)
    if attention == "weights":  # the softmax of log-weights divides them by their sum over the unmasked keys
        student, teacher = (
            ops.log(ops.clip(ops.zero_masked(side, pairs), SMALLEST_WEIGHT)) for side in (student, teacher)
        )
    return _masked_log_softmax(student, pairs), _masked_log_softmax(teacher, pairs)


@loss("minilm", takes="relations", widths="any")
def minilm(
    student: Sequence[Any],
    teacher: Sequence[Any],
    *,
    heads: int = 12,
    pairs: Sequence[tuple[int, int]] | None = None,
    mask: Any = None,
) -> Any:
    """Return the KL divergence of the similarities between positions in the queries, keys or values of a layer.

    The similarities, called relations, of two arrays A and B are softmax(A Bᵀ / √d), with d the width of a head. Each
    array is split into relation heads, independently of the attention heads of the layer, so widths and numbers of
    attention heads may differ.

    Args:
        student, teacher: arrays of one layer with their heads concatenated, such as [queries, keys, values], each
            (N, L, D); D is a multiple of `heads`.
        heads: number of relation heads. BERT base has 12 attention heads; MiniLMv2 uses 48 for that width, 64 for 1024.
        pairs: indices of the arrays to relate. None relates each array to itself, as in MiniLMv2. With [queries, keys,
            values], ((0, 1), (2, 2)) gives the attention and the value relations of MiniLM.
        mask: shape (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0: summed over the relations, averaged over heads and unmasked positions; 0 if the
        arrays agree.

    Raises:
        ShapeError: the positions differ, or a width is not a multiple of `heads`.
        UsageError: `pairs` is empty, or contains an index that is out of range.
        DataError: the mask is false everywhere.

    Source: Wang et al. 2020, arXiv:2002.10957, sections 3.1 and 3.2; Wang et al. 2021, arXiv:2012.15828, section 3.1.
        The compared layer is the last one of base teachers, layer 21 of 24 of BERT large, and 19 of RoBERTa large.
    """
    _check_same_positions(student, teacher)
    chosen = [(i, i) for i in range(len(student))] if pairs is None else list(pairs)
    if not chosen:
        raise UsageError("`pairs` is empty.", fix="Pass at least one pair, or omit `pairs`.")
    for index in (index for pair in chosen for index in pair):
        if not 0 <= index < len(student):
            raise UsageError(f"`pairs` contains the index {index}; there are {len(student)} arrays, numbered from 0.")
    student, teacher = (
        [_split(array, heads, mask) for array in student],
        [_split(array, heads, mask) for array in teacher],
    )
    total: Any = 0.0
    for i, j in chosen:
        log_s, log_t = (_relation(side[i], side[j], mask) for side in (student, teacher))
        divergence = ops.sum(ops.kl_terms(log_t, log_s), -1)
        total = total + ops.masked_mean(divergence, _query_mask(mask, divergence))
    return total


def _split(states: Any, heads: int, mask: Any) -> Any:
    """Reshape (N, L, D) to (N, heads, L, D / heads)."""
    n, length, width = states.shape
    if heads < 1 or width % heads:
        raise ShapeError(f"`heads` is {heads}, which does not divide the width {width}.", fix="Use a divisor.")
    return ops.swapaxes(ops.reshape(ops.zero_masked(states, mask), (n, length, heads, width // heads)), 1, 2)


def _relation(first: Any, second: Any, mask: Any) -> Any:
    """Return log softmax(A Bᵀ / √d) over the unmasked positions of B: (N, heads, L, L)."""
    scores = first @ ops.swapaxes(second, -1, -2) / math.sqrt(first.shape[-1])
    return _masked_log_softmax(scores, _pair_mask(mask, scores))


# ------------------------------------------------------------------------------------------------ masks and shapes


def _pair_positions(mask: Any) -> Any:
    """Expand a mask (N, L) to pairs (N, L, L), true where both positions count."""
    counts = mask != 0
    return counts[:, :, None] & counts[:, None, :]


def _check_mask(mask: Any, states: Any) -> None:
    """Raise a ShapeError unless the mask is None or has one entry per position."""
    if mask is not None and tuple(mask.shape) != tuple(states.shape[:2]):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(states.shape[:2])} is needed.")


def _pair_mask(mask: Any, attention: Any) -> Any:
    """Expand a mask (N, L) or (N, queries, keys) to the shape of the attention."""
    if mask is None:
        return None
    n, _, queries, keys = attention.shape
    expected = (n, queries, keys) if len(mask.shape) == len("NQK") or queries != keys else (n, queries)
    if tuple(mask.shape) != expected:
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {expected} is needed.")
    pairs = _pair_positions(mask) if len(mask.shape) == len("NL") else mask != 0
    return ops.broadcast_like(pairs[:, None], attention)


def _query_mask(mask: Any, like: Any) -> Any:
    """Return a mask (N, heads, queries); for a mask (N, queries, keys), a query counts if any of its keys counts."""
    if mask is None:
        return None
    counts = mask != 0 if len(mask.shape) == len("NL") else ops.any(mask != 0, -1)
    return ops.broadcast_like(counts[:, None], like)


def _masked_log_softmax(scores: Any, pairs: Any) -> Any:
    """Return the log-softmax over the unmasked keys."""
    if pairs is None:
        return ops.log_softmax(scores)
    return ops.log_softmax(ops.where(pairs, scores, MASKED_SCORE))


def _padding_score(convention: str | None) -> float:
    if convention not in PADDING_SCORES:
        raise UnknownNameError("convention", str(convention), (name for name in PADDING_SCORES if name))
    return PADDING_SCORES[convention]


def _check_same_positions(student: Sequence[Any], teacher: Sequence[Any]) -> None:
    """Raise a ShapeError unless both sides have the same number of arrays, samples and positions."""
    for role, arrays in (("student", student), ("teacher", teacher)):
        if not isinstance(arrays, (list, tuple)):
            raise ShapeError(f"The {role} has one array; a list of arrays is needed, each of shape (N, L, D).")
    if len(student) != len(teacher):
        raise ShapeError(f"The student has {figures.counted(len(student), 'array')}, the teacher {len(teacher)}.")
    shapes = {tuple(array.shape[:2]) for array in (*student, *teacher)}
    if len(shapes) > 1:
        found = " and ".join(str(shape) for shape in sorted(shapes))
        raise ShapeError(f"The arrays have samples and positions {found}.", "They must be of the same tokens.")


def _check_two_layers(layers: Sequence[Any]) -> None:
    if len(layers) != 2:  # noqa: PLR2004 - a flow matrix has two layers
        raise ShapeError(f"There are states of {len(layers)} layers; two are needed.", fix="Pass a single layer twice.")
