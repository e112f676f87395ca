"""Registries of objects that users choose by name: importances, losses, exporters, steps, tasks."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from kirsch.errors import RequirementError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class Registry(Generic[T]):
    """Mapping from names to objects. Duplicates are refused; an unknown name raises an error with the known names.

    Other packages register objects through the entry point group `kirsch.<kind>`, with underscores in place of spaces.
    The group is read when a name is not found, so that a broken package affects only those who use it.

    Args:
        kind: kind of the registered objects, in the singular: "importance", "label loss".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._group = f"kirsch.{kind.replace(' ', '_')}"
        self._objects: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under a name."""

        def add(registered: T) -> T:
            if name in self._objects:
                message = f"The {self.kind} {name!r} is registered already."
                raise UsageError(message, fix="Choose another name.")
            self._objects[name] = registered
            return registered

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._objects:
            self._objects[name] = self._load(name)
        return self._objects[name]

    def _load(self, name: str) -> T:
        """Load an object from the entry point of another package."""
        matches = entry_points(group=self._group, name=name)
        if not matches:
            raise UnknownNameError(self.kind, name, self)
        if len(matches) > 1:
            raise UsageError(
                f"The {self.kind} {name!r} is registered by several packages.",
                f"The entry points are {' and '.join(sorted(entry.value for entry in matches))}.",
                "Uninstall one of the packages.",
            )
        (entry,) = matches
        try:
            loaded: T = entry.load()
        except Exception as error:  # the import of another package may raise anything
            raise RequirementError(
                f"The {self.kind} {name!r} cannot be loaded from {entry.value}.",
                f"{type(error).__name__}: {error}.",
                "Repair or uninstall the package that provides it.",
            ) from error
        return loaded

    def __iter__(self) -> Iterator[str]:
        names = set(self._objects) | {entry.name for entry in entry_points(group=self._group)}
        return iter(sorted(names))

    def __contains__(self, name: object) -> bool:
        return name in set(self)
