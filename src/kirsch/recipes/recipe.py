"""Recipe of a job: its sections and steps, reading and writing."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_serializer

from kirsch.annotations import Count, Seed
from kirsch.errors import RecipeError, UsageError, nearest
from kirsch.graph import plan
from kirsch.jobs.goal import JobGoal
from kirsch.jobs.step import keys_of
from kirsch.options import Options
from kirsch.recipes.yaml import dump, read, scalar
from kirsch.steps import STEPS, Evaluate, Step, Train
from kirsch.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BUILTIN = Path(__file__).parent / "builtin"
ENVIRONMENT = "KIRSCH_RECIPE__"
"""Prefix of environment variables that change a recipe, such as KIRSCH_RECIPE__PRUNE__GOAL__MACS=0.4."""

REFERENCE = "package.module:callable, file.py:callable, timm:NAME or a built-in model such as digits:teacher"


class DataSection(Options):
    """Data that the models are trained and evaluated on."""

    source: str | None = Field(
        "digits",
        description=(
            "digits, cifar10, file.py:callable or package.module:callable; the callable returns a kirsch.DataSet and "
            "takes the options as keyword arguments, and the recipe's seed if it has a parameter seed"
        ),
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the source")
    batch_size: Count = Field(64, description="samples per training step")


class ModelSection(Options):
    """A model before training."""

    model: str | None = Field(description=REFERENCE)
    outputs: Literal["logits", "probabilities"] | None = Field(
        None, description="logits, or probabilities if the model ends in a softmax; null: logits"
    )


class Recipe(Options):
    """Recipe of a job. Models and data are references; they are null if they were passed to `kirsch.compress`."""

    version: Literal[2] = Field(2, description="version of the format")
    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        "recipe", description="name in the run folder and the report"
    )
    seed: Seed = Field(0, description="seed of all random numbers")
    task: str = Field("classification", description="what the models are for: classification")
    data: DataSection = Field(default_factory=DataSection, description="data of training and evaluation")
    teacher: ModelSection = Field(description="the large model")
    student: ModelSection | None = Field(None, description="the small model; null: the teacher itself is compressed")
    steps: tuple[SerializeAsAny[Step], ...] = Field(
        description="steps in order: train, distill, prune, recover, export, measure"
    )
    goal: JobGoal = Field(default_factory=JobGoal, description="goals, which are checked at the end")

    def check(self) -> None:
        """Check the task, and that each step can follow the steps before it."""
        TASKS[self.task]
        names = [name_of(step) for step in self.steps]
        for number, (step, name) in enumerate(zip(self.steps, names, strict=True)):
            before = names[:number]
            if step.needs and step.needs not in before:
                raise UsageError(f"The step {name!r} needs a step {step.needs!r} before it.", fix="Add it.")
            if step.needs_student and self.student is None:
                raise UsageError(
                    f"The step {name!r} needs a student.",
                    fix="Add the section student, or use the step recover, which trains the model on the teacher.",
                )
            if not step.repeatable and name in before:
                raise UsageError(f"There are two steps {name!r}.", fix="Remove one of them.")
            if isinstance(step, Train) and step.model == "student" and self.student is None:
                raise UsageError("The step 'train' trains the student, and there is none.", fix="Add a student.")
            if isinstance(step, Train) and step.model == "teacher" and set(before) - {"train"}:
                raise UsageError("The teacher is trained after another step.", fix="Train it first.")
        if self.goal.speedup is not None and "measure" not in names:
            raise UsageError("A speedup goal needs the steps export and measure.", fix="Add them.")

    @field_serializer("steps", when_used="always")
    def _write_steps(self, steps: tuple[Step, ...]) -> list[dict[str, Any]]:
        return [{name_of(step): step.model_dump(mode="json")} for step in steps]

    @property
    def all_steps(self) -> dict[str, Step]:
        """Steps by key, in order. A teacher that is not trained is evaluated first."""
        trains = any(isinstance(step, Train) and step.model == "teacher" for step in self.steps)
        steps = (*(() if trains else (Evaluate(),)), *self.steps)
        return dict(zip(keys_of([name_of(step) for step in steps]), steps, strict=True))

    def to_yaml(self) -> str:
        """Return the recipe as YAML; `read_recipe` of the text returns an equal recipe."""
        return dump(self.model_dump(mode="json"))


def name_of(step: Step) -> str:
    """Return the name under which the class of a step is registered."""
    return next(name for name in STEPS if STEPS[name] is type(step))


def read_recipe(
    source: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe, and apply changes from environment variables and then from `a.b=value` overrides.

    Args:
        source: path of a file as a `Path`, or YAML text as a `str`.
        overrides: changes such as "prune.goal.macs=0.4", where "prune" is the key of a step, or "seed=3"; values are
            read as YAML. "recover=null" removes a step.
        environment: environment variables; those that start with KIRSCH_RECIPE__ are used.

    Raises:
        RecipeError: the recipe is not valid; lists every problem with its line, key, found and expected value.
    """
    document = read(source)
    data, lines = document.data, dict(document.lines)
    changes = [
        (name.removeprefix(ENVIRONMENT).lower().replace("__", "."), value, name)
        for name, value in sorted((environment or {}).items())
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
        changes.append((key, value, f"--set {text}"))
    origins: dict[str, str] = {}
    for text, value, origin in changes:
        names = _path(data, text.split("."), origin)
        key = ".".join(names)
        _put(data, names, scalar(value, origin), origin)
        lines = {name: line for name, line in lines.items() if not f"{name}.".startswith(f"{key}.")}
        origins |= {inner: origin for end in range(1, len(names)) if (inner := ".".join(names[:end])) not in lines}
        origins[key] = origin
    data["steps"] = [item for item in _items(data) if not (_is_step(item) and next(iter(item.values())) is REMOVED)]
    return recipe_of(data, "recipe" if isinstance(source, str) else str(source), lines, origins)
