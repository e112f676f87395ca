"""What a distillation loss is, and how it gets its name."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from kirsch.distillation.arrays import constant, first_of, full_precision, wide
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Takes = Literal["scores", "values", "pixels", "maps", "features", "tokens", "attention", "relations", "stages", "sets"]
"""What a loss compares, with the shape of one side:

- scores: (N, K), or (N, L, K) of a sequence: classes on the last axis
- values: (N, D) or (N,), numbers that a regression puts out; labels are then numbers of the same shape
- pixels: (N, K, H, W), scores of every pixel
- maps: (N, C, H, W), activations of a convolution
- features: (N, ...), of which each sample is one vector
- tokens: (N, L, D), hidden states of a sequence
- attention: (N, heads, L, L), scores or weights of attention
- relations: (N, L, D) for each of several values, which a loss relates to each other
- stages: a list of maps, from the first stage to the last
- sets: a dict of "scores" (N, Q, K) and "boxes" (N, Q, 4), of a detector that predicts a set
"""

SCORED = ("scores", "pixels", "values")
"""What a model puts out: labels belong to it, and several teachers say it together."""

Activation = Literal["softmax", "sigmoid", "identity"]
"""What makes of scores what they say: probabilities of classes, of which one is right; of labels, each yes or no; or
nothing, as they are numbers to come near to."""

TOKEN_KINDS = ("tokens", "attention", "relations")
"""What a sequence holds, of which a mask says what counts."""

Over = Literal["samples", "positions", "pairs", "contents"]
"""What the mean of a loss goes over, so that batches which make one step can be weighed by how many there are:

