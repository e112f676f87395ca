"""A whole job as data."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kirsch.errors import RecipeError, UsageError, nearest
from kirsch.frameworks.training import Training
from kirsch.recipes.objective import Learning, Stated
from kirsch.recipes.section import AtLeastZero, Count, Fraction, Positive, Section
from kirsch.recipes.yaml import dump, read, scalar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.distillation.objective import Objective

BUILTIN = Path(__file__).parent / "builtin"
ENVIRONMENT = "KIRSCH_RECIPE__"
"""Environment variables that start with this change a recipe: KIRSCH_RECIPE__PRUNE__GOAL__MACS=0.4."""


class Train(Section):
    """How to train."""

    epochs: Count = Field(10, description="passes over the data")
    learning_rate: Positive = Field(0.05, description="peak learning rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd (momentum 0.9) or adamw")
    weight_decay: AtLeastZero = Field(5e-4, description="on weights, not on biases and scales")
    schedule: Literal["cosine", "multistep", "constant"] = Field("cosine", description="of the learning rate")
    milestones: tuple[Fraction, ...] = Field((0.5, 0.75), description="of multistep, as fractions of the run")
    warmup_epochs: AtLeastZero = Field(0.0, description="linear warm-up")
    clip_norm: Positive | None = Field(None, description="largest gradient norm; null: no limit")
    accumulate: Count = Field(1, description="batches whose gradients make one step")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of what may be computed in 16 bits")
    ema: Fraction | None = Field(None, description="what a moving average of the weights keeps at a step; null: none")

    def settings(self, seed: int) -> Training:
        """As the training loop takes it."""
        return Training(**self.model_dump(), seed=seed)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        """What the training loop would refuse is refused before anything has been trained."""
        try:
            self.settings(0)
        except UsageError as error:
            raise ValueError(error) from error
        return self


class Data(Section):
    """What the models serve."""

    source: str = Field(
        "digits",
        description=(
            "digits, cifar10, file.py:callable or package.module:callable; the callable returns a kirsch.DataSet, and "
            "is given the options as keywords, and the seed of the recipe as seed= if it has such an argument"
        ),
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the source")
    batch_size: Count = Field(64, description="samples a training step")


Outputs = Literal["logits", "probabilities"] | None
OUTPUTS = "logits, or probabilities if it ends in a softmax; null: logits, and probabilities are an error"


class Teacher(Section):
    """The large model."""

    model: str = Field(description="package.module:callable, file.py:callable or timm:NAME")
    outputs: Outputs = Field(None, description=OUTPUTS)
    train: Train | None = Field(None, description="null: it comes trained")


class Distill(Section):
    """Learning from the teacher."""

    temperature: Positive | None = Field(None, description="softens both models' scores; 4.0")
    weight: AtLeastZero | None = Field(None, le=1, description="of the soft targets, the rest is for labels; 0.9")
    objective: Learning | None = Field(
        None,
        description=(
            "instead of these two: dkd, or {preset: at, label_weight: 0.5}, or {terms: [{loss: kd, weight: 0.9}], "
            "label_weight: 0.1}; see `kirsch methods`"
        ),
    )
    train: Train = Field(default_factory=Train, description="how to train")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        """The numbers of plain soft targets, where these are meant."""
        if not isinstance(given, dict) or given.get("objective") is not None:
            return given
        plain = {"temperature": 4.0, "weight": 0.9}
        return {**given, **{name: number for name, number in plain.items() if given.get(name) is None}}

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        stated = [name for name in ("temperature", "weight") if getattr(self, name) is not None]
        if self.objective is not None and stated:
            raise ValueError(
                f"{' and '.join(stated)} beside an objective; leave them out, or null, and state such numbers in the "
                "objective"
            )
        return self

    def learned(self) -> Objective:
        """What is learned, as training takes it."""
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see `kirsch.recipes.objective`

        if self.objective is not None:
            return self.objective.objective()
        if self.temperature is None or self.weight is None:
            raise RuntimeError("a section without an objective has both numbers")
        return Objective.kd(self.temperature, self.weight)


class Student(Section):
    """The small model."""

    model: str = Field(description="package.module:callable, file.py:callable or timm:NAME")
    outputs: Outputs = Field(None, description=OUTPUTS)
    distill: Distill = Field(default_factory=Distill, description="learning from the teacher")


class PruneGoal(Section):
    """What the pruned model may cost, as fractions of the model before pruning."""

    macs: Fraction | None = Field(None, description="multiply-accumulates")
    params: Fraction | None = Field(None, description="parameters")


class Prune(Section):
    """What to remove."""

    goal: PruneGoal = Field(description="fractions of the model before pruning")
    importance: str = Field("magnitude", description="what ranks the units: magnitude, random")
    norm: Literal[1, 2] = Field(2, description="of magnitude")
    scope: Literal["global", "local"] = Field("global", description="rank all layers together, or each by itself")
    round_to: Count | Literal["auto"] | dict[str, Count] = Field(
        "auto", description="kept widths are multiples of this; or by kind of unit"
    )
    granularity: tuple[str, ...] | dict[str, AtLeastZero] | None = Field(
        None, description="the kinds of units that may go, or by kind how readily; all"
    )
    uniform: bool = Field(False, description="layers of one kind lose the same number of units")
    exclude: tuple[str, ...] = Field((), description="layers to leave as they are; globs")
    min_keep: Positive = Field(0.1, le=1, description="fraction of each group that stays in any case")


class Export(Section):
    """The file to ship."""

    format: Literal["onnx"] = Field("onnx", description="of the file")


class Measure(Section):
    """Where and how to time."""

    runtime: Literal["onnxruntime"] = Field("onnxruntime", description="the runtime that the file is for")
    threads: Count = Field(1, description="of the runtime")
    rounds: int = Field(30, ge=10, strict=True, description="interleaved rounds")


class Wanted(Section):
    """When the job is done well. The limits of prune.goal count as well."""

    max_drop: AtLeastZero | None = Field(None, lt=1, description="accuracy that may be lost: 0.01 is one point")
    speedup: Positive | None = Field(None, description="over the teacher, on the runtime")


class Recipe(Section):
    """A whole job: teacher → student → prune → recover → export → measure. Sections that are null are left out."""

    version: Literal[1] = Field(1, description="of this format")
    name: str = Field("recipe", min_length=1, max_length=200, description="for the run folder and the report")
    seed: int = Field(0, ge=0, lt=2**63, strict=True, description="of everything random")
    data: Data = Field(default_factory=Data, description="what the models serve")
    teacher: Teacher = Field(description="the large model")
    student: Student | None = Field(None, description="the small model; null: the teacher itself is made smaller")
    prune: Prune | None = Field(None, description="what to remove from it")
    recover: Distill | None = Field(None, description="training after the removal, on the teacher's scores")
    export: Export | None = Field(default_factory=Export, description="the file to ship")
    measure: Measure | None = Field(default_factory=Measure, description="where and how to time")
    goal: Wanted = Field(default_factory=Wanted, description="when the job is done well")

    @field_validator("goal")
    @classmethod
    def _can_be_judged(cls, goal: Wanted, others: ValidationInfo) -> Wanted:
        """A goal that nothing is held against would count as met."""
        if goal.speedup is not None and None in (others.data.get(name, "") for name in ("export", "measure")):
            raise ValueError("a speedup is wanted, and without the sections export and measure nothing is timed")
        return goal

    def section_of(self, stage: str) -> Distill | None:
        """The section of a stage that learns from the teacher, "distill" or "recover"; None where there is none."""
        found = {"distill": self.student.distill if self.student else None, "recover": self.recover}
        return found.get(stage)

    def objective_of(self, stage: str) -> Objective:
        """What a stage that trains minimizes, with what its models are said to put out."""
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see `kirsch.recipes.objective`

        section = self.section_of(stage)
        if section is None:
            return dataclasses.replace(Objective.labels(), student_outputs=self.teacher.outputs)
        learned = section.learned()
        return dataclasses.replace(
            learned,
            student_outputs=learned.student_outputs or (self.student or self.teacher).outputs,
            teacher_outputs=learned.teacher_outputs or self.teacher.outputs,
        )

    def to_yaml(self) -> str:
        """The recipe as a YAML text that reads back to it."""
        return dump(self.model_dump(mode="json"))


def read_recipe(
    source: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Recipe:
    """A recipe from a file, changed by the environment and then by `a.b=value` overrides.

    Args:
        source: path of a file, or a YAML text as a str with a line break.
        overrides: "prune.goal.macs=0.4"; values are read as YAML.
        environment: variables by name; those that start with KIRSCH_RECIPE__ count.

    Raises:
        RecipeError: with every problem, each with its line, key, what was found and what is expected.
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
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise RecipeError(
                f"--set {text!r} is no change.", "Its form is a.b=value.", "Write --set prune.goal.macs=0.4."
            )
        changes.append((key, value, f"--set {text}"))
    origins: dict[str, str] = {}
    for key, value, origin in changes:
        _put(data, key.split("."), scalar(value, origin), origin)
        lines = {name: line for name, line in lines.items() if not f"{name}.".startswith(f"{key}.")}
        names = key.split(".")
        origins |= {inner: origin for end in range(1, len(names)) if (inner := ".".join(names[:end])) not in lines}
        origins[key] = origin
    return recipe_of(data, "recipe" if isinstance(source, str) else str(source), lines, origins)


