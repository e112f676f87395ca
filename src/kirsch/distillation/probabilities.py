"""Models that put out probabilities where logits are needed: how they are recognized, and how they become logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.distillation.losses.loss import get_loss
from kirsch.distillation.schedule import ends
from kirsch.errors import UsageError
from kirsch.measurement.outputs import are_probabilities, are_scaled_probabilities

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.distillation.bound_term import BoundTerm
    from kirsch.distillation.losses.loss import Activation
    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.protocols import Features

ACTIVATIONS: Mapping[str, Activation] = {"cross-entropy": "softmax", "binary": "sigmoid"}
"""Label loss → what it applies to the outputs of the student."""

MANY, NEAR = 128, 0.02
"""So many values, all from 0 to 1 and some as near to either end, are taken for probabilities by their values alone."""

ROUNDING = 1e-6


def to_logits(probabilities: Any, activation: Activation) -> Any:
    """Logits of which the softmax, or the logistic function, gives these probabilities.

    Args:
        probabilities: 0 to 1, floating.
        activation: "softmax": logarithms. "sigmoid": log p - log (1 - p).

    Returns:
        An array of at least 32 bits. A probability of 0 becomes that of the smallest normal number, without gradient.
    """
    with ops.without_autocast(probabilities):
        p = ops.upcast(probabilities)
        limits = np.finfo(ops.dtype(p))
        log_p = ops.log(ops.clip(p, float(limits.tiny)))
        if activation == "softmax":
            return log_p
        return log_p - ops.log(ops.clip(1 - p, float(limits.eps) / 2))


def activations_of(objective: Objective) -> set[Activation]:
    """What the losses apply to the outputs of the models: "softmax", "sigmoid", both, or nothing."""
    found: set[Activation] = set()
    if any(ends(objective.label_weight)) and objective.label_loss in ACTIVATIONS:
        found.add(ACTIVATIONS[objective.label_loss])
    for term in objective.terms:
        loss = get_loss(term.loss)
        if any(ends(term.weight)) and loss.takes in ("logits", "pixels", "sets"):
            found.add(loss.activation)
    return found - {"identity"}


def stated_of(objective: Objective, teacher: int | None) -> str | None:
    """What the objective says of the outputs of the student (None), or of the teacher of this place."""
    if teacher is None:
        return objective.student_outputs
    stated = objective.teacher_outputs
    return stated[teacher] if isinstance(stated, (tuple, list)) else stated


@dataclass(frozen=True)
class Logits:
    """Replaces probabilities at some layers of a model by logits; values at other layers stay.

    Args:
        layers: where the model puts out probabilities.
        activation: see `to_logits`.
    """

    layers: tuple[str, ...]
    activation: Activation

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values by layer."""
        return {
            layer: to_logits(value, self.activation) if layer in self.layers else value
            for layer, value in values.items()
        }


def logit_layers(objective: Objective, terms: Sequence[BoundTerm], teacher: int | None) -> list[str]:
    """Return the layers of the student (None) or of a teacher (its index) at which losses take logits."""
    found = ["logits"] if teacher is None and _labels_take_logits(objective) else []
    for term in terms:
        if term.loss.takes not in ("logits", "pixels", "sets") or term.loss.activation == "identity":
            continue
        if teacher is not None and term.teacher not in (None, teacher):
            continue
        if teacher is None and term.adapter is not None:  # the adapter makes the logits
            continue
        layers = term.student_layer if teacher is None else term.teacher_layer
        layers = layers.get("logits", ()) if isinstance(layers, dict) else layers
        found += [layers] if isinstance(layers, str) else []
    return list(dict.fromkeys(found))


def _labels_take_logits(objective: Objective) -> bool:
    return any(ends(objective.label_weight)) and objective.label_loss in ACTIVATIONS


def settle(
    features: Features, model: Any, objective: Objective, layers: Sequence[str], inputs: Any, *, teacher: int | None
) -> Logits | None:
    """What makes logits of a model's outputs; None where they are logits.

    Args:
        features: of the framework of the model.
        model: the student, or a teacher.
        objective: says what the model puts out; where it does not, outputs that look like probabilities are refused.
        layers: at which losses take logits.
        inputs: some samples.
        teacher: its place among the teachers; None for the student.

    Raises:
        UsageError: the outputs are probabilities and the objective does not say so, or the other way round.
    """
    stated, activations = stated_of(objective, teacher), activations_of(objective)
    if not layers or not activations or stated == "logits":
        return None
    if stated == "probabilities" and len(activations) > 1:
        raise UsageError(
            "The objective takes the outputs for classes of which one holds, and for answers of yes or no as well.",
            "Probabilities become logits in another way for each.",
            "Give models that put out logits.",
        )
    values = features.extract(model, layers, inputs)
    whose = "The student" if teacher is None else "The teacher"
    named = f"{whose}, a {type(model).__name__},"
    for layer in layers:
        found = host(ops.upcast(values[layer]))
        if stated == "probabilities":
            _check_stated(named, layer, found, activations)
        else:
            shape = shape_of(found, activations)
            if shape == "inside" and features.is_squashed(model, layer, inputs):
                shape = "sigmoid"
            negative = not shape and "sigmoid" in activations and found.size and found.max() <= 0
            if negative and features.is_squashed(model, layer, inputs, logarithm=True):
                shape = "log-sigmoid"
            if shape not in ("", "inside"):
                raise refusal(named, shape, objective, "student_outputs" if teacher is None else "teacher_outputs")
    return Logits(tuple(layers), next(iter(activations))) if stated == "probabilities" else None


