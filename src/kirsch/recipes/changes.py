"""Changes of a recipe by `--set` and by environment variables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kirsch.errors import RecipeError, nearest
from kirsch.jobs.step import keys_of
from kirsch.recipes.yaml import scalar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENVIRONMENT = "KIRSCH_RECIPE__"
"""Prefix of environment variables that change a recipe, such as KIRSCH_RECIPE__PRUNE__GOAL__MACS=0.4."""


@dataclass(frozen=True)
class Change:
    """Change of one value of a recipe.

    Args:
        key: section or key of a step, followed by the keys of the value: ("prune-2", "goal", "macs").
        value: the new value.
        origin: origin of the change in error messages, such as "--set seed=3".
    """

    key: tuple[str, ...]
    value: Any
    origin: str

    def is_of_step(self, items: Sequence[Any], name: str) -> bool:
        """Return whether the value belongs to a step of this name; arguments: see `path`."""
        names = [str(next(iter(item), "")) if isinstance(item, dict) else "" for item in items]
        keys = [key for key, step in zip(keys_of(names), names, strict=True) if step == name]
        return _plain(self.key[0]) in map(_plain, keys)

    def path(self, items: Any, sections: Sequence[str]) -> list[str]:
        """Return the path of the value in the data of a recipe; the key of a step becomes ["steps", number, name].

        Args:
            items: the steps of the recipe, as read from YAML.
            sections: names of the other sections.

        Raises:
            RecipeError: there is no such section and no such step.
        """
        first, *rest = self.key
        if first in sections:
            return list(self.key)
        names = [str(next(iter(item), "")) if isinstance(item, dict) else "" for item in _list(items)]
        keys = keys_of(names)
        # The name of an environment variable cannot contain a hyphen: PRUNE_2 is the step "prune-2".
        number = next((number for number, key in enumerate(keys) if _plain(key) == _plain(first)), None)
        if number is None:
            known = list(filter(None, keys))
            raise RecipeError(
                f"{self.origin}: {first!r} is not a section or a step of the recipe.",
                f"Its steps: {', '.join(known) or 'none'}. Its sections: {', '.join(sections)}.",
                nearest(first, [*known, *sections]) or "Change one of these.",
            )
        return ["steps", str(number), names[number], *rest]

    def put(self, data: Any, path: Sequence[str]) -> None:
        """Write the value to its path in the data of a recipe; missing sections are added.

        Raises:
            RecipeError: a part of the path is a value or a missing item of a list.
        """
        section: Any = data
        place: Any = path[0]
        for depth in range(1, len(path)):
            inner = section[place] if isinstance(section, list) else section.get(place)
            key = ".".join(self.key[: len(self.key) - len(path) + depth])
            if inner is None and path[depth].isdecimal():
                raise RecipeError(
                    f"{self.origin}: {key} is not in the recipe, so it has no item {path[depth]!r}.",
                    fix=f"Set the whole list: {key}=[...].",
                )
            if inner is None:
                inner = section[place] = {}
            if not isinstance(inner, (dict, list)):
                raise RecipeError(
                    f"{self.origin}: {key} is {inner!r}, which has no keys.",
                    fix=f"Set the whole value: {key}={{{path[depth]}: ...}} if it may be a dict.",
                )
            section, place = inner, path[depth]
            if isinstance(inner, list):
                place = self._index(inner, path[depth], key)
        section[place] = self.value

    def _index(self, items: list[Any], name: str, key: str) -> int:
        """Return the index of an item of a list from its name in the key of a change."""
        if not (name.isdecimal() and int(name) < len(items)):
            raise RecipeError(
                f"{self.origin}: {key} is a list of {len(items)}, and has no item {name!r}.",
                "Items are numbered from 0.",
                f"Set an item that exists, or the whole list: {key}=[...].",
            )
        return int(name)


def changes_of(overrides: Sequence[str], environment: Mapping[str, str]) -> list[Change]:
    """Return the changes of environment variables, and then those of `a.b=value` overrides.

    Raises:
        RecipeError: an override has another form, or a value is not valid YAML.
    """
    texts = [
        (name.removeprefix(ENVIRONMENT).lower().replace("__", "."), value, name)
        for name, value in sorted(environment.items())
        if name.startswith(ENVIRONMENT)
    ]
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w[\w-]*(\.\w+)*", key):
            raise RecipeError(
                f"--set {text!r} is not a change of a key.",
                "Expected the form a.b=value.",
                "For example, write --set prune.goal.macs=0.4.",
            )
        texts.append((key, value, f"--set {text}"))
    return [Change(tuple(key.split(".")), scalar(value, origin), origin) for key, value, origin in texts]


def _list(items: Any) -> list[Any]:
    """Return the list itself; an empty list for a value of another type, which is reported when the recipe is read."""
    return items if isinstance(items, list) else []


def _plain(key: str) -> str:
    return key.replace("-", "_")
