"""Models that return probabilities where losses take logits: detection, and conversion to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.distillation.losses.loss import get_loss
from kirsch.distillation.term import end_values
from kirsch.errors import UsageError
from kirsch.measurement.outputs import are_probabilities, are_scaled_probabilities

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.distillation.losses.loss import Activation
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.term import BoundTerm
    from kirsch.frameworks.protocols import Features

ACTIVATIONS: Mapping[str, Activation] = {"cross-entropy": "softmax", "binary": "sigmoid"}
"""Activation that each label loss applies to the logits of the student."""

SIGMOID_COUNT, SIGMOID_MARGIN = 128, 0.02
"""Values from 0 to 1 are taken for outputs of a sigmoid if there are at least 128, and some are within 0.02 of 0 and
some within 0.02 of 1."""

ROUNDING = 1e-6
"""Largest distance from 0 to 1 that counts as a rounding error of a probability."""

NOT_LOGITS = {
    "softmax": "probabilities: they are at least 0 and sum to 1 for each sample",
    "scaled softmax": "scaled probabilities: they are at least 0 and have the same sum for each sample",
    "sigmoid": "probabilities: all are from 0 to 1, like the outputs of a sigmoid",
    "log-softmax": "logarithms of probabilities that sum to 1",
    "log-sigmoid": "logarithms of a sigmoid, at most 0: read as logits, no probability would be above 0.5",
}
"""Descriptions of outputs that are not logits, by kind; see `kind_of_outputs`."""


def to_logits(probabilities: Any, activation: Activation) -> Any:
    """Return logits whose softmax, or sigmoid, equals the given probabilities.

    Args:
        probabilities: 0 to 1, floating, any shape; for "softmax" with sum 1 over classes.
        activation: "softmax": logarithms. "sigmoid": log p - log (1 - p).

    Returns:
        An array with at least 32 bits per number. A probability of 0 is clipped to the smallest normal number and has
        no gradient.
    """
    with ops.without_autocast(probabilities):
        p = ops.upcast(probabilities)
        limits = np.finfo(ops.dtype(p))
        log_p = ops.log(ops.clip(p, float(limits.tiny)))
        if activation == "softmax":
            return log_p
        return log_p - ops.log(ops.clip(1 - p, float(limits.eps) / 2))


def activations_of(objective: Objective) -> set[Activation]:
    """Return the activations that the losses apply to logits: "softmax", "sigmoid", both or none."""
    activations: set[Activation] = set()
    if any(end_values(objective.label_weight)) and objective.label_loss in ACTIVATIONS:
        activations.add(ACTIVATIONS[objective.label_loss])
    for term in objective.terms:
        loss = get_loss(term.loss)
        if any(end_values(term.weight)) and loss.takes in ("logits", "pixels", "sets"):
            activations.add(loss.activation)
    return activations - {"identity"}


def declared_outputs(objective: Objective, teacher: int | None) -> str | None:
    """Return the kind of outputs that the objective declares for the student (None) or for a teacher (its index)."""
    if teacher is None:
        return objective.student_outputs
    declared = objective.teacher_outputs
    return declared[teacher] if isinstance(declared, (tuple, list)) else declared


@dataclass(frozen=True)
class LogitsConverter:
    """Converts probabilities at some layers of a model to logits; values at other layers are returned unchanged.

    Args:
        layers: the layers whose values are probabilities.
        activation: see `to_logits`.
    """

    layers: tuple[str, ...]
    activation: Activation

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by layer, converted."""
        return {
            layer: to_logits(value, self.activation) if layer in self.layers else value
            for layer, value in values.items()
        }


def logit_layers(objective: Objective, terms: Sequence[BoundTerm], teacher: int | None) -> list[str]:
    """Return the layers of the student (None) or of a teacher (its index) at which losses take logits."""
    logits = ["logits"] if teacher is None and _labels_take_logits(objective) else []
    for term in terms:
        if term.loss.takes not in ("logits", "pixels", "sets") or term.loss.activation == "identity":
            continue
        if teacher is not None and term.teacher not in (None, teacher):
            continue
        if teacher is None and term.adapter is not None:  # the adapter returns the logits
            continue
        layers = term.student_layer if teacher is None else term.teacher_layer
        layers = layers.get("logits", ()) if isinstance(layers, dict) else layers
        logits += [layers] if isinstance(layers, str) else []
    return list(dict.fromkeys(logits))