def recipe_of(
    data: Mapping[str, Any],
    name: str,
    lines: Mapping[str, int] = MappingProxyType({}),
    origins: Mapping[str, str] = MappingProxyType({}),
) -> Recipe:
    """A recipe from plain data.

    Args:
        data: sections by name.
        name: of what holds them, for the sentence of an error.
        lines: dotted key → line.
        origins: dotted key → where it comes from, for what does not come from a line.

    Raises:
        RecipeError: with every problem.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_problem(details, lines, origins) for details in error.errors()]
        many = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise RecipeError(
            f"The {name} has {many}:\n  " + "\n  ".join(problems),
            fix="`kirsch init` writes a recipe that runs, with its sections and keys.",
        ) from None


def _put(data: dict[str, Any], path: list[str], value: Any, origin: str) -> None:
    here = data
    for name in path[:-1]:
        inner = here.setdefault(name, {})
        if inner is None:
            inner = here[name] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{origin}: {name!r} holds a value, not a section.")
        here = inner
    here[path[-1]] = value


def _problem(details: Any, lines: Mapping[str, int], origins: Mapping[str, str]) -> str:
    """One line for one problem."""
    path: list[str] = []
    *above_it, last = details["loc"]
    for part in above_it:
        # pydantic has names of its own for the members of a union; no section has such a key.
        if isinstance(part, int) or part in _keys(path):
            path.append(str(part))
    if isinstance(last, int) or last in _keys(path) or details["type"] == "extra_forbidden":
        path.append(str(last))
    key = ".".join(path)
    above = [".".join(path[:end]) for end in range(len(path), 0, -1)]  # what is missing has the line of its section
    places = (origins.get(name) or (f"line {lines[name]}" if name in lines else "") for name in above)
    place = next(filter(None, places), "")
    if details["type"] == "extra_forbidden":
        text = f"unknown key. {_in_place_of(path[-1]) or nearest(path[-1], _keys(path[:-1]))}".rstrip()
    elif details["type"] == "missing":
        text = "this key is needed"
    elif details["type"] == "value_error":
        text = _lower(str(details["ctx"]["error"])).rstrip(".")
    else:
        text = f"{_lower(details['msg'])}, found {details['input']!r}"
    return f"{place + ': ' if place else ''}{key}: {text}"


def _in_place_of(key: str) -> str:
    """What to use where a latency is asked for as a goal; empty for any other key."""
    from kirsch.graph import plan  # noqa: PLC0415 - it loads numpy, which the reading of a recipe does not need

    return f"{plan.NO_LATENCY} {plan.IN_PLACE_OF_LATENCY}" if plan.LATENCY.search(key) else ""


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _keys(path: Sequence[str]) -> list[str]:
    """The keys that the section at a path has; none where no section is."""
    section: type[BaseModel] = Recipe
    for name in path:
        if name.isdigit():  # of an item of a list of sections
            continue
        field = section.model_fields.get(name)
        section = next((t for t in _kinds(field.annotation if field else None) if issubclass(t, BaseModel)), Section)
    return list(section.model_fields)


def _kinds(annotation: Any) -> list[type]:
    """The classes in an annotation: of a union, of the items of a tuple."""
    own = [annotation] if isinstance(annotation, type) and not get_args(annotation) else []
    return own + [kind for part in get_args(annotation) for kind in _kinds(part)]


def commented(recipe: Recipe) -> str:
    """The recipe as YAML with a comment on each key; reads back to the same recipe."""
    lines = [
        "# A recipe for `kirsch compress`. Sections that are null are left out.",
        "# Any key can be changed on the command line: --set prune.goal.macs=0.4",
    ]
    _comment(recipe, 0, lines)
    return "\n".join(lines) + "\n"


def _comment(section: Section, depth: int, lines: list[str]) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        indent = "  " * depth
        if isinstance(value, Section) and not isinstance(value, Stated):
            lines += [""] * (depth == 0) + [f"{indent}{name}:  # {field.description}"]
            _comment(value, depth + 1, lines)
        else:
            text = dump(section.model_dump(mode="json")[name], one_line=True)
            lines.append(f"{indent}{name}: {text}  # {field.description}")
