"""Recipe of a run: its sections, reading and writing."""

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

from kirsch.annotations import Seed
from kirsch.errors import RecipeError, UsageError, nearest
from kirsch.frameworks.training import Training
from kirsch.pruning.options import PlanOptions
from kirsch.recipes.objective import ObjectiveSection, SparseSection
from kirsch.recipes.section import AtLeastZero, Count, Fraction, Positive, Section
from kirsch.recipes.yaml import dump, read, scalar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.distillation.objective import Objective

BUILTIN = Path(__file__).parent / "builtin"
ENVIRONMENT = "KIRSCH_RECIPE__"
"""Prefix of environment variables that change a recipe, such as KIRSCH_RECIPE__PRUNE__GOAL__MACS=0.4."""


class Train(Section):
    """Settings of a training run. Its keys are the fields of `kirsch.Training`."""

    epochs: Count = Field(10, description="passes over the data")
    learning_rate: Positive = Field(0.05, description="peak learning rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd (momentum 0.9) or adamw")
    weight_decay: AtLeastZero = Field(5e-4, description="weight decay, not on biases and normalization")
    schedule: Literal["cosine", "multistep", "constant"] = Field("cosine", description="schedule of the learning rate")
    milestones: tuple[Fraction, ...] = Field((0.5, 0.75), description="for multistep, fractions of the run")
    warmup_epochs: AtLeastZero = Field(0.0, description="epochs of linear warm-up")
    max_grad_norm: Positive | None = Field(None, description="largest gradient norm; null: no limit")
    gradient_accumulation_steps: Count = Field(1, description="batches per optimizer step")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="bf16 and fp16: mixed precision")
    ema_decay: Fraction | None = Field(None, description="decay of a moving average of the weights; null: none")

    def settings(self, seed: int) -> Training:
        """Return the `Training` of this section."""
        return Training(**self.model_dump(), seed=seed)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        """Refuse settings that `Training` refuses."""
        try:
            self.settings(0)
        except UsageError as error:
            raise ValueError(error.what) from error
        return self


