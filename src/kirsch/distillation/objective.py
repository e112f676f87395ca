"""Objectives: the weighted sum of losses that training minimizes, as data."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, ClassVar, Literal

from kirsch.arguments import checked
from kirsch.distillation.losses.loss import LOSSES
from kirsch.distillation.presets import PRESETS, kd_fields
from kirsch.distillation.term import KD_TEMPERATURE, KD_WEIGHT, Number, Ramp, Term, end_values, problem
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.layers import texts
from kirsch.tables import Part, Piece, Printable
from kirsch.tasks.label_losses import LABEL_LOSSES

NUMBERS = ("weight", "temperature", "label_weight")
"""Fields that may be a `Ramp`."""

Outputs = Literal["logits", "probabilities"]
"""Kinds of outputs of a model."""


@checked
@dataclass(frozen=True)
class Objective(Printable):
    """Weighted sum of a label loss and of distillation losses: label_weight · label loss + Σ weight · loss.

    Args:
        terms: distillation losses; empty to train on labels only.
        label_weight: weight of the label loss, >= 0, or a `Ramp`.
        label_smoothing: fraction of the label distribution that is spread over all classes, 0 <= fraction < 1.
        label_loss: "cross-entropy", "binary", "squared-error", or the name of a label loss that another package
            registers.
        causal: position i of a sequence predicts token i + 1: logits and labels are shifted by one position.
        ignore_index: label of masked positions and of samples without a label, whose label loss is 0. With one label
            per sample, the mean is over all samples. With a label per token or pixel, it is over the labeled positions.
        balance: "fixed": use the weights unchanged. "gradient": on the first batch of each epoch, scale the terms so
            that the norms of their gradients are in proportion to the weights.
        combine_teachers: how several teachers are combined. "probabilities": the mean of their probabilities;
            "logits": the mean of their logits; "confidence": the mean of their probabilities, weighted by the
            confidence of each teacher; "sum": one loss for each teacher, summed.
        student_outputs: kind of the student's outputs. "logits": used unchanged. "probabilities": converted to logits,
            log p, or log p - log (1 - p) for binary losses. None: logits; outputs that look like probabilities raise an
            error.
        teacher_outputs: kind of the teachers' outputs, as for `student_outputs`; a tuple has one entry per teacher.

    Raises:
        UsageError: a number is out of range, or all weights are zero.
        UnknownNameError: the label loss is unknown.
    """

    made_by: ClassVar[str] = "kirsch.Objective.kd()"

    terms: tuple[Term, ...] = ()
    _: KW_ONLY
    label_weight: Number = 1.0
    label_smoothing: float = 0.0
    label_loss: str = "cross-entropy"
    causal: bool = False
    ignore_index: int = -100
    balance: Literal["fixed", "gradient"] = "fixed"
    combine_teachers: Literal["probabilities", "logits", "confidence", "sum"] = "probabilities"
    student_outputs: Outputs | None = None
    teacher_outputs: Outputs | tuple[Outputs | None, ...] | None = None

    @staticmethod
    def of_text(name: str) -> str:
        """Return the call that makes the objective of this name, for the error of `kirsch.arguments.checked`."""
        if name in LOSSES and name not in PRESETS:
            return f'Give kirsch.Objective((kirsch.Term("{name}"),)).'
        close = difflib.get_close_matches(name, list(PRESETS), n=1)
        return f'Give kirsch.Objective.preset("{close[0]}").' if close else f"Give {Objective.made_by}."

    def __post_init__(self) -> None:
        problems = [text for term in self.terms for text in term.problems()]
        LABEL_LOSSES[self.label_loss]  # raises UnknownNameError
        problems += [text for text in [problem("label_weight", self.label_weight, least=0)] if text]
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"label_smoothing is {self.label_smoothing}; expected at least 0 and below 1")
        elif self.label_smoothing and not any(end_values(self.label_weight)):
            problems.append(f"`label_smoothing` is {self.label_smoothing:g} and has no effect with label_weight=0")
        weights = [self.label_weight, *(term.weight for term in self.terms)]
        if not problems and not any(value for weight in weights for value in end_values(weight)):
            problems.append("all weights are 0, so there is nothing to learn")
        if problems:
            raise UsageError("The objective is invalid: " + "; ".join(problems) + ".", fix="Change these values.")

    def parts(self) -> list[Part]:
        """Return the sum as `kirsch methods` shows it."""
        return [[Piece(formula(self))]]

    @property
    def needs_logits(self) -> bool:
        """Whether the label loss or a term uses the logits of the student or the teacher."""
        layers = texts([[*term.layers] for term in self.terms if any(end_values(term.weight))])
        return any(end_values(self.label_weight)) or "logits" in layers

    @classmethod
    @checked
    def kd(cls, *, temperature: float = KD_TEMPERATURE, weight: float = KD_WEIGHT) -> Objective:
        """Return weight · soft-target loss + (1 - weight) · label loss, after Hinton et al. 2015.

        Args:
            temperature: > 0; 4 is usual for small images, 1 to 2 for teachers with low confidence.
            weight: weight of the soft-target loss, 0 to 1; 0.9 is usual.
        """
        if not 0 <= weight <= 1:
            raise UsageError(
                f"The weight of the soft targets is {weight}; expected 0 to 1.", fix="Give a fraction such as 0.9."
            )
        return cls(**kd_fields(temperature, weight))

    @classmethod
    @checked
    def labels(cls, *, label_smoothing: float = 0.0) -> Objective:
        """Return an objective of the label loss only, which needs no teacher."""
        return cls((), label_smoothing=label_smoothing)

    @classmethod
    @checked
    def preset(cls, name: str, **changes: Any) -> Objective:
        """Return a published objective with its standard hyperparameters.

        Args:
            name: one of `PRESETS`.
            changes: fields of the objective to replace, such as `label_weight`.

        Raises:
            UnknownNameError: there is no such preset.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for field_name in changes:
            if field_name not in known:
                raise UnknownNameError("field of an objective named", field_name, known)
        objective: Objective = cls(**{**PRESETS[name](), **changes})
        return objective

    def to_dict(self) -> dict[str, Any]:
        """Return the objective as JSON-able data."""
        return asdict(self)

    @classmethod
    @checked
    def from_dict(cls, values: Mapping[str, Any]) -> Objective:
        """Return the objective from the data that `to_dict` returned.

        Raises:
            UnknownNameError: a key is not a field of an objective or of a term.
        """
        terms = tuple(_from_fields(Term, term, "a term") for term in values.get("terms", ()))
        outputs = values.get("teacher_outputs")
        lists = {"teacher_outputs": tuple(outputs)} if isinstance(outputs, list) else {}  # JSON has no tuples
        objective: Objective = _from_fields(cls, {**values, **lists, "terms": terms}, "an objective")
        return objective


