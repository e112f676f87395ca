"""Sources of data sets, which recipes load by name or by reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kirsch.data.dataset import DataSet
from kirsch.errors import DataError, KirschError, UsageError
from kirsch.failures import error_with_location
from kirsch.references import FAILURES, preserved_process_state, resolve
from kirsch.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

Source = Callable[..., DataSet]
"""Function that returns a data set, and takes the options of the recipe as keyword arguments.

If it has a parameter `seed` or takes any keyword, it also gets the recipe's seed as `seed`. Its randomness should
depend on the seed alone.
"""

SOURCES: Registry[Source] = Registry("data")


def load_data(source: str, options: dict[str, Any], *, seed: int, base: Path | None = None) -> DataSet:
    """Return the data set of a recipe.

    Args:
        source: registered name, or "file.py:callable" or "package.module:callable" of a `Source`.
        options: keyword arguments of the source.
        seed: seed of the recipe, passed as `seed` if the source has a parameter `seed` or takes any keyword.
        base: folder that files are relative to.

    Raises:
        UsageError: the source does not take these options, or a required option is missing.
        DataError: the source fails, or does not return a `DataSet`.
    """
    load: Source = resolve(source, base=base) if ":" in source else SOURCES[source]
    parameters = _signature(load).parameters
    seeded = "seed" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if seeded and "seed" in options:
        raise UsageError(
            f"data.options contains `seed`, which {source!r} receives from the recipe.",
            fix="Remove it, and set the seed of the recipe.",
        )
    arguments = {**options, "seed": seed} if seeded else options
    missing = _missing_options(parameters, arguments)
    if missing:
        names = " and ".join(map(repr, missing))
        raise UsageError(
            f"The data source {source!r} needs the option{'s' * (len(missing) > 1)} {names}.",
            fix=f"Add {'them' if len(missing) > 1 else 'it'} to data.options.",
        )
    try:
        _signature(load).bind(**arguments)
    except TypeError as error:
        takes = [name for name in parameters if name != "seed"]
        raise UsageError(
            f"The data source {source!r} does not take these options.",
            f"{error}.",
            f"Use only {', '.join(takes)} in data.options."
            if takes
            else "Remove data.options: the data source takes no options.",
        ) from error
    try:
        with preserved_process_state():
            data = load(**arguments)
    except KirschError:
        raise
    except FAILURES as error:
        raise DataError(
            f"The data source {source!r} failed.", error_with_location(error), "Fix the source, or change data.options."
        ) from error
    if not isinstance(data, DataSet):
        raise DataError(
            f"The data source {source} returns a {type(data).__name__}; expected a kirsch.DataSet.",
            fix="Return kirsch.DataSet(name, train=kirsch.Split(inputs, labels), ...).",
        )
    return data


def _missing_options(parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> list[str]:
    """Return the required parameters without a value; empty if there are unknown arguments, which may be misspelled."""
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any and arguments.keys() - parameters.keys():
        return []
    by_keyword = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in by_keyword if p.default is p.empty and p.name not in arguments]


def _signature(load: Source) -> inspect.Signature:
    """Return the parameters of a source; **options if Python cannot determine them."""
    try:
        return inspect.signature(load)
    except ValueError:
        return inspect.signature(lambda **options: options)
