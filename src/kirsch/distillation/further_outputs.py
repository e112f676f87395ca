"""Outputs of a student that the objective does not use, and terms that compare them with the outputs of a teacher."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.data.batches import Batch
from kirsch.distillation.checks import first_samples
from kirsch.distillation.term import Term
from kirsch.frameworks.layers import OUTPUT, texts
from kirsch.frameworks.predictions import is_prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.distillation.objective import Objective
    from kirsch.distillation.term import BoundTerm
    from kirsch.frameworks.protocols import Features

MAX_CURVATURE = 10.0
"""Largest curvature of the terms of `output_terms`, added up.

With the default learning rate of 0.05 and Nesterov momentum of 0.9, gradient descent diverges above a curvature of 27.
The rest is a margin, because the curvature changes during training.
"""


def unused_outputs(features: Features, model: Any, layers: Sequence[str], inputs: Any) -> list[str]:
    """Return the outputs of a model that hold predictions, and that have no fixed relation to one of the layers.

    An output counts as computed from a layer if it equals the values of the layer, their logistic function, their
    softmax, or the logarithm of one of these two. An output from which a layer is computed, such as an embedding before
    the logits, is trained through this layer, and is left out as well. Hidden states, attention weights, caches and
    losses are left out, and so are integers and outputs without an entry for each sample.

    Args:
        features: the `Features` object of the model's framework.
        model: the model.
        layers: the layers that the objective uses, such as "logits".
        inputs: inputs of one batch.

    Returns:
        Layer names, such as "output.age".
    """
    names = features.expand(model, f"{OUTPUT}*", inputs)
    if len(names) == 1 and layers:
        return []
    values = features.extract(model, [*layers, *names], inputs)
    samples = len(ops.first_array(inputs))
    unrelated = [
        name
        for name in names
        if is_prediction(name.removeprefix(OUTPUT))
        and "float" in ops.dtype(values[name])
        and tuple(values[name].shape[:1]) == (samples,)
        and not any(_computed_from(values[layer], values[name]) for layer in layers)
    ]
    sources = features.sources_of(model, layers, unrelated, _first_samples_of(inputs)) if unrelated and layers else []
    return [name for name in unrelated if name not in sources]


def output_terms(features: Features, student: Any, teacher: Any, names: Sequence[str], inputs: Any) -> list[Term]:
    """Return a term for each output that student and teacher return in the same shape.

    The term is the mean squared difference. Its weight is at most 1 / variance of the teacher's output over the
    samples, with which 0.1 means that the student's output explains 90 % of this variance. An output of the teacher
    that does not vary, or is not finite, gets no term.

    The weight is lower if gradient descent could diverge. The largest curvature of weight · mean squared difference is
    about 2 · weight · |g|², where g is the gradient of the mean of the output for the parameters of the student. For
    an output with a small variance, a weight of 1 / variance makes the curvature a thousand times that of the soft
    targets. The weights are limited so that the curvatures of all terms add up to `MAX_CURVATURE` at most.

    Args:
        features: the `Features` object of the framework of student and teacher.
        student, teacher: the models.
        names: outputs as layer names, such as "output.age".
        inputs: inputs of one batch; the weights depend on them.
    """
    shared = [name for name in names if name in features.expand(teacher, f"{OUTPUT}*", inputs)]
    of_student, of_teacher = (features.extract(model, shared, inputs) for model in (student, teacher))
    variances = {}
    for name in shared:
        target = _host(of_teacher[name]).astype(np.float64)
        variance = float(((target - target.mean(0)) ** 2).mean())
        if target.shape == tuple(of_student[name].shape) and np.isfinite(variance) and variance > 0:
            variances[name] = variance
    gradients = features.mean_gradients(student, list(variances), _first_samples_of(inputs)) if variances else {}
    terms = []
    for name, variance in variances.items():
        weight = 1 / variance
        if gradients[name]:
            weight = min(weight, MAX_CURVATURE / len(variances) / (2 * gradients[name] ** 2))
        loss = squared_difference_loss(len(of_teacher[name].shape))
        terms.append(Term(loss, float(f"{weight:.3g}"), student_layer=name, name=name))
    return terms


def squared_difference_loss(axes: int) -> str:
    """Return the name of the loss for the mean squared difference of features with this number of axes."""
    return "hidden-mse" if axes == len("NLD") else "fitnet"


def with_further_outputs(
    objective: Objective, features: Features, student: Any, teacher: Any, inputs: Any
) -> Objective:
    """Return an objective of the logits, extended by a term for each further output; see `output_terms`."""
    names = unused_outputs(features, student, ["logits"], inputs)
    terms = output_terms(features, student, teacher, names, inputs)
    return dataclasses.replace(objective, terms=(*objective.terms, *terms))


def warning_of_unused_outputs(
    features: Features, student: Any, teacher: Any, objective: Objective, terms: Sequence[BoundTerm], inputs: Any
) -> list[str]:
    """Return a warning if the model to train returns predictions that neither the label loss nor a term uses.

    Args:
        features: the `Features` object of the framework of student and teacher.
        student: the model to train.
        teacher: the model whose outputs the suggested terms use; None if there is none.
        objective: shows whether the logits are used.
        terms: the terms of the objective, bound to layers.
        inputs: inputs of one batch.
    """
    layers = ["logits"] * objective.needs_logits + texts([term.student_layer for term in terms])
    names = unused_outputs(features, student, layers, inputs)
    if not names:
        return []
    suggested = [] if teacher is None else output_terms(features, student, teacher, names, inputs)
    if suggested:
        code = ", ".join(
            f'kirsch.Term("{term.loss}", {term.weight:g}, student_layer="{term.student_layer}")' for term in suggested
        )
        fix = f"To train them, add to the terms of the objective: {code}."
    else:
        fix = (
            "To train them, distill from a model that returns them, with a term such as "
            f'kirsch.Term("fitnet", student_layer="{names[0]}").'
        )
    text = (
        f"The objective does not use these outputs of {type(student).__name__}: "
        f"{', '.join(name.removeprefix(OUTPUT) for name in names)}. They are not trained, and they change with the "
        "layers that they share with the other outputs."
    )
    return [f"{text} {fix}"]


def _computed_from(layer: Any, output: Any) -> bool:
    """Return whether an output has the values of a layer, or of its probabilities or log-probabilities.

    The axes may differ, since an output may be a reshaped output of a module.
    """
    if layer is output:  # avoids a copy of the logits of a language model
        return True
    if math.prod(layer.shape) != math.prod(output.shape):
        return False
    logits, values = _host(layer), _host(output).ravel()
    if np.array_equal(logits.ravel(), values, equal_nan=True):
        return True
    candidates = [ops.log_sigmoid(logits), *(ops.log_softmax(logits, axis) for axis in {1, logits.ndim - 1} - {0})]
    return any(
        np.allclose(values, candidate.ravel(), rtol=1e-3, atol=1e-5)
        for logarithm in candidates
        for candidate in (logarithm, np.exp(logarithm))
    )


def _first_samples_of(inputs: Any) -> Any:
    """Return the inputs of a few samples, since a run with gradient keeps the outputs of all layers."""
    return first_samples(Batch(inputs)).inputs


def _host(array: Any) -> NDArray[Any]:
    return host(ops.upcast(array))