def _labels_take_logits(objective: Objective) -> bool:
    return any(end_values(objective.label_weight)) and objective.label_loss in ACTIVATIONS


def logits_converter(
    features: Features,
    model: Any,
    objective: Objective,
    terms: Sequence[BoundTerm],
    inputs: Any,
    *,
    teacher: int | None = None,
) -> LogitsConverter | None:
    """Return the function that converts a model's outputs to logits; None if they are logits.

    Args:
        features: the `Features` object of the model's framework.
        model: the student, or a teacher.
        objective: may declare the kind of the model's outputs. If it does not, outputs that look like probabilities
            raise an error.
        terms: the bound terms of the objective.
        inputs: a few samples for a dry run.
        teacher: index of the teacher; None for the student.

    Raises:
        UsageError: the outputs are probabilities that the objective does not declare, they are declared as
            probabilities but are none, or some losses apply a softmax and others a sigmoid to declared probabilities.
    """
    declared, activations = declared_outputs(objective, teacher), activations_of(objective)
    layers = logit_layers(objective, terms, teacher)
    if not layers or not activations or declared == "logits":
        return None
    if declared == "probabilities" and len(activations) > 1:
        raise UsageError(
            "The objective has losses that apply a softmax to the outputs and losses that apply a sigmoid.",
            "The conversion of probabilities to logits differs between the two.",
            "Give models that return logits.",
        )
    values = features.extract(model, layers, inputs)
    subject = f"The {'student' if teacher is None else 'teacher'}, a {type(model).__name__},"
    for layer in layers:
        outputs = host(ops.upcast(values[layer]))
        if declared == "probabilities":
            _check_declared(subject, layer, outputs, activations)
        else:
            kind = kind_of_outputs(outputs, activations)
            if kind == "inside" and features.is_squashed(model, layer, inputs):
                kind = "sigmoid"
            negative = not kind and "sigmoid" in activations and outputs.size and outputs.max() <= 0
            if negative and features.is_squashed(model, layer, inputs, logarithm=True):
                kind = "log-sigmoid"
            if kind not in ("", "inside"):
                raise not_logits(subject, kind, objective, "student_outputs" if teacher is None else "teacher_outputs")
    return LogitsConverter(tuple(layers), next(iter(activations))) if declared == "probabilities" else None


def kind_of_outputs(values: NDArray[Any], activations: set[Activation]) -> str:
    """Return the likely kind of outputs: "softmax", "scaled softmax", "sigmoid", "log-softmax", "inside", "" (logits).

    "inside" means that all values are from 0 to 1, which is possible for logits, too. Logarithms of probabilities are
    valid logits of a softmax, so that "log-softmax" is returned only if a loss applies a sigmoid.
    """
    if not values.size or not np.isfinite(values).all():
        return ""
    rows = ops.classes_last(values)
    if are_probabilities(rows):  # rows that are equal for all samples may be a bias with sum 1
        constant = values.shape[0] > 1 and bool((values == values[:1]).all())
        return "inside" if constant else "softmax"
    few_values = len(np.unique(values)) <= len((0, 1, 2))  # constants and 0/1 codes can have equal sums, too
    if are_scaled_probabilities(rows) and not few_values and not (values == values[:1]).all():
        return "scaled softmax"
    if "sigmoid" in activations and rows.shape[-1] > 1 and rows.max() <= 0 and are_probabilities(np.exp(rows)):
        return "log-softmax"
    if values.min() < -ROUNDING or values.max() > 1 + ROUNDING:
        return ""
    both = values.min() < SIGMOID_MARGIN and values.max() > 1 - SIGMOID_MARGIN
    return "sigmoid" if values.size >= SIGMOID_COUNT and both and not few_values else "inside"


