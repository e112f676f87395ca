"""Names for things that users choose by name: importances, losses, exporters, runtimes, tasks."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from kirsch.errors import SurroundingsError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class Registry(Generic[T]):
    """Name → thing. A name is taken once; an unknown name is answered with the known ones and the nearest.

    Other packages add theirs through the entry point group `kirsch.<kind>`; it is read at the first unknown name, so
    that a broken package costs nothing to those who do not use it.

    Args:
        kind: what the names name, in the singular: "importance".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that gives the thing below it a name."""

        def put(thing: T) -> T:
            if name in self._things:
                message = f"The {self.kind} {name!r} is registered already."
                raise UsageError(message, fix="Choose another name.")
            self._things[name] = thing
            return thing

        return put

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            self._things[name] = self._load(name)
        return self._things[name]

    def _load(self, name: str) -> T:
        """What another package calls by this name."""
        found = entry_points(group=f"kirsch.{self.kind}", name=name)
        if not found:
            raise UnknownNameError(self.kind, name, self)
        if len(found) > 1:
            raise UsageError(
                f"The {self.kind} {name!r} is there more than once.",
                f"It comes from {' and '.join(sorted(entry.value for entry in found))}.",
                "Uninstall one of the packages.",
            )
        (entry,) = found
        try:
            thing: T = entry.load()
        except Exception as error:  # a foreign module is run, which may raise anything
            raise SurroundingsError(
                f"The {self.kind} {name!r} cannot be loaded from {entry.value}.",
                f"{type(error).__name__}: {error}.",
                "Repair or uninstall the package that brings it.",
            ) from error
        return thing

    def __iter__(self) -> Iterator[str]:
        known = set(self._things) | {entry.name for entry in entry_points(group=f"kirsch.{self.kind}")}
        return iter(sorted(known))

    def __contains__(self, name: object) -> bool:
        return name in set(self)
