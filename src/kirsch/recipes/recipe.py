"""Recipe of a job: its sections and steps, reading and writing."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_serializer

from kirsch.annotations import Count, Kind, Seed
from kirsch.arguments import ABBREVIATIONS
from kirsch.errors import RecipeError, UnknownNameError, UsageError, listing, nearest
from kirsch.graph import goal
from kirsch.graph.cost_names import WORDS
from kirsch.graph.goal import Goal
from kirsch.jobs.goal import JobGoal
from kirsch.jobs.step import keys_of
from kirsch.options import FieldsError, Options
from kirsch.recipes.changes import Change, changes_of
from kirsch.recipes.models import is_random
from kirsch.recipes.repeat import REPEAT, Expansion, Repeat, expand, is_repetition, items_of
from kirsch.recipes.yaml import dump, read
from kirsch.steps import STEPS, Evaluate, Export, Measure, Prune, Sparsify, Step, Train
from kirsch.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BUILTIN = Path(__file__).parent / "builtin"
NOT_TRAINED = "No step trains the student."
TRAIN_STUDENT = "Add a step distill, or train with model: student"

Name = Annotated[str, Kind("text of 1 to 200 characters", lambda text: 1 <= len(text) <= 200, lambda _: "")]  # noqa: PLR2004 - as it says
"""Name of a run."""

REFERENCE = "package.module:callable, file.py:callable, timm:NAME or a built-in model such as digits:teacher"


class DataSection(Options):
    """Data that the models are trained and evaluated on."""

    source: str | None = Field(
        "digits",
        description=(
            "digits, cifar10, file.py:callable or package.module:callable; the callable takes the options as keyword "
            "arguments, and the seed of the recipe if it has a parameter seed; it returns a kirsch.DataSet"
        ),
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the source")
    batch_size: Count = Field(64, description="samples per training step")


class ModelSection(Options):
    """The model before the first step. `model` names a callable that returns it."""

    model: str | None = Field(description=REFERENCE)
    outputs: Literal["logits", "probabilities"] | None = Field(
        None, description="logits, or probabilities if the model ends in a softmax; null: logits"
    )


class Recipe(Options):
    """Recipe of a job. A reference to a model or to data is null if the object was passed to `kirsch.compress`."""

    version: Literal[2] = Field(2, description="version of the format")
    name: Name = Field("recipe", description="name, used in the report and for the run folder")
    seed: Seed = Field(0, description="seed of all random numbers")
    task: str = Field("classification", description="task of the models: classification")
    data: DataSection = Field(default_factory=DataSection, description="data of training and evaluation")
    teacher: ModelSection = Field(description="the large model")
    student: ModelSection | None = Field(None, description="the small model; null: the teacher itself is compressed")
    steps: tuple[SerializeAsAny[Step], ...] = Field(
        description=(
            "steps in order: evaluate, train, distill, prune, sparsify, recover, export, measure; an item repeat "
            "stands for the same steps several times"
        )
    )
    goal: JobGoal = Field(default_factory=JobGoal, description="goals, which are checked at the end")

    def check(self) -> None:
        """Check the task, that each step can follow the steps before it, and that pruning has a goal."""
        names = [name_of(step) for step in self.steps]
        problems: list[tuple[tuple[str | int, ...], UsageError]] = []
        try:
            TASKS[self.task]
        except UsageError as error:
            problems.append((("task",), error))
        for number, step in enumerate(self.steps):
            problems += [(("steps", number), error) for error in self._problems_of(step, names[: number + 1])]
        if not self.steps:
            problems.append((("steps",), UsageError("There are no steps.", fix="Add at least one, such as prune.")))
        elif self.student is not None and all(map(is_of_teacher, self.steps)):
            fix = "Add a step such as distill, or leave out the student."
            problems.append((("student",), UsageError("No step uses the student.", fix=fix)))
        elif self.student_is_not_trained and is_random(self.student.model if self.student else None):
            problems.append((("student",), UsageError(NOT_TRAINED, "Its weights are random.", f"{TRAIN_STUDENT}.")))
        problems += self._problems_after_export(names)
        problems += self._missing_goals(names)
        if self.goal.speedup is not None and "measure" not in names:
            problems.append((("goal",), UsageError("A speedup goal needs the steps export and measure.")))
        if problems:
            raise FieldsError(problems)

    def _problems_of(self, step: Step, names: Sequence[str]) -> Iterator[UsageError]:
        """Yield the reasons why a step cannot follow the steps before it; `names` ends with its name."""
        *before, name = names
        if step.needs and step.needs not in before:
            yield UsageError(f"The step {name!r} needs a step {step.needs!r} before it.", fix="Add this step.")
        if self.student is None and (step.needs_student or (isinstance(step, Train) and step.model == "student")):
            fix = "Give a student, or use the step recover, which trains the model itself on the teacher."
            yield UsageError(f"The step {name!r} needs a student.", fix=fix)
        exported = next((earlier for earlier in self.steps if isinstance(earlier, Export)), None)
        if isinstance(step, Measure) and exported is not None and exported.format != "onnx":
            fix = "Export with format: onnx, or remove this step."
            yield UsageError(f"The step {name!r} cannot run a file of the format {exported.format!r}.", fix=fix)
        if not step.repeatable and name in before:
            yield UsageError(f"There are two steps {name!r}.", fix="Remove one of them.")
        no_goal = isinstance(step, Prune) and step.goal is None and step.goal_of == "step" and step.max_drop is None
        if no_goal and name in before:
            key = keys_of(names)[-1]
            yield UsageError(
                f"The step {key!r} has no goal of its own.",
                "The goal of the job limits the cost after all steps, as a fraction of the model before the first step "
                f"{name!r}. The limits of a step are fractions of the model before this step.",
                f"Give the step {key!r} a goal, such as macs=0.7, or goal_of: job to prune to the goal of the job.",
            )
        other = next(
            (name for name, earlier in zip(before, self.steps, strict=False) if not is_of_teacher(earlier)), ""
        )
        if other and is_of_teacher(step):
            yield UsageError(
                f"The step {name!r} of the teacher comes after the step {other!r}.",
                "The models of the other steps start from the teacher, are trained on it, or are compared with it.",
                f"Move {name!r} to the beginning."
                + " To train the pruned model, use the step recover." * isinstance(step, Train),
            )

    def _problems_after_export(self, names: list[str]) -> Iterator[tuple[tuple[str | int, ...], UsageError]]:
        """Yield a problem if steps change the model after it was exported: the file would be another model."""
        place = names.index("export") if "export" in names else len(names)
        keys = zip(keys_of(names), self.steps, strict=True)
        late = [repr(key) for key, step in list(keys)[place + 1 :] if step.changes_model]
        if late:
            subject = f"step {late[0]} changes" if len(late) == 1 else f"steps {', '.join(late)} change"
            problem = f"The {subject} the model after the step 'export'."
            why = "The exported file would not be the final model."
            yield ("steps", place), UsageError(problem, why, f"Move 'export' after {late[-1]}.")

    def _missing_goals(self, names: list[str]) -> Iterator[tuple[tuple[str | int, ...], UsageError]]:
        """Yield a problem for a step that prunes to the goal of the job, if the job has none."""
        for number, (key, step) in enumerate(zip(keys_of(names), self.steps, strict=True)):
            try:
                if isinstance(step, Prune) and (names[number] not in names[:number] or step.goal_of == "job"):
                    step.goal_in(self.goal, key)
            except UsageError as error:
                yield ("steps", number), error

    @field_serializer("steps", when_used="always")
    def _write_steps(self, steps: tuple[Step, ...]) -> list[dict[str, Any]]:
        return [{name_of(step): step.model_dump(mode="json")} for step in steps]

    @property
    def all_steps(self) -> dict[str, Step]:
        """Steps by key, in order. Without a step of the teacher, the teacher is evaluated first."""
        steps = self.steps if any(map(is_of_teacher, self.steps)) else (Evaluate(), *self.steps)
        return dict(zip(keys_of([name_of(step) for step in steps]), steps, strict=True))

    @property
    def student_is_not_trained(self) -> bool:
        """Whether there is a student, and its weights are not trained; a step of another package may train them."""
        others = (step for step in self.steps if not is_of_teacher(step) and not isinstance(step, (Prune, Sparsify)))
        return self.student is not None and not any(step.changes_model for step in others)

    def to_yaml(self) -> str:
        """Return the recipe as YAML; `read_recipe` of the text returns an equal recipe."""
        return dump(self.model_dump(mode="json"))


def is_of_teacher(step: Step) -> bool:
    """Return whether a step trains or evaluates the teacher."""
    return isinstance(step, Evaluate) or (isinstance(step, Train) and step.model == "teacher")


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
            read as YAML. "recover=null" removes a step; a later change of its keys adds it again, without its options
            in the source.
        environment: environment variables; those that start with KIRSCH_RECIPE__ are used.

    Raises:
        RecipeError: the recipe is not valid. The message lists every problem with its line, key, found and expected
            value.
    """
    document = read(source)
    data, lines = document.data, dict(document.lines)
    steps = data.get("steps")
    title = "The recipe" if isinstance(source, str) else str(source)
    changes = changes_of(overrides, environment or {})
    if not isinstance(steps, list):
        lines, origins = _changed(data, changes, lines, {})
        return recipe_of(data, title, lines, origins)
    data["steps"] = items_of(steps)
    # The steps of a repetition have keys such as "prune-3" only after it is expanded, and none of its own.
    of_repetitions = [change for change in changes if change.is_of_step(data["steps"], REPEAT)]
    lines, origins = _changed(data, of_repetitions, lines, {})
    expansion = expand(data["steps"])
    data["steps"] = expansion.steps
    others = [change for change in changes if change not in of_repetitions]
    lines, origins = _changed(data, others, expansion.moved(lines), expansion.moved(origins))
    return recipe_of(data, title, lines, origins, expansion)


