"""Which places of student and teacher are compared, and what joins those that differ in shape; decided on one batch."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.distillation.arrays import first_array
from kirsch.distillation.losses.loss import OUTPUT_KINDS, get_loss, step_arguments
from kirsch.distillation.matching import by_depth, stages, stages_of
from kirsch.distillation.schedule import ends
from kirsch.distillation.teachers import holds_top_k, stored_scores
from kirsch.errors import ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.layers import at_layers, texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.distillation.objective import Objective
    from kirsch.distillation.term import Term
    from kirsch.frameworks.layers import LayerNames
    from kirsch.frameworks.port import Framework

SCORES = ("logits", "output.logits")
"""LayerNames of what labels belong to."""

GATHERED = ("stages", "relations")
"""Kinds of values that are lists: all places of a term make one pair."""


@dataclass(frozen=True)
class Pair:
    """One place in the student beside one in the teacher.

    Args:
        term: which term of the objective, by its place.
        name: of its adapter, as parameters are called by it.
        student, teacher: concrete layers.
        adapter: what brings them to one shape, a module; None where they are compared as they are.
        shapes: of both sides, as text.
    """

    term: int
    name: str
    student: LayerNames
    teacher: LayerNames
    adapter: Any
    shapes: tuple[str, str]


def attach(
    framework: Framework,
    objective: Objective,
    student: Any,
    teachers: Sequence[Any],
    inputs: Any,
    *,
    seed: int,
    recorded: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """The pairs of an objective: concrete layers, and adapters sized from a run of all models.

    Args:
        framework: of all models.
        objective: what is compared.
        student, teachers: models.
        inputs: some samples.
        seed: of what adapters begin with.
        recorded: what a store holds of these samples, instead of teachers.

    Raises:
        UnknownNameError: a model has no such layer, or the store no such record.
        ShapeError: no adapter joins two places, or student and teacher put out other classes.
        UsageError: student and teacher have different numbers of places, or there is no such teacher.
    """
    if recorded is None and not teachers:
        raise UsageError("The objective has terms, and there is no teacher.", fix="Give one, or Objective.labels().")
    places = []
    for number, term in enumerate(objective.terms):
        if not any(ends(term.weight)):  # a term that never counts is not computed
            continue
        if recorded is None and not 0 <= (term.of or 0) < len(teachers):
            raise UsageError(f"The term {term.called!r} is of teacher {term.of}; there are {len(teachers)}, from 0 on.")
        teacher = None if recorded is not None else teachers[term.of or 0]
        found = _places(framework, term, student, teacher, inputs, recorded)
        places += [(number, mine, theirs) for mine, theirs in found]
    _check_all_held(objective, [number for number, _, _ in places], len(teachers))
    seen = framework.dry_run(student, texts([mine for _, mine, _ in places]), inputs)
    others: list[Mapping[str, Any]] = [recorded] if recorded is not None else []
    for place, teacher in enumerate(teachers):
        wanted = [theirs for number, _, theirs in places if concerns(objective.terms[number], place)]
        others.append(framework.dry_run(teacher, texts(wanted), inputs))
    if any(mine in SCORES and theirs in SCORES for _, mine, theirs in places):
        for teacher in teachers:
            _check_names(framework.class_names(student), framework.class_names(teacher))
    pairs = []
    for place, (number, mine, theirs) in enumerate(places):
        term = objective.terms[number]
        values = at_layers(seen, mine), at_layers(others[term.of or 0], theirs)
        adapter = _adapter(framework, term, values, place, seed)
        if of_all(term) and len(teachers) > 1:
            _check_teachers(objective, term, [at_layers(other, theirs) for other in others], adapter)
        pairs.append(Pair(number, f"adapter{place}", mine, theirs, adapter, (_shape(values[0]), _shape(values[1]))))
        _try(framework, term, values, adapter, f"{said(mine)} of the student and {said(theirs)} of the teacher")
    return pairs


def of_all(term: Term) -> bool:
    """Whether a term holds the student against all teachers together, and not against one."""
    return term.of is None and get_loss(term.loss).takes in OUTPUT_KINDS


def concerns(term: Term, place: int) -> bool:
    """Whether a term needs the teacher of this place."""
    return of_all(term) or (term.of or 0) == place


def _check_all_held(objective: Objective, terms: Sequence[int], teachers: int) -> None:
    """Refuse a teacher that would be run for nothing."""
    for place in range(teachers):
        if terms and not any(concerns(objective.terms[number], place) for number in terms):
            raise UsageError(
                f"No term of the objective is held against teacher {place}, of {teachers} from 0 on.",
                "Terms on features take the first teacher, and those that name one with `of` that one alone.",
                f"Leave it out, or add a term with of={place}.",
            )


def _check_teachers(objective: Objective, term: Term, scores: Sequence[Any], adapter: Any) -> None:
    """Refuse teachers that cannot be combined."""
    sizes = [tuple(values.shape) for values in scores]
    if len(set(sizes)) > 1:
        raise ShapeError(
            f"The teachers put out scores of shape {', '.join(str(size[1:]) for size in sizes)} a sample.",
            "What they say can be combined only of the same classes.",
            "Name one of them for the term: of=0.",
        )
    if get_loss(term.loss).activation == "identity" and objective.teachers == "confidence":
        raise UsageError(
            f"The term {term.called!r} compares numbers, which do not tell how sure a teacher is of them.",
            fix='Combine them as "probabilities", which is the mean of numbers, or name one for the term: of=0.',
        )
    if adapter is not None and objective.teachers == "sum":
        raise UsageError(
            f"The term {term.called!r} has an adapter, which takes one teacher, and there are {len(scores)} to add up.",
            fix='Combine them as "probabilities", or name one of them for the term: of=0.',
        )


def wanted_of(objective: Objective, pairs: Sequence[Pair], place: int) -> list[str]:
    """The layers that are watched in the teacher of this place."""
    return texts([pair.teacher for pair in pairs if concerns(objective.terms[pair.term], place)])


def table(objective: Objective, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """What is compared with what, one JSON-able row a pair: to be printed, read and written into an objective."""
    return [
        {
            "term": objective.terms[pair.term].called,
            "student": pair.student,
            "teacher": pair.teacher,
            "student_shape": pair.shapes[0],
            "teacher_shape": pair.shapes[1],
            "adapter": type(pair.adapter).__name__ if pair.adapter is not None else None,
        }
        for pair in pairs
    ]


def _places(
    framework: Framework, term: Term, student: Any, teacher: Any, inputs: Any, recorded: Mapping[str, Any] | None
) -> list[tuple[LayerNames, LayerNames]]:
    """The pairs of concrete layers of a term."""
    gathered = get_loss(term.loss).takes in GATHERED
    auto = re.fullmatch(r"auto(?:\[(-?\d+)\])?", term.student) if isinstance(term.student, str) else None
    if auto is not None and term.teacher is None and recorded is None:
        found = stages(framework, student, teacher, inputs)
        found = found if auto[1] is None else _picked(found, int(auto[1]), "stages that student and teacher share")
        return [([a for a, _ in found], [b for _, b in found])] if gathered else list(found)
    if auto is not None:
        mine: Any = [path for path, _ in stages_of(framework, student, inputs)]
        mine = mine if auto[1] is None else _picked(mine, int(auto[1]), "stages of the student")
    else:
        mine = _expanded(framework, student, term.student, inputs)
    if recorded is not None:
        theirs = _recorded(term.there, recorded)
    else:
        theirs = _expanded(framework, teacher, term.there, inputs)
    if isinstance(mine, dict) or isinstance(theirs, dict):
        return [(mine, theirs)]
    if len(theirs) == 1:  # such as the scores, which each stage is held against
        theirs = theirs * len(mine)
    if len(theirs) != len(mine):
        if isinstance(term.there, list) and not any("*" in text for text in term.there):
            raise UsageError(
                f"The term {term.called!r} names {len(theirs)} places of the teacher for {len(mine)} of the student.",
                fix="Name as many, or a pattern such as layer*, of which as many are taken by their depth.",
            )
        theirs = by_depth(theirs, len(mine))
    return [(mine, theirs)] if gathered else list(zip(mine, theirs, strict=True))


def _picked(found: Any, place: int, what: str) -> Any:
    if not -len(found) <= place < len(found):
        raise UsageError(f"There are {len(found)} {what}; [{place}] is none of them.")
    return [found[place]]


def _expanded(framework: Framework, model: Any, layers: LayerNames, inputs: Any) -> Any:
    if isinstance(layers, dict):
        return {name: _expanded(framework, model, layer, inputs)[0] for name, layer in layers.items()}
    return [concrete for text in texts(layers) for concrete in framework.expand(model, text, inputs)]


def _recorded(layers: LayerNames, recorded: Mapping[str, Any]) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        if name not in recorded:
            raise UnknownNameError("record in the store", name, recorded)
    return names


def _adapter(framework: Framework, term: Term, values: tuple[Any, Any], place: int, seed: int) -> Any:
    loss = get_loss(term.loss)
    # Scores of other classes are no matter of an adapter.
    if term.adapter == "none" or (term.adapter == "auto" and loss.takes in ("scores", "pixels", "values", "sets")):
        return None
    options = {"widths": loss.widths, "takes": loss.takes, **term.adapter_options}
    return framework.seeded(lambda: framework.adapter(term.adapter, *values, options), seed + place)


def _try(framework: Framework, term: Term, values: tuple[Any, Any], adapter: Any, where: str) -> None:
    """The loss of a term on the values of the dry run, so that what does not fit is an error before any training."""
    loss = get_loss(term.loss)
    mine, theirs = values
    if holds_top_k(theirs):
        stored_scores(term, mine, theirs, None, term.keywords(0.0))
        return
    if adapter is not None:
        ids = framework.tensor(np.arange(len(first_array(mine))))
        mine, theirs = framework.seeded(lambda: copy.deepcopy(adapter)(mine, theirs, ids=ids), 0)
    if loss.takes == "scores" and mine.ndim >= len("NKHW"):
        classes = "Take 'pixel-kd' or 'cwd-pixels' for classes of pixels; for " if mine.shape[1] > 1 else "For "
        layer = texts(term.student)[0]
        raise ShapeError(
            f"The term {term.called!r} cannot compare {where}: of shape {tuple(mine.shape)} they are scores of pixels.",
            f"The loss {term.loss!r} takes the last axis for that of the classes.",
            f'{classes}images of numbers, or a yes or no for each pixel, Term("fitnet", student="{layer}").',
        )
    if loss.takes == "scores" and loss.widths == "same" and tuple(mine.shape[1:]) != tuple(theirs.shape[1:]):
        refuse_classes(tuple(mine.shape), tuple(theirs.shape))
    if "labels" in step_arguments(loss):
        return  # they are known to a training step only
    given = {"mask": None, "epoch": 0.0}
    try:
        loss(mine, theirs, **term.keywords(0.0), **{name: given[name] for name in step_arguments(loss)})
    except ShapeError as error:
        raise ShapeError(
            f"The term {term.called!r} cannot compare {where}. {error.what}",
            error.why,
            error.fix or "Name an adapter, or other places.",
        ) from error


def refuse_classes(mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    """Raise the error for scores of student and teacher whose shapes, with the samples, are of other classes."""
    if len(mine) == len(theirs) == len("NLK") and mine[:2] == theirs[:2]:
        raise ShapeError(
            f"The student has a vocabulary of {mine[-1]:,}, the teacher one of {theirs[-1]:,}.",
            "Soft targets need the same tokens with the same numbers.",
            "Give both the tokenizer of one of them, resize its embedding to that, or let the student learn from text "
            "that the teacher generates.",
        )
    raise ShapeError(
        f"The student puts out {_classes(mine[1:])}, the teacher {_classes(theirs[1:])}.",
        "Soft targets need the same classes in the same order.",
        "Give one of them a head for the classes of the other.",
    )


def _check_names(mine: Sequence[str], theirs: Sequence[str]) -> None:
    """Refuse classes of one number and other names; names of which none is shared may be words for the same."""
    differ = [number for number, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a.lower() != b.lower()]
    if differ and {name.lower() for name in mine} & {name.lower() for name in theirs}:
        raise ShapeError(
            f"The student calls class {differ[0]} {mine[differ[0]]!r}, the teacher {theirs[differ[0]]!r}.",
            "Soft targets need the same classes in the same order.",
            "Build the student with the id2label of the teacher's configuration, or fix the names.",
        )


def _classes(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} classes" if len(shape) == 1 else f"scores of shape {shape} a sample"


def _shape(values: Any) -> str:
    if isinstance(values, dict):
        return ", ".join(f"{name} {_shape(value)}" for name, value in values.items())
    if isinstance(values, list):
        return ", ".join(_shape(value) for value in values)
    return " × ".join(str(size) for size in tuple(first_array(values).shape)[1:])


def said(layers: LayerNames) -> str:
    """LayerNames as words."""
    return ", ".join(f"`{text}`" for text in texts(layers))
