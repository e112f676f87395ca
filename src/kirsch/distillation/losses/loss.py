"""The interface of a distillation loss, and the decorator that registers one."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from kirsch import ops
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


Takes = Literal["logits", "values", "pixels", "maps", "features", "tokens", "attention", "relations", "stages", "sets"]
"""Kind of values that a loss compares; see `SHAPES`."""

SHAPES: Mapping[Takes, str] = {
    "logits": "outputs of a classifier, (N, K), or (N, L, K) for a sequence: classes on the last axis",
    "values": "outputs of a regression, (N, D) or (N,); the labels are then numbers of the same shape",
    "pixels": "logits of each pixel, (N, K, H, W)",
    "maps": "feature maps of a convolution, (N, C, H, W)",
    "features": "one vector per sample, (N, ...)",
    "tokens": "hidden states of a sequence, (N, L, D)",
    "attention": "attention scores or weights, (N, heads, L, L)",
    "relations": "several arrays (N, L, D), which the loss relates to each other",
    "stages": "a list of feature maps, from the first stage to the last",
    "sets": 'a dict of "logits" (N, Q, K) and "boxes" (N, Q, 4), of a detector that predicts a set',
}
"""Values and shapes of each kind, for one side: the student or the teacher.

The channels of pixels, maps and stages may be on another axis, see `Loss`.
"""

OUTPUT_KINDS = ("logits", "pixels", "values")
"""Kinds that are outputs of a model. Labels exist for them, and several teachers can be combined."""

Activation = Literal["softmax", "sigmoid", "identity"]
"""Activation that turns the outputs of a model into predictions: "softmax" for exclusive classes, "sigmoid" for
independent labels, "identity" for a regression."""

TOKEN_KINDS = ("tokens", "attention", "relations")
"""Kinds that belong to the positions of a sequence, so that a mask of positions applies."""

CHANNEL_KINDS = ("pixels", "maps", "stages")
"""Kinds with an axis of channels or classes before the height and the width, or, by another convention, after them."""

Over = Literal["samples", "positions", "pairs", "contents"]
"""Elements over which a loss is averaged. If a step has several batches, each is weighted by its number of elements:

- samples; for logits of sequences and pixels, the positions that are not masked
- positions of a sequence; for attention, the queries
- pairs of positions
- contents: elements that depend on the values, such as the objects a teacher finds; the losses of parts of a batch do
  not add up to the loss of the batch
