"""Base class of options: the one definition that the Python call, the recipe and the command line share."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kirsch.annotations import public_name, type_phrase, value_phrase
from kirsch.arguments import MismatchError, check_arguments, convert
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic.fields import FieldInfo

T = TypeVar("T")


class FieldsError(ValueError):
    """Error that a pydantic validator raises for problems inside the value of one field.

    Args:
        problems: pairs of the path of a problem in the value, such as ("terms", 2), and its error.
    """

    def __init__(self, problems: Sequence[tuple[tuple[str | int, ...], UsageError]]) -> None:
        super().__init__("; ".join(str(error) for _, error in problems))
        self.problems = list(problems)


def with_fields(make: Callable[[dict[str, Any]], T], fields: dict[str, Any]) -> T:
    """Return `make(fields)`.

    Raises:
        FieldsError: `make` raises a `UsageError`. Its path names the only field without which there is no error, or
            without which there is another error.
    """

    def message(values: dict[str, Any]) -> str:
        try:
            make(values)
        except UsageError as error:
            return str(error)
        return ""

    try:
        return make(fields)
    except UsageError as error:
        without = {name: message({key: fields[key] for key in fields if key != name}) for name in fields}
        causes = [name for name, text in without.items() if not text]
        causes = causes or [name for name, text in without.items() if text != str(error)]
        raise FieldsError([(tuple(causes) if len(causes) == 1 else (), error)]) from error


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

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Apply the checks of the constructor to the values of a recipe; pydantic would convert "yes" to True."""
        name = str(info.field_name)
        hint = _hint(cls.model_fields[name])
        if isinstance(value, dict) and _is_section(hint):
            return value
        try:
            return convert(value, hint)
        except MismatchError as error:
            expected = error.expected if error.path or error.close else _yaml_phrase(hint)
            what = f"Expected {expected}, found {value_phrase(error.value)}."
            raise FieldsError([(error.path, UsageError(what, fix="" if _is_section(hint) else error.fix))]) from error

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
    """Return the annotation of a field together with its constraints, which pydantic stores separately."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _is_section(hint: Any) -> bool:
    """Return whether pydantic reads a dict as a value of this annotation: as options, or by a function."""
    is_options = inspect.isclass(hint) and issubclass(hint, Options)
    return isinstance(hint, BeforeValidator) or is_options or any(map(_is_section, get_args(hint)))


def _yaml_phrase(hint: Any) -> str:
    """Return a noun phrase for the values of a field in a recipe."""
    if _is_section(hint):
        return "a list of steps" if get_origin(hint) is tuple else "a section with its keys"
    return type_phrase(hint)


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
