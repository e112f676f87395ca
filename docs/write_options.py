"""Write docs/options.md from the definitions of the options: `python docs/write_options.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any, get_args

from kirsch.annotations import type_phrase
from kirsch.distillation.objective import Objective
from kirsch.distillation.steps import TrainingStep
from kirsch.distillation.term import Ramp, Term
from kirsch.frameworks.training import Training
from kirsch.graph.cost_names import WORDS
from kirsch.graph.kinds import BLOCK, KINDS
from kirsch.graph.plan import Goal
from kirsch.jobs.goal import JobGoal
from kirsch.options import Options
from kirsch.pruning.options import PlanOptions
from kirsch.pruning.sparsity.options import SparsityOptions
from kirsch.pruning.sparsity.step import Sparsify
from kirsch.pruning.step import Prune
from kirsch.recipes.recipe import DataSection, ModelSection, Recipe, own_fields_first
from kirsch.recipes.repeat import Repeat
from kirsch.steps import STEPS, Step

if typing.TYPE_CHECKING:
    from pydantic.fields import FieldInfo

PAGE = Path(__file__).parent / "options.md"
HEAD = """\
# Options

<!-- written by `python docs/write_options.py`; do not edit -->

Each option is defined once, with its type, default and description, and is used in four ways:

- as a keyword argument in Python: `kirsch.plan(graph, goal, round_to=8)`, `kirsch.steps.Prune(round_to=8)`;
- as a key of a recipe: `- prune: {round_to: 8}`; `None` is written `null`, and texts need no quotes;
- as a change of a recipe: `kirsch compress recipe.yaml --set prune.round_to=8`; the second step `prune` is `prune-2`;
  `KIRSCH_RECIPE__PRUNE__ROUND_TO=8` in the environment does the same;
- as a flag of `kirsch plan` and `kirsch prune`: `--round-to 8`.

