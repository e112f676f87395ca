"""Which places of student and teacher are compared, and what joins those that differ in shape; decided on one batch."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.distillation.bound_term import BoundTerm
from kirsch.distillation.losses.loss import OUTPUT_KINDS, get_loss
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
    from kirsch.frameworks.protocols import Features, Framework

LOGITS = ("logits", "output.logits")
"""LayerNames of what labels belong to."""

GATHERED = ("stages", "relations")
"""Kinds of values that are lists: all places of a term make one pair."""


def bind(
    framework: Framework,
    objective: Objective,
    student: Any,
    teachers: Sequence[Any],
    inputs: Any,
    *,
    seed: int,
    recorded: Mapping[str, Any] | None = None,
) -> list[BoundTerm]:
    """Bind the terms of an objective to concrete layers, with adapters sized from a run of all models.

    Args:
        framework: of all models.
        objective: the terms.
        student, teachers: models.
        inputs: some samples.
        seed: of the initial weights of adapters.
        recorded: the outputs of a store for these samples, instead of teachers.

    Raises:
        UnknownNameError: a model has no such layer, or the store no such record.
        ShapeError: no adapter joins two layers, or student and teacher return different numbers of classes.
        UsageError: student and teacher have different numbers of layers, or there is no such teacher.
    """
    if recorded is None and not teachers:
        raise UsageError("The objective has terms, and there is no teacher.", fix="Give one, or Objective.labels().")
    layers: list[tuple[int, Any, Any]] = []
    for number, term in enumerate(objective.terms):
        if not any(ends(term.weight)):  # a term that never counts is not computed
            continue
        if recorded is None and not 0 <= (term.teacher or 0) < len(teachers):
            raise UsageError(
                f"The term {term.record_name!r} is of teacher {term.teacher}; there are {len(teachers)}, from 0 on."
            )
        teacher = None if recorded is not None else teachers[term.teacher or 0]
        pairs = _places(framework, term, student, teacher, inputs, recorded)
        layers += [(number, own, other) for own, other in pairs]
    _check_all_used(objective, [number for number, _, _ in layers], len(teachers))
    values = framework.features.extract(student, texts([own for _, own, _ in layers]), inputs)
    outputs: list[Mapping[str, Any]] = [recorded] if recorded is not None else []
    for place, teacher in enumerate(teachers):
        wanted = [other for number, _, other in layers if concerns(objective.terms[number], place)]
        outputs.append(framework.features.extract(teacher, texts(wanted), inputs))
    if any(own in LOGITS and other in LOGITS for _, own, other in layers):
        for teacher in teachers:
            _check_names(framework.inference.class_names(student), framework.inference.class_names(teacher))
    names = _distinct([term.record_name for term in objective.terms])
    bound = []
    for place, (number, own, other) in enumerate(layers):
        term = objective.terms[number]
        teacher = None if combines_teachers(term) and recorded is None else (term.teacher or 0) * (recorded is None)
        sides = at_layers(values, own), at_layers(outputs[teacher or 0], other)
        options, temperature = term.resolved()
        found = BoundTerm(
            name=names[number],
            adapter_name=f"adapter{place}",
            loss=get_loss(term.loss),
            weight=term.weight,
            options=options,
            temperature=temperature,
            student_layer=own,
            teacher_layer=other,
            teacher=teacher,
            adapter=_adapter(framework, term, sides, place, seed),
            shapes=(_shape(sides[0]), _shape(sides[1])),
        )
        if teacher is None and len(teachers) > 1:
            _check_teachers(objective, found, [at_layers(output, other) for output in outputs])
        _try(framework, found, sides)
        bound.append(found)
    return bound


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, the second of the same as "name#2"."""
    return [
        name if not (before := names[:place].count(name)) else f"{name}#{before + 1}"
        for place, name in enumerate(names)
    ]


