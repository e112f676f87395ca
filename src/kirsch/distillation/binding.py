"""Binding of the terms of an objective to layers of student and teacher, with adapters, from one dry run."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures, ops
from kirsch.distillation.distillation_loss import top_k_record_loss
from kirsch.distillation.losses.loss import OUTPUT_KINDS, get_loss
from kirsch.distillation.matching import by_depth, stages, stages_of
from kirsch.distillation.teachers import holds_top_k
from kirsch.distillation.term import BoundTerm, end_values
from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.layers import at_layers, texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.distillation.objective import Objective
    from kirsch.distillation.term import Term
    from kirsch.frameworks.layers import LayerNames
    from kirsch.frameworks.protocols import Features, Framework

LOGITS = ("logits", "output.logits")
"""Names of the layer whose values are the logits of a model."""

GATHERED = ("stages", "relations")
"""Kinds of inputs of a loss that are lists: the loss compares all layers of a term at once, not pair by pair."""


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
        framework: the framework of all models.
        objective: supplies the terms.
        student, teachers: models.
        inputs: a few samples.
        seed: seed of the initial weights of adapters.
        recorded: the outputs that a store holds for these samples; they are used instead of teachers.

    Raises:
        UnknownNameError: a term names a layer that a model does not have.
        ShapeError: student and teacher return different numbers of classes, or, for a term, no adapter can convert the
            student's feature to the shape of the teacher's feature.
        UsageError: a term names different numbers of layers of student and teacher, a teacher that does not exist, or
            an output that the store does not hold; or no term uses one of the teachers.
    """
    if recorded is None and not teachers:
        raise UsageError("The objective has terms, and there is no teacher.", fix="Give a teacher, or no terms.")
    layers: list[tuple[int, Any, Any]] = []
    for number, term in enumerate(objective.terms):
        if not any(end_values(term.weight)):
            continue
        if recorded is None and not 0 <= (term.teacher or 0) < len(teachers):
            raise UsageError(
                f"The term {term.record_name!r} has teacher={term.teacher}; the number of teachers is {len(teachers)}.",
                fix=f"Give an index from 0 to {len(teachers) - 1}.",
            )
        teacher = None if recorded is not None else teachers[term.teacher or 0]
        pairs = _layer_pairs(framework, term, student, teacher, inputs, recorded)
        layers += [(number, student_layer, teacher_layer) for student_layer, teacher_layer in pairs]
    _check_all_used(objective, [number for number, _, _ in layers], len(teachers))
    student_values = framework.features.extract(
        student, texts([student_layer for _, student_layer, _ in layers]), inputs
    )
    outputs: list[Mapping[str, Any]] = [recorded] if recorded is not None else []
    for index, teacher in enumerate(teachers):
        used = [teacher_layer for number, _, teacher_layer in layers if uses_teacher(objective.terms[number], index)]
        outputs.append(framework.features.extract(teacher, texts(used), inputs))
    if any(student_layer in LOGITS and teacher_layer in LOGITS for _, student_layer, teacher_layer in layers):
        for teacher in teachers:
            _check_class_names(framework.inference.class_names(student), framework.inference.class_names(teacher))
    names = _distinct([term.record_name for term in objective.terms])
    bound = []
    for index, (number, student_layer, teacher_layer) in enumerate(layers):
        term = objective.terms[number]
        teacher = None if combines_teachers(term) and recorded is None else (term.teacher or 0) * (recorded is None)
        values = at_layers(student_values, student_layer), at_layers(outputs[teacher or 0], teacher_layer)
        options, temperature = term.resolved()
        bound_term = BoundTerm(
            name=names[number],
            adapter_name=f"adapter{index}",
            loss=get_loss(term.loss),
            weight=term.weight,
            options=options,
            temperature=temperature,
            student_layer=student_layer,
            teacher_layer=teacher_layer,
            teacher=teacher,
            adapter=_adapter(framework, term, values, index, seed),
            shapes=(_shape(values[0]), _shape(values[1])),
        )
        if teacher is None and len(teachers) > 1:
            _check_teachers(objective, bound_term, [at_layers(output, teacher_layer) for output in outputs])
        _check_shapes(framework, bound_term, values)
        bound.append(bound_term)
    return bound


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with "#2" appended to the second occurrence of a name, "#3" to the third, and so on."""
    return [
        name if not (before := names[:index].count(name)) else f"{name}#{before + 1}"
        for index, name in enumerate(names)
    ]


def combines_teachers(term: Term) -> bool:
    """Return whether a term compares the student with all teachers combined."""
    return term.teacher is None and get_loss(term.loss).takes in OUTPUT_KINDS


def uses_teacher(term: Term, index: int) -> bool:
    """Return whether a term compares the student with the teacher of this index, alone or combined with others."""
    return combines_teachers(term) or (term.teacher or 0) == index


def _check_all_used(objective: Objective, terms: Sequence[int], teachers: int) -> None:
    """Refuse a teacher that no term uses."""
    for index in range(teachers):
        if terms and not any(uses_teacher(objective.terms[number], index) for number in terms):
            raise UsageError(
                f"Teacher {index} (of {teachers}, counted from 0) is not used by any term of the objective.",
                "Terms on features use the first teacher, unless they name another one.",
                f"Leave this teacher out, or add a term with teacher={index}.",
            )


def _check_teachers(objective: Objective, term: BoundTerm, logits: Sequence[Any]) -> None:
    """Refuse teachers that cannot be combined."""
    shapes = [tuple(values.shape) for values in logits]
    if len(set(shapes)) > 1:
        raise ShapeError(
            f"The teachers return logits of the shapes {', '.join(str(shape[1:]) for shape in shapes)} per sample.",
            "Only teachers with the same classes can be combined.",
            "Name one of them for the term: teacher=0.",
        )
    if term.loss.activation == "identity" and objective.combine_teachers == "confidence":
        raise UsageError(
            f"The term {term.name!r} compares real numbers, which do not show how confident a teacher is.",
            fix='Set combine_teachers="probabilities", which averages real numbers, or name one teacher: teacher=0.',
        )
    if term.adapter is not None and objective.combine_teachers == "sum":
        raise UsageError(
            f"The term {term.name!r} has an adapter for one teacher, but compares with each of {len(logits)} teachers.",
            fix='Set combine_teachers="probabilities", or name one teacher for the term: teacher=0.',
        )


def layers_of_teacher(terms: Sequence[BoundTerm], index: int) -> list[str]:
    """Return the layers of one teacher whose features the terms compare."""
    return texts([term.teacher_layer for term in terms if term.teacher in (None, index)])


def table(terms: Sequence[BoundTerm]) -> list[dict[str, Any]]:
    """Return the compared layers, one JSON-able row for each bound term."""
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


def _layer_pairs(
    framework: Framework, term: Term, student: Any, teacher: Any, inputs: Any, recorded: Mapping[str, Any] | None
) -> list[tuple[LayerNames, LayerNames]]:
    """Return the pairs of concrete layers of a term."""
    gathered = get_loss(term.loss).takes in GATHERED
    auto = re.fullmatch(r"auto(?:\[(-?\d+)\])?", term.student_layer) if isinstance(term.student_layer, str) else None
    if auto is not None and term.teacher_layer is None and recorded is None:
        pairs = stages(framework.features, student, teacher, inputs)
        pairs = pairs if auto[1] is None else _picked(pairs, int(auto[1]), term, "shared by student and teacher")
        return [([a for a, _ in pairs], [b for _, b in pairs])] if gathered else list(pairs)
    if auto is not None:
        student_layers: Any = [path for path, _ in stages_of(framework.features, student, inputs)]
        if auto[1] is not None:
            student_layers = _picked(student_layers, int(auto[1]), term, "of the student")
    else:
        student_layers = _expanded(framework.features, student, term.student_layer, inputs)
    if recorded is not None:
        teacher_layers: Any = _recorded(term.layers[1], recorded)
    else:
        teacher_layers = _expanded(framework.features, teacher, term.layers[1], inputs)
    if isinstance(student_layers, dict) or isinstance(teacher_layers, dict):
        return [(student_layers, teacher_layers)]
    if len(teacher_layers) == 1:  # such as the logits, with which each stage is compared
        teacher_layers = teacher_layers * len(student_layers)
    if len(teacher_layers) != len(student_layers):
        if isinstance(term.layers[1], list) and not any("*" in text for text in term.layers[1]):
            raise UsageError(
                f"The term {term.record_name!r} names {figures.counted(len(teacher_layers), 'layer')} of the teacher "
                f"and {len(student_layers)} of the student.",
                fix="Name the same number of layers, or a pattern such as layer*: evenly spaced layers are taken "
                "from its matches.",
            )
        teacher_layers = by_depth(teacher_layers, len(student_layers))
    if gathered:
        return [(student_layers, teacher_layers)]
    return list(zip(student_layers, teacher_layers, strict=True))


def _picked(items: Any, index: int, term: Term, owner_phrase: str) -> Any:
    """Return a list with the one stage that the layer "auto[index]" of a term names.

    The error names the owner of the stages by `owner_phrase`, such as "of the student".
    """
    if not -len(items) <= index < len(items):
        raise UsageError(
            f"The term {term.record_name!r} uses the stage {index} (auto[{index}]), and the number of stages "
            f"{owner_phrase} is {len(items)}.",
            fix="Write the term with layers of the models, such as "
            f'kirsch.Term("{term.loss}", student_layer=..., teacher_layer=...), or with the last stage, "auto[-1]".',
        )
    return [items[index]]


def _expanded(features: Features, model: Any, layers: LayerNames, inputs: Any) -> Any:
    if isinstance(layers, dict):
        return {name: _expanded(features, model, layer, inputs)[0] for name, layer in layers.items()}
    return [concrete for text in texts(layers) for concrete in features.expand(model, text, inputs)]


def _recorded(layers: LayerNames, recorded: Mapping[str, Any]) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        if name not in recorded:
            raise UsageError(
                f"The objective needs the teacher's layer {name!r}, and the store holds only {', '.join(recorded)}.",
                fix="Build the store by kirsch.build_store(folder, teacher, data, outputs=...), where `outputs` "
                "returns features by name, and name them in `teacher_layer` of the term. Or give the teacher itself.",
            )
    return names


def _adapter(framework: Framework, term: Term, values: tuple[Any, Any], index: int, seed: int) -> Any:
    loss = get_loss(term.loss)
    if not term.may_have_adapter:
        return None
    options = {"widths": loss.widths, "takes": loss.takes, **term.adapter_options}
    built = framework.training.seeded(
        lambda: framework.features.build_adapter(term.adapter, *values, options), seed + index
    )
    if built is None and term.adapter_options:
        raise UsageError(
            f"`adapter_options` of the term {term.record_name!r} has no effect: the values of student and teacher have "
            "the same shape, so adapter='auto' adds no adapter.",
            fix="Remove `adapter_options`, or name an adapter.",
        )
    return built


def _check_shapes(framework: Framework, term: BoundTerm, values: tuple[Any, Any]) -> None:
    """Compute the loss of a term on the values of the dry run, so that wrong shapes raise an error before training."""
    loss = term.loss
    student, teacher = values
    where = f"{quoted_layers(term.student_layer)} of the student and {quoted_layers(term.teacher_layer)} of the teacher"
    if holds_top_k(teacher):
        top_k_record_loss(term, student, teacher, None, term.keywords(0.0))
        return
    if term.adapter is not None:
        ids = framework.inference.from_numpy(np.arange(len(ops.first_array(student))))
        student, teacher = framework.training.seeded(lambda: copy.deepcopy(term.adapter)(student, teacher, ids=ids), 0)
    if loss.takes == "logits" and student.ndim >= len("NKHW"):
        classes = "For classes of pixels, use 'pixel-kd' or 'cwd-pixels'. " if student.shape[1] > 1 else ""
        layer = texts(term.student_layer)[0]
        raise ShapeError(
            f"The term {term.name!r} cannot compare {where}: they are logits of pixels, {tuple(student.shape)}.",
            f"The loss {loss.name!r} expects the classes on the last axis.",
            f'{classes}For regression or binary labels of pixels, use Term("fitnet", student_layer="{layer}").',
        )
    if loss.takes == "logits" and loss.widths == "same" and tuple(student.shape[1:]) != tuple(teacher.shape[1:]):
        refuse_classes(tuple(student.shape), tuple(teacher.shape))
    if "labels" in term.step_keywords:
        return  # labels are known in a training step only
    step_values = {"mask": None, "epoch": 0.0}
    try:
        loss(student, teacher, **term.keywords(0.0), **{name: step_values[name] for name in term.step_keywords})
    except ShapeError as error:
        raise ShapeError(
            f"The term {term.name!r} cannot compare {where}. {error.what}",
            error.why,
            error.fix or "Name an adapter, or other layers.",
        ) from error


def refuse_classes(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    """Raise the error for logits of student and teacher with different numbers of classes.

    Args:
        student_shape, teacher_shape: shapes of the logits, including the axis of samples.
    """
    if len(student_shape) == len(teacher_shape) == len("NLK") and student_shape[:2] == teacher_shape[:2]:
        raise ShapeError(
            f"The student has a vocabulary of {student_shape[-1]:,}, the teacher one of {teacher_shape[-1]:,}.",
            "Soft targets need the same tokens with the same ids.",
            "Use one tokenizer for both models, resize the embedding of one model to the vocabulary of the other, or "
            "train the student on text that the teacher generates.",
        )
    raise ShapeError(
        f"The student returns {_classes(student_shape[1:])}; the teacher returns {_classes(teacher_shape[1:])}.",
        "Soft targets need the same classes in the same order.",
        "Give one model a head for the classes of the other model.",
    )


def _check_class_names(student_names: Sequence[str], teacher_names: Sequence[str]) -> None:
    """Refuse class names that differ, unless student and teacher share no name: the names may be translations."""
    student, teacher = ([name.lower() for name in names] for names in (student_names, teacher_names))
    differ = [index for index, (a, b) in enumerate(zip(student, teacher, strict=False)) if a != b]
    if differ and set(student) & set(teacher):
        first = differ[0]
        raise ShapeError(
            f"The name of class {first} is {student_names[first]!r} in the student, {teacher_names[first]!r} in the "
            "teacher.",
            "Soft targets need the same classes in the same order.",
            "Build the student with the id2label of the teacher's configuration, or fix the names.",
        )


def _classes(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} classes" if len(shape) == 1 else f"logits of shape {shape} per sample"


def _shape(values: Any) -> str:
    if isinstance(values, dict):
        return ", ".join(f"{name} {_shape(value)}" for name, value in values.items())
    if isinstance(values, list):
        return ", ".join(_shape(value) for value in values)
    return " × ".join(str(size) for size in tuple(ops.first_array(values).shape)[1:])


def quoted_layers(layers: LayerNames) -> str:
    """Return layers as text for an error."""
    return ", ".join(f"`{text}`" for text in texts(layers))
