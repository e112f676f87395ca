"""Sequences: which scores belong to which labels, frames of speech, and which of a teacher's outputs to learn from.

Word by word, a student of translation or of a causal language model learns with the loss "kd" and a mask (N, L).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.distillation.arrays import blank as blanked
from kirsch.distillation.arrays import each, log_softmax, namespace, relative, same_shape, weighted_mean
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import loss
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

IGNORE = -100
"""The label of a position that does not count, as PyTorch and transformers write it."""

BLANKS = ("keep", "drop", "weight")


# ------------------------------------------------------------------------------------------------ alignment


def causal(scores: Any, labels: Any, ignore: int = IGNORE) -> tuple[Any, Any, Any]:
    """Scores, labels and mask, aligned: what a causal model puts out at position i is about token i + 1.

    The mask belongs to the label, not to the position that the label stands at. Taken without the shift it leaves out
    the first token of each answer, and counts one guess behind its end.

    Args:
        scores: shape (N, L, K), or a list or dict of such: those of student and teacher.
        labels: token numbers, shape (N, L), where they stand in the input; `ignore` where none is to be learned.
        ignore: the label of prompts and padding.

    Returns:
        Scores (N, L - 1, K), labels (N, L - 1), and a mask (N, L - 1), true where the label counts.

    Raises:
        ShapeError: scores and labels are not of the same positions, or there is one position only.
    """

    def cut(array: Any) -> Any:
        if tuple(array.shape[:2]) != tuple(labels.shape):
            raise ShapeError(
                f"The labels have shape {tuple(labels.shape)}; the scores are of {tuple(array.shape[:2])}."
            )
        return array[:, :-1]

    if labels.ndim != 2 or labels.shape[1] < 2:  # noqa: PLR2004 - (N, L), of which one token foretells another
        raise ShapeError(f"The labels have shape {tuple(labels.shape)}; (N, L) with L of at least 2 is needed.")
    aligned = labels[:, 1:]
    return each(cut, scores), aligned, aligned != ignore


def mask_of_lengths(lengths: Any, length: int) -> Any:
    """True at the first `lengths[n]` of the positions of each sequence: shape (N, length).

    Args:
        lengths: whole numbers, shape (N,), 0 to `length`.
        length: of the padded sequences.

    Raises:
        DataError: a length is below 0 or above `length`.
    """
    xp = namespace(lengths)
    for worst in (int(lengths.min()), int(lengths.max())):
        if not 0 <= worst <= length:
            raise DataError(f"A sequence has length {worst}; the padded ones have {length} positions.")
    places = np.arange(length) if xp is np else xp.arange(length, device=lengths.device)
    return places[None, :] < lengths[:, None]


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
    """Divergence of the softened classes of each frame, times temperature², averaged over the frames that count.

    Between its spikes a CTC model says blank, so that most frames teach silence. Whether to leave them out is for the
    data to say: it helps some tasks and harms others.

    Args:
        student, teacher: scores of frames, shape (N, L, K).
        temperature: > 0; it does not touch how sure of a blank the teacher is.
        blank: "keep": all frames count alike. "drop": those do not count in which the teacher gives the blank more than
            `threshold`. "weight": each frame counts as much as the teacher gives to other classes than the blank. With
            both, the frames of a batch share its mean, so that several batches of a step do not add up to a large one.
        blank_class: number of the blank, -K to K - 1: 0 in most toolkits, -1 where it comes last.
        threshold: 0 to 1.
        mask: shape (N, L), true where a frame holds sound; None counts all.

    Returns:
        Scalar in nats, >= 0; 0 when the softened classes agree, or when every frame is dropped.

    Raises:
        ShapeError: the frames of student and teacher differ in number, or the classes do.
        UsageError: an option is out of range.
        UnknownNameError: there is no such way with blanks.
        DataError: the mask is false everywhere.

    Source: Takashima, Li, Kawai 2018 (ICASSP), frame by frame. What is done with blanks, and the threshold, are ours.
    """
    check_temperature(temperature)
    _check_frames(student, teacher)
    _check_blank(blank, blank_class, threshold, student.shape[-1])
    xp = namespace(student)
    student, teacher = blanked(student, mask), blanked(teacher, mask)
    log_s, log_t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    divergence = relative(log_t, log_s).sum(-1)
    weights = xp.ones_like(divergence)
    if blank != "keep":
        silence = xp.exp(log_softmax(teacher)[..., blank_class])
        weights = 1.0 - silence if blank == "weight" else xp.where(silence > threshold, 0.0 * weights, weights)
    return weighted_mean(divergence, weights, mask) * temperature**2


def _check_frames(student: Any, teacher: Any) -> None:
    """Raise a ShapeError, of which one about strides is the likeliest."""
    three = student.ndim == teacher.ndim == 3  # noqa: PLR2004 - (N, L, K)
    if three and len(student) == len(teacher) and student.shape[1] != teacher.shape[1]:
        raise ShapeError(
            f"The student puts out {student.shape[1]} frames, the teacher {teacher.shape[1]}, for the same sound.",
            "Their strides differ, and frame i is not the same moment in both.",
            "Give both the same stride, or let the student learn from the teacher's transcripts.",
        )
    same_shape(student, teacher)


def _check_blank(blank: str, blank_class: int, threshold: float, classes: int) -> None:
    if blank not in BLANKS:
        raise UnknownNameError("way with blanks", blank, BLANKS)
    if not -classes <= blank_class < classes:
        raise UsageError(f"The blank is class {blank_class}; there are {classes} classes.")
    if not 0 <= threshold <= 1:
        raise UsageError(f"The threshold of blanks is {threshold}; a probability from 0 to 1 is needed.")


# ------------------------------------------------------------------------------------------------ pseudo-targets


@dataclass(frozen=True)
class TargetLimits:
    """What a sequence that a teacher generated must keep to, to be learned from.

    Args:
        least_per_source, most_per_source: tokens of the target for each of the source.
        ngram: how many tokens in a row are looked at for repetition.
        most_repeats: how often the same ones may occur.
        least_log_probability: of the teacher, the mean over the tokens, in nats; None asks for none.

    The figures are ours, for languages of like lengths; look at what is dropped before you trust them.

    Raises:
        UsageError: a number is out of range.
    """

    least_per_source: float = 0.5
    most_per_source: float = 2.0
    ngram: int = 4
    most_repeats: int = 3
    least_log_probability: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.least_per_source <= self.most_per_source:
            raise UsageError(
                f"Targets are to have {self.least_per_source} to {self.most_per_source} tokens for each of the source;"
                " two numbers from 0 on, the smaller first, are needed."
            )
        if self.ngram < 1 or self.most_repeats < 1:
            raise UsageError(
                f"{self.ngram} tokens in a row may occur {self.most_repeats} times; numbers of at least 1 are needed."
            )


@dataclass(frozen=True)
class Dropped:
    """Why one pseudo-target is not learned from.

    Args:
        index: its place among the targets.
        reason: "empty", "duplicate", "short", "long", "repetitive" or "unlikely".
        detail: a sentence with the number found and the limit.
    """

    index: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Sifted:
    """Which pseudo-targets are kept, and why each of the others is not.

    Args:
        kept: places among the targets, rising.
        dropped: one record each, by rising place.
    """

    kept: tuple[int, ...]
    dropped: tuple[Dropped, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Reason → how many were dropped for it."""
        return dict(Counter(record.reason for record in self.dropped))


