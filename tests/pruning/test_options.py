"""The options of a plan are the same in Python, in a recipe and on the command line."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from pydantic import Field
from typer.main import get_command

import kirsch
from kirsch.cli import main
from kirsch.cli.app import app
from kirsch.cli.flags import given_options, with_flags
from kirsch.errors import RecipeError, UsageError
from kirsch.graph.cost_names import WORDS
from kirsch.pruning.options import PlanOptions
from kirsch.recipes.recipe import Recipe, read_recipe, recipe_of
from kirsch.steps import Prune

NOT_OPTIONS = {"graph", "goal", "data", "validation", "quality", "progress"}
"""Arguments of `kirsch.plan` that are not options."""


@pytest.fixture(scope="module")
def graph():
    return kirsch.trace(torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2)), torch.randn(2, 4))


def python_options(function: Callable[..., Any] = kirsch.plan) -> dict[str, Any]:
    """Return the default of each option of `kirsch.plan`."""
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in NOT_OPTIONS}


def class_options(options: type[PlanOptions] = PlanOptions) -> dict[str, Any]:
    return {name: field.default for name, field in options.model_fields.items()}


def recipe_options() -> dict[str, Any]:
    """Return the default of each option of the step prune that `kirsch.plan` has, too; it uses the recipe's seed."""
    others = ("goal", "goal_of", "compensate")
    defaults = {name: field.default for name, field in Prune.model_fields.items() if name not in others}
    return defaults | {"seed": Recipe.model_fields["seed"].default}


def flags(name: str) -> dict[str, str]:
    """Return the flag of each option of a subcommand, by the name of the argument."""
    parameters = get_command(app).commands[name].params
    return {parameter.name: parameter.opts[0] for parameter in parameters}


def test_kirsch_plan_and_plan_options_have_the_same_options_and_defaults():
    assert python_options() == class_options()


def test_kirsch_plan_and_plan_options_have_the_same_types():
    signature = typing.get_type_hints(kirsch.plan, include_extras=True)
    fields = typing.get_type_hints(PlanOptions, include_extras=True)
    also_functions = {
        "importance",
        "loss",
        "metric",
    }  # Python calls also take functions and arrays, which no file can store
    same = fields.keys() - {"model_config"} - also_functions
    assert {name: signature[name] for name in same} == {name: fields[name] for name in same}
    for name in also_functions:
        assert set(typing.get_args(fields[name]) or [str]) < set(typing.get_args(signature[name]))


def test_recipes_have_the_same_options_defaults_and_descriptions():
    assert recipe_options() == class_options()
    descriptions = {name: field.description for name, field in Prune.model_fields.items()}
    assert all(
        descriptions[name] == field.description for name, field in PlanOptions.model_fields.items() if name != "seed"
    )


@pytest.mark.parametrize("command", ["plan", "prune"])
def test_the_commands_plan_and_prune_have_a_flag_for_each_option(command):
    expected = {name: f"--{name.replace('_', '-')}" for name in class_options()}
    assert flags(command).items() >= expected.items()


def test_the_docstring_of_kirsch_plan_describes_each_option():
    arguments = inspect.getdoc(kirsch.plan).partition("Args:")[2]
    assert all(f"\n    {name}: " in arguments for name in class_options())


def test_an_option_missing_in_kirsch_plan_is_detected():
    class More(PlanOptions):
        more: int = Field(0, description="one more")

    assert python_options() != class_options(More)


def test_an_option_that_only_python_has_is_found():
    def plan(graph, goal, *, more=0, **options):
        """Take one more option."""

    assert python_options(plan).keys() - class_options().keys() == {"more", "options"}


def test_a_subcommand_keeps_its_own_flag_for_an_option():
    def subcommand(session, seed: int = 5, **options: Any) -> int:
        return 0

    parameters = inspect.signature(with_flags(PlanOptions, limits=True)(subcommand)).parameters
    assert parameters["seed"].default == 5
    assert parameters.keys() - {"session", *WORDS} == class_options().keys()


VALUES = {
    "importance": (["random"], "random"),
    "loss": (["binary"], "binary"),
    "norm": (["1"], 1),
    "ranking": (["local"], "local"),
    "round_to": (["head=4", "head dim=8"], {"head": 4, "head dim": 8}),
    "kinds": (["head", "channel"], ("head", "channel")),
    "uniform": ([], True),
    "loadable": ([], True),
    "min_keep": (["0.25"], 0.25),
    "keep": (["layer4.*=0.5", "fc=48", "conv=1.0"], {"layer4.*": 0.5, "fc": 48, "conv": 1.0}),
    "max_drop": (["0.02"], 0.02),
    "metric": (["balanced_accuracy"], "balanced_accuracy"),
    "class_weights": (["cat=5", "3=2"], {"cat": 5, "3": 2}),
    "minimize": (["parameters"], "parameters"),
    "exclude": (["layer4.*", "fc"], ("layer4.*", "fc")),
    "keep_outputs": (["fc"], ("fc",)),
    "seed": (["7"], 7),
    "evaluations": (["50"], 50),
}


NEEDED = {
    "loss": {"importance": "taylor"},
    "evaluations": {"ranking": "legr"},
    **{name: {"max_drop": 0.02} for name in ("metric", "class_weights", "minimize")},
}
"""Options without which another option has no effect, by the name of the other one."""