def not_logits(subject: str, kind: str, objective: Objective, field: str) -> UsageError:
    """Return the error for outputs that are not logits.

    Args:
        subject: the model, as the subject of a sentence.
        kind: see `kind_of_outputs`.
        objective: supplies the losses that take the outputs.
        field: name of the field of the objective that declares the outputs of the model.
    """
    takes = " and ".join(sorted(activations_of(objective)))
    fix = "Give the model without its last activation"
    if kind in ("log-sigmoid", "scaled softmax"):
        fix += f', or set {field}="logits" to use its outputs unchanged.'
    elif kind == "log-softmax":
        fix += ', or use losses that apply a softmax: "cross-entropy" and "kd".'
    else:
        fix += (
            f', or set Objective(..., {field}="probabilities") (in a recipe, the key outputs of the model) to use '
            f'their logarithms, or {field}="logits" to use them unchanged.'
        )
    return UsageError(
        f"{subject} returns {NOT_LOGITS[kind]}.",
        f"The losses take logits and apply the {takes} themselves; with probabilities the student learns far less.",
        fix,
    )


def _check_declared(subject: str, layer: str, values: NDArray[Any], activations: set[Activation]) -> None:
    """Refuse outputs that are declared as probabilities and are not."""
    inside = np.isfinite(values).all() and values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING
    if inside and (activations != {"softmax"} or are_probabilities(ops.classes_last(values))):
        return
    why = f"`{layer}` has values from {values.min():.3g} to {values.max():.3g}."
    if inside:
        sums = ops.classes_last(values).sum(-1)
        why = f"The classes of `{layer}` have sums from {sums.min():.3g} to {sums.max():.3g} instead of 1."
    raise UsageError(
        f"{subject} is declared to return probabilities, but does not.",
        why,
        "Leave out the declaration if the model returns logits.",
    )


def check_training(values: Mapping[str, Any], layers: Sequence[str], objective: Objective) -> None:
    """Refuse a student that returns probabilities in training mode only; `logits_converter` checks the inference mode.

    Args:
        values: outputs of the student in training mode, by layer.
        layers: the layers at which losses take logits.
        objective: supplies the losses, and may declare the kind of the student's outputs.

    Raises:
        UsageError: the outputs are probabilities, and the objective does not declare the outputs of the student.
    """
    activations = activations_of(objective)
    for layer in layers if declared_outputs(objective, None) is None and activations else ():
        kind = kind_of_outputs(host(ops.upcast(values[layer])), activations)
        if kind not in ("", "inside"):
            error = not_logits("The student, in training mode,", kind, objective, "student_outputs")
            fix = (
                "Let the forward of the student return logits in training mode, as in inference mode, or set "
                'student_outputs="logits" in the objective to use the outputs unchanged.'
            )
            raise UsageError(error.what, error.why, fix)


def check_record(values: Any, objective: Objective) -> None:
    """Refuse a store whose logits are probabilities.

    Raises:
        UsageError: the stored values, or the outputs that the objective declares, are probabilities.
    """
    fix = (
        "Build the store from a teacher that returns logits, or give build_store the argument outputs: a callable that "
        'returns the logarithms of the probabilities as "logits".'
    )
    if declared_outputs(objective, 0) == "probabilities":
        raise UsageError(
            "The objective declares probabilities as outputs of the teacher, and a store holds logits.", "", fix
        )
    activations = activations_of(objective)
    kind = ""
    if activations and declared_outputs(objective, 0) is None:
        kind = kind_of_outputs(host(ops.upcast(values)), activations)
    if kind not in ("", "inside"):
        error = not_logits("The teacher of the store", kind, objective, "teacher_outputs")
        raise UsageError(error.what, error.why, fix)


def logits_converters(
    features: Features, teachers: Sequence[Any], objective: Objective, terms: Sequence[BoundTerm], inputs: Any
) -> list[LogitsConverter | None]:
    """Return, for each teacher, the function that converts its outputs to logits, or None; see `logits_converter`.

    Raises:
        UsageError: the number of entries of `teacher_outputs` is not the number of teachers, or see `logits_converter`.
    """
    declared = objective.teacher_outputs
    if isinstance(declared, (tuple, list)) and len(declared) != len(teachers):
        raise UsageError(
            f"`teacher_outputs` has length {len(declared)}; the number of teachers is {len(teachers)}.",
            fix="Give one entry for each teacher, or one value for all.",
        )
    return [
        logits_converter(features, model, objective, terms, inputs, teacher=index)
        for index, model in enumerate(teachers)
    ]
