"""Objective section of a recipe: the name of a preset, or terms with their weights.

The losses are imported only if a recipe has an objective: their import takes longer than reading the recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic import model_validator as validated

from kirsch.errors import UsageError
from kirsch.recipes.section import AtLeastZero, Positive, Section

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.distillation.objective import Objective
    from kirsch.registry import Registry

Layers = str | list[str] | dict[str, str]
"""A layer, a list of layers for losses of stages or relations, or a dict of layers for losses of sets."""


class SparseSection(Section):
    """Section that is written without its unset keys, whose defaults depend on the other keys."""

    @model_serializer(mode="wrap")
    def _without_unset_keys(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class RampSection(SparseSection):
    """Number that changes linearly over some epochs. Its keys are the fields of `Ramp`."""

    start: AtLeastZero = Field(description="first value")
    end: AtLeastZero = Field(description="last value")
    epochs: Positive = Field(description="epochs from the first to the last value")
    after: AtLeastZero | None = Field(None, description="epochs at the first value before the change")


Weight = AtLeastZero | RampSection | None


class TermSection(SparseSection):
    """Term of an objective: one distillation loss. Its keys are the fields of `Term`."""

    loss: str | None = Field(None, description="name of the loss; kd")
    weight: Weight = Field(None, description="weight of the loss; 0.9")
    temperature: Positive | RampSection | None = Field(None, description="temperature of the loss; its default")
    student_layer: Layers | None = Field(None, description="layer of the student; logits")
    teacher_layer: Layers | None = Field(None, description="layer of the teacher; the student's")
    adapter: str | None = Field(None, description="adapter between shapes that differ; auto")
    options: dict[str, Any] | None = Field(None, description="options of the loss")
    adapter_options: dict[str, Any] | None = Field(None, description="options of the adapter")
    name: str | None = Field(None, description="name in records; that of the loss")
    teacher: int | None = Field(None, description="index of the teacher; a recipe has one, 0")

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, name: str | None) -> str | None:
        from kirsch.distillation.losses import LOSSES  # noqa: PLC0415 - see the head of this file

        return _check_known(LOSSES, name)

    @validated(mode="after")
    def _check_term(self) -> Self:
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see the head of this file

        _check_builds(lambda: Objective.from_dict({"terms": [self.model_dump()]}))
        return self


class ObjectiveSection(SparseSection):
    """Objective: a preset, optionally with changed numbers, or terms. Its keys are the fields of `Objective`."""

    preset: str | None = Field(None, description="name of a published objective")
    terms: tuple[TermSection, ...] | None = Field(None, description="losses that compare student and teacher")
    label_weight: Weight = Field(None, description="weight of the loss on labels")
    label_smoothing: Annotated[float, Field(ge=0, lt=1, strict=True)] | None = Field(
        None, description="smoothing of the labels"
    )
    label_loss: str | None = Field(None, description="loss on labels; cross-entropy")
    causal: bool | None = Field(None, description="each position predicts the next token")
    ignore_index: int | None = Field(None, description="label of positions without a target; -100")
    balance: Literal["fixed", "gradient"] | None = Field(None, description="gradient: weights scale the gradients")
    teachers: str | None = Field(None, description="how several teachers are combined; probabilities")
    student_outputs: str | None = Field(None, description="logits or probabilities")
    teacher_outputs: str | list[str | None] | None = Field(
        None, description="logits or probabilities; or a list with one entry per teacher"
    )

    @validated(mode="wrap")
    @classmethod
    def _from_name(cls, value: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        return build({"preset": value} if isinstance(value, str) else value)

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str | None) -> str | None:
        from kirsch.distillation.presets import PRESETS  # noqa: PLC0415 - see the head of this file

        return _check_known(PRESETS, name)

    @validated(mode="after")
    def _check_objective(self) -> Self:
        if (self.preset is None) == (self.terms is None):
            problem = "preset and terms are both given" if self.preset is not None else "neither preset nor terms"
            raise ValueError(f"{problem}; give one of them, such as dkd or {{terms: [{{loss: kd, weight: 0.9}}]}}")
        _check_builds(self.objective)
        return self

    def objective(self) -> Objective:
        """Return the `Objective` of this section."""
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see the head of this file

        fields: dict[str, Any] = self.model_dump()
        preset = fields.pop("preset", None)
        if preset is None:
            return Objective.from_dict(fields)
        parsed = Objective.from_dict({"label_weight": 1.0, **fields})  # turns the dict of a ramp into a `Ramp`
        return Objective.preset(preset, **{name: getattr(parsed, name) for name in fields})


def _check_known(registry: Registry[Any], name: str | None) -> str | None:
    if name is not None:
        _check_builds(lambda: registry[name])
    return name


def _check_builds(build: Callable[[], Any]) -> None:
    """Turn a usage error into a ValueError, which pydantic reports together with the key."""
    try:
        build()
    except UsageError as error:
        raise ValueError(error) from error
