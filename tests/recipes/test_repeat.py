"""The item `repeat` of a recipe: rounds of pruning and recovery whose goals approach the last one."""

from __future__ import annotations

import pytest
import torch

import kirsch
from kirsch.errors import GoalError, Interrupted, RecipeError, UsageError
from kirsch.graph.goal import spaced
from kirsch.recipes.forecast import forecast
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.runner import resume
from kirsch.steps import Export, Prune, Recover, repeat
from tiny import same_weights

RECIPE = """
name: rounds
data: {source: "nets.py:stripes", batch_size: 16}
teacher: {model: "nets.py:teacher"}
steps:
- train: {epochs: 4, learning_rate: 0.02, optimizer: adamw}
- repeat:
    times: 3
    goal: {macs: 0.4}
    steps:
    - prune:
        round_to: 1
    - recover: {epochs: 1, learning_rate: 0.02}
- export
"""

STEPS = ["train", "prune", "recover", "prune-2", "recover-2", "prune-3", "recover-3", "export"]


def goals(recipe):
    return [step.goal.macs for step in recipe.steps if isinstance(step, Prune)]


def test_the_steps_of_each_round_stand_in_place_of_the_item():
    recipe = read_recipe(RECIPE)
    assert list(recipe.all_steps) == STEPS
    assert goals(recipe) == spaced(0.4, 3, "cubic")
    assert {step.goal_of for step in recipe.steps if isinstance(step, Prune)} == {"job"}
    assert {step.round_to for step in recipe.steps if isinstance(step, Prune)} == {1}
    assert read_recipe(recipe.to_yaml()) == recipe


def test_steps_in_python_equal_those_of_a_recipe():
    steps = repeat([Prune(round_to=1), Recover(epochs=1, learning_rate=0.02)], goal=kirsch.Goal(macs=0.4), times=3)
    assert tuple(steps) == read_recipe(RECIPE).steps[1:-1]
    linear = repeat([Prune()], goal=kirsch.Goal(macs=0.4, size=0.7), times=3, spacing="linear")
    assert [step.goal.to_dict() for step in linear] == [
        pytest.approx({"macs": macs, "size": size}) for macs, size in ((0.8, 0.9), (0.6, 0.8), (0.4, 0.7))
    ]


@pytest.mark.parametrize(
    ("changes", "key", "name", "value"),
    [
        (["recover-3.epochs=9"], "recover-3", "epochs", 9),
        (["recover-3.epochs=9", "repeat.times=4"], "recover-3", "epochs", 9),
        (["repeat.steps.1.recover.epochs=7"], "recover-2", "epochs", 7),
        (["repeat.goal.macs=0.3"], "prune-3", "goal", kirsch.Goal(macs=0.3)),
        (["repeat.spacing=linear"], "prune", "goal", kirsch.Goal(macs=spaced(0.4, 3, "linear")[0])),
        (["prune-2.goal.macs=0.6"], "prune-2", "goal", kirsch.Goal(macs=0.6)),
        (["repeat.times=1", "prune.round_to=4"], "prune", "round_to", 4),
    ],
)
def test_keys_of_the_item_and_of_single_rounds_can_be_set(changes, key, name, value):
    assert getattr(read_recipe(RECIPE, changes).all_steps[key], name) == value


def test_the_environment_sets_the_number_of_rounds_and_an_item_can_be_removed():
    assert len(goals(read_recipe(RECIPE, (), {"KIRSCH_RECIPE__REPEAT__TIMES": "5"}))) == 5
    assert list(read_recipe(RECIPE, ["repeat=null", "export=null"]).all_steps) == ["train"]
    assert list(read_recipe(RECIPE, ["recover-2=null"]).all_steps) == [*STEPS[:4], "prune-3", "recover-2", "export"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("round_to: 1", "round_too: 1", "line 12: steps[1].repeat.steps[0].prune.round_too: unknown key."),
        ("times: 3", "times: 0", "line 8: steps[1].repeat.times: expected a whole number between 1 and 1000, found 0."),
        ("times: 3", "tims: 3", "line 8: steps[1].repeat.tims: unknown key. Known: goal, times, spacing, steps. Did"),
        ("macs: 0.4", "macs: 4", "line 9: steps[1].repeat.goal.macs: the goal macs=4 is out of range."),
        ("    goal: {macs: 0.4}\n", "", "line 7: steps[1].repeat.goal: this key is required"),
        (
            "round_to: 1",
            "goal: {macs: 0.5}",
            "line 10: steps[1].repeat.steps: the step prune in the steps to repeat has",
        ),
        ("round_to: 1", "goal_of: step", "has its own `goal_of`. Remove goal and goal_of of this step"),
        ("- recover:", "- prune:", "line 10: steps[1].repeat.steps: the steps to repeat contain 2 steps prune."),
        ("- prune:\n        round_to: 1", "- evaluate", "the steps to repeat contain 0 steps prune. Each round needs"),
        ("- recover: {epochs: 1, learning_rate: 0.02}", "- repeat", "the steps to repeat contain a repetition."),
        (
            "- recover: {epochs: 1, learning_rate: 0.02}",
            "- 5",
            "line 13: steps[1].repeat.steps[1]: a step is 5; expected",
        ),
        ("- recover: {epochs: 1, learning_rate: 0.02}", "- recovr", "there is no step 'recovr'."),
        ("- export", "- exprt", "line 14: steps[2]: there is no step 'exprt'. Known: distill, "),
        ("- recover: {epochs: 1, learning_rate: 0.02}", "- export", "steps[1].repeat.steps[1]: there are two steps"),
    ],
)
def test_a_problem_is_named_once_with_its_line_and_place(old, new, sentence):
    with pytest.raises(RecipeError) as caught:
        read_recipe(RECIPE.replace(old, new))
    assert sum(sentence in line for line in caught.value.what.split("\n")) == 1, caught.value.what


