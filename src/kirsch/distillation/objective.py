"""What a training run minimizes, as data."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from kirsch.arguments import checked
from kirsch.distillation.losses.labels import LABEL_LOSSES
from kirsch.distillation.losses.loss import LOSSES
from kirsch.distillation.presets import PRESETS
from kirsch.distillation.schedule import Number, Ramp, ends, problem
from kirsch.distillation.term import Term
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.layers import texts

NUMBERS = ("weight", "temperature", "label_weight")
"""Fields that may be ramps."""

Outputs = Literal["logits", "probabilities"]
"""What a model may be said to put out."""


@checked
@dataclass(frozen=True)
class Objective:
    """weight of the labels · loss on labels + Σ weight · distillation loss.

    Args:
        terms: distillation losses; empty for labels alone.
        label_weight: of the loss on labels, >= 0, or a `Ramp`.
        label_smoothing: 0 <= share < 1.
        label_loss: by its name among `LABEL_LOSSES`.
        causal: position i of a sequence predicts token i + 1, so that scores and labels are shifted against each other.
        ignore_index: label of positions that do not count, and of samples without a label. They add nothing to the loss
            on labels, which is averaged over all samples of a batch.
        balance: "fixed": weights are as stated. "gradient": each term's gradient is scaled, at the first batch of an
            epoch, so that the lengths of the gradients stand to each other as the weights.
        teachers: how several teachers are combined. "probabilities": the mean of their probabilities; "logits": the
            mean of their logits; "confidence": the mean of their probabilities, weighted by each one's confidence;
            "sum": one term for each teacher, added up.
        student_outputs: what the student puts out. "logits"; or "probabilities", of which logits are made by their
            logarithms (of yes or no: log p - log (1 - p)) for all losses on them. None: logits, and outputs that look
            like probabilities are an error.
        teacher_outputs: the same of the teachers: one for all, or one for each as a tuple.

    Raises:
        UsageError: a number is out of range, or all weights are zero.
        UnknownNameError: there is no such loss, option or way.
    """

    made_by: ClassVar[str] = "kirsch.Objective.kd()"

    terms: tuple[Term, ...] = ()
    label_weight: Number = 1.0
    label_smoothing: float = 0.0
    label_loss: str = "cross-entropy"
    causal: bool = False
    ignore_index: int = -100
    balance: Literal["fixed", "gradient"] = "fixed"
    teachers: Literal["probabilities", "logits", "confidence", "sum"] = "probabilities"
    student_outputs: Outputs | None = None
    teacher_outputs: Outputs | tuple[Outputs | None, ...] | None = None

    @staticmethod
    def of_text(name: str) -> str:
        """Return how to make the objective that a text names. `kirsch.arguments.checked` asks for it."""
        if name in LOSSES and name not in PRESETS:
            return f'Give kirsch.Objective((kirsch.Term("{name}"),)).'
        close = difflib.get_close_matches(name, list(PRESETS), n=1)
        return f'Give kirsch.Objective.preset("{close[0]}").' if close else f"Give {Objective.made_by}."

    def __post_init__(self) -> None:
        problems = [sentence for term in self.terms for sentence in term.problems()]
        LABEL_LOSSES[self.label_loss]  # an unknown name is answered here, before any work
        problems += [sentence for sentence in [problem("label_weight", self.label_weight, least=0)] if sentence]
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"label_smoothing is {self.label_smoothing}; a share of at least 0, below 1, is needed")
        weights = [self.label_weight, *(term.weight for term in self.terms)]
        if not problems and not any(value for weight in weights for value in ends(weight)):
            problems.append("all weights are 0, so there is nothing to learn")
        if problems:
            raise UsageError("The objective is wrong: " + "; ".join(problems) + ".")

    @property
    def needs_logits(self) -> bool:
        """Whether it needs the scores of the models: for labels, or for a term."""
        layers = texts([[*term.layers] for term in self.terms if any(ends(term.weight))])
        return any(ends(self.label_weight)) or "logits" in layers

    @classmethod
    @checked
    def kd(cls, temperature: float = 4.0, weight: float = 0.9) -> Objective:
        """Weight · soft targets + (1 - weight) · labels, after Hinton et al. 2015.

        Args:
            temperature: > 0; 4 is usual for small images, 1 to 2 where the teacher is unsure.
            weight: of the soft targets, 0 to 1; 0.9 is usual.
        """
        if not 0 <= weight <= 1:
            raise UsageError(f"The weight of the soft targets is {weight}; a share from 0 to 1 is needed.")
        return cls((Term("kd", weight, temperature=temperature),), label_weight=1 - weight)

    @classmethod
    @checked
    def labels(cls, label_smoothing: float = 0.0) -> Objective:
        """Labels alone, without a teacher."""
        return cls((), 1.0, label_smoothing)

    @classmethod
    @checked
    def preset(cls, name: str, **changes: Any) -> Objective:
        """A published objective with its standard hyperparameters.

        Args:
            name: one of `PRESETS`.
            changes: fields of the objective that shall be others, such as `label_weight`.

        Raises:
            UnknownNameError: there is no such preset.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for field_name in changes:
            if field_name not in known:
                raise UnknownNameError("field of an objective", field_name, known)
        made: Objective = cls(**{**PRESETS[name](), **changes})
        return made

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    @checked
    def from_dict(cls, values: Mapping[str, Any]) -> Objective:
        """From what `to_dict` gave.

        Raises:
            UnknownNameError: a field that objectives do not have.
        """
        terms = tuple(_made(Term, term, "a term") for term in values.get("terms", ()))
        outputs = values.get("teacher_outputs")
        lists = {"teacher_outputs": tuple(outputs)} if isinstance(outputs, list) else {}  # as JSON has them
        made: Objective = _made(cls, {**values, **lists, "terms": terms}, "an objective")
        return made


def _made(kind: Any, values: Mapping[str, Any], what: str) -> Any:
    known = [entry.name for entry in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise UnknownNameError(f"field of {what}", name, known)
    return kind(**{n: Ramp(**v) if n in NUMBERS and isinstance(v, dict) else v for n, v in values.items()})
