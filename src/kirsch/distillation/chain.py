"""Chains of distillation (each student is the teacher of the next), born-again networks, and ensembles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from kirsch import figures, ops
from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.data.annotations import Build, Data, Model, Regularizer
from kirsch.data.arrays import host
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses.loss import Activation
from kirsch.distillation.objective import Objective, Outputs
from kirsch.distillation.probabilities import NOT_LOGITS, kind_of_outputs, to_logits
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.teachers import Teacher, combined_logits, one_or_more
from kirsch.errors import CheckpointError, UsageError
from kirsch.frameworks.find import framework_of, pytorch
from kirsch.frameworks.progress import with_progress
from kirsch.frameworks.training import Trained, Training, TrainingHooks, TrainingState

Link = Callable[[list[Trained], TrainingHooks, bool], Trained]
"""A function that trains one model: (results of the earlier links, hooks, whether to check the teachers) → result."""

MIN_MODELS = 2


@checked
def distill_chain(
    models: Sequence[Model | TeacherStore],
    data: Data,
    *,
    learn_from: Literal["previous", "all"] = "previous",
    objective: Objective | Sequence[Objective] | None = None,
    training: Training | Sequence[Training] | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    check_teacher: bool = True,
    progress: bool | None = None,
) -> list[Trained]:
    """Distill a teacher into assistants and a student, each trained on the outputs of the model before it.

    A link is the training of one model. An interrupted chain can be resumed from any state that `hooks.save` received:
    pass the state as `hooks.resume`, and otherwise the same arguments. The state contains the finished links, which are
    not trained again, and the current link, so it grows with each link. The result is bit-identical to that of an
    uninterrupted chain.

    Args:
        models: teacher, assistants and student, usually from the largest to the smallest. Copies of all but the first
            are trained. The first may be any teacher that `distill` takes.
        data: see `distill`.
        learn_from: "previous": each model learns from the model before it. "all": each model learns from all models
            before it, combined as in `Objective.combine_teachers`; terms on features use only the model directly before
            it.
        objective: one objective for all links, or one for each link; by default `Objective.kd()`.
        training: one `Training` for all links, or one for each link; by default `Training()`.
        validation, regularizers, check_teacher, progress: see `distill`.
        hooks: hooks for the whole chain, see `distill`. The field "link" of events is the number of the link, from 1.

    Returns:
        One `Trained` for each link, the last for the student.

    Raises:
        UsageError: there are fewer than two models, a model occurs twice, or the number of objectives or of training
            settings is not the number of links.
        CheckpointError: the state to resume from belongs to another chain.
        Stopped: `hooks.stop` returned an error; `hooks.save` has been called.

    Source: Mirzadeh et al. 2020, arXiv:1902.03393. "all": Son et al. 2021, arXiv:2009.08825, without randomly
        dropped teachers. With `Objective(combine_teachers="probabilities")`, the gradient of the soft-target loss
        equals the mean of its gradients for the single teachers.
    """
    if len(models) < MIN_MODELS:
        raise UsageError(
            f"A chain needs a teacher and a student; found {figures.counted(len(models), 'model')}.",
            fix="Give two or more models.",
        )
    _check_distinct(models)
    first, students = models[0], models[1:]
    if learn_from == "all" and isinstance(first, TeacherStore):
        raise UsageError(
            "A store cannot be combined with other teachers.",
            fix='Give the teacher itself, or learn_from="previous".',
        )
    objectives = _for_each_link(objective or Objective.kd(), len(students), "objective")
    trainings = _for_each_link(training or Training(), len(students), "training")

    def link(index: int) -> Link:
        def train(before: list[Trained], link_hooks: TrainingHooks, check: bool) -> Trained:
            nearest_first = [trained.model for trained in reversed(before)]
            teacher = [*nearest_first, *one_or_more(first)] if learn_from == "all" else (nearest_first or [first])[0]
            return distill(
                students[index],
                teacher,
                data,
                objective=objectives[index],
                training=trainings[index],
                validation=validation,
                hooks=link_hooks,
                regularizers=regularizers,
                check_teacher=check and check_teacher,
                progress=False,  # the hooks show the progress
            )

        return train

    return _run([link(index) for index in range(len(students))], with_progress(hooks, progress))


@checked
def born_again(
    build: Build,
    data: Data,
    *,
    generations: Count = 3,
    teacher: Teacher | None = None,
    objective: Objective | None = None,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    progress: bool | None = None,
) -> list[Trained]:
    """Train generations of one architecture, each from new random weights, with the previous generation as teacher.

    `ensemble([trained.model for trained in result])` combines the generations. An interrupted run can be resumed like
    `distill_chain`.

    Args:
        build: returns the architecture with random weights. The weights of generation g and the random numbers of its
            training are seeded with `training.seed` + g. The first generation with a teacher has g = 1.
        data: see `distill`.
        generations: number of generations that have a teacher, >= 1.
        teacher: the teacher of the first generation. None: an additional generation, g = 0, is trained on labels only.
            It is the first teacher, and the first item of the result.
        objective: by default `Objective.kd()`. A generation without a teacher uses only its label loss.
        training, validation, hooks, regularizers, progress: see `distill_chain`.

    Returns:
        One `Trained` for each generation, in order.

    Raises:
        UsageError: the number of generations is below 1, or `build` returns the same model or the same weights again.
        CheckpointError, Stopped: see `distill_chain`.

    Source: Furlanello et al. 2018, arXiv:1805.04770. In the paper, the temperature is 1, and training on the teacher's
        outputs is evaluated with and without the label loss.
    """
    objective, training = objective or Objective.kd(), training or Training()
    framework = pytorch()  # the models are not built yet, so their type does not show the framework
    first = 0 if teacher is None else 1
    seeds = [training.seed + number for number in range(first, generations + 1)]
    models = [framework.training.seeded(build, seed) for seed in seeds]
    _check_distinct(models)
    if len({framework.inference.fingerprint(model) for model in models}) < len(models):
        raise UsageError(
            "`build` returns the same weights each time.",
            "Each generation needs new random weights.",
            "Remove the seed, or the loading of weights, from `build`.",
        )
    common: dict[str, Any] = {"validation": validation, "regularizers": regularizers, "progress": False}

    def link(index: int) -> Link:
        seeded = training.changed(seed=seeds[index])

        def train(before: list[Trained], link_hooks: TrainingHooks, check: bool) -> Trained:
            if not before and teacher is None:
                labels = dataclasses.replace(objective, terms=(), label_weight=1.0)
                return fit(models[index], data, objective=labels, training=seeded, hooks=link_hooks, **common)
            return distill(
                models[index],
                before[-1].model if before else teacher,
                data,
                objective=objective,
                training=seeded,
                hooks=link_hooks,
                check_teacher=check,
                **common,
            )

        return train

    return _run([link(index) for index in range(len(models))], with_progress(hooks, progress))


@dataclasses.dataclass
class _Combination:
    """Combines the outputs of several models into logits.

    Args:
        combine: see `Objective.combine_teachers`.
        activation: the function that converts logits to probabilities.
        outputs: kind of the models' outputs. None: logits; the first outputs are checked.
    """

    combine: str
    activation: Activation
    outputs: str | None

    def __call__(self, values: Sequence[Any]) -> Any:
        if self.outputs == "probabilities":
            values = [to_logits(value, self.activation) for value in values]
        elif self.outputs is None and self.activation != "identity" and type(values[0]).__name__ == "Tensor":
            # Skipped while the model is traced: the tensors of a trace have another type and no values.
            for index, value in enumerate(values):
                kind = kind_of_outputs(host(ops.upcast(value)), {self.activation})
                if kind in ("softmax", "sigmoid"):
                    raise UsageError(
                        f"Model {index} of the ensemble returns {NOT_LOGITS[kind]}.",
                        f"An ensemble combines logits and applies the {self.activation} to them.",
                        'Set outputs="probabilities" if all models return them, or remove the last activation.',
                    )
            self.outputs = "logits"
        return combined_logits(values, self.combine, activation=self.activation)


@checked
def ensemble(
    models: Sequence[Model],
    *,
    combine: Literal["probabilities", "logits", "confidence"] = "probabilities",
    activation: Activation = "softmax",
    outputs: Outputs | None = None,
) -> Any:
    """Return one model that combines the outputs of several, and can be run, distilled and exported like any other.

    Args:
        models: models with the same classes; the ensemble contains copies.
        combine: "probabilities", "logits" or "confidence", see `Objective.combine_teachers`.
        activation: the function that converts logits to probabilities: "softmax" over classes, or "sigmoid" for
            independent labels. "identity": the outputs are real-valued predictions, which are averaged.
        outputs: kind of the models' outputs, "logits" or "probabilities". None: logits; the first call raises an error
            if the outputs of a model look like those of a softmax, or like those of a sigmoid, which are recognized
            only among at least 128 numbers.

    Returns:
        A model of the same framework, in inference mode. With "probabilities", the softmax of its logits is the mean of
        the models' probabilities, up to rounding.

    Raises:
        UsageError: there are no models; in the first call, a model returns probabilities that are not declared.
    """
    if not models:
        raise UsageError("`models` of kirsch.ensemble is empty.", fix="Give at least one model.")
    return framework_of(models[0]).features.ensemble(models, _Combination(combine, activation, outputs))


def _for_each_link(value: Any, links: int, name: str) -> list[Any]:
    """Return a list with one value for each link."""
    if not isinstance(value, (list, tuple)):
        return [value] * links
    if len(value) != links:
        raise UsageError(
            f"`{name}` has {figures.counted(len(value), 'item')}, and the chain has {figures.counted(links, 'link')} "
            "from one model to the next.",
            fix=f"Give `{name}` without a list for all links, or a list with one item for each link.",
        )
    return list(value)


def _check_distinct(models: Sequence[Any]) -> None:
    for index, model in enumerate(models):
        for other in range(index):
            if models[other] is model:
                raise UsageError(
                    f"Models {other} and {index} are the same object.",
                    fix="Build each model separately, or give a copy: copy.deepcopy(model).",
                )


# ------------------------------------------------------------------------------------------------ links


def _run(links: Sequence[Link], hooks: TrainingHooks) -> list[Trained]:
    """Run the links in order and return their results. Finished links are loaded from the state to resume from."""
    states = _unpacked(hooks.resume, len(links)) if hooks.resume is not None else []
    finished: list[TrainingState] = states[:-1]
    trained: list[Trained] = []
    for index, link in enumerate(links):
        if index < len(states) - 1:
            trained.append(link(trained, TrainingHooks(resume=states[index]), False))
            continue
        latest = states[index:]  # the state to resume the link from, if any; later, the last state that it saved
        trained.append(link(trained, _link_hooks(hooks, index, finished, latest), True))
        finished = [*finished, *(state.ended() for state in latest)]
    return trained


def _link_hooks(
    hooks: TrainingHooks, index: int, finished: Sequence[TrainingState], latest: list[TrainingState]
) -> TrainingHooks:
    """Return the hooks of one link, which add its number to events, and the finished links to saved states.

    Args:
        hooks: hooks for the whole chain.
        index: index of the link, from 0.
        finished: final states of the earlier links.
        latest: list with the state to resume from, or empty; its item is replaced with each state that is saved.
    """
    emit, save_chain = hooks.event, hooks.save

    def event(values: dict[str, Any]) -> None:
        if emit is not None:
            emit({**values, "link": index + 1})

    def save(state: TrainingState) -> None:
        latest[:] = [state]
        if save_chain is not None:
            save_chain(_packed([*finished, state]))

    return dataclasses.replace(
        hooks,
        event=event if emit is not None else None,
        save=save if save_chain is not None else None,
        resume=latest[0] if latest else None,
    )


def _packed(states: Sequence[TrainingState]) -> TrainingState:
    """Return the states of several links as one state, with the sum of their epochs."""
    arrays = {f"{index}.{name}": array for index, state in enumerate(states) for name, array in state.arrays.items()}
    epochs = sum(state.values["epoch"] for state in states)
    links = [state.values for state in states]
    return TrainingState(arrays, {"epoch": epochs, "batch": links[-1]["batch"], "links": links})


def _unpacked(state: TrainingState, links: int) -> list[TrainingState]:
    """Return the states of the links from a state that `_packed` returned."""
    values = state.values.get("links", [])
    if not 1 <= len(values) <= links:
        raise CheckpointError(
            f"The checkpoint has {len(values) or 'no'} links of a chain; this chain has {links}.",
            "It belongs to another run.",
            "Start the chain from the beginning.",
        )
    states = [TrainingState({}, link_values) for link_values in values]
    for name, array in state.arrays.items():
        index, _, array_name = name.partition(".")
        states[int(index)].arrays[array_name] = array
    return states
