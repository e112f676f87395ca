"""Sequences: the loss of speech frames, and a filter for sequences that a teacher generated.

Word-level distillation of translation and of causal language models uses the loss "kd" with a mask (N, L).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import check_same_shape, loss
from kirsch.errors import ShapeError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

BLANK_MODES = ("keep", "drop", "weight")

# ------------------------------------------------------------------------------------------------ speech


@loss("ctc-frames")
def ctc_frames(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 1.0,
    blank: str = "keep",
    blank_class: int = 0,
    threshold: float = 0.95,
    mask: Any = None,
) -> Any:
    """Return the KL divergence of each frame's softened outputs, times temperature², averaged over unmasked frames.

    A CTC model predicts blank in most frames, so most of the loss may come from blanks. Leaving out blanks helps in
    some tasks and harms in others; compare on your data.

    Args:
        student, teacher: logits of frames, shape (N, L, K).
        temperature: > 0; not applied to the probability of blank that the option `blank` uses.
        blank: "keep" gives all frames the same weight. "drop" leaves out frames in which the teacher's probability of
            blank is above `threshold`. "weight" weights each frame by the teacher's probability of the other classes.
            With "drop" and "weight" the mean depends on the whole batch, so the mean of several batches differs from
            that of one large batch.
        blank_class: number of the blank class, -K to K - 1: 0 in most toolkits, -1 if it is the last.
        threshold: 0 to 1.
        mask: shape (N, L), true where a frame is not padding; None counts all.

    Returns:
        Scalar in nats, >= 0; 0 if the softened outputs agree, or if every frame is dropped.

    Raises:
        ShapeError: student and teacher differ in the number of frames or classes.
        UsageError: an option is out of range.
        UnknownNameError: `blank` is unknown.
        DataError: the mask is false everywhere.

    Source: Takashima, Li, Kawai 2018 (ICASSP), frame by frame. The options for blanks and the threshold are Kirsch's.
    """
    check_temperature(temperature)
    _check_frames(student, teacher)
    _check_blank(blank, blank_class, threshold, student.shape[-1])
    student, teacher = ops.zero_masked(student, mask), ops.zero_masked(teacher, mask)
    log_s, log_t = ops.log_softmax(student / temperature), ops.log_softmax(teacher / temperature)
    divergence = ops.sum(ops.kl_terms(log_t, log_s), -1)
    weights = ops.ones_like(divergence)
    if blank != "keep":
        p_blank = ops.exp(ops.log_softmax(teacher)[..., blank_class])
        weights = 1.0 - p_blank if blank == "weight" else ops.where(p_blank > threshold, 0.0 * weights, weights)
    return ops.weighted_mean(divergence, weights, mask) * temperature**2


def _check_frames(student: Any, teacher: Any) -> None:
    """Raise a ShapeError if the shapes differ; if the numbers of frames differ, it names the strides as the cause."""
    are_frames = len(student.shape) == len(teacher.shape) == 3  # noqa: PLR2004 - (N, L, K)
    if are_frames and student.shape[0] == teacher.shape[0] and student.shape[1] != teacher.shape[1]:
        raise ShapeError(
            f"The student returns {student.shape[1]} frames, the teacher {teacher.shape[1]}, for the same audio.",
            "Their strides differ, so frame i is a different time in each.",
            "Use models with the same stride, or train the student on the teacher's transcripts.",
        )
    check_same_shape(student, teacher)


def _check_blank(blank: str, blank_class: int, threshold: float, classes: int) -> None:
    if blank not in BLANK_MODES:
        raise UnknownNameError("value of `blank`", blank, BLANK_MODES)
    if not -classes <= blank_class < classes:
        raise UsageError(f"`blank_class` is {blank_class}; there are {classes} classes.")
    if not 0 <= threshold <= 1:
        raise UsageError(f"`threshold` is {threshold}; a probability from 0 to 1 is needed.")


# ------------------------------------------------------------------------------------------------ generated targets


@dataclass(frozen=True)
class TargetLimits:
    """Limits on sequences that a teacher generated, for use as training targets.

    The defaults are Kirsch's own choice, for languages with texts of similar length. Inspect the dropped targets before
    relying on the limits.

    Args:
        min_length_ratio, max_length_ratio: tokens of the target divided by tokens of the source.
        ngram: length of the token sequences that are counted to detect repetition.
        max_repeats: largest number of occurrences of the same n-gram.
        min_log_probability: the teacher's log-probability, averaged over the tokens, in nats; None sets no limit.

    Raises:
        UsageError: a number is out of range.
    """

    min_length_ratio: float = 0.5
    max_length_ratio: float = 2.0
    ngram: int = 4
    max_repeats: int = 3
    min_log_probability: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_length_ratio <= self.max_length_ratio:
            raise UsageError(
                f"`min_length_ratio` is {self.min_length_ratio}, `max_length_ratio` {self.max_length_ratio}.",
                fix="Use numbers of at least 0, the first not above the second.",
            )
        if self.ngram < 1 or self.max_repeats < 1:
            raise UsageError(
                f"`ngram` is {self.ngram}, `max_repeats` {self.max_repeats}; integers of at least 1 are needed."
            )


@dataclass(frozen=True)
class DroppedTarget:
    """A generated target that was left out.

    Args:
        index: index of the target.
        reason: "empty", "duplicate", "short", "long", "repetitive" or "unlikely".
        detail: a sentence with the value found and the limit.
    """

    index: int
    reason: str
    detail: str


@dataclass(frozen=True)
class FilteredTargets:
    """Generated targets to train on, and targets that were left out.

    Args:
        kept: indices of the targets to use, ascending.
        dropped: a `DroppedTarget` for each other target, by ascending index.
    """

    kept: tuple[int, ...]
    dropped: tuple[DroppedTarget, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of dropped targets by reason."""
        return dict(Counter(record.reason for record in self.dropped))


