"""Training of gates on the units of a model, on labels or on the outputs of a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kirsch.annotations import Names, Positive
from kirsch.arguments import checked
from kirsch.data.annotations import Data, Regularizer
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.objective import Objective
from kirsch.distillation.teachers import Teacher
from kirsch.errors import UsageError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Goal
from kirsch.pruning.learned.gates import LearnedGates, read_gates, with_gates
from kirsch.pruning.options import Kinds, MinKeep, RoundTo


@checked
def learn_gates(
    graph: Graph,
    goal: Goal,
    data: Data,
    *,
    teacher: Teacher | None = None,
    objective: Objective | None = None,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    train_weights: bool = True,
    gate_speed: Positive = 50.0,
    kinds: Kinds = None,
    exclude: Names = (),
    keep_outputs: Names = (),
    round_to: RoundTo = "auto",
    min_keep: MinKeep = 0.1,
    progress: bool | None = None,
) -> LearnedGates:
    """Train gates on the units of a traced model, and return the plan that removes the units whose gates close.

    The network itself decides which units it needs: see `kirsch.with_gates` for the method. The traced model does not
    change. Prune with kirsch.prune(result.model, result.plan), and train the pruned model afterwards.

    Args:
        graph: result of `kirsch.trace` for a trained model.
        goal: fractions of the original cost, of MACs, parameters or size.
        data: training data with a length, such as `ArrayData` or a DataLoader; see `kirsch.fit`.
        teacher: the model to learn from, for example the traced model itself, `graph.model`; None: labels only.
        objective: the losses; by default `Objective.labels()`, or `Objective.kd()` with a teacher.
        training: by default Training(optimizer="adamw", learning_rate=2e-3). With a smaller learning rate, give a
            larger `gate_speed`.
        validation, hooks, regularizers, progress: see `kirsch.fit`.
        train_weights: whether the weights are trained together with the gates.
        gate_speed: see `kirsch.with_gates`.
        kinds, exclude, keep_outputs, round_to, min_keep: see `kirsch.plan`.

    Returns:
        `LearnedGates`: the model with trained weights, the plan, the scores and the expected cost.

    Raises:
        GoalError: no plan reaches the goal, or the goal is on the memory of the activations.
        UsageError: the data has no length, or see `kirsch.fit` and `kirsch.distill`.
    """
    training = training or Training(optimizer="adamw", learning_rate=2e-3)
    selection: dict[str, Any] = {"kinds": kinds, "exclude": exclude, "keep_outputs": keep_outputs}
    steps = training.epochs * _batches_in(data)
    gated = with_gates(graph, goal, steps=steps, train_weights=train_weights, gate_speed=gate_speed, **selection)
    common: dict[str, Any] = {
        "objective": objective,
        "training": training,
        "validation": validation,
        "hooks": hooks,
        "regularizers": regularizers,
        "progress": progress,
    }
    trained = fit(gated, data, **common) if teacher is None else distill(gated, teacher, data, **common)
    learned = read_gates(trained.model, graph, goal, round_to=round_to, min_keep=min_keep, **selection)
    return dataclasses.replace(learned, trained=dataclasses.replace(trained, model=learned.model))


def _batches_in(data: Any) -> int:
    """Return the number of batches of an epoch.

    Raises:
        UsageError: it is not known.
    """
    try:
        return max(len(data), 1)
    except TypeError:
        raise UsageError(
            "`data` of kirsch.learn_gates has no length.",
            "The budget is lowered over the steps of the training.",
            "Give kirsch.ArrayData or a DataLoader, or use kirsch.with_gates(..., steps=...) in a loop of your own.",
        ) from None
