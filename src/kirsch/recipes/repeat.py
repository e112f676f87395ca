"""The item `repeat` in the steps of a recipe, which stands for the same steps several times."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from kirsch.annotations import value_phrase
from kirsch.errors import UsageError
from kirsch.options import FieldsError
from kirsch.pruning.repeat import Rounds, check_round

REPEAT = "repeat"

Problem = tuple[tuple[int | str, ...], Any]
"""Path of a problem in a recipe, and its details as pydantic states them."""


class Repeat(Rounds):
    """The item `repeat`: steps that are repeated, and their goal."""

    steps: list[Any] = Field(description="steps of one round, with one step prune that has no goal")

    def check(self) -> None:
        """Check that each round has one step prune without a goal, and no other repetition."""
        prunings = [step["prune"] for step in items_of(self.steps) if isinstance(step, dict) and "prune" in step]
        try:
            if any(map(is_repetition, items_of(self.steps))):
                raise UsageError(  # noqa: TRY301 - reported like the errors of `check_round`
                    "The steps to repeat contain a repetition.", fix="Write its steps, or raise `times`."
                )
            check_round([options if isinstance(options, dict) else {} for options in prunings])
        except UsageError as error:
            raise FieldsError([(("steps",), error)]) from error

    def expanded(self) -> list[dict[str, Any]]:
        """Return the steps of all rounds, with their goals."""

        def with_goal(step: Any, goal: dict[str, Any]) -> Any:
            if not (isinstance(step, dict) and list(step) == ["prune"]):
                return step
            options = step["prune"] or {}
            return {"prune": {**options, **goal}} if isinstance(options, dict) else step

        return [with_goal(copy.deepcopy(step), goal) for goal in self.prune_options() for step in items_of(self.steps)]


@dataclass
class Expansion:
    """Steps of a recipe without repetitions.

    Args:
        steps: the steps; a repetition that is not valid is kept as it is.
        sources: for each step, its path in the file, such as ("steps", "1", "repeat", "steps", "0").
        problems: problems of the repetitions.
    """

    steps: list[Any]
    sources: list[tuple[str, ...]]
    problems: list[Problem]

    def place(self, number: int) -> str:
        """Return the place of a step in the file, such as "steps[1].repeat.steps[0]"."""
        parts = [f"[{part}]" if part.isdecimal() else f".{part}" for part in self.sources[number]]
        return "".join(parts).removeprefix(".")

    def moved(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Return entries by dotted keys of the file, such as its lines, by the keys of the expanded recipe."""
        found = {key: value for key, value in entries.items() if not key.startswith("steps.")}
        for number, source in enumerate(self.sources):
            old, new = ".".join(source), f"steps.{number}"
            above = (".".join(source[:end]) for end in range(len(source), 1, -1))
            nearest = next((entries[key] for key in above if key in entries), None)
            found |= {} if nearest is None else {new: nearest}
            found |= {f"{new}{k[len(old) :]}": v for k, v in entries.items() if f"{k}.".startswith(f"{old}.")}
            if REPEAT in source and "prune" in (self.steps[number] if isinstance(self.steps[number], dict) else ()):
                goal = f"{'.'.join(source[:3])}.goal"
                moved = f"{new}.prune.goal"
                found |= {f"{moved}{k[len(goal) :]}": v for k, v in entries.items() if f"{k}.".startswith(f"{goal}.")}
        return found


def items_of(steps: Any) -> Any:
    """Return the list of steps, with a plain name such as "export" as {"export": {}}; other values are unchanged."""
    if not isinstance(steps, list):
        return steps
    return [{item: {}} if isinstance(item, str) else item for item in steps]


def is_repetition(item: Any) -> bool:
    """Return whether an item of the steps is a repetition."""
    return isinstance(item, dict) and list(item) == [REPEAT]


def expand(items: list[Any]) -> Expansion:
    """Return the steps of a recipe, with the steps of each round in place of a repetition."""
    found = Expansion([], [], [])
    for number, item in enumerate(items):
        source: tuple[str, ...] = ("steps", str(number))
        if not is_repetition(item):
            found.steps.append(item)
            found.sources.append(source)
            continue
        place = ("steps", len(found.steps), REPEAT)
        try:
            repetition = _repetition(item[REPEAT])
        except (ValidationError, UsageError) as error:
            found.problems += _problems(place, error)
            found.steps.append(item)
            found.sources.append(source)
            continue
        steps, each = repetition.expanded(), len(repetition.steps)
        found.steps += steps
        found.sources += [(*source, REPEAT, "steps", str(index % each)) for index in range(len(steps))]
    return found


def _repetition(options: Any) -> Repeat:
    if not isinstance(options, dict):
        what = f"Expected a section with the keys of a repetition, found {value_phrase(options)}."
        raise UsageError(what, fix="Write `- repeat: {times: 4, goal: {macs: 0.3}, steps: [prune, recover]}`.")
    return Repeat.model_validate(options)


def _problems(place: tuple[int | str, ...], error: ValidationError | UsageError) -> list[Problem]:
    if isinstance(error, UsageError):
        return [(place, {"type": "value_error", "ctx": {"error": error}})]
    return [((*place, *details["loc"]), details) for details in error.errors()]