- samples; of scores of sequences and pixels, the positions that count
- positions of what a sequence holds; of attention, the queries
- pairs: of such positions
- contents: what the values themselves decide, such as the objects that a teacher finds; parts do not add up
"""

GIVEN = ("labels", "mask", "epoch")
"""Keywords that a training step gives, and no objective states: class numbers of the samples or positions; True where
a position counts; how many epochs are done, as a float."""


class Loss(Protocol):
    """A registered loss: student, teacher, and keywords, each with a default but those that the step gives."""

    name: str
    takes: Takes
    widths: Literal["same", "any"]
    learned: bool
    relational: bool
    over: Over
    activation: Activation
    least_at_teacher: bool
    __doc__: str | None

    def __call__(self, student: Any, teacher: Any, **options: Any) -> Any:
        """A scalar, smallest when the student equals the teacher."""


LOSSES: Registry[Loss] = Registry("loss")


def loss(
    name: str,
    *,
    takes: Takes = "scores",
    widths: Literal["same", "any"] = "same",
    learned: bool = False,
    relational: bool = False,
    over: Over | None = None,
    activation: Activation | None = None,
    least_at_teacher: bool = True,
) -> Callable[[Callable[..., Any]], Loss]:
    """Decorator that makes a formula a loss of this name.

    The formula then sees arrays of at least 32 bits, computes without autocast, and gets the teacher as a constant.

    Args:
        name: what objectives call it.
        takes: what it compares.
        widths: "same" where channels or hidden sizes must agree, so that an adapter joins those that do not; "any"
            where the formula compares what has no width: relations of samples, or places.
        learned: it compares with what is learned from the teacher's values, such as an embedding, so that gradients
            reach that; the teacher's own values are constants already where it is run.
        relational: it relates the samples of a batch to each other, so that its value follows the size of the batch.
        over: what its mean goes over; positions by default where it takes what a sequence holds, else samples.
        activation: by which several teachers are combined; "identity" by default where it takes values, else "softmax",
            which has nothing to say of one class, and refuses it. The others take (N,) for (N, 1).
        least_at_teacher: no student is charged less than one that equals its teacher; false where the labels, too, say
            where the minimum is.

    Raises:
        UnknownNameError: `takes`, `over` or `activation` is none of these.
        UsageError: the name is taken, or a keyword has no default.
    """
    if takes not in get_args(Takes):
        raise UnknownNameError("kind of values", takes, get_args(Takes))
    if over is not None and over not in get_args(Over):
        raise UnknownNameError("what a mean goes over", over, get_args(Over))
    if activation is not None and activation not in get_args(Activation):
        raise UnknownNameError("activation", activation, get_args(Activation))

    says: Activation = activation or ("identity" if takes == "values" else "softmax")

    def put(formula: Callable[..., Any]) -> Loss:
        for parameter in list(inspect.signature(formula).parameters.values())[2:]:
            if parameter.kind is not parameter.KEYWORD_ONLY or (
                parameter.default is parameter.empty and parameter.name not in GIVEN
            ):
                raise UsageError(
                    f"The loss {name!r} takes {parameter.name!r} without a default, or by its place.",
                    "What an objective states is a keyword with a default.",
                )

        @functools.wraps(formula)
        def charged(student: Any, teacher: Any, **options: Any) -> Any:
            student, teacher = (_checked(wide(side), takes, says) for side in (student, teacher))
            with full_precision(student):
                return formula(student, teacher if learned else constant(teacher), **options)

        done = cast("Loss", charged)
        done.name, done.takes, done.widths, done.learned = name, takes, widths, learned
        done.relational, done.least_at_teacher = relational, least_at_teacher
        done.activation = says
        done.over = over or ("positions" if takes in TOKEN_KINDS else "samples")
        return LOSSES.register(name)(done)

    return put


def _checked(side: Any, takes: Takes, says: Activation) -> Any:
    """The values of one side, those of a single number a sample with an axis for it.

    Raises:
        ShapeError: these are scores without an axis of classes, or of one class for a softmax, or nothing at all.
        DataError: there are no samples.
    """
    if isinstance(side, (dict, list)):
        if not side:
            raise ShapeError("A side gives no arrays.", fix=f"Give at least one: {takes} are compared.")
        if len(first_of(side)) == 0:
            raise DataError("The batch has no samples.", fix="Leave it out.")
        return side
    if side.ndim and len(side) == 0:
        raise DataError("The batch has no samples.", fix="Leave it out.")
    if side.ndim == 1 and takes in SCORED and says != "softmax":
        return side[:, None]
    if takes in ("scores", "values", "pixels") and side.ndim < len("NK"):
        raise ShapeError(
            f"The {takes} have shape {tuple(side.shape)}; (N, K) or (N, L, K) is needed.",
            "Samples would be taken for classes.",
            'Leave the last axis where it is; for a single question use "binary-kd".',
        )
    if takes in ("scores", "pixels") and says == "softmax" and side.shape[1 if takes == "pixels" else -1] == 1:
        fix = 'Use "binary-kd" for a yes or no; for a number Term("fitnet", student="logits").'
        if side.ndim >= len("NKHW"):
            fix = 'Use Term("fitnet", student="logits") for a yes or no or a number at each pixel.'
        raise ShapeError(
            f"The scores have shape {tuple(side.shape)}: they are of one class.",
            "Its softmax is 1 whatever the score, so that there is nothing to learn.",
            fix,
        )
    return side


def loss_of(name: str) -> Loss:
    """The loss of a name.

    Raises:
        UnknownNameError: there is none.
        UsageError: it does not say what it compares.
    """
    found = LOSSES[name]
    if not hasattr(found, "takes"):
        raise UsageError(
            f"The loss {name!r} does not say what it compares.",
            "It is a plain function.",
            f'Decorate it: @kirsch.distillation.losses.loss("{name}", takes="scores").',
        )
    return found


def options_of(charged: Callable[..., Any]) -> dict[str, Any]:
    """The keywords that an objective may state for a loss, with their defaults."""
    found = list(inspect.signature(charged).parameters.values())[2:]
    return {p.name: p.default for p in found if p.name not in GIVEN}


def given_to(charged: Callable[..., Any]) -> frozenset[str]:
    """Which of `GIVEN` a loss asks for."""
    return frozenset(p.name for p in inspect.signature(charged).parameters.values() if p.name in GIVEN)


def check_at_least(least: float, **options: float) -> None:
    """Raise a UsageError for an option that is no finite number of at least this."""
    for name, value in options.items():
        if not (math.isfinite(value) and value >= least):
            raise UsageError(f"`{name}` is {value}; a number of at least {least} is needed.")


def check_above(bound: float, **options: float) -> None:
    """Raise a UsageError for an option that is no finite number above this."""
    for name, value in options.items():
        if not (math.isfinite(value) and value > bound):
            raise UsageError(f"`{name}` is {value}; a number above {bound} is needed.")


def check_whole(least: int, **options: int) -> None:
    """Raise a UsageError for an option that is no whole number of at least this."""
    for name, value in options.items():
        if not isinstance(value, numbers.Integral) or value < least:
            raise UsageError(f"`{name}` is {value}; a whole number of at least {least} is needed.")


def check_convention(convention: str, known: Iterable[str]) -> None:
    """Raise an UnknownNameError if a loss has no convention of this name."""
    if convention not in known:
        raise UnknownNameError("convention", convention, known)
