"""Changes of a recipe by `--set` and environment variables that do not fit the recipe are refused with a fix."""

from __future__ import annotations

import pytest

from kirsch.errors import RecipeError
from kirsch.recipes.recipe import read_recipe

RECIPE = """
seed: 1
teacher: {model: 'm:t'}
steps:
- prune: {goal: {macs: 0.5}, round_to: 4}
- recover: {schedule: multistep, milestones: [0.5, 0.75]}
- prune: {goal: {macs: 0.5}}
"""


def refusal(*changes, text=RECIPE, environment=None):
    """Return the message of the error for changes of a recipe."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, changes, environment)
    return str(caught.value)


@pytest.mark.parametrize(
    "change", ["steps.0.prune.norm=1", "steps.5.prune.norm=1", "steps.x=1", "steps.0=", "steps=[]"]
)
def test_steps_are_changed_by_their_keys(change):
    assert refusal(change).startswith(
        f"--set {change}: 'steps' is not a section or a step of the recipe. Its steps: prune, recover, prune-2. "
        "Its sections: version, name, seed, task, data, teacher, student, goal. "
    )


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ("distill.weight=1", "Change one of these."),
        ("teachr.model=x", "Did you mean 'teacher'?"),
        ("recover-2.epochs=1", "Did you mean 'recover'?"),
        ("PRUNE.norm=1", "Did you mean 'prune'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_ones(change, fix):
    assert refusal(change).endswith(f"student, goal. {fix}")


def test_a_step_that_is_not_there_does_not_suggest_a_section():
    """The names "recover" and "teacher" share four letters in order."""
    text = RECIPE.replace("- recover: {schedule: multistep, milestones: [0.5, 0.75]}\n", "")
    assert refusal("recover.epochs=3", text=text).endswith("Change one of these.")


@pytest.mark.parametrize("steps", ["5", "prune", "[{1: {}}]", "[3]", ""])
def test_steps_of_another_type_are_refused_after_a_change(steps):
    refusal("prune.norm=1", text=f"teacher: {{model: 'm:t'}}\nsteps: {steps}\n")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed.x=1", "seed is 1, which has no keys. Set the whole value: seed={x: ...} if it may be a dict."),
        (
            "prune.round_to.head=2",
            "prune.round_to is 4, which has no keys. Set the whole value: prune.round_to={head: ",
        ),
        ("recover.milestones.2=0.9", "recover.milestones is a list of 2, and has no item '2'. Items are numbered from"),
        ("recover.milestones.2=0.9", "Set an item that exists, or the whole list: recover.milestones=[...]."),
        ("recover.milestones.x=1", "recover.milestones is a list of 2, and has no item 'x'."),
        ("recover.milestones.-1=1", "is not a change of a key"),
        (
            "prune.exclude.0=head",
            "prune.exclude is not in the recipe, so it has no item '0'. Set the whole list: prune.exclude=[...].",
        ),
        ("recover.objective.terms.0.weight=1", "recover.objective.terms is not in the recipe, so it has no item '0'."),
        ("prune=3", "steps[0]: a step is {'prune': 3}; expected its name with its options."),
        ("recover.lr=1", "Did you mean 'learning_rate'?"),
    ],
)
def test_a_path_through_a_value_or_a_missing_item_is_refused_with_the_whole_value_as_fix(change, sentence):
    assert sentence in refusal(change)


def test_an_item_of_a_list_can_be_set():
    assert read_recipe(RECIPE, ["recover.milestones.1=0.9"]).all_steps["recover"].milestones == (0.5, 0.9)


NESTED = """
teacher: {model: 'm:t'}
goal: {macs: 0.5}
steps:
- prune: {goal: {macs: 0.5}}
- recover:
    objective:
      terms:
      - {loss: dkd, weight: 0.9}
"""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "prune.goal.macs=50%",
            "steps[0].prune.goal.macs: expected a number above 0 and below 1, found '50%'. For half",
        ),
        ("prune.goal.macs=3", "steps[0].prune.goal.macs: the goal macs=3 is out of range."),
        ("recover.objective.label_weight=-1", "steps[1].recover.objective.label_weight: the objective is invalid: "),
        ("recover.objective.terms.0.loss=kdd", "steps[1].recover.objective.terms.0.loss: there is no loss 'kdd'."),
        (
            "recover.objective.terms.0.options={betta: 3}",
            "steps[1].recover.objective.terms.0.options: there is no option",
        ),
        ("task=classify", "task: there is no task 'classify'."),
    ],
)
def test_a_wrong_value_inside_a_goal_or_an_objective_is_reported_with_its_change(change, sentence):
    assert f"  --set {change}: {sentence}" in refusal(change, text=NESTED)


def test_a_wrong_limit_is_reported_with_its_line():
    text = NESTED.replace("- prune: {goal: {macs: 0.5}}", "- prune:\n    goal:\n      macs: 50%")
    assert "  line 7: steps[0].prune.goal.macs: expected a number above 0 and below 1, found '50%'." in refusal(
        text=text
    )


REMOVAL = {"KIRSCH_RECIPE__RECOVER": "null"}


@pytest.mark.parametrize(
    ("changes", "environment", "steps"),
    [
        (["recover=null"], {}, ["prune", "prune-2"]),
        (["recover.epochs=3", "recover=null"], {}, ["prune", "prune-2"]),
        (["recover=null", "recover.epochs=3"], {}, ["prune", "recover", "prune-2"]),
        (["recover={epochs: 3}"], REMOVAL, ["prune", "recover", "prune-2"]),
        (["prune.norm=1"], REMOVAL, ["prune", "prune-2"]),
    ],
)
def test_the_last_change_of_a_step_decides_whether_it_is_removed(changes, environment, steps):
    found = read_recipe(RECIPE, changes, environment).all_steps
    assert list(found)[1:] == steps
    assert "recover" not in steps or found["recover"].epochs == 3


def test_a_removed_step_that_is_added_again_has_no_options_of_the_file():
    assert read_recipe(RECIPE, ["prune=null", "prune.goal.macs=0.4"]).all_steps["prune"].round_to == "auto"


def test_the_fix_for_the_name_of_a_preset_gives_the_form_with_label_weight():
    text = RECIPE.replace("{schedule: multistep, milestones: [0.5, 0.75]}", "{objective: at}")
    change = "recover.objective.label_weight=0.5"
    assert "recover.objective is 'at', which has no keys. Set the whole value: recover.objective={label_" in refusal(
        change, text=text
    )
    assert "Give the name of a preset such as dkd, {preset: at, label_weight: 0.5}" in refusal(change)


def test_an_environment_variable_names_a_repeated_step_with_an_underscore():
    """A shell cannot assign a variable with a hyphen in its name."""
    found = read_recipe(RECIPE, (), {"KIRSCH_RECIPE__PRUNE_2__NORM": "1"})
    assert (found.all_steps["prune"].norm, found.all_steps["prune-2"].norm) == (2, 1)
    sentence = "KIRSCH_RECIPE__PRUNE_3__NORM: 'prune_3' is not a section or a step of the recipe."
    assert refusal(environment={"KIRSCH_RECIPE__PRUNE_3__NORM": "1"}).startswith(sentence)
