"""The adapter that joins what was captured, by name or by the shapes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from kirsch.errors import ShapeError, UsageError, listing, nearest

# The files that register adapters.
from kirsch.frameworks.pytorch.features.adapters import kept, maps, memory, review, tokens, vectors  # noqa: F401
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, Shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

OF_ALL = ("widths", "takes", "dtype")
"""Options that every call may give, and no adapter sees."""

MAP, TOKENS, VECTOR = len("NCHW"), len("NLD"), len("ND")


def build(
    name: str, student: Shape | Sequence[Shape], teacher: Shape | Sequence[Shape], *, options: Mapping[str, Any]
) -> nn.Module | None:
    """An adapter for values of these shapes, drawn from PyTorch's generator on its default device.

    Args:
        name: one of `ADAPTERS`, or "auto" for what joins the shapes, None where nothing has to be joined.
        student, teacher: shape of one captured value, or a list with one for each stage.
        options: of the adapter, and
            "widths": as the loss says it, "same" or "any"; "auto" joins no widths for "any".
            "takes": as the loss says it; "auto" lets maps face tokens where a loss of "features" takes any widths.
            "dtype": of the captured value. Parameters are float64 where that is, and float32 otherwise.

    Returns:
        A module with `forward(student, teacher, *, ids=None)`, see `Adapter`.

    Raises:
        UnknownNameError: there is no such adapter.
        UsageError: it has no such option.
        ShapeError: it cannot join these shapes, or no adapter can.
    """
    own_options = {key: value for key, value in options.items() if key not in OF_ALL}
    listed = _is_list(student)
    if listed != _is_list(teacher) or (listed and len(student) != len(teacher)):
        raise ShapeError(
            f"The student gives {_counted(student)}, the teacher {_counted(teacher)}.",
            "An adapter joins one with one.",
            "Name as many layers of both.",
        )
    if name != "auto" and getattr(ADAPTERS[name], "stages", False):
        if not listed:
            raise ShapeError(f"The adapter {name!r} joins a list of stages, and was given one value.")
        built: nn.Module | None = _made(name, student, teacher, own_options)
    elif listed:
        pairs = zip(cast("Sequence[Shape]", student), cast("Sequence[Shape]", teacher), strict=True)
        built = _of_stages([_one(name, own, its, options, own_options) for own, its in pairs])
    else:
        built = _one(name, cast("Shape", student), cast("Shape", teacher), options, own_options)
    if built is not None and options.get("dtype") is torch.float64:
        built = built.double()
    return built


def _is_list(shapes: Any) -> bool:
    """Whether these are the shapes of stages, and no shape."""
    return bool(shapes) and not isinstance(shapes[0], int)


def _counted(shapes: Any) -> str:
    return f"{len(shapes)} stages" if _is_list(shapes) else "one value"


def _one(
    name: str, student: Shape, teacher: Shape, options: Mapping[str, Any], own_options: dict[str, Any]
) -> nn.Module | None:
    if name == "auto":
        found = joining(student, teacher, widths=options.get("widths", "same"), takes=options.get("takes"))
        if found is None:
            return None
        name = found
    return _made(name, student, teacher, own_options)


def _made(name: str, student: Any, teacher: Any, options: dict[str, Any]) -> nn.Module:
    make = ADAPTERS[name]
    taken = list(inspect.signature(make).parameters.values())[2:]
    known = [parameter.name for parameter in taken]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        for option in options:
            if option not in known:
                raise UsageError(
                    f"The adapter {name!r} has no option {option!r}.", listing(sorted(known)), nearest(option, known)
                )
    return make(student, teacher, **options)


def joining(student: Shape, teacher: Shape, *, widths: str = "same", takes: str | None = None) -> str | None:
    """The adapter by which two shapes are joined; None if they need none.

    Args:
        student, teacher: with the batch first, which is not looked at.
        widths: "any" where the loss compares what has no width.
        takes: what the loss compares, if that is known.

    Raises:
        ShapeError: no adapter joins them.
    """
    own, its = tuple(student[1:]), tuple(teacher[1:])
    kinds = len(student), len(teacher)
    if own == its or (widths == "any" and (kinds[0] == kinds[1] or takes == "features")):
        return None
    if takes == "attention":
        raise ShapeError(
            f"The student's attention has {own[0]} heads, the teacher's {its[0]}."
            if kinds == (MAP, MAP) and own[1:] == its[1:]
            else f"The student's attention has shape {tuple(student)}, the teacher's {tuple(teacher)}.",
            "A mixture of heads is no attention.",
            'Build the student with as many, or compare how positions relate: the loss "minilm".',
        )
    if kinds == (MAP, MAP):
        return "conv"
    if kinds[0] == kinds[1] and kinds[0] >= VECTOR and own[:-1] == its[:-1]:
        return "linear"
    if kinds == (TOKENS, MAP) and own[0] - its[1] * its[2] in (0, 1):
        return "tokens-to-map"
    if kinds == (MAP, TOKENS) and its[0] - own[1] * own[2] in (0, 1):
        return "map-to-tokens"
    raise ShapeError(
        f"No adapter joins the student's value of shape {tuple(student)} and the teacher's of shape {tuple(teacher)}.",
        _why(own, its, kinds),
        "Choose other layers, or name an adapter.",
    )


def _why(own: tuple[int, ...], its: tuple[int, ...], kinds: tuple[int, int]) -> str:
    if set(kinds) == {MAP, TOKENS}:
        lengths, places = (own[0], its[1:]) if kinds[0] == TOKENS else (its[0], own[1:])
        return (
            f"A map of {places[0]} × {places[1]} has {places[0] * places[1]} places, and there are {lengths} tokens, "
            "of which one may be a class token."
        )
    if kinds == (TOKENS, TOKENS):
        return f"The student has {own[0]} tokens, the teacher {its[0]}."
    return "They are of different kinds."


def _of_stages(parts: list[nn.Module | None]) -> nn.Module | None:
    return Stages(parts) if any(part is not None for part in parts) else None


class Stages(Adapter):
    """One adapter for each stage.

    Args:
        parts: None where a stage needs none.
    """

    def __init__(self, parts: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.places = [number for number, part in enumerate(parts) if part is not None]
        self.parts = nn.ModuleList(part for part in parts if part is not None)

    def forward(self, student: Sequence[Any], teacher: Sequence[Any], *, ids: Any = None) -> tuple[Any, Any]:
        """Lists of both, the first stage first."""
        own, its = list(student), list(teacher)
        for place, part in zip(self.places, self.parts, strict=True):
            own[place], its[place] = part(own[place], its[place], ids=ids)
        return own, its

    def extra_loss(self) -> Tensor | None:
        """The sum over stages; None if no stage has one."""
        found = [part.extra_loss() for part in self.parts if isinstance(part, Adapter)]
        charged = [loss for loss in found if loss is not None]
        return torch.stack(charged).sum() if charged else None
