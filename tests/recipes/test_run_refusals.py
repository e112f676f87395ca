"""Folders, recipes, models and machines on which a run is refused with a fix, and folders that a run may use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from folders import contents
from kirsch.deploy import steps
from kirsch.errors import (
    GoalError,
    Interrupted,
    KirschError,
    LoadError,
    NumericError,
    OutputError,
    RecipeError,
    ShapeError,
    UnknownNameError,
    UsageError,
)
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.runner import materials_of, resume
from tiny import NO_EXPORT, STEPS


def assert_no_step_started(job):
    assert [event["event"] for event in job.events if event["event"] != "start"] == []
    assert not list(job.folder.glob("checkpoints/*/*"))


def test_run_of_another_recipe_is_refused_with_the_differences(done):
    before = contents(done.folder)
    sentence = (
        r"The folder .*run holds a run with other steps or options\. "
        r"In the run and now: prune\.goal\.macs 0\.6 and 0\.5; recover only in the run; seed 0 and 1\. "
        r"Choose another folder\. To continue the run: kirsch resume .*run\.$"
    )
    with pytest.raises(RecipeError, match=sentence):
        done.run_recipe("seed=1", "prune.goal.macs=0.5", "recover=null")
    assert contents(done.folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "recipe.yaml", "plan.json", ".hidden"])
def test_folder_with_other_files_is_refused_and_not_changed(job, name):
    job.folder.mkdir()
    (job.folder / name).write_text("a file of the user")
    (job.folder / "inner").mkdir()
    (job.folder / ".tmp-user").write_text("named like a temporary file of Kirsch")
    (job.folder / "inner" / ".tmp-user").write_text("a file of the user")
    before = contents(job.folder)
    sentence = r"The folder .*run is not empty\. It contains '.*' and is not a run folder\. Choose another folder\."
    with pytest.raises(OutputError, match=sentence):
        job.run_recipe()
    assert contents(job.folder) == before
    assert job.events == []


def test_run_killed_at_its_start_is_started_again(job):
    """Only recipe.yaml was written before the run was killed."""
    job.folder.mkdir()
    (job.folder / ".lock").touch()
    (job.folder / ".tmp-half").write_text("")
    (job.folder / "recipe.yaml").write_text(job.recipe(*NO_EXPORT).to_yaml())
    with pytest.raises(Interrupted):
        job.run_recipe(*NO_EXPORT, stop=lambda: Interrupted("asked"))
    assert not (job.folder / ".tmp-half").exists()
    assert json.loads((job.folder / "run.json").read_text())["base"] == ".."


def test_run_may_use_the_folder_of_its_dry_run(job):
    recipe = job.recipe(*NO_EXPORT)
    job.folder.mkdir()
    (job.folder / "recipe.yaml").write_text(recipe.to_yaml())
    (job.folder / "plan.json").write_text("{}")
    with pytest.raises(Interrupted):
        job.run_recipe(*NO_EXPORT, stop=lambda: Interrupted("asked"))
    assert (job.folder / "run.json").is_file()


def test_folder_in_use_is_refused_until_its_process_ends(done):
    hold = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True), input()"
    command = [sys.executable, "-c", hold, str(done.folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = contents(done.folder)
        try:
            with pytest.raises(OutputError, match=r"The run .*run is in use\. Another process runs in it\."):
                resume(done.folder, listen=done.events.append)
        finally:
            other.kill()
        assert contents(done.folder) == before
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_kept") == STEPS


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (["prune.goal.macs=0.001"], GoalError, r"No plan for Net reaches the goal: macs"),
        (["prune.goal.macs=0.05", "prune.min_keep=0.9"], GoalError, r"No plan for Net reaches the goal: macs"),
        (["prune.goal={}"], RecipeError, r"a goal needs at least one limit"),
        (["prune.importance=magnitud"], UnknownNameError, r"no importance 'magnitud'\..*Did you mean 'magnitude'"),
        (["prune.exclude=[third]"], KirschError, r"third"),
        (
            ["teacher.model=nets.py:five_classes"],
            ShapeError,
            r"logits of shape \(5,\); the data stripes has 3 classes\.",
        ),
        (
            ["student.model=nets.py:five_classes"],
            ShapeError,
            r"logits of shape \(5,\); the data stripes has 3 classes\.",
        ),
        (["student.model=nets.py:nobody"], LoadError, r"There is no callable of nets\.py named 'nobody'\."),
        (["data.source=nets.py:nobody"], LoadError, r"There is no callable of nets\.py named 'nobody'\."),
        (["data.options.colors=3"], UsageError, r"does not take these options\. got an unexpected .*'colors'"),
        (
            ["measure.threads=5000"],
            UsageError,
            r"The step 'measure' has threads=5000; this machine has \d+ usable cores\. Lower threads",
        ),
    ],
)
def test_invalid_recipe_is_refused_before_training(job, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        job.run_recipe(*changes)
    assert_no_step_started(job)


def test_finished_step_measure_is_kept_on_a_machine_with_fewer_cores(done, monkeypatch):
    monkeypatch.setattr(steps, "usable_cores", lambda: 0)
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_kept") == STEPS


def test_full_disk_is_reported_before_training(job, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2_000_000))
    with pytest.raises(OutputError, match=r"The folder .*run has 2 MB free; the work needs about 10 MB\."):
        job.run_recipe()
    assert_no_step_started(job)


def test_unwritable_folder_is_reported_before_data_is_loaded(job):
    (job.base / "file").write_text("")
    with pytest.raises(OutputError, match=r"The folder .*file/run cannot be written\. Not a directory\."):
        job.run_recipe("data.source=nets.py:nobody", folder=job.base / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "step", "why"),
    [
        (
            ["train=null", "teacher.model=nets.py:Constant"],
            "evaluate",
            r"It predicts one class .*Give a teacher with trained weights, or add a step `train`",
        ),
        (
            ["train.learning_rate=1e-9"],
            "train",
            "It (is not better than chance|predicts one class).*Lower the",
        ),
        (
            ["student.model=nets.py:Constant", "distill.learning_rate=1e-9", "prune=null"],
            "distill",
            "It predicts one.*Lower the",
        ),
    ],
)
def test_unusable_model_ends_the_run_after_its_step(job, changes, step, why):
    sentence = rf"The model is unusable after the step '{step}': \d+\.\d% of 60 correct, chance is 33\.3%\. {why}"
    with pytest.raises(NumericError, match=sentence) as caught:
        job.run_recipe(*changes, *NO_EXPORT)
    assert caught.value.exit_code == 6
    assert job.steps("step_end") == (["train"] if step == "distill" else [])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["teacher.model=null"], "teacher.model"),
        (["data.source=null"], "data.source"),
        (["student={model: null}"], "student.model"),
    ],
)
def test_a_reference_that_is_null_is_named(changes, key):
    recipe = read_recipe("teacher: {model: 'digits:teacher'}\nsteps: [prune]\ngoal: {macs: 0.5}\n", changes)
    with pytest.raises(LoadError, match=f"`{key}` of the recipe 'recipe' is null, so .* Set {key}\\."):
        materials_of(recipe, Path())