"""

STEP_ARGUMENTS = ("labels", "mask", "epoch")
"""Keywords that a training step passes and an objective cannot set: `labels`, the class numbers of the samples or
positions; `mask`, True where a position counts; `epoch`, the number of epochs done, as a float."""


class Loss(Protocol):
    """A registered loss: a function of student, teacher and keywords. Only `STEP_ARGUMENTS` may lack a default."""

    name: str
    takes: Takes
    widths: Literal["same", "any"]
    learned: bool
    relational: bool
    over: Over
    activation: Activation
    least_at_teacher: bool
    __doc__: str | None

    def __call__(self, student: Any, teacher: Any, *, axis: Any = None, **options: Any) -> Any:
        """Return a scalar. With `least_at_teacher`, it is smallest when the student equals the teacher.

        Args:
            student, teacher: values of the kind `takes`.
            axis: the axis of the channels or classes, for `CHANNEL_KINDS` only: 1 for (N, C, H, W), -1 for
                (N, H, W, C). None: the convention of the library of the arrays; 1 for numpy and PyTorch.
            options: options of the formula, by keyword.
        """


LOSSES: Registry[Loss] = Registry("loss")


def loss(
    name: str,
    *,
    takes: Takes = "logits",
    widths: Literal["same", "any"] = "same",
    learned: bool = False,
    relational: bool = False,
    over: Over | None = None,
    activation: Activation | None = None,
    least_at_teacher: bool = True,
) -> Callable[[Callable[..., Any]], Loss]:
    """Decorate a function to register it as a loss.

    The decorated function runs without autocast. It receives arrays of at least 32 bits, the teacher's values without
    gradient, and pixels, maps and stages with their channels on axis 1. It must use only operators and the functions of
    `kirsch.ops`, which work on the arrays of all libraries, never methods of arrays. Its Python code must not depend on
    the values of arrays, so that a compiler can trace it; check values with `ops.raise_if`.

    Args:
        name: name of the loss in objectives.
        takes: kind of values that the loss compares.
        widths: "same" if the channels or hidden sizes of student and teacher must agree, so that an adapter is added
            where they differ; "any" if the formula does not depend on them.
        learned: the teacher's side passes through a trained module, such as an embedding, so the gradient must reach
            that module. The teacher itself runs without gradient in any case.
        relational: the loss relates the samples of a batch to each other, so its value depends on the batch size.
        over: elements over which the loss is averaged; by default positions if `takes` is one of `TOKEN_KINDS`, else
            samples.
        activation: activation by which the outputs of several teachers are combined; by default "identity" if the loss
            takes values, else "softmax". With "softmax", a single class raises an error; with the other activations,
            arrays (N,) are treated as (N, 1).
        least_at_teacher: the loss has its minimum where the student equals the teacher; False if the minimum may
            be elsewhere, because it depends on labels, on a margin, or on the other samples.

    Raises:
        UnknownNameError: `takes`, `over` or `activation` has no such choice.
        UsageError: the name is taken, or a keyword lacks a default.
    """
    if takes not in get_args(Takes):
        raise UnknownNameError("kind of values", takes, get_args(Takes))
    if over is not None and over not in get_args(Over):
        raise UnknownNameError("value of `over`", over, get_args(Over))
    if activation is not None and activation not in get_args(Activation):
        raise UnknownNameError("activation", activation, get_args(Activation))

    output_activation: Activation = activation or ("identity" if takes == "values" else "softmax")

    def register(formula: Callable[..., Any]) -> Loss:
        for parameter in list(inspect.signature(formula).parameters.values())[2:]:
            if parameter.kind is not parameter.KEYWORD_ONLY or (
                parameter.default is parameter.empty and parameter.name not in STEP_ARGUMENTS
            ):
                raise UsageError(
                    f"The parameter {parameter.name!r} of the loss {name!r} is positional or has no default.",
                    "An objective passes options by keyword, and only those that differ from the default.",
                    fix=f"Make {parameter.name!r} keyword-only, with a default.",
                )

        @functools.wraps(formula)
        def compute(student: Any, teacher: Any, *, axis: int | None = None, **options: Any) -> Any:
            student, teacher = ops.upcast(student), ops.upcast(teacher)
            if takes in CHANNEL_KINDS:
                student, teacher = _channels_first(student, axis), _channels_first(teacher, axis)
            student, teacher = (_checked(side, takes, output_activation) for side in (student, teacher))
            with ops.without_autocast(ops.first_array(student)):
                return formula(student, teacher if learned else ops.detach(teacher), **options)

        registered = cast("Loss", compute)
        registered.name, registered.takes, registered.widths, registered.learned = name, takes, widths, learned
        registered.relational, registered.least_at_teacher = relational, least_at_teacher
        registered.activation = output_activation
        registered.over = over or ("positions" if takes in TOKEN_KINDS else "samples")
        return LOSSES.register(name)(registered)

    return register


def _channels_first(side: Any, axis: int | None) -> Any:
    """Return arrays with the channels moved to axis 1; arrays without positions, such as (N, C), are unchanged."""

    def move(array: Any) -> Any:
        source = ops.channel_axis(array) if axis is None else axis
        return array if source == 1 or len(array.shape) < len("NCL") else ops.moveaxis(array, source, 1)

    return ops.map_arrays(move, side)


def _checked(side: Any, takes: Takes, activation: Activation) -> Any:
    """Return the checked values of student or teacher; outputs of shape (N,) are reshaped to (N, 1).

    Raises:
        ShapeError: the class axis is missing, a softmax has only one class, or there are no arrays.
        DataError: there are no samples.
    """
    if isinstance(side, (dict, list)):
        if not side:
            raise ShapeError(
                "The student or the teacher has no arrays.", fix=f"Pass at least one: the loss compares {takes}."
            )
        if ops.first_array(side).shape[0] == 0:
            raise _empty_batch()
        return side
    if len(side.shape) and side.shape[0] == 0:
        raise _empty_batch()
    if len(side.shape) == 1 and takes in OUTPUT_KINDS and activation != "softmax":
        return side[:, None]
    noun = "values" if takes == "values" else "logits"
    if takes in OUTPUT_KINDS and len(side.shape) < len("NK"):
        raise ShapeError(
            f"The {noun} have shape {tuple(side.shape)}; (N, K) or (N, L, K) is needed.",
            "If there is only one axis, the samples would count as classes.",
            'Keep the last axis; for a single binary output use "binary-kd".',
        )
    if takes in ("logits", "pixels") and activation == "softmax" and side.shape[1 if takes == "pixels" else -1] == 1:
        fix = 'Use "binary-kd" for a binary output; for a number use Term("fitnet", student_layer="logits").'
        if len(side.shape) >= len("NKHW"):
            fix = 'Use Term("fitnet", student_layer="logits") for a binary output or a number at each pixel.'
        raise ShapeError(
            f"The logits have shape {tuple(side.shape)}: only one class.",
            "The softmax of one class is always 1, so there is nothing to learn.",
            fix,
        )
    return side


def _empty_batch() -> DataError:
    return DataError("The batch has no samples.", fix="Skip empty batches.")


def get_loss(name: str) -> Loss:
    """Return the registered loss of a name.

    Raises:
        UnknownNameError: no loss has this name.
        UsageError: the registered function was not made by the decorator `loss`.
    """
    registered = LOSSES[name]
    if not hasattr(registered, "takes"):
        raise UsageError(
            f"The loss {name!r} does not state what it compares.",
            "It was registered as a plain function.",
            "Write `from kirsch.distillation.losses import loss`, and the decorator "
            f'@loss("{name}", takes="logits") before the function.',
        )
    return registered


def loss_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keywords of a loss that an objective may set, with their defaults."""
    parameters = list(inspect.signature(function).parameters.values())[2:]
    return {p.name: p.default for p in parameters if p.name not in STEP_ARGUMENTS}