def combines_teachers(term: Term) -> bool:
    """Whether a term holds the student against all teachers together, and not against one."""
    return term.teacher is None and get_loss(term.loss).takes in OUTPUT_KINDS


def concerns(term: Term, place: int) -> bool:
    """Whether a term needs the teacher of this place."""
    return combines_teachers(term) or (term.teacher or 0) == place


def _check_all_used(objective: Objective, terms: Sequence[int], teachers: int) -> None:
    """Refuse a teacher that would be run for nothing."""
    for place in range(teachers):
        if terms and not any(concerns(objective.terms[number], place) for number in terms):
            raise UsageError(
                f"No term of the objective is held against teacher {place}, of {teachers} from 0 on.",
                "Terms on features take the first teacher, and those that name one with `teacher` that one alone.",
                f"Leave it out, or add a term with teacher={place}.",
            )


def _check_teachers(objective: Objective, term: BoundTerm, logits: Sequence[Any]) -> None:
    """Refuse teachers that cannot be combined."""
    sizes = [tuple(values.shape) for values in logits]
    if len(set(sizes)) > 1:
        raise ShapeError(
            f"The teachers return logits of shape {', '.join(str(size[1:]) for size in sizes)} a sample.",
            "Only teachers of the same classes can be combined.",
            "Name one of them for the term: teacher=0.",
        )
    if term.loss.activation == "identity" and objective.teachers == "confidence":
        raise UsageError(
            f"The term {term.name!r} compares numbers, which do not tell how sure a teacher is of them.",
            fix='Combine them as "probabilities", which is the mean of numbers, or name one for the term: teacher=0.',
        )
    if term.adapter is not None and objective.teachers == "sum":
        raise UsageError(
            f"The term {term.name!r} has an adapter, which takes one teacher, and there are {len(logits)} to add up.",
            fix='Combine them as "probabilities", or name one of them for the term: teacher=0.',
        )


def layers_of_teacher(terms: Sequence[BoundTerm], index: int) -> list[str]:
    """Return the layers of one teacher whose features the terms compare."""
    return texts([term.teacher_layer for term in terms if term.teacher in (None, index)])


def table(terms: Sequence[BoundTerm]) -> list[dict[str, Any]]:
    """Return which layers are compared, one JSON-able row a bound term."""
    return [
        {
            "term": term.name,
            "student": term.student_layer,
            "teacher": term.teacher_layer,
            "student_shape": term.shapes[0],
            "teacher_shape": term.shapes[1],
            "adapter": type(term.adapter).__name__ if term.adapter is not None else None,
        }
        for term in terms
    ]


def _places(
    framework: Framework, term: Term, student: Any, teacher: Any, inputs: Any, recorded: Mapping[str, Any] | None
) -> list[tuple[LayerNames, LayerNames]]:
    """The pairs of concrete layers of a term."""
    gathered = get_loss(term.loss).takes in GATHERED
    auto = re.fullmatch(r"auto(?:\[(-?\d+)\])?", term.student_layer) if isinstance(term.student_layer, str) else None
    if auto is not None and term.teacher_layer is None and recorded is None:
        found = stages(framework.features, student, teacher, inputs)
        found = found if auto[1] is None else _picked(found, int(auto[1]), "stages that student and teacher share")
        return [([a for a, _ in found], [b for _, b in found])] if gathered else list(found)
    if auto is not None:
        mine: Any = [path for path, _ in stages_of(framework.features, student, inputs)]
        mine = mine if auto[1] is None else _picked(mine, int(auto[1]), "stages of the student")
    else:
        mine = _expanded(framework.features, student, term.student_layer, inputs)
    if recorded is not None:
        theirs = _recorded(term.layers[1], recorded)
    else:
        theirs = _expanded(framework.features, teacher, term.layers[1], inputs)
    if isinstance(mine, dict) or isinstance(theirs, dict):
        return [(mine, theirs)]
    if len(theirs) == 1:  # such as the scores, which each stage is held against
        theirs = theirs * len(mine)
    if len(theirs) != len(mine):
        if isinstance(term.layers[1], list) and not any("*" in text for text in term.layers[1]):
            raise UsageError(
                f"The term {term.record_name!r} names {len(theirs)} layers of the teacher for {len(mine)} "
                "of the student.",
                fix="Name as many, or a pattern such as layer*, of which as many are taken by their depth.",
            )
        theirs = by_depth(theirs, len(mine))
    return [(mine, theirs)] if gathered else list(zip(mine, theirs, strict=True))


