"""Forecasts of recipes agree with their runs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from kirsch import figures
from kirsch.cli.jobs import forecast_lines
from kirsch.distillation import steps as training_steps
from kirsch.errors import GoalError, OutputError, ShapeError, UsageError
from kirsch.recipes import forecast as source
from kirsch.recipes import runner
from kirsch.recipes.forecast import forecast
from kirsch.recipes.recipe import read_recipe
from kirsch.tables import plain

BOTH = """
data: {source: "nets.py:stripes", batch_size: 16}
teacher: {model: "nets.py:teacher"}
student: {model: "nets.py:student"}
steps:
"""

TRAINED_TEACHER = ("train=null", "student=null", "distill=null", "recover=null", "export=null", "measure=null")


def costs(steps):
    return {step["key"]: (step["parameters"], step["macs"]) for step in steps}


def test_forecast_costs_equal_those_of_the_run(job, finished):
    found = costs(forecast(job.recipe(), base=job.base)["steps"])
    real = {model["key"]: (model["parameters"], model["macs"]) for model in finished[1].metrics["models"]}
    assert list(found) == ["train", "distill", "prune", "recover", "export", "measure"]
    assert (found["train"], found["distill"]) == (real["teacher"], real["student"])
    assert found["prune"] == found["recover"]
    assert found["prune"][1] <= 0.6 * found["distill"][1]
    assert found["export"] == found["measure"] == found["prune"]


def test_forecast_plan_of_a_trained_model_equals_the_plan_of_the_run(job, monkeypatch):
    monkeypatch.setattr(runner.Job, "check_usable", lambda *_: None)  # it would refuse random weights
    changes = (*TRAINED_TEACHER, "prune.importance=magnitude")  # others are computed from fewer samples
    found = forecast(job.recipe(*changes), base=job.base)
    metrics = job.run_recipe(*changes).metrics
    assert list(found["plans"].values()) == metrics["provenance"]["plans"]
    assert " · ".join(found["goals"]) == metrics["goal"]["text"]
    assert costs(found["steps"]) == {
        step: (model["parameters"], model["macs"])
        for step, model in zip(("evaluate", "prune"), metrics["models"], strict=True)
    }


def test_forecast_shows_the_cost_that_the_steps_reach_for_each_limit(job):
    found = forecast(job.recipe("prune.goal.macs=0.5", "goal={macs: 0.6}", *TRAINED_TEACHER), base=job.base)
    before, after = (found["plans"]["prune"]["cost"][side]["macs"] for side in ("before", "after"))
    share = f"MACs {100 * after / before:.1f} % of the teacher"
    lines = [plain(line) for line in forecast_lines(found)]
    assert lines[1:3] == [
        "goal         prune: MACs ≤ 50 % of the teacher",
        "             at the end: MACs ≤ 60 % of the teacher",
    ]
    first = lines.index(f"reached      prune: {share}, goal ≤ 50 %")
    assert lines[first + 1] == f"             at the end: {share}, goal ≤ 60 %"


@pytest.mark.parametrize(
    ("groups", "blocks", "text"),
    [
        (1, 0, "by pruning 1 group; units ranked by the importance influence, widths by the ranking milp"),
        (2, 0, "by pruning 2 groups; units ranked by the importance influence, widths by the ranking milp"),
        (0, 1, "by removing 1 block; blocks ranked by the importance influence"),
        (0, 3, "by removing 3 blocks; blocks ranked by the importance influence"),
    ],
)
def test_forecast_counts_groups_or_blocks_and_names_their_importance(job, groups, blocks, text):
    found = forecast(job.recipe(*TRAINED_TEACHER), base=job.base)
    assert found["plans"]["prune"]["method"]["importance"] == "taylor"
    method = {"importance": "influence", "ranking": "milp"}
    found["plans"]["prune"] |= {"groups": [{}] * groups, "blocks": [{}] * blocks, "method": method}
    (line,) = [plain(line) for line in forecast_lines(found) if plain(line).startswith("plan ")]
    weights = "the weights that nets.py:teacher comes with"
    assert line.endswith(f" {text}, with {weights}")


def test_goal_that_the_steps_do_not_reach_is_refused_by_a_forecast(job):
    with pytest.raises(
        GoalError,
        match=r"the goal is ≤ 0\.1 %\..* each step leaves: prune .*Lower `goal.macs` of the step 'prune', or raise",
    ):
        forecast(job.recipe("goal.macs=0.001"), base=job.base)


def test_forecast_cost_of_a_plan_with_ranking_local_equals_the_cost_after_training(job):
    changes = ("prune.ranking=local", "student=null", "distill=null", "recover=null", "export=null", "measure=null")
    found = forecast(job.recipe(*changes), base=job.base)
    (plan,) = job.run_recipe(*changes).metrics["provenance"]["plans"]
    assert found["plans"]["prune"]["cost"] == plan["cost"]


def test_recovery_of_a_pruned_teacher_is_forecast(job):
    """The timed training steps must not use the same object as teacher and student."""
    found = forecast(job.recipe("student=null", "distill=null", "measure=null"), base=job.base)
    assert [step["key"] for step in found["steps"]] == ["train", "prune", "recover", "export"]
    assert all(step["seconds"] > 0 for step in found["steps"][:3])


def test_times_are_extrapolated_from_a_few_training_steps(job, monkeypatch):
    """A mocked clock measures six seconds for three batches; an epoch has three batches."""
    ticks = itertools.count(0, 6)
    monkeypatch.setattr(training_steps, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = forecast(job.recipe(), base=job.base)
    seconds = {step["key"]: step["seconds"] for step in found["steps"]}
    pruning = seconds.pop("prune")  # measured by another clock
    assert 1.0 < pruning < 60.0
    assert seconds == {
        "train": 6 * 6.0,
        "distill": 4 * 6.0,
        "recover": 3 * 6.0,
        "export": None,  # known only after an export
        "measure": None,
    }
    assert found["seconds"] == pytest.approx(13 * 6.0 + pruning)
    lines = [plain(line) for line in forecast_lines(found)]
    assert [line.split()[1] for line in lines if "not timed" in line] == ["export", "measure"]
    (line,) = [line for line in lines if line.startswith("time ")]
    total = figures.seconds(found["seconds"])
    assert f"about {total}, without export and measure, on this machine under its current load" in line
    ticks = itertools.count(0, 6)
    batch_of_eight = forecast(job.recipe("data.batch_size=8"), base=job.base)
    assert batch_of_eight["steps"][0]["seconds"] == 6 * 6.0 / 3 * 6


def test_forecast_without_a_folder_writes_nothing(job):
    before = sorted(path.name for path in job.base.rglob("*") if path.suffix != ".pyc")
    found = forecast(job.recipe(), base=job.base)
    assert sorted(path.name for path in job.base.rglob("*") if path.suffix not in (".pyc", "")) == [
        name for name in before if "." in name
    ]
    assert found["data"] == {"name": "stripes", "train": 48, "validation": 30, "test": 60}


def test_forecast_writes_only_recipe_and_plan_to_its_folder(job):
    found = forecast(job.recipe(), base=job.base, folder=job.folder)
    assert sorted(path.name for path in job.folder.iterdir()) == ["plan.json", "recipe.yaml"]
    assert read_recipe(job.folder / "recipe.yaml") == job.recipe()
    assert found["plans"]["prune"]["goal"] == {"macs": 0.6}


def test_recipe_without_pruning_has_no_plan(job):
    found = forecast(job.recipe("prune=null"), base=job.base, folder=job.folder)
    assert (found["plans"], found["plan_weights"]) == ({}, None)
    assert [path.name for path in job.folder.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ("prune.goal.macs=0.001", GoalError, "No plan for Net reaches the goal"),
        ("teacher.model=nets.py:five_classes", ShapeError, r"the data stripes has 3 classes"),
        ("measure.threads=5000", UsageError, r"'measure' has threads=5000"),
    ],
)
def test_errors_of_the_run_are_raised_by_the_forecast(job, change, error, sentence):
    with pytest.raises(error, match=sentence):
        forecast(job.recipe(change), base=job.base, folder=job.folder)
    assert not job.folder.exists()


def test_unwritable_folder_is_named(job):
    (job.base / "file").write_text("")
    with pytest.raises(OutputError, match=r"file is a file\."):
        forecast(job.recipe(*TRAINED_TEACHER), base=job.base, folder=job.base / "file")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [(("measure=null",), ["onnxscript", "onnxruntime"]), (("export=null", "measure=null"), [])],
)
def test_packages_that_the_steps_need_and_that_are_not_installed_are_listed(job, monkeypatch, changes, missing):
    monkeypatch.setattr(source, "find_spec", lambda name: None if name != "onnx" else object())
    changes = ("train=null", "student=null", "distill=null", "recover=null", *changes)
    assert forecast(job.recipe(*changes), base=job.base)["missing"] == missing


def test_the_reference_of_a_model_is_listed_for_the_first_step_that_uses_it(job):
    recipe = read_recipe(f"{BOTH}- train\n- distill\n- distill\n- prune: {{goal: {{macs: 0.6}}}}\n- recover\n")
    models = {step["key"]: step["model"] for step in forecast(recipe, base=job.base)["steps"]}
    none = dict.fromkeys(("distill-2", "prune", "recover"))
    assert models == {"train": "nets.py:teacher", "distill": "nets.py:student", **none}
    recipe = read_recipe(f"{BOTH}- train: {{model: student}}\n- distill\n")
    models = {step["key"]: step["model"] for step in forecast(recipe, base=job.base)["steps"]}
    assert models == {"evaluate": "nets.py:teacher", "train": "nets.py:student", "distill": None}


LOADED = """

def loaded():
    data = stripes(seed=0)
    train = [(data.train.inputs[i : i + 16], data.train.labels[i : i + 16]) for i in (0, 16, 32)]
    return DataSet("loaded", train, data.validation, data.test, classes=data.classes)
"""


def test_data_of_a_loader_is_forecast_and_run(job):
    (job.base / "nets.py").write_text((job.base / "nets.py").read_text() + LOADED)
    changes = ("data.source=nets.py:loaded", "student=null", "distill=null", "export=null", "measure=null")
    found = forecast(job.recipe(*changes), base=job.base)
    assert found["data"] == {"name": "loaded", "train": None, "validation": 30, "test": 60}
    assert (
        plain(forecast_lines(found)[3])
        == "data         loaded: a loader for training, 30 for validation, 60 for testing"
    )
    assert all(step["seconds"] > 0 for step in found["steps"] if step["key"] in ("train", "recover"))
    assert job.run_recipe(*changes).metrics["measured"]["data"]["train"] is None
    assert job.notes()[0].startswith("data.batch_size applies to evaluations only")