`kirsch init` writes a recipe with every key and its description. Presets, losses and their options are in
[methods.md](methods.md).
"""
PLAN = """\
Options of `kirsch.plan`, of the step `prune`, and of the commands `plan` and `prune`. In Python, `kirsch.plan` also
takes `data` and `loss`, for importances that run the model and for residual blocks; a job uses its training part.
"""
SPARSITY = """\
Options of `kirsch.sparsify` and of the step `sparsify`. In Python, `kirsch.sparsify` also takes `data`, for importances
that run the model; a job uses its training part.
"""
SECTIONS = {DataSection: "data", ModelSection: "teacher and student", JobGoal: "goal", Step: "steps"}
TYPES = {
    "objective": "a preset, or a dict of an objective",
    "goal": f"a dict from {', '.join(WORDS)} to a fraction, or None",
}
"""Types that are read by functions of their own."""


def page() -> str:
    """Return the content of docs/options.md."""
    parts = [HEAD, "## Recipe\n", _doc(Recipe), table(Recipe)]
    for section, name in SECTIONS.items():
        if section is not Step:
            parts += [f"### {name}\n", _doc(section), table(section)]
    parts += ["## Steps\n", "Classes of `kirsch.steps`, also for `kirsch.compress(model, data, steps=[...])`.\n"]
    for name in STEPS:
        parts += [f"### {name}\n", *_step(STEPS[name])]
    parts += ["### repeat\n", f"{_doc(Repeat).strip()} In Python, `kirsch.steps.repeat` returns the steps.\n"]
    parts += [table(Repeat), "## Plan\n", PLAN]
    parts += [table(PlanOptions, flags=True), _kinds(), "`kirsch.Goal`, the goal of a plan:\n", table(Goal, flags=True)]
    parts += ["## Sparsity\n", SPARSITY, table(SparsityOptions)]
    parts += ["## Training\n", "`kirsch.Training`, and keys of the steps that train.\n", table(Training)]
    for kind, where in (
        (Objective, "`kirsch.Objective`, and the value of the key `objective`."),
        (Term, "`kirsch.Term`, and the items of the key `terms`."),
        (Ramp, "`kirsch.Ramp`, and a dict with these keys in a recipe."),
    ):
        parts += [f"## {kind.__name__}\n", f"{_doc(kind).strip()} {where}\n", table(kind)]
    return "\n".join(parts)


def _kinds() -> str:
    """Return a sentence that lists the kinds of units."""
    names = ", ".join(f"`{kind}`" for kind in (*KINDS, BLOCK))
    return f"Kinds of units, explained in the [glossary](glossary.md#kinds-of-units): {names}.\n"


def _step(step: type[Step]) -> list[str]:
    """Return the description of a step, and its options without those that are described in another section."""
    base: type[Options] = Step
    shared = ""
    if issubclass(step, Prune):
        base, shared = PlanOptions, "The step has all options of a [plan](#plan), and:"
    elif issubclass(step, Sparsify):
        base, shared = SparsityOptions, "The step has all options of [sparsity](#sparsity), and:"
    elif issubclass(step, TrainingStep):
        base, shared = Training, "The step has all options of [training](#training), and:"
    names = [
        name
        for name, field in step.model_fields.items()
        if name not in base.model_fields or field.description != base.model_fields[name].description
    ]
    lines = [f"`kirsch.steps.{step.__name__}`. {_doc(step).strip()} {shared}".rstrip() + "\n"]
    return [*lines, table(step, names)] if names else lines


def table(kind: type, names: list[str] | None = None, *, flags: bool = False) -> str:
    """Return the options of a class as a Markdown table."""
    hints = typing.get_type_hints(kind, include_extras=True)
    rows = [f"| option | type | default |{' flag |' * flags} description |", "|---|---|---|" + "---|" * flags + "---|"]
    for name, (default, description) in _fields(kind).items():
        if names is None or name in names:
            command = f"`--{name.replace('_', '-')}`" if kind is not Goal or name in WORDS else ""
            flag = f" {command} |" if flags else ""
            rows.append(f"| `{name}` | {_type(name, hints[name])} | {default} |{flag} {_cell(description)} |")
    return "\n".join(rows) + "\n"


def _fields(kind: type) -> dict[str, tuple[str, str]]:
    """Return name → default and description of each option of a class."""
    if issubclass(kind, Options):
        return {name: _field(kind.model_fields[name]) for name in own_fields_first(kind)}
    descriptions, missing = _arguments(kind), dataclasses.MISSING
    fields: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory() if field.default_factory is not missing else field.default
        fields[field.name] = ("required" if made is missing else _default(made), descriptions[field.name])
    return fields


def _field(field: FieldInfo) -> tuple[str, str]:
    """Return default and description of a field."""
    default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
    return default, str(field.description)


def _arguments(kind: type) -> dict[str, str]:
    """Return the description of each argument in the docstring of a class."""
    text = (inspect.getdoc(kind) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"^    (?=\w)", text, flags=re.MULTILINE)[1:]:
        names, _, description = entry.partition(": ")
        found |= dict.fromkeys(names.split(", "), " ".join(description.split()))
    return found


def _doc(kind: type) -> str:
    """Return the first paragraph of the docstring of a class."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()) + "\n"


def _default(value: Any) -> str:
    return "see below" if isinstance(value, Options) else f"`{value!r}`"


def _type(name: str, hint: Any) -> str:
    section = next((kind for kind in _classes(hint) if kind in SECTIONS), None)
    if section is Step:
        return "list of [steps](#steps)"
    if section is not None:
        title = SECTIONS[section]
        return f"section [{name}](#{title.replace(' ', '-')})" + " or None" * (type(None) in get_args(hint))
    return _cell(TYPES[name]) if type_phrase(hint) == "any object" or name == "goal" else _cell(type_phrase(hint))


def _classes(hint: Any) -> list[Any]:
    return [hint, *(kind for part in get_args(hint) for kind in _classes(part))]


def _cell(text: str) -> str:
    text = text.replace("|", "\\|").replace("*", "\\*")
    return text.rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page())