def _changed(
    data: dict[str, Any], changes: Sequence[Change], lines: dict[str, int], origins: dict[str, str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Apply changes to the data of a recipe, and return the lines and origins of its keys; see `recipe_of`."""
    sections = [name for name in Recipe.model_fields if name != "steps"]
    removed: set[int] = set()
    for change in changes:
        path = change.path(data.get("steps"), sections)
        key = ".".join(path)
        change.put(data, path)
        if path[0] == "steps":
            is_removal = change.value is None and len(path) == len(("steps", "0", "name"))
            (removed.add if is_removal else removed.discard)(int(path[1]))
        lines = {name: line for name, line in lines.items() if not f"{name}.".startswith(f"{key}.")}
        inner = (".".join(path[:end]) for end in range(1, len(path)))
        origins |= {name: change.origin for name in inner if name not in lines}
        origins[key] = change.origin
    for number in removed:
        data["steps"][number] = REMOVED
    return lines, origins


REMOVED = object()
"""Stands for a step that a change has removed, so that the other steps keep their numbers in error messages."""


def recipe_of(
    data: Mapping[str, Any],
    name: str,
    lines: Mapping[str, int] = MappingProxyType({}),
    origins: Mapping[str, str] = MappingProxyType({}),
    expansion: Expansion | None = None,
) -> Recipe:
    """Return a recipe from plain data.

    Args:
        data: sections by name. A step is a dict with one key, its name, and its options as the value.
        name: name of the source in error messages.
        lines: dotted key → line in the source.
        origins: dotted key → origin in error messages, for keys that are not from the source.
        expansion: places of the steps in the source, and the problems of repetitions; None if there are none.

    Raises:
        RecipeError: the recipe is not valid. The message lists every problem.
    """
    problems = [] if expansion is None else list(expansion.problems)
    steps = _read_steps(data.get("steps"), problems)
    try:
        recipe = Recipe.model_validate(data if steps is None else {**data, "steps": steps})
    except ValidationError as error:
        found = [(details["loc"], details) for details in error.errors()]
        # Invalid steps were left out above. A problem of the whole recipe, with the path (), may only follow from this.
        problems = [*(item for item in found if item[0]), *problems] if problems else found
        recipe = None
    if recipe is None or problems:
        texts = [_problem(place, details, lines, origins, expansion) for place, details in _expanded(problems)]
        texts = list(dict.fromkeys(texts))  # the rounds of a repetition have the same problems
        many = f"{len(texts)} problems" if len(texts) > 1 else "a problem"
        raise RecipeError(
            f"{name} has {many}:\n  " + "\n  ".join(texts),
            fix="`kirsch init` writes a valid recipe with all sections and keys.",
        ) from None
    return recipe


def _expanded(problems: list[tuple[tuple[int | str, ...], Any]]) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    """Yield each problem with its path of keys; problems inside the value of one field are yielded separately."""
    for place, details in problems:
        error = details.get("ctx", {}).get("error")
        if isinstance(error, FieldsError):
            yield from (
                (place, {**details, "ctx": {"error": found}, "inner": inner}) for inner, found in error.problems
            )
        else:
            yield place, details


def _read_steps(items: Any, problems: list[tuple[tuple[int | str, ...], Any]]) -> Any:
    """Return the steps of a list of dicts, and add the problems of invalid steps to `problems`."""
    items = items_of(items)
    if isinstance(items, dict) and items:
        fix = f"Write each step as an item of a list, with a hyphen: `- {next(iter(items))}: {{...}}`."
        error = UsageError("Expected a list of steps, found a mapping.", fix=fix)
        problems.append((("steps",), {"type": "value_error", "ctx": {"error": error}}))
        return ()
    if not isinstance(items, (list, tuple)):
        return items
    steps = []
    for number, item in enumerate(items):
        if isinstance(item, Step):
            steps.append(item)
        elif item is not REMOVED and not is_repetition(item):
            try:
                name, options = _name_and_options(item)
                if name not in STEPS:
                    raise UnknownNameError("step", name, [*STEPS, REPEAT])
                steps.append(STEPS[name].model_validate(options))
            except ValidationError as error:
                problems += [(("steps", number, name, *details["loc"]), details) for details in error.errors()]
            except UsageError as error:
                problems.append((("steps", number), {"type": "value_error", "ctx": {"error": error}}))
    return steps


def _name_and_options(item: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(item, dict) and len(item) == 1:
        ((name, options),) = item.items()
        if isinstance(name, str) and (options is None or isinstance(options, dict)):
            return name, options or {}
    raise UsageError(
        f"A step is {item!r}; expected its name with its options.",
        fix="For example, write `- prune: {goal: {macs: 0.5}}`.",
    )


def _problem(
    place: Sequence[int | str],
    details: Any,
    lines: Mapping[str, int],
    origins: Mapping[str, str],
    expansion: Expansion | None,
) -> str:
    """Return one line that describes a problem found by pydantic."""
    path: list[str] = []
    *parents, last = place or ("",)
    for part in parents:
        # pydantic adds the names of union members to the path; they are not keys.
        if isinstance(part, int) or part in _keys(path):
            path.append(str(part))
    if isinstance(last, int) or last in _keys(path) or details["type"] == "extra_forbidden":
        path.append(str(last))
    path += map(str, details.get("inner", ()))
    key = ".".join(path)
    keys = [".".join(path[:end]) for end in range(len(path), 0, -1)]  # a missing key has the line of its section
    candidates = (origins.get(name) or (f"line {lines[name]}" if name in lines else "") for name in keys)
    location = next(filter(None, candidates), "")
    if details["type"] == "extra_forbidden":
        known = _keys(path[:-1])
        suggestion = _latency_hint(path[-1]) or nearest(ABBREVIATIONS.get(path[-1], path[-1]), known)
        text = " ".join(filter(None, ["unknown key.", listing(known, len(known)) if known else "", suggestion]))
    elif details["type"] == "missing":
        text = "this key is required"
    elif details["type"] == "value_error":
        text = _lower(str(details["ctx"]["error"]))
    else:
        text = f"{_lower(details['msg'])}, found {details['input']!r}"
    step = re.match(r"steps\.(\d+)", key)
    shown = key
    if step is not None:
        number = int(step[1])
        shown = (f"steps[{number}]" if expansion is None else expansion.place(number)) + key[step.end() :]
    return f"{location + ': ' if location else ''}{shown + ': ' if shown else ''}{text}"


def _latency_hint(key: str) -> str:
    """Return what to use in place of a latency goal; empty for other keys."""
    return f"{goal.NO_LATENCY} {goal.IN_PLACE_OF_LATENCY}" if goal.LATENCY.search(key) else ""


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _keys(path: Sequence[str]) -> list[str]:
    """Return the keys of the section at a path; empty if there is no section."""
    section: type[BaseModel] | None = Recipe
    if path[:1] == ["steps"] and len(path) > len(("steps", "0")):
        section, path = Repeat if path[2] == REPEAT else STEPS[path[2]], path[3:]
    elif path[:1] == ["steps"]:
        return [*STEPS, REPEAT] if len(path) > 1 else []
    for name in path:
        field = section.model_fields.get(name) if section is not None else None
        annotation = field.annotation if field is not None else None
        section = next((kind for kind in _classes(annotation) if issubclass(kind, BaseModel)), None)
        if section is None and Goal in _classes(annotation):
            return list(WORDS)
    return list(section.model_fields) if section is not None else []


def _classes(annotation: Any) -> list[type]:
    """Return the classes in an annotation: members of a union, items of a tuple."""
    plain = [annotation] if isinstance(annotation, type) and not get_args(annotation) else []
    return plain + [kind for part in get_args(annotation) for kind in _classes(part)]


def commented(recipe: Recipe) -> str:
    """Return the recipe as YAML with a comment on each key; `read_recipe` of the text returns an equal recipe."""
    lines = [
        "# A recipe for `kirsch compress`. Its steps run in order; remove, repeat or move them.",
        "# Any key can be changed on the command line: --set prune.goal.macs=0.4",
    ]
    _comment(recipe, 0, lines)
    return "\n".join(lines) + "\n"


def _comment(section: Options, depth: int, lines: list[str]) -> None:
    for name in own_fields_first(type(section)):
        field, value, indent = type(section).model_fields[name], getattr(section, name), "  " * depth
        if name == "steps" and isinstance(section, Recipe):
            lines += ["", f"steps:  # {field.description}"]
            for step in section.steps:
                lines.append(f"- {name_of(step)}:  # {_summary(step)}")
                _comment(step, 2, lines)
        elif isinstance(value, Options):
            lines += [""] * (depth == 0) + [f"{indent}{name}:  # {field.description}"]
            _comment(value, depth + 1, lines)
        else:
            text = dump(section.model_dump(mode="json")[name], one_line=True)
            lines.append(f"{indent}{name}: {text}  # {field.description}")


def own_fields_first(kind: type[Options]) -> list[str]:
    """Return the fields of a class; those that it shares with other classes come last."""
    declared = [name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})]
    return [name for name in dict.fromkeys(declared) if name in kind.model_fields]


def _summary(step: Step) -> str:
    """Return the first sentence of the description of a step, as a comment."""
    return _lower((type(step).__doc__ or "").partition(".")[0])