def filter_targets(
    targets: Sequence[Sequence[Hashable]],
    sources: Sequence[Sequence[Hashable]] | None = None,
    log_probabilities: Sequence[float] | None = None,
    *,
    limits: TargetLimits | None = None,
) -> FilteredTargets:
    """Select the sequences generated by a teacher that are suitable as training targets.

    A target is dropped for the first reason that applies: it is empty, it repeats an earlier pair of source and target,
    it is too short or too long for its source, it repeats the same tokens, its probability is too low.

    Args:
        targets: tokens generated by the teacher, without padding and without begin and end tokens.
        sources: tokens of the inputs; None if there are none. Then lengths are not checked, and equal targets count as
            duplicates.
        log_probabilities: the teacher's log-probability of each target, averaged over its tokens, in nats; required if
            `limits.min_log_probability` is set.
        limits: `TargetLimits()` by default.

    Raises:
        UsageError: only one of `log_probabilities` and `limits.min_log_probability` is given.
        ShapeError: the numbers of targets, sources and log-probabilities differ.

    Source: Kim, Rush 2016, arXiv:1606.07947, section 3.2 (sequence-level distillation).
    """
    limits = limits or TargetLimits()
    if (log_probabilities is None) != (limits.min_log_probability is None):
        raise UsageError(
            "Log-probabilities of the teacher need a limit, and the limit needs log-probabilities.",
            fix="Pass both `log_probabilities` and `min_log_probability`, or neither.",
        )
    for name, values in (("sources", sources), ("log-probabilities", log_probabilities)):
        if values is not None and len(values) != len(targets):
            raise ShapeError(f"There are {len(targets)} targets and {len(values)} {name}; equal numbers are needed.")
    first_index: dict[Hashable, int] = {}
    kept, dropped = [], []
    for index, target in enumerate(targets):
        source = None if sources is None else sources[index]
        earlier = first_index.setdefault((None if source is None else tuple(source), tuple(target)), index)
        log_probability = None if log_probabilities is None else log_probabilities[index]
        if target and earlier != index:
            problem: tuple[str, str] | None = ("duplicate", f"It equals target {earlier}.")
        else:
            problem = _problem(target, source, log_probability, limits)
        if problem is None:
            kept.append(index)
        else:
            dropped.append(DroppedTarget(index, *problem))
    return FilteredTargets(tuple(kept), tuple(dropped))


def _problem(
    target: Sequence[Hashable],
    source: Sequence[Hashable] | None,
    log_probability: float | None,
    limits: TargetLimits,
) -> tuple[str, str] | None:
    """Return the first reason to drop a target, with a sentence, or None."""
    if not target:
        return "empty", "It has no tokens."
    if source is not None:
        lengths = f"It has {len(target)} tokens, the source {len(source)}"
        if len(target) < limits.min_length_ratio * len(source):
            return "short", f"{lengths}; the ratio must be at least {limits.min_length_ratio}."
        if len(target) > limits.max_length_ratio * len(source):
            return "long", f"{lengths}; the ratio must be at most {limits.max_length_ratio}."
    repeats = count_most_frequent(target, limits.ngram)
    if repeats > limits.max_repeats:
        detail = f"An n-gram of {limits.ngram} tokens occurs {repeats} times; the limit is {limits.max_repeats}."
        return "repetitive", detail
    minimum = limits.min_log_probability
    if minimum is not None and log_probability is not None and not log_probability >= minimum:  # also drops NaN
        return "unlikely", f"Its mean log-probability is {log_probability:.4g}; the minimum is {minimum:.4g}."
    return None


def count_most_frequent(tokens: Sequence[Hashable], ngram: int) -> int:
    """Return the number of occurrences, overlapping ones included, of the most frequent n-gram; 0 without n-grams."""
    ngrams = Counter(tuple(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1))
    return max(ngrams.values(), default=0)