@pytest.mark.parametrize("name", PlanOptions.model_fields)
def test_an_option_set_in_python_recipe_or_command_reaches_the_plan(name, monkeypatch, tmp_path):
    texts, value = VALUES[name]
    needed = NEEDED.get(name, {})
    assert getattr(PlanOptions(**{name: value}, **needed), name) == value != PlanOptions.model_fields[name].default
    text = "teacher: {model: 'a:b'}\ngoal: {macs: 0.5}\nsteps: [prune]"
    recipe = read_recipe(text, [f"prune.{key}={as_yaml(item)}" for key, item in {**needed, name: value}.items()])
    assert getattr(recipe.all_steps["prune"], name) == value
    found = {}

    def planned(_loaded, request, *_rest):
        found.update(request.options, seed=request.seed)
        return 0

    monkeypatch.setattr("kirsch.cli.networks.load_model", lambda *_, **__: None)
    monkeypatch.setattr("kirsch.cli.networks.show_plan", planned)
    flag = flags("plan")[name]
    arguments = [part for text in texts for part in (flag, text)] or [flag]
    arguments += [part for key, item in needed.items() for part in (flags("plan")[key], str(item))]
    assert main(["plan", "a:b", "--macs", "0.5", *arguments]) == 0
    assert PlanOptions(**found) == PlanOptions(**{name: value}, **needed)


@pytest.mark.parametrize("name", PlanOptions.model_fields)
def test_a_plan_file_accepts_each_option(graph, name):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.8))
    method = PlanOptions(**{name: VALUES[name][1]}, **NEEDED.get(name, {})).to_dict()
    content = json.loads(plan.to_json()) | {"method": method}
    assert kirsch.Plan.from_json(json.dumps(content)).method == method


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("importance", 3),
        ("norm", 3),
        ("norm", True),
        ("norm", 1.0),
        ("norm", "1"),
        ("ranking", "each"),
        ("round_to", 0),
        ("round_to", True),
        ("round_to", 8.0),
        ("round_to", "8"),
        ("round_to", {"head": "8"}),
        ("round_to", {"heads": 8}),
        ("kinds", ["heads"]),
        ("kinds", {"head": -1}),
        ("kinds", {"head": True}),
        ("uniform", "yes"),
        ("uniform", "true"),
        ("uniform", 1),
        ("kinds", ["block", "head"]),
        ("min_keep", 0),
        ("min_keep", 1.5),
        ("min_keep", "0.5"),
        ("keep", {"fc": 0}),
        ("keep", {"fc": True}),
        ("keep", {"fc": 1.5}),
        ("keep", {"fc": "48"}),
        ("keep", ["fc"]),
        ("max_drop", 1.0),
        ("max_drop", -0.1),
        ("max_drop", "0.1"),
        ("metric", 3),
        ("class_weights", {"cat": -1}),
        ("class_weights", [1.0]),
        ("minimize", "latency"),
        ("exclude", 3),
        ("keep_outputs", [3]),
        ("seed", -1),
        ("seed", 0.5),
        ("evaluations", 0),
        ("evaluations", 10.5),
    ],
)
def test_a_value_that_is_refused_in_python_is_refused_in_a_recipe(graph, name, value):
    with pytest.raises(UsageError, match=f"`{name}"):
        kirsch.plan(graph, kirsch.Goal(macs=0.8), **{name: value})
    with pytest.raises(RecipeError, match=r"The call has .*problem.*\n  steps\[0\]\.prune"):
        recipe_of({"teacher": {"model": "a:b"}, "steps": [{"prune": {name: value}}]}, "The call")


def test_a_norm_is_refused_with_an_importance_that_does_not_use_it():
    with pytest.raises(UsageError, match=r"`norm` has no effect with importance='random'"):
        PlanOptions(importance="random", norm=1)
    assert PlanOptions(importance="magnitude", norm=1).norm == 1


@pytest.mark.parametrize(
    "flag", [("--norm", "true"), ("--norm", "3"), ("--uniform", "yes"), ("--round-to", "8.0"), ("--min-keep", "true")]
)
def test_a_value_that_is_refused_in_python_is_refused_by_a_flag(flag):
    assert main(["plan", "digits:student", "--input", "1,1,8,8", "--macs", "0.5", *flag]) == 2


def as_yaml(value: Any) -> str:
    """Return a value in the form of --set."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {number}" for key, number in value.items()) + "}"
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value).lower()


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({"round_to": ["8"]}, {"round_to": 8}),
        ({"round_to": ["auto"], "norm": 2, "kinds": None, "exclude": []}, {"round_to": "auto", "norm": 2}),
        ({"kinds": ["head=2", "head dim=0.5"]}, {"kinds": {"head": 2, "head dim": 0.5}}),
        ({"kinds": ["block"]}, {"kinds": ["block"]}),
        ({"exclude": ["a=b"]}, {"exclude": ["a=b"]}),
    ],
)
def test_texts_of_flags_become_values(flags, options):
    assert given_options(flags, PlanOptions) == options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"round_to": ["8", "4"]}, "--round-to is given 2 times"),
        ({"kinds": ["head=many"]}, r"--kinds head=many: 'many' is not a number"),
    ],
)
def test_a_flag_that_cannot_be_read_is_named(flags, message):
    with pytest.raises(UsageError, match=message):
        given_options(flags, PlanOptions)


@pytest.mark.parametrize("options", [{"kinds": {"head": 2}}, {"kinds": ["head", "rank"]}, {"round_to": {"head": 8}}])
def test_a_kind_that_the_model_does_not_have_gives_a_note(graph, options):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.9), **options)
    (option,) = options
    (note,) = (note for note in plan.notes if note.startswith(f"{option}="))
    assert note.startswith(f"{option}='head' has no effect: Sequential has no units of this kind")
    assert not any("has no effect" in note for note in kirsch.plan(graph, kirsch.Goal(macs=0.9)).notes)
