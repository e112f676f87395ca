"""Students that learn one after the other, each from those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from kirsch import ops
from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.data.annotations import Build, Data, Model, Regularizer
from kirsch.data.arrays import host
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses.loss import Activation
from kirsch.distillation.objective import Objective, Outputs
from kirsch.distillation.probabilities import shape_of, to_logits
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.teachers import Teacher, combined, one_or_more
from kirsch.errors import CheckpointError, UsageError
from kirsch.frameworks.find import framework_of, pytorch
from kirsch.frameworks.progress import with_progress
from kirsch.frameworks.training import Trained, Training, TrainingHooks, TrainingState

Link = Callable[[list[Trained], TrainingHooks, bool], Trained]
"""(the links before it, its hooks, whether its teachers are to be checked) → what it gives."""

FEWEST = 2


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
    """Each model trained on what the one before it computes: a teacher, its assistants, and the student.

    A chain that is cut goes on from any state that `hooks.save` was given: that state holds the links that are
    finished, and the one under way. Give `hooks.resume` and the same arguments as before; what is finished is taken
    from the state and not trained again, and all ends in the same bits. A state is as large as all of them together.

    Args:
        models: teacher, assistants, student, usually from the largest to the smallest; all but the first are trained,
            as copies. The first may be whatever `distill` takes as a teacher.
        data: see `distill`.
        learn_from: "previous": each learns from the one before. "all": from all before it, the nearest first, combined
            as the objective says; terms that compare places inside of models take the nearest.
        objective: one for all links, or one for each; `Objective.kd()` if left out.
        training: one for all links, or one for each; `Training()` if left out.
        validation, regularizers, check_teacher, progress: see `distill`.
        hooks: of the whole chain; see `distill`. Events say which "link" they are of, from 1 on.

    Returns:
        One `Trained` for each link, the last for the student.

    Raises:
        UsageError: there are fewer than two models, one comes twice, or objectives or settings are of another number
            than the links.
        CheckpointError: the state to go on from is of no chain, or of another one.
        Stopped: `hooks.stop` asked for it; `hooks.save` has been called.

    Source: Mirzadeh et al. 2020, arXiv:1902.03393. "all": Son et al. 2021, arXiv:2009.08825, without dropping teachers
        at random; with "probabilities" the gradient of soft targets is that of their mean divergence.
    """
    if len(models) < FEWEST:
        raise UsageError(f"A chain needs a teacher and a student; there are {len(models)} models.", fix="Give both.")
    _check_apart(models)
    first, students = models[0], models[1:]
    if learn_from == "all" and isinstance(first, TeacherStore):
        raise UsageError(
            "A store cannot be combined with the models that come after it.",
            fix='Give the teacher itself, or learn_from="previous".',
        )
    objectives = _each(objective or Objective.kd(), len(students), "objective")
    trainings = _each(training or Training(), len(students), "training")

    def link(place: int) -> Link:
        def learn(before: list[Trained], own: TrainingHooks, check: bool) -> Trained:
            earlier = [trained.model for trained in reversed(before)]
            teacher = [*earlier, *one_or_more(first)] if learn_from == "all" else (earlier or [first])[0]
            return distill(
                students[place],
                teacher,
                data,
                objective=objectives[place],
                training=trainings[place],
                validation=validation,
                hooks=own,
                regularizers=regularizers,
                check_teacher=check and check_teacher,
                progress=False,  # the hooks show it
            )

        return learn

    return _in_turn([link(place) for place in range(len(students))], with_progress(hooks, progress))


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
    """Generations of one architecture, each with fresh weights and trained on what the last one computes.

    `ensemble([each.model for each in generations])` has their scores together. A run that is cut goes on as that of
    `distill_chain` does.

    Args:
        build: makes the architecture with random weights. Generation g gets weights, and its run chance, from
            `training.seed` + g.
        data: see `distill`.
        generations: that are born again, >= 1.
        teacher: of the first of them. If left out, one more is trained on labels alone before, and comes first in what
            is given back.
        objective: `Objective.kd()` if left out, and its loss on labels for the one that learns from them alone.
        training, validation, hooks, regularizers, progress: see `distill_chain`.

    Returns:
        One `Trained` for each generation, the first first.

    Raises:
        UsageError: the number of generations is below 1, or `build` gives the same model or the same weights again.
        CheckpointError, Stopped: see `distill_chain`.

    Source: Furlanello et al. 2018, arXiv:1805.04770; there soft targets are at temperature 1, with or without labels.
    """
    objective, training = objective or Objective.kd(), training or Training()
    framework = pytorch()  # what is not built yet has no framework that could be asked for
    first = 0 if teacher is None else 1
    seeds = [training.seed + number for number in range(first, generations + 1)]
    models = [framework.training.seeded(build, seed) for seed in seeds]
    _check_apart(models)
    if len({framework.inference.fingerprint(model) for model in models}) < len(models):
        raise UsageError(
            "`build` gives the same weights each time.",
            "Each generation begins with fresh ones.",
            "Let it set no seed and load no weights.",
        )
    common: dict[str, Any] = {"validation": validation, "regularizers": regularizers, "progress": False}

    def link(place: int) -> Link:
        own_training = training.changed(seed=seeds[place])

        def learn(before: list[Trained], own: TrainingHooks, check: bool) -> Trained:
            if not before and teacher is None:
                bare = dataclasses.replace(objective, terms=(), label_weight=1.0)
                return fit(models[place], data, objective=bare, training=own_training, hooks=own, **common)
            teacher_source = before[-1].model if before else teacher
            return distill(
                models[place],
                teacher_source,
                data,
                objective=objective,
                training=own_training,
                hooks=own,
                check_teacher=check,
                **common,
            )

        return learn

    return _in_turn([link(place) for place in range(len(models))], with_progress(hooks, progress))


@dataclasses.dataclass
class _Combination:
    """The scores of several models as those of one.

    Args:
        way: see `Objective.teachers`.
        activation: what makes probabilities of the scores.
        outputs: what the models put out; None: logits, which the first scores are looked at for.
    """

    way: str
    activation: Activation
    outputs: str | None

    def __call__(self, scores: Sequence[Any]) -> Any:
        first = scores[0]
        if self.outputs == "probabilities":
            scores = [to_logits(each, self.activation) for each in scores]
        elif self.outputs is None and self.activation != "identity" and type(first).__name__ == "Tensor":
            for place, each in enumerate(scores):  # none of them while a model is traced, which has no values
                if shape_of(host(ops.upcast(each)), {self.activation}) == "softmax":
                    raise UsageError(
                        f"Model {place} of the ensemble puts out probabilities: they are at least 0 and sum to 1.",
                        "Logits are combined, and the softmax is applied to them.",
                        'Say outputs="probabilities" where all models do, or give them without their last activation.',
                    )
            self.outputs = "logits"
        return combined(scores, self.way, activation=self.activation)


@checked
def ensemble(
    models: Sequence[Model],
    combine: Literal["probabilities", "logits", "confidence"] = "probabilities",
    *,
    activation: Activation = "softmax",
    outputs: Outputs | None = None,
) -> Any:
    """One model whose scores are those of several together; it runs, teaches and is exported as any other.

    Args:
        models: that put out the same classes; copies of them make up the ensemble.
        combine: as `Objective.teachers` says: "probabilities", "logits" or "confidence".
        activation: what makes probabilities of their scores: "softmax" over classes, "sigmoid" of labels each by
            itself, or "identity" of numbers, whose mean is taken.
        outputs: what the models put out, "logits" or "probabilities". None: logits, and models whose outputs look like
            probabilities in the first run are refused.

    Returns:
        A model of their framework, in inference mode: its scores are those of the mean probabilities, up to rounding,
        for "probabilities".

    Raises:
        UsageError: there are no models, or an argument has another value.
    """
    if not models:
        raise UsageError("An ensemble of no models has no scores.", fix="Give at least one.")
    return framework_of(models[0]).features.ensemble(models, _Combination(combine, activation, outputs))


def _each(given: Any, links: int, what: str) -> list[Any]:
    """One for each link."""
    if not isinstance(given, (list, tuple)):
        return [given] * links
    if len(given) != links:
        raise UsageError(
            f"There are {len(given)} for {what!r} and {links} links, each from one model to the next.",
            fix="Give one for all, or one for each link.",
        )
    return list(given)


def _check_apart(models: Sequence[Any]) -> None:
    for place, model in enumerate(models):
        for other in range(place):
            if models[other] is model:
                raise UsageError(
                    f"Models {other} and {place} are the same object.",
                    fix="Build each by itself, or give a copy: copy.deepcopy(model).",
                )


# ------------------------------------------------------------------------------------------------ one after the other


def _in_turn(links: Sequence[Link], hooks: TrainingHooks) -> list[Trained]:
    """What the links give, one after the other; those that a state holds are taken from it."""
    states = _unpacked(hooks.resume, len(links)) if hooks.resume is not None else []
    done: list[TrainingState] = states[:-1]
    trained: list[Trained] = []
    for place, link in enumerate(links):
        if place < len(states) - 1:
            trained.append(link(trained, TrainingHooks(resume=states[place]), False))
            continue
        latest = states[place:]  # the state that this link begins with, if any; then the last that it saved
        own = _of_link(hooks, place, done, latest)
        trained.append(link(trained, own, True))
        done = [*done, *(state.ended() for state in latest)]
    return trained


def _of_link(
    hooks: TrainingHooks, place: int, done: Sequence[TrainingState], latest: list[TrainingState]
) -> TrainingHooks:
    """The hooks of one link: its events say so, and its states, of which `latest` holds one, bring those before it."""
    tell, save = hooks.event, hooks.save

    def event(told: dict[str, Any]) -> None:
        if tell is not None:
            tell({**told, "link": place + 1})

    def keep(state: TrainingState) -> None:
        latest[:] = [state]
        if save is not None:
            save(_packed([*done, state]))

    return dataclasses.replace(
        hooks,
        event=event if tell is not None else None,
        save=keep if save is not None else None,
        resume=latest[0] if latest else None,
    )


def _packed(states: Sequence[TrainingState]) -> TrainingState:
    """States of links as one, which counts the epochs of all of them."""
    arrays = {f"{place}.{name}": array for place, state in enumerate(states) for name, array in state.arrays.items()}
    epochs = sum(state.values["epoch"] for state in states)
    links = [state.values for state in states]
    return TrainingState(arrays, {"epoch": epochs, "batch": links[-1]["batch"], "links": links})


def _unpacked(state: TrainingState, links: int) -> list[TrainingState]:
    """The states of links that `_packed` made one."""
    values = state.values.get("links", [])
    if not 1 <= len(values) <= links:
        raise CheckpointError(
            f"The checkpoint holds {len(values) or 'no'} links of a chain; this one has {links}.",
            "It is of another run.",
            "Start the chain anew.",
        )
    found = [TrainingState({}, own) for own in values]
    for name, array in state.arrays.items():
        place, _, own = name.partition(".")
        found[int(place)].arrays[own] = array
    return found