@pytest.mark.parametrize("item", ["- repeat", "- repeat: 3", "- repeat: [prune]"])
def test_an_item_without_its_keys_is_refused_with_the_form(item):
    with pytest.raises(RecipeError, match=r"expected a section with the keys of a repetition|this key is required"):
        read_recipe(f"teacher: {{model: 'm:t'}}\nsteps:\n{item}\n")


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([Recover()], "contain 0 steps prune"),
        ([Prune(), Prune()], "contain 2 steps prune"),
        ([Prune(goal=kirsch.Goal(macs=0.5))], "has its own `goal`"),
        ([Prune(goal_of="job")], "has its own `goal_of`"),
    ],
)
def test_steps_to_repeat_that_have_no_single_prune_are_refused(steps, sentence):
    with pytest.raises(UsageError, match=sentence):
        repeat(steps, goal=kirsch.Goal(macs=0.5), times=2)


@pytest.fixture(scope="module")
def rounds(new_job):
    """Finished run, which tests must not change."""
    job = new_job()
    (job.base / "recipe.yaml").write_text(RECIPE)
    return job, job.run_recipe()


def test_each_round_reaches_its_goal_as_a_fraction_of_the_first_model(rounds):
    job, outcome = rounds
    assert job.steps("step_end") == STEPS
    macs = {model["key"]: model["macs"] for model in outcome.metrics["models"]}
    items = {item["name"]: item for item in outcome.metrics["goal"]["items"]}
    models, limits = ("pruned", "pruned-2", "pruned-3"), spaced(0.4, 3, "cubic")
    for key, model, limit in zip(STEPS[1:7:2], models, limits, strict=True):
        item = items[f"{key}.macs"]
        assert (item["limit"], item["value"], item["met"]) == (limit, macs[model] / macs["teacher"], True)
        assert item["text"].startswith(f"{key}: MACs ")
        assert " of the teacher, goal " in item["text"]
    assert outcome.exit_code == 0


def test_forecast_makes_a_plan_for_each_round_with_the_cost_of_the_run(rounds):
    job, outcome = rounds
    found = forecast(job.recipe(), base=job.base)
    assert list(found["plans"]) == ["prune", "prune-2", "prune-3"]
    assert len(found["expected"]) == 3
    last = found["plans"]["prune-3"]["cost"]["after"]["macs"] / found["plans"]["prune"]["cost"]["before"]["macs"]
    assert last <= 0.4
    assert outcome.metrics["provenance"]["recipe"] == job.recipe().to_yaml()


def test_run_interrupted_in_the_second_round_continues_to_the_same_model(rounds, new_job):
    job = new_job()
    (job.base / "recipe.yaml").write_text(RECIPE)

    def stop():
        return Interrupted("asked") if "prune-2" in job.steps("step_end") else None

    with pytest.raises(Interrupted):
        job.run_recipe(stop=stop)
    outcome = resume(job.folder, listen=job.events.append)
    assert job.steps("step_kept") == STEPS[:4]
    assert same_weights(outcome.model, rounds[1].model)


def test_a_goal_that_a_round_cannot_reach_is_refused_before_the_first_step_with_the_key_of_the_round(new_job):
    job = new_job()
    (job.base / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(GoalError, match=r"^The step 'prune-3' cannot prune\. No plan .* macs 4\d?% is requested"):
        job.run_recipe("repeat.goal.macs=0.4", "repeat.spacing=linear", "prune-3.min_keep=1.0")
    assert not job.folder.exists()


def test_a_round_whose_goal_is_met_removes_nothing_and_the_run_goes_on(new_job):
    job = new_job()
    (job.base / "recipe.yaml").write_text(RECIPE)
    outcome = job.run_recipe("prune.goal.macs=0.41", "prune-2.goal.macs=0.5", "export=null", "train.epochs=2")
    macs = {model["key"]: model["macs"] for model in outcome.metrics["models"]}
    assert macs["pruned-2"] == macs["pruned"] > macs["pruned-3"]
    assert any("which removes nothing" in note for note in job.notes())
    assert outcome.exit_code == 0


def test_a_later_prune_step_can_prune_to_the_goal_of_the_job(new_job):
    job = new_job()
    steps = "- prune: {goal: {macs: 0.7}}\n- prune: {goal_of: job, round_to: 1}\n- export\n"
    (job.base / "recipe.yaml").write_text(f"{RECIPE[: RECIPE.index('- repeat')]}{steps}goal: {{macs: 0.5}}\n")
    found = forecast(job.recipe("export=null"), base=job.base)
    last = found["plans"]["prune-2"]["cost"]["after"]["macs"] / found["plans"]["prune"]["cost"]["before"]["macs"]
    assert 0.45 < last <= 0.5
    with pytest.raises(RecipeError, match=r"'prune-2' has no goal"):
        job.recipe("goal.macs=null")


def test_compress_runs_repeated_steps(trained, tmp_path):
    model, _, data = trained
    steps = repeat([Prune(round_to=1), Recover(epochs=1, learning_rate=0.02)], goal=kirsch.Goal(size=0.5), times=2)
    result = kirsch.compress(model, data, steps=[*steps, Export()], folder=tmp_path / "run", batch_size=16)
    example = data.test.inputs[:1]
    size = [kirsch.trace(net, torch.as_tensor(example)).cost.size for net in (model, result.model)]
    assert 0.45 < size[1] / size[0] <= 0.5
    assert [item["name"] for item in result.metrics["goal"]["items"]] == ["prune.size", "prune-2.size"]
