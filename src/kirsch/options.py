"""Base class of options: the one definition that the Python call, the recipe and the command line share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kirsch.annotations import public_name, value_phrase
from kirsch.arguments import check_arguments
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo


class FieldsError(ValueError):
    """Error that a pydantic validator raises for problems inside the value of one field.

    Args:
        problems: pairs of the path of a problem in the value, such as ("terms", 2), and its error.
    """

    def __init__(self, problems: Sequence[tuple[tuple[str | int, ...], UsageError]]) -> None:
        super().__init__("; ".join(str(error) for _, error in problems))
        self.problems = list(problems)


class Options(BaseModel):
    """Options of a technique, immutable, with a type, default and description for each.

    A field is declared once, as `epochs: Count = Field(10, description="passes over the data")`. Calling the class with
    a wrong value raises a `UsageError` that names the argument. Recipes read the same class from YAML, `kirsch init`
    writes its descriptions, and the command line makes flags of its fields.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    def __init__(self, /, **values: Any) -> None:
        kind = type(self)
        values = check_arguments(kind, values, {name: _hint(field) for name, field in kind.model_fields.items()})
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _usage_error(kind, error) from None

    def __new__(cls, *positional: Any, **_values: Any) -> Self:
        """Refuse positional arguments before `__init__` does, with an error that names the class."""
        if positional:
            raise UsageError(
                f"{public_name(cls)} takes its options by keyword; found {value_phrase(positional[0])} without one.",
                fix=f"Write {public_name(cls)}({next(iter(cls.model_fields))}=...), or the name of another option.",
            )
        return super().__new__(cls)

    # pydantic must not call this `__init__` while a recipe is read: pydantic collects all problems, and `__init__`
    # raises only the first.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return repr(self)

    def check(self) -> None:
        """Check what the types of the fields cannot express.

        Raises:
            UsageError: fields do not fit together.
        """

    @model_validator(mode="after")
    def _run_check(self) -> Self:
        try:
            self.check()
        except UsageError as error:
            raise FieldsError([((), error)]) from error  # pydantic collects errors of this type
        return self

    def changed(self, **changes: Any) -> Self:
        """Return the options with some values replaced.

        Raises:
            UsageError: a value does not fit.
        """
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


def _hint(field: FieldInfo) -> Any:
    """Return the annotation of a field as it was written; pydantic has resolved its names."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _usage_error(kind: type[Options], error: ValidationError) -> UsageError:
    """Return the error of a call from the first problem that pydantic found."""
    details = error.errors()[0]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, FieldsError):
        return cause.problems[0][1]
    path = ".".join(map(str, details["loc"]))
    return UsageError(
        f"`{path}` of {public_name(kind)}: {details['msg']}, found {details['input']!r}.",
        fix=f"Give another value of `{path}`.",
    )
