"""Construction of adapters, by name or by the shapes of the captured values."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from kirsch import figures
from kirsch.errors import ShapeError
from kirsch.frameworks.adapters.options import ADAPTER_OPTIONS, check_known, complete_options
from kirsch.frameworks.adapters.shapes import Shape, choose_adapter

# These modules register adapters.
from kirsch.frameworks.pytorch.features.adapters import kept, maps, memory, review, tokens, vectors  # noqa: F401
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

COMMON_OPTIONS = ("widths", "takes", "dtype")
"""Options of `build` that are not passed to the adapter."""


def build(
    name: str, student: Shape | Sequence[Shape], teacher: Shape | Sequence[Shape], *, options: Mapping[str, Any]
) -> nn.Module | None:
    """Build an adapter for values of these shapes, initialized by PyTorch's generator on the default device.

    Args:
        name: a name in `ADAPTERS`, or "auto" to choose by the shapes.
        student, teacher: shape of one captured value, or a list with one shape for each stage.
        options: options of the adapter, and
            "widths": `widths` of the loss, "same" or "any"; with "any", "auto" adds no adapter if only widths differ.
            "takes": `takes` of the loss; with "features" and widths "any", "auto" adds no adapter for maps and tokens.
            "dtype": dtype of the captured value. The parameters are float64 for float64 values, else float32.

    Returns:
        A module with `forward(student, teacher, *, ids=None)`, see `Adapter`; None if "auto" finds that no adapter is
        needed.

    Raises:
        UnknownNameError: there is no adapter of this name.
        UsageError: the adapter does not have a given option.
        ShapeError: the adapter does not support these shapes, or no adapter does.
    """
    adapter_options = {key: value for key, value in options.items() if key not in COMMON_OPTIONS}
    is_list = _is_list(student)
    if is_list != _is_list(teacher) or (is_list and len(student) != len(teacher)):
        raise ShapeError(
            f"The student has {_describe(student)}, the teacher has {_describe(teacher)}.",
            "An adapter needs one value of each model, or the same number of stages.",
            "Choose the same number of layers in both.",
        )
    if name != "auto" and _takes_stages(name):
        if not is_list:
            raise ShapeError(f"The adapter {name!r} needs a list of stages; there is only one value.")
        built: nn.Module | None = _create(name, student, teacher, adapter_options)
    elif is_list:
        pairs = zip(cast("Sequence[Shape]", student), cast("Sequence[Shape]", teacher), strict=True)
        built = _combine_stages(
            [_build_one(name, shape_s, shape_t, options, adapter_options) for shape_s, shape_t in pairs]
        )
    else:
        built = _build_one(name, cast("Shape", student), cast("Shape", teacher), options, adapter_options)
    if built is not None and options.get("dtype") is torch.float64:
        built = built.double()
    return built


def build_adapter(name: str, student: Any, teacher: Any, options: dict[str, Any]) -> nn.Module | None:
    """Build an adapter between two features, or two lists of features, on the device of the student's features.

    Returns:
        The adapter; None if "auto" finds that no adapter is needed.
    """
    first = student[0] if isinstance(student, list) else student
    shapes = [[part.shape for part in side] if isinstance(side, list) else side.shape for side in (student, teacher)]
    adapter = build(name, *shapes, options={"dtype": first.dtype, **options})
    return None if adapter is None else adapter.to(first.device)


def _takes_stages(name: str) -> bool:
    """Return whether an adapter takes lists of stages."""
    return bool(getattr(ADAPTER_OPTIONS[name] if name in ADAPTER_OPTIONS else ADAPTERS[name], "stages", False))


def _is_list(shapes: Any) -> bool:
    """Return whether this is a list of shapes, not one shape."""
    return bool(shapes) and not isinstance(shapes[0], int)


def _describe(shapes: Any) -> str:
    return figures.counted(len(shapes), "stage") if _is_list(shapes) else "one value"


def _build_one(
    name: str, student: Shape, teacher: Shape, options: Mapping[str, Any], adapter_options: dict[str, Any]
) -> nn.Module | None:
    if name == "auto":
        chosen = choose_adapter(student, teacher, widths=options.get("widths", "same"), takes=options.get("takes"))
        if chosen is None:
            return None
        name = chosen
    return _create(name, student, teacher, adapter_options)


def _create(name: str, student: Any, teacher: Any, options: dict[str, Any]) -> nn.Module:
    factory = ADAPTERS[name]
    if name in ADAPTER_OPTIONS:
        return factory(student, teacher, **complete_options(name, options))
    parameters = list(inspect.signature(factory).parameters.values())[2:]  # an adapter that exists only for PyTorch
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        check_known(name, options, [parameter.name for parameter in parameters])
    return factory(student, teacher, **options)


def _combine_stages(parts: list[nn.Module | None]) -> nn.Module | None:
    return Stages(parts) if any(part is not None for part in parts) else None


class Stages(Adapter):
    """One adapter for each stage.

    Args:
        parts: adapters by stage, None for a stage that needs none.
    """

    def __init__(self, parts: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.stage_numbers = [number for number, part in enumerate(parts) if part is not None]
        self.parts = nn.ModuleList(part for part in parts if part is not None)

    def forward(self, student: Sequence[Any], teacher: Sequence[Any], *, ids: Any = None) -> tuple[Any, Any]:
        """Return lists of both values, the first stage first."""
        students, teachers = list(student), list(teacher)
        for stage, part in zip(self.stage_numbers, self.parts, strict=True):
            students[stage], teachers[stage] = part(students[stage], teachers[stage], ids=ids)
        return students, teachers

    def extra_loss(self) -> Tensor | None:
        """Return the sum over stages, or None if no stage has a loss of its own."""
        extra_losses = [part.extra_loss() for part in self.parts if isinstance(part, Adapter)]
        losses = [loss for loss in extra_losses if loss is not None]
        return torch.stack(losses).sum() if losses else None