def step_arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of `STEP_ARGUMENTS` that a loss takes."""
    return frozenset(p.name for p in inspect.signature(function).parameters.values() if p.name in STEP_ARGUMENTS)


def check_at_least(minimum: float, **options: float) -> None:
    """Raise a UsageError for an option that is not a finite number of at least the minimum."""
    for name, value in options.items():
        if not minimum <= value < math.inf:
            raise UsageError(f"`{name}` is {value}; a number of at least {minimum} is needed.")


def check_above(bound: float, **options: float) -> None:
    """Raise a UsageError for an option that is not a finite number above the bound."""
    for name, value in options.items():
        if not bound < value < math.inf:
            raise UsageError(f"`{name}` is {value}; a number above {bound} is needed.")


def check_integer(minimum: int, **options: int) -> None:
    """Raise a UsageError for an option that is not an integer of at least the minimum."""
    for name, value in options.items():
        if not isinstance(value, numbers.Integral) or value < minimum:
            raise UsageError(f"`{name}` is {value}; an integer of at least {minimum} is needed.")


def check_convention(convention: str, known: Iterable[str]) -> None:
    """Raise an UnknownNameError if a loss has no convention of this name."""
    if convention not in known:
        raise UnknownNameError("convention", convention, known)


def check_same_shape(student: Any, teacher: Any, noun: str = "logits") -> None:
    """Raise a ShapeError that names both shapes if they differ.

    Args:
        student, teacher: arrays.
        noun: plural name of the arrays, for the message.
    """
    if tuple(student.shape) != tuple(teacher.shape):
        classes = " for the same classes." if noun == "logits" else ", of the same size."
        raise ShapeError(
            f"The student's {noun} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.",
            f"They must be {noun} of the same samples{classes}",
        )


def check_same_samples(student: Any, teacher: Any, noun: str = "features") -> None:
    """Raise a ShapeError that names both numbers of samples if they differ."""
    if student.shape[0] != teacher.shape[0]:
        raise ShapeError(
            f"The student's {noun} have {student.shape[0]} samples, the teacher's {teacher.shape[0]}.",
            "They must be of the same samples.",
        )


def check_maps(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless student and teacher are feature maps (N, C, H, W) of the same samples."""
    for role, maps in (("student", student), ("teacher", teacher)):
        if len(maps.shape) != len("NCHW"):
            raise ShapeError(
                f"The {role}'s maps have shape {tuple(maps.shape)}; (N, C, H, W) is needed.",
                fix="Choose the output of a convolution, or a loss that takes features or tokens.",
            )
    check_same_samples(student, teacher, "maps")
