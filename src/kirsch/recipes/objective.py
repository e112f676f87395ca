"""What a student learns, as a recipe says it: a preset by its name, or terms with their weights.

The losses are loaded only where a recipe states an objective: they take longer than all the rest of its reading.
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

Places = str | list[str] | dict[str, str]
"""A layer, several for losses of stages or relations, or one by name for those of sets."""


class Stated(Section):
    """A section that is written as it was stated: what is left out has the default of what it stands in."""

    @model_serializer(mode="wrap")
    def _stated(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class RampOf(Stated):
    """A number that goes in a line from start to end over some epochs."""

    start: AtLeastZero = Field(description="where it begins")
    end: AtLeastZero = Field(description="where it stays")
    epochs: Positive = Field(description="over how many epochs")
    after: AtLeastZero | None = Field(None, description="epochs before it begins to move")


Weight = AtLeastZero | RampOf | None


class TermOf(Stated):
    """One distillation loss. Its keys are the fields of `Term`."""

    loss: str | None = Field(None, description="its name; kd")
    weight: Weight = Field(None, description="how much it counts; 0.9")
    temperature: Positive | RampOf | None = Field(None, description="of the loss; its own")
    student: Places | None = Field(None, description="where in the student; logits")
    teacher: Places | None = Field(None, description="where in the teacher; the same")
    adapter: str | None = Field(None, description="what joins shapes that differ; auto")
    options: dict[str, Any] | None = Field(None, description="of the loss")
    adapter_options: dict[str, Any] | None = Field(None, description="of the adapter")
    name: str | None = Field(None, description="in records; that of the loss")
    of: int | None = Field(None, description="which of several teachers; a recipe has one, 0")

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, name: str | None) -> str | None:
        from kirsch.distillation.losses import LOSSES  # noqa: PLC0415 - see the head of this file

        return _known(LOSSES, name)

    @validated(mode="after")
    def _possible(self) -> Self:
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see the head of this file

        _made(lambda: Objective.from_dict({"terms": [self.model_dump()]}))
        return self


class Learning(Stated):
    """A preset, perhaps with other numbers; or terms. Its keys are the fields of `Objective`."""

    preset: str | None = Field(None, description="a published objective by its name")
    terms: tuple[TermOf, ...] | None = Field(None, description="losses against the teacher")
    label_weight: Weight = Field(None, description="of the loss on labels")
    label_smoothing: Annotated[float, Field(ge=0, lt=1, strict=True)] | None = Field(None, description="of the labels")
    label_loss: str | None = Field(None, description="on labels; cross-entropy")
    causal: bool | None = Field(None, description="each position predicts the next one")
    ignore: int | None = Field(None, description="the label that stands for none; -100")
    balance: Literal["fixed", "gradient"] | None = Field(None, description="gradient: weights scale the gradients")
    teachers: str | None = Field(None, description="how several are combined; probabilities")
    student_outputs: str | None = Field(None, description="logits or probabilities")
    teacher_outputs: str | list[str | None] | None = Field(None, description="the same; or a list, one for each")

    @validated(mode="wrap")
    @classmethod
    def _by_name(cls, given: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        return build({"preset": given} if isinstance(given, str) else given)

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str | None) -> str | None:
        from kirsch.distillation.presets import PRESETS  # noqa: PLC0415 - see the head of this file

        return _known(PRESETS, name)

    @validated(mode="after")
    def _possible(self) -> Self:
        if (self.preset is None) == (self.terms is None):
            both = (
                "a preset and terms are stated" if self.preset is not None else "neither a preset nor terms are stated"
            )
            raise ValueError(f"{both}; give one of them, such as dkd or {{terms: [{{loss: kd, weight: 0.9}}]}}")
        _made(self.objective)
        return self

    def objective(self) -> Objective:
        """As training takes it."""
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see the head of this file

        stated: dict[str, Any] = self.model_dump()
        preset = stated.pop("preset", None)
        if preset is None:
            return Objective.from_dict(stated)
        numbers = Objective.from_dict({"label_weight": 1.0, **stated})  # a ramp becomes what objectives know
        return Objective.preset(preset, **{name: getattr(numbers, name) for name in stated})


def _known(registry: Registry[Any], name: str | None) -> str | None:
    """The name, if there is such a thing."""
    if name is not None:
        _made(lambda: registry[name])
    return name


def _made(build: Callable[[], Any]) -> None:
    """Build something, so that pydantic hears of what is wrong with it, in the place where it stands."""
    try:
        build()
    except UsageError as error:
        raise ValueError(error) from error