def shape_of(values: NDArray[Any], activations: set[Activation]) -> str:
    """What outputs look like: "softmax", "scaled softmax", "sigmoid", "log-softmax", or "" where they look like logits.

    "inside": all are from 0 to 1, which logits may be too. Logarithms of probabilities are logits of a softmax, and are
    named only where losses take yes or no.
    """
    if not values.size or not np.isfinite(values).all():
        return ""
    rows = ops.classes_last(values)
    if are_probabilities(rows):  # what is the same for all samples may be a bias that sums to 1
        alike = values.shape[0] > 1 and bool((values == values[:1]).all())
        return "inside" if alike else "softmax"
    few_values = len(np.unique(values)) <= len((0, 1, 2))  # a constant output, or codes of 0 and 1, may be anything
    if are_scaled_probabilities(rows) and not few_values and not (values == values[:1]).all():
        return "scaled softmax"
    if "sigmoid" in activations and rows.shape[-1] > 1 and rows.max() <= 0 and are_probabilities(np.exp(rows)):
        return "log-softmax"
    if values.min() < -ROUNDING or values.max() > 1 + ROUNDING:
        return ""
    both = values.min() < NEAR and values.max() > 1 - NEAR
    return "sigmoid" if values.size >= MANY and both and not few_values else "inside"


def refusal(whose: str, shape: str, objective: Objective, field: str) -> UsageError:
    """The error for outputs that look like this."""
    looks = {
        "softmax": "probabilities: they are at least 0 and sum to 1 for each sample",
        "scaled softmax": "scaled probabilities: they are at least 0 and have the same sum for each sample",
        "sigmoid": "probabilities: all are from 0 to 1, as a sigmoid makes them",
        "log-softmax": "logarithms of probabilities that sum to 1",
        "log-sigmoid": "logarithms of a sigmoid, at most 0: read as logits, no probability would be above 0.5",
    }[shape]
    takes = " and ".join(sorted(activations_of(objective)))
    fix = "Give the model without its last activation"
    if shape in ("log-sigmoid", "scaled softmax"):
        fix += f'; {field}="logits" takes its outputs as they are.'
    elif shape == "log-softmax":
        fix += ', or losses of classes: "cross-entropy" and "kd".'
    else:
        fix += (
            f', or say Objective(..., {field}="probabilities"), in a recipe outputs: probabilities of the model, which '
            "takes their logarithms; "
            f'{field}="logits" takes them as they are.'
        )
    return UsageError(
        f"{whose} puts out {looks}.",
        f"The losses take logits and apply the {takes} themselves; of probabilities far less is learned.",
        fix,
    )


def _check_stated(whose: str, layer: str, values: NDArray[Any], activations: set[Activation]) -> None:
    """Refuse outputs that are said to be probabilities and are not."""
    inside = np.isfinite(values).all() and values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING
    if inside and (activations != {"softmax"} or are_probabilities(ops.classes_last(values))):
        return
    why = f"`{layer}` has values from {values.min():.3g} to {values.max():.3g}."
    if inside:
        sums = ops.classes_last(values).sum(-1)
        why = f"Of `{layer}` the classes of a sample sum to {sums.min():.3g} to {sums.max():.3g}, and not to 1."
    raise UsageError(
        f"{whose} is said to put out probabilities, and does not.",
        why,
        "Leave the statement out where it puts out logits.",
    )


def check_training(values: Mapping[str, Any], layers: Sequence[str], objective: Objective) -> None:
    """Refuse probabilities that a student puts out in training mode alone; `settle` looks in inference mode.

    Args:
        values: of the student in training mode, by layer.
        layers: at which losses take logits.
        objective: says what the student puts out.

    Raises:
        UsageError: they are probabilities, and the objective does not say what they are.
    """
    activations = activations_of(objective)
    for layer in layers if stated_of(objective, None) is None and activations else ():
        shape = shape_of(host(ops.upcast(values[layer])), activations)
        if shape not in ("", "inside"):
            error = refusal("The student, in training mode,", shape, objective, "student_outputs")
            fix = (
                "Let its forward return logits in training mode, as it does in inference mode; "
                'student_outputs="logits" of the objective takes them as they are.'
            )
            raise UsageError(error.what, error.why, fix)


def check_record(values: Any, objective: Objective) -> None:
    """Refuse the logits of a store that are probabilities.

    Raises:
        UsageError: they are, or the objective says so.
    """
    fix = (
        "Build the store from a teacher that puts out logits, or with outputs= a callable that gives their logarithms "
        'as "logits".'
    )
    if stated_of(objective, 0) == "probabilities":
        raise UsageError(
            "A store holds logits, and the objective says that the teacher puts out probabilities.", "", fix
        )
    activations = activations_of(objective)
    shape = shape_of(host(ops.upcast(values)), activations) if activations and stated_of(objective, 0) is None else ""
    if shape not in ("", "inside"):
        error = refusal("The teacher of the store", shape, objective, "teacher_outputs")
        raise UsageError(error.what, error.why, fix)


def teachers_logits(
    features: Features, teachers: Sequence[Any], objective: Objective, terms: Sequence[BoundTerm], inputs: Any
) -> list[Logits | None]:
    """What makes logits of the outputs of each teacher; see `settle`.

    Raises:
        UsageError: the objective speaks of another number of teachers; and see `settle`.
    """
    stated = objective.teacher_outputs
    if isinstance(stated, (tuple, list)) and len(stated) != len(teachers):
        raise UsageError(
            f"teacher_outputs says what {len(stated)} teachers put out, and there are {len(teachers)}.",
            fix="Give one for each, or one for all.",
        )
    return [
        settle(features, model, objective, logit_layers(objective, terms, place), inputs, teacher=place)
        for place, model in enumerate(teachers)
    ]