def _picked(found: Any, place: int, what: str) -> Any:
    if not -len(found) <= place < len(found):
        raise UsageError(f"There are {len(found)} {what}; [{place}] is none of them.")
    return [found[place]]


def _expanded(features: Features, model: Any, layers: LayerNames, inputs: Any) -> Any:
    if isinstance(layers, dict):
        return {name: _expanded(features, model, layer, inputs)[0] for name, layer in layers.items()}
    return [concrete for text in texts(layers) for concrete in features.expand(model, text, inputs)]


def _recorded(layers: LayerNames, recorded: Mapping[str, Any]) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        if name not in recorded:
            raise UnknownNameError("record in the store", name, recorded)
    return names


def _adapter(framework: Framework, term: Term, values: tuple[Any, Any], place: int, seed: int) -> Any:
    loss = get_loss(term.loss)
    # Scores of other classes are no matter of an adapter.
    if term.adapter == "none" or (term.adapter == "auto" and loss.takes in ("logits", "pixels", "values", "sets")):
        return None
    options = {"widths": loss.widths, "takes": loss.takes, **term.adapter_options}
    return framework.training.seeded(
        lambda: framework.features.build_adapter(term.adapter, *values, options), seed + place
    )


def _try(framework: Framework, term: BoundTerm, values: tuple[Any, Any]) -> None:
    """Compute the loss of a term on the values of the dry run, so that shapes that do not fit are an error here."""
    loss = term.loss
    student, teacher = values
    where = f"{quoted(term.student_layer)} of the student and {quoted(term.teacher_layer)} of the teacher"
    if holds_top_k(teacher):
        stored_scores(term, student, teacher, None, term.keywords(0.0))
        return
    if term.adapter is not None:
        ids = framework.inference.from_numpy(np.arange(len(ops.first_array(student))))
        student, teacher = framework.training.seeded(lambda: copy.deepcopy(term.adapter)(student, teacher, ids=ids), 0)
    if loss.takes == "logits" and student.ndim >= len("NKHW"):
        classes = "Take 'pixel-kd' or 'cwd-pixels' for classes of pixels; for " if student.shape[1] > 1 else "For "
        layer = texts(term.student_layer)[0]
        raise ShapeError(
            f"The term {term.name!r} cannot compare {where}: they are logits of pixels, {tuple(student.shape)}.",
            f"The loss {loss.name!r} takes the last axis for that of the classes.",
            f'{classes}images of numbers, or a yes or no for each pixel, Term("fitnet", student_layer="{layer}").',
        )
    if loss.takes == "logits" and loss.widths == "same" and tuple(student.shape[1:]) != tuple(teacher.shape[1:]):
        refuse_classes(tuple(student.shape), tuple(teacher.shape))
    if "labels" in term.step_keywords:
        return  # only a training step knows them
    known = {"mask": None, "epoch": 0.0}
    try:
        loss(student, teacher, **term.keywords(0.0), **{name: known[name] for name in term.step_keywords})
    except ShapeError as error:
        raise ShapeError(
            f"The term {term.name!r} cannot compare {where}. {error.what}",
            error.why,
            error.fix or "Name an adapter, or other layers.",
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
    return " × ".join(str(size) for size in tuple(ops.first_array(values).shape)[1:])


def quoted(layers: LayerNames) -> str:
    """Return layers as text for an error."""
    return ", ".join(f"`{text}`" for text in texts(layers))