def sift_targets(
    targets: Sequence[Sequence[Hashable]],
    sources: Sequence[Sequence[Hashable]] | None = None,
    log_probabilities: Sequence[float] | None = None,
    *,
    limits: TargetLimits | None = None,
) -> Sifted:
    """Which sequences of a teacher a student should learn from, and why not the others.

    Each target is dropped for the first reason that holds: it is empty, the same pair was seen before, it is too short
    or too long for its source, it repeats itself, the teacher itself finds it unlikely.

    Args:
        targets: tokens that the teacher generated, without padding and marks of begin and end.
        sources: tokens that it was given; None where there are none, so that lengths are not compared and equal targets
            are duplicates.
        log_probabilities: of the teacher, the mean over the tokens of each target, in nats; needed where
            `limits.least_log_probability` is stated.
        limits: the ones above by default.

    Raises:
        UsageError: log-probabilities without a limit, or a limit without them.
        ShapeError: targets, sources and log-probabilities differ in number.

    Source: Kim, Rush 2016, arXiv:1606.07947, section 3.2 (learning from what the teacher generates).
    """
    limits = limits or TargetLimits()
    if (log_probabilities is None) != (limits.least_log_probability is None):
        raise UsageError(
            "The teacher's log-probabilities and a limit for them go together.",
            fix="Give `log_probabilities` and `least_log_probability`, or neither.",
        )
    for name, given in (("sources", sources), ("log-probabilities", log_probabilities)):
        if given is not None and len(given) != len(targets):
            raise ShapeError(f"There are {len(targets)} targets and {len(given)} {name}; as many are needed.")
    first: dict[Hashable, int] = {}
    kept, dropped = [], []
    for index, target in enumerate(targets):
        source = None if sources is None else sources[index]
        earlier = first.setdefault((None if source is None else tuple(source), tuple(target)), index)
        chance = None if log_probabilities is None else log_probabilities[index]
        found = ("duplicate", f"It is the same as number {earlier}.") if target and earlier != index else None
        found = found or _fault(target, source, chance, limits)
        if found is None:
            kept.append(index)
        else:
            dropped.append(Dropped(index, *found))
    return Sifted(tuple(kept), tuple(dropped))


def _fault(
    target: Sequence[Hashable], source: Sequence[Hashable] | None, chance: float | None, limits: TargetLimits
) -> tuple[str, str] | None:
    """The first reason not to learn from a target, with a sentence; None where it is good."""
    if not target:
        return "empty", "It has no tokens."
    if source is not None:
        lengths = f"It has {len(target)} tokens for {len(source)} of the source"
        if len(target) < limits.least_per_source * len(source):
            return "short", f"{lengths}; {limits.least_per_source} for each are the least."
        if len(target) > limits.most_per_source * len(source):
            return "long", f"{lengths}; {limits.most_per_source} for each are the most."
    repeats = most_repeats(target, limits.ngram)
    if repeats > limits.most_repeats:
        return "repetitive", f"{limits.ngram} tokens in a row occur {repeats} times; {limits.most_repeats} is the most."
    least = limits.least_log_probability
    if least is not None and chance is not None and not chance >= least:  # NaN is no probability either
        return "unlikely", f"Its mean log-probability is {chance:.4g}; {least:.4g} is the least."
    return None


def most_repeats(tokens: Sequence[Hashable], ngram: int) -> int:
    """How often the commonest run of `ngram` tokens occurs, runs that overlap included; 0 of fewer tokens."""
    runs = Counter(tuple(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1))
    return max(runs.values(), default=0)