def _from_fields(kind: Any, values: Mapping[str, Any], what: str) -> Any:
    known = [entry.name for entry in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise UnknownNameError(f"field of {what} named", name, known)
    return kind(**{n: Ramp(**v) if n in NUMBERS and isinstance(v, dict) else v for n, v in values.items()})


def formula(objective: Objective) -> str:
    """Return an objective as a sum: "0.9 kd (T 4) + 0.1 labels"."""
    parts = []
    for term in objective.terms:
        weight = f"{_number(term.weight)}{' ·' if isinstance(term.weight, Ramp) else ''}"
        parts.append(f"{weight} {term.loss}{_details(term)}")
    if objective.label_weight:
        parts.append(f"{_number(objective.label_weight)} labels")
    return " + ".join(parts) + (", for the next token" if objective.causal else "")


def _details(term: Term) -> str:
    """Return the temperature and the settings that differ from the defaults, in parentheses."""
    details = []
    _, temperature = term.resolved()
    if temperature is not None:
        details.append(f"T {_number(temperature)}")
    student, teacher = (", ".join(texts(layers)) for layers in term.layers)
    if (student, teacher) != ("logits", "logits"):
        details.append(student if student == teacher else f"{student} ↔ {teacher}")
    if term.adapter != "auto":
        details.append(f"adapter {term.adapter}")
    details += [f"{name} {option_text(value)}" for name, value in term.options.items()]
    return f" ({'; '.join(details)})" if details else ""


def _number(number: Number) -> str:
    if isinstance(number, Ramp):
        return f"{number.start:g} → {number.end:g} over {number.epochs:g} epochs"
    return f"{number:g}"


def option_text(value: Any) -> str:
    """Return the value of an option as text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
