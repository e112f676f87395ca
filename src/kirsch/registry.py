"""Names for things that users choose by name: importances, losses, exporters, runtimes, tasks."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from kirsch.errors import UnknownNameError, UsageError

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
                raise UsageError(message, mend="Choose another name.")
            self._things[name] = thing
            return thing

        return put

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            for entry in entry_points(group=f"kirsch.{self.kind}"):
                if entry.name == name:
                    self._things[name] = entry.load()
        if name not in self._things:
            raise UnknownNameError(self.kind, name, self)
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        known = set(self._things) | {entry.name for entry in entry_points(group=f"kirsch.{self.kind}")}
        return iter(sorted(known))

    def __contains__(self, name: object) -> bool:
        return name in set(self)
