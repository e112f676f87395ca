"""Each option of a step is defined once: Python, recipes, --set and `kirsch init` have the same options."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from pydantic import Field, ValidationError

import kirsch
from kirsch.errors import RecipeError, UsageError
from kirsch.frameworks.training import Training
from kirsch.jobs.step import STEPS, Step
from kirsch.pruning.options import PlanOptions
from kirsch.recipes.recipe import commented, read_recipe
from kirsch.steps import Distill, Prune, Recover, Train

NEEDED = {"measure": "- export\n"}
"""Step → the lines of the steps that must come before it in a recipe."""

REQUIRED = {"sparsify": {"pattern": "2:4"}}
"""Step → options without which it cannot be made."""


def recipe_with(name: str, *changes: str):
    """Return a recipe with one step of this name without options."""
    student = "student: {model: 'm:s'}\n" if STEPS[name].needs_student else ""
    text = f"teacher: {{model: 'm:t'}}\n{student}goal: {{macs: 0.5}}\nsteps:\n{NEEDED.get(name, '')}- {name}\n"
    return read_recipe(text, changes)


def options(steps=STEPS):
    return [(name, field) for name in steps for field in steps[name].model_fields]


@pytest.mark.parametrize(("name", "field"), options())
def test_each_option_can_be_set_and_is_written_with_its_description(name, field):
    kind = STEPS[name]
    required = REQUIRED.get(name, {})
    default = required.get(field, kind.model_fields[field].get_default(call_default_factory=True))
    value = json.dumps(kind(**required).model_dump(mode="json")[field])
    changes = [f"{name}.{key}={needed}" for key, needed in required.items()]
    recipe = recipe_with(name, *changes, *([] if value == "null" else [f"{name}.{field}={value}"]))
    assert getattr(recipe.steps[-1], field) == default == getattr(kind(**required), field)
    line = [line for line in commented(recipe).splitlines() if line.startswith(f"    {field}: ")][-1]
    assert line.endswith(f"  # {kind.model_fields[field].description}")


@pytest.mark.parametrize("name", list(STEPS))
def test_an_unknown_option_is_refused_in_python_and_by_set(name):
    with pytest.raises(UsageError, match=r"has no argument 'epohcs'"):
        STEPS[name](epohcs=1)
    with pytest.raises(RecipeError, match=rf"--set {name}\.epohcs=1: steps\[\d\]\.{name}\.epohcs: unknown key"):
        recipe_with(name, f"{name}.epohcs=1")


@pytest.mark.parametrize(("name", "field"), options())
def test_python_and_a_recipe_accept_the_same_values(name, field):
    """YAML has the same types as Python, and no value of another type is converted."""
    for value in (True, 0, 1, 1.0, 1.5, -1, "yes", "1", "", None, [], [0.5], ["a"], {}, {"head": True}, {"head": 2}):
        found = []
        for make in (lambda: STEPS[name](**{field: value}), lambda: STEPS[name].model_validate({field: value})):  # noqa: B023 - called at once
            try:
                found.append(getattr(make(), field))
            except (UsageError, ValidationError):
                found.append("refused")
        assert found[0] == found[1], value


@pytest.mark.parametrize("step", [Train, Distill, Recover])
def test_steps_that_train_have_the_options_of_training(step):
    for name, field in Training.model_fields.items():
        if name != "seed":  # null by default, which means the seed of the recipe
            assert step.model_fields[name] is not None
            assert step.model_fields[name].default == field.default
            assert step.model_fields[name].description == field.description


def test_the_step_that_prunes_has_the_options_of_a_plan():
    assert {*PlanOptions.model_fields, "goal", "goal_of", "compensate"} == set(Prune.model_fields)


def test_a_new_option_can_be_set_and_appears_in_the_commented_recipe(monkeypatch):
    """A new option needs nothing but a field of the class."""

    class Blur(Step):
        """Blur the inputs."""

        radius: int = Field(3, description="radius in pixels")

    monkeypatch.setitem(STEPS._objects, "blur", Blur)
    assert read_recipe("teacher: {model: 'm:t'}\nsteps:\n- blur\n", ["blur.radius=5"]).steps == (Blur(radius=5),)
    recipe = read_recipe("teacher: {model: 'm:t'}\nsteps:\n- blur\n")
    assert re.search(r"- blur:  # blur the inputs\n    radius: 3  # radius in pixels", commented(recipe))


@pytest.mark.parametrize("option", [name for name in PlanOptions.model_fields if name != "seed"])
def test_compress_takes_each_option_of_a_plan(option):
    """A value of the wrong type is refused before any work, and the error names the option."""
    part = kirsch.Split(torch.randn(6, 4).numpy(), np.arange(6) % 2)
    data = kirsch.DataSet("random", train=part, validation=part, test=part, classes=("a", "b"))
    with pytest.raises(UsageError, match=f"`{option}"):
        kirsch.compress(torch.nn.Linear(4, 2), data, kirsch.Goal(macs=0.5), **{option: object()})