class Data(Section):
    """Data that the models are trained and evaluated on."""

    source: str = Field(
        "digits",
        description=(
            "digits, cifar10, file.py:callable or package.module:callable; the callable returns a kirsch.DataSet and "
            "takes the options as keyword arguments, and the recipe's seed if it has a parameter seed"
        ),
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the source")
    batch_size: Count = Field(64, description="samples per training step")


Outputs = Literal["logits", "probabilities"] | None
OUTPUTS = "logits, or probabilities if the model ends in a softmax; null: logits"


class Teacher(Section):
    """The large model."""

    model: str = Field(description="package.module:callable, file.py:callable or timm:NAME")
    outputs: Outputs = Field(None, description=OUTPUTS)
    train: Train | None = Field(None, description="null: the model is already trained")


class Distill(Section):
    """Training of a student on its teacher."""

    temperature: Positive | None = Field(None, description="temperature of both models' logits; 4.0")
    weight: AtLeastZero | None = Field(None, le=1, description="weight of the soft targets, 1 - weight for labels; 0.9")
    objective: ObjectiveSection | None = Field(
        None,
        description=(
            "in place of temperature and weight: dkd, or {preset: at, label_weight: 0.5}, or "
            "{terms: [{loss: kd, weight: 0.9}], label_weight: 0.1}; see `kirsch methods`"
        ),
    )
    train: Train = Field(default_factory=Train, description="training settings")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        """Fill in temperature and weight if there is no objective."""
        if not isinstance(values, dict) or values.get("objective") is not None:
            return values
        defaults = {"temperature": 4.0, "weight": 0.9}
        return {**values, **{name: number for name, number in defaults.items() if values.get(name) is None}}

    @model_validator(mode="after")
    def _check_no_duplicate_settings(self) -> Self:
        numbers = [name for name in ("temperature", "weight") if getattr(self, name) is not None]
        if self.objective is not None and numbers:
            raise ValueError(
                f"{' and '.join(numbers)} cannot be combined with an objective; remove them, and set such numbers in "
                "the objective"
            )
        return self

    def as_objective(self) -> Objective:
        """Return the `Objective` of this section."""
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see `kirsch.recipes.objective`

        if self.objective is not None:
            return self.objective.objective()
        if self.temperature is None or self.weight is None:
            raise RuntimeError("a section without an objective has a temperature and a weight")
        return Objective.kd(self.temperature, self.weight)


class Student(Section):
    """The small model."""

    model: str = Field(description="package.module:callable, file.py:callable or timm:NAME")
    outputs: Outputs = Field(None, description=OUTPUTS)
    distill: Distill = Field(default_factory=Distill, description="training on the teacher")


class PruneGoal(Section):
    """Limits of the pruned model, as fractions of the model before pruning."""

    macs: Fraction | None = Field(None, description="multiply-accumulates")
    parameters: Fraction | None = Field(None, description="parameters")


class PruneTarget(Section):
    """The key of the section prune that is no option of a plan."""

    goal: PruneGoal = Field(description="limits, as fractions of the model before pruning")


class Prune(PlanOptions, PruneTarget):  # pydantic lists the fields of the last base first
    """Pruning of units. Its keys are the goal and the options of `kirsch.plan`."""

    seed: Seed | None = Field(None, description="seed of the importance random; null: the seed of the recipe")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        """Refuse options that `kirsch.plan` refuses."""
        try:
            self.check()
        except UsageError as error:
            raise ValueError(str(error)) from error
        return self


class Export(Section):
    """Exported file."""

    format: Literal["onnx"] = Field("onnx", description="format of the file")


class Measure(Section):
    """Measurement of latency."""

    runtime: Literal["onnxruntime"] = Field("onnxruntime", description="runtime of the exported file")
    threads: Count = Field(1, description="threads of the runtime")
    rounds: int = Field(30, ge=10, strict=True, description="interleaved rounds")


class RunGoal(Section):
    """Goals of a run. The limits of prune.goal are goals, too."""

    max_drop: AtLeastZero | None = Field(None, lt=1, description="allowed drop of accuracy: 0.01 is one point")
    speedup: Positive | None = Field(None, description="smallest speedup over the teacher")


class Recipe(Section):
    """Recipe of a run: teacher → student → prune → recover → export → measure. Sections that are null are skipped."""

    version: Literal[1] = Field(1, description="version of the format")
    name: str = Field("recipe", min_length=1, max_length=200, description="name in the run folder and the report")
    seed: int = Field(0, ge=0, lt=2**63, strict=True, description="seed of all random numbers")
    data: Data = Field(default_factory=Data, description="data of training and evaluation")
    teacher: Teacher = Field(description="the large model")
    student: Student | None = Field(None, description="the small model; null: the teacher itself is pruned")
    prune: Prune | None = Field(None, description="pruning of the student, or of the teacher")
    recover: Distill | None = Field(None, description="training on the teacher after pruning")
    export: Export | None = Field(default_factory=Export, description="exported file")
    measure: Measure | None = Field(default_factory=Measure, description="measurement of latency")
    goal: RunGoal = Field(default_factory=RunGoal, description="goals of the run")

    @field_validator("goal")
    @classmethod
    def _check_speedup_is_measured(cls, goal: RunGoal, others: ValidationInfo) -> RunGoal:
        """Refuse a speedup goal without measurement, which would count as met."""
        if goal.speedup is not None and None in (others.data.get(name, "") for name in ("export", "measure")):
            raise ValueError("a speedup goal needs the sections export and measure")
        return goal

    def section_of(self, stage: str) -> Distill | None:
        """Return the section of the stage "distill" or "recover"; None if the recipe has no such stage."""
        sections = {"distill": self.student.distill if self.student else None, "recover": self.recover}
        return sections.get(stage)

    def objective_of(self, stage: str) -> Objective:
        """Return the objective of a training stage, with the outputs (logits or probabilities) of its models."""
        from kirsch.distillation.objective import Objective  # noqa: PLC0415 - see `kirsch.recipes.objective`

        section = self.section_of(stage)
        if section is None:
            return dataclasses.replace(Objective.labels(), student_outputs=self.teacher.outputs)
        objective = section.as_objective()
        return dataclasses.replace(
            objective,
            student_outputs=objective.student_outputs or (self.student or self.teacher).outputs,
            teacher_outputs=objective.teacher_outputs or self.teacher.outputs,
        )

    def to_yaml(self) -> str:
        """Return the recipe as YAML; `read_recipe` of the text returns an equal recipe."""
        return dump(self.model_dump(mode="json"))


def read_recipe(
    source: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe, and apply changes from environment variables and then from `a.b=value` overrides.

    Args:
        source: path of a file as a `Path`, or YAML text as a `str`.
        overrides: changes such as "prune.goal.macs=0.4"; values are read as YAML.
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
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise RecipeError(
                f"--set {text!r} is not a change of a key.",
                "Expected the form a.b=value.",
                "For example, write --set prune.goal.macs=0.4.",
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
    """Return the recipe of plain data.

    Args:
        data: sections by name.
        name: name of the source in error messages.
        lines: dotted key → line in the source.
        origins: dotted key → origin in error messages, for keys that are not from the source.

    Raises:
        RecipeError: the recipe is not valid; lists every problem.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_problem(details, lines, origins) for details in error.errors()]
        many = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise RecipeError(
            f"The {name} has {many}:\n  " + "\n  ".join(problems),
            fix="`kirsch init` writes a valid recipe with all sections and keys.",
        ) from None


def _put(data: dict[str, Any], path: list[str], value: Any, origin: str) -> None:
    section = data
    for name in path[:-1]:
        inner = section.setdefault(name, {})
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{origin}: {name!r} is a value, not a section.")
        section = inner
    section[path[-1]] = value


def _problem(details: Any, lines: Mapping[str, int], origins: Mapping[str, str]) -> str:
    """Return one line that describes a problem found by pydantic."""
    path: list[str] = []
    *parents, last = details["loc"]
    for part in parents:
        # pydantic adds the names of union members to the path; they are not keys.
        if isinstance(part, int) or part in _keys(path):
            path.append(str(part))
    if isinstance(last, int) or last in _keys(path) or details["type"] == "extra_forbidden":
        path.append(str(last))
    key = ".".join(path)
    keys = [".".join(path[:end]) for end in range(len(path), 0, -1)]  # a missing key has the line of its section
    candidates = (origins.get(name) or (f"line {lines[name]}" if name in lines else "") for name in keys)
    location = next(filter(None, candidates), "")
    if details["type"] == "extra_forbidden":
        text = f"unknown key. {_latency_hint(path[-1]) or nearest(path[-1], _keys(path[:-1]))}".rstrip()
    elif details["type"] == "missing":
        text = "this key is required"
    elif details["type"] == "value_error":
        text = _lower(str(details["ctx"]["error"])).rstrip(".")
    else:
        text = f"{_lower(details['msg'])}, found {details['input']!r}"
    return f"{location + ': ' if location else ''}{key}: {text}"


def _latency_hint(key: str) -> str:
    """Return what to use in place of a latency goal; empty for other keys."""
    from kirsch.graph import plan  # noqa: PLC0415 - it loads numpy, which reading a recipe does not need

    return f"{plan.NO_LATENCY} {plan.IN_PLACE_OF_LATENCY}" if plan.LATENCY.search(key) else ""


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _keys(path: Sequence[str]) -> list[str]:
    """Return the keys of the section at a path; empty if there is no section."""
    section: type[BaseModel] = Recipe
    for name in path:
        if name.isdigit():  # index in a list of sections
            continue
        field = section.model_fields.get(name)
        section = next((t for t in _kinds(field.annotation if field else None) if issubclass(t, BaseModel)), Section)
    return list(section.model_fields)


def _kinds(annotation: Any) -> list[type]:
    """Return the classes in an annotation: members of a union, items of a tuple."""
    plain = [annotation] if isinstance(annotation, type) and not get_args(annotation) else []
    return plain + [kind for part in get_args(annotation) for kind in _kinds(part)]


def commented(recipe: Recipe) -> str:
    """Return the recipe as YAML with a comment on each key; `read_recipe` of the text returns an equal recipe."""
    lines = [
        "# A recipe for `kirsch compress`. Sections that are null are skipped.",
        "# Any key can be changed on the command line: --set prune.goal.macs=0.4",
    ]
    _comment(recipe, 0, lines)
    return "\n".join(lines) + "\n"


def _comment(section: Section, depth: int, lines: list[str]) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        indent = "  " * depth
        if isinstance(value, Section) and not isinstance(value, SparseSection):
            lines += [""] * (depth == 0) + [f"{indent}{name}:  # {field.description}"]
            _comment(value, depth + 1, lines)
        else:
            text = dump(section.model_dump(mode="json")[name], one_line=True)
            lines.append(f"{indent}{name}: {text}  # {field.description}")
