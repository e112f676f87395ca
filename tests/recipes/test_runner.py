"""Running a recipe: what is kept, what is done again, and what is refused before any work."""

from __future__ import annotations

import collections
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

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
from kirsch.recipes import runner, soundness
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.runner import new_folder_name, resume
from kirsch.recipes.tasks.data import DataSet, Split

STAGES = ["teacher", "distill", "prune", "recover", "export", "measure"]
MODELS_ALONE = ("export=null", "measure=null")


def contents(folder):
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(first, second):
    one, two = (model if isinstance(model, dict) else model.state_dict() for model in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_nothing_was_done(job):
    assert [event["event"] for event in job.heard if event["event"] != "start"] == []
    assert not list(job.folder.glob("checkpoints/*/*"))


# ------------------------------------------------------------------------------------------------ what is kept


def test_a_run_does_its_stages_in_order_and_tells_each(finished):
    job, outcome = finished
    assert job.heard[0]["event"] == "start"
    assert job.stages("stage_start") == job.stages("stage_end") == STAGES
    assert [event["number"] for event in job.heard if event["event"] == "stage_end"] == [1, 2, 3, 4, 5, 6]
    epochs = collections.Counter(event["stage"] for event in job.heard if event["event"] == "epoch")
    assert epochs == {"teacher": 6, "distill": 4, "recover": 3}
    assert job.heard[-1]["event"] == "end"
    assert (outcome.exit_code, job.heard[-1]["met"]) == (0, True)


def test_the_file_of_events_holds_what_was_told(finished):
    job, _ = finished
    lines = [json.loads(line) for line in (job.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{name: value for name, value in line.items() if name != "time"} for line in lines] == job.heard
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_a_finished_run_does_nothing_again_and_gives_the_same(finished, done):
    before = contents(done.folder)
    outcome = resume(done.folder, listen=done.heard.append)
    after = contents(done.folder)
    assert done.stages("stage_kept") == STAGES
    assert done.stages("stage_start") == done.notes() == []
    assert after.keys() == before.keys()
    written_anew = {"events.jsonl", "metrics.json", "report.html", "manifest.json", "run.json"}
    assert {name for name in before if before[name] != after[name]} <= written_anew
    assert equal(outcome.model, finished[1].model)
    assert not outcome.model.training
    assert outcome.metrics | {"created": ""} == finished[1].metrics | {"created": ""}


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [("goal.max_drop", 0.4, 5), ("recover.temperature", 3.0, 3), ("prune.norm", 1, 2)],
)
def test_a_change_of_a_section_does_its_stage_and_all_after_it_again(done, key, value, first):
    """The recipe of a run is changed in its folder. Here without timing, which takes long and says nothing more."""
    changed = read_recipe(done.folder / "recipe.yaml", [f"{key}={value}", "measure=null"])
    (done.folder / "recipe.yaml").write_text(changed.to_yaml())
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_kept") == STAGES[:first]
    assert done.stages("stage_start") == STAGES[first:5]
    again = [f"The stage {stage!r} is done again: its inputs have changed." for stage in STAGES[first:5]]
    assert [note for note in done.notes() if note.startswith("The stage")] == again


@pytest.mark.parametrize("change", ["seed", "batches", "models", "data"])
def test_a_change_of_what_all_follows_from_does_all_again(done, change, monkeypatch):
    if change == "data":
        monkeypatch.setenv("NOISE", "0.7")
    else:
        path, old, new = {
            "seed": (done.folder / "recipe.yaml", "seed: 0", "seed: 1"),
            "batches": (done.folder / "recipe.yaml", "batch_size: 16", "batch_size: 8"),
            "models": (done.base / "nets.py", "Dropout(0.1)", "Dropout(0.2)"),
        }[change]
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Interrupted):
        resume(done.folder, listen=done.heard.append, stop=after(done, "first_batch"))
    changed = [note for note in done.notes() if note.endswith("The stages that this changes are done again.")]
    assert len(changed) == (change in ("seed", "batches"))
    again = ["The stage 'teacher' is done again: its inputs have changed."]
    assert done.notes()[: len(changed) + 1] == changed + again
    assert done.stages("stage_start") == ["teacher"]


def after(job, happening, times=1):
    """Stops a run as soon as something has happened so many times."""
    return lambda: Interrupted("asked") if [e["event"] for e in job.heard].count(happening) >= times else None


def test_a_training_does_not_go_on_from_a_checkpoint_of_other_settings(job):
    """Else its result would be that of neither recipe."""
    alone = ("student=null", "prune=null", "recover=null", *MODELS_ALONE)
    with pytest.raises(Interrupted):
        job.do(*alone, stop=after(job, "epoch", 3))
    assert len(list(job.folder.glob("checkpoints/teacher/step-*"))) == 2
    changed = [*alone, "teacher.train.learning_rate=0.01"]
    (job.folder / "recipe.yaml").write_text(job.recipe(*changed).to_yaml())
    found = job.do(*changed)
    assert sum("the inputs of its stage have changed" in note for note in job.notes()) == 2
    assert equal(found.model, job.do(*changed, folder=job.base / "fresh").model)


def test_what_a_kill_left_of_a_finished_stage_goes(done):
    """A run may be killed after a stage was sealed and before its last checkpoints were removed."""
    left = shutil.copytree(
        done.folder / "checkpoints" / "teacher" / "done", done.folder / "checkpoints" / "teacher" / "step-00006-000000"
    )
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_kept") == STAGES
    assert not left.exists()


def test_recovering_leaves_the_models_before_it_as_they_are(job, monkeypatch):
    """A stage that is loaded must not write its weights into the model that an earlier one has made."""
    seen = []
    metrics_of = runner.metrics_of
    monkeypatch.setattr(runner, "metrics_of", lambda job, *rest: seen.append(job) or metrics_of(job, *rest))
    alone = ("student=null", "prune=null", *MODELS_ALONE)
    for _ in range(2):
        job.do(*alone)
    assert job.stages("stage_kept") == ["teacher", "recover"]
    stored = safetensors.torch.load_file(job.folder / "checkpoints" / "teacher" / "done" / "weights.safetensors")
    for state in seen:
        assert equal(state.models["teacher"], stored)
        assert not equal(state.models["result"], stored)


def test_a_teacher_that_comes_trained_is_taken_in_inference_mode(job, monkeypatch):
    """So that the result of a run and of a resumed run are in one mode."""
    monkeypatch.setattr(runner.Job, "check_alive", lambda *_: None)
    shortest = ("teacher.train=null", "student=null", "recover=null", *MODELS_ALONE)
    assert [job.do(*shortest).model.training for _ in range(2)] == [False, False]
    assert job.stages("stage_kept") == ["teacher", "prune"]


# ------------------------------------------------------------------------------------------------ what is damaged


def test_whatever_is_damaged_is_made_again_and_comes_out_the_same(done):
    """One bit in each file but those that say what is to be done."""
    before = contents(done.folder)
    damaged = before.keys() - {".lock", "recipe.yaml", "run.json", "events.jsonl"}
    sound = {name: (done.folder / name).read_bytes() for name in damaged}
    for name in damaged:
        flip(done.folder / name)
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_start") == STAGES
    now = contents(done.folder)
    assert now.keys() == before.keys()
    bits = {
        name for name in damaged if not name.endswith(("record.json", "manifest.json", "metrics.json", "report.html"))
    }
    assert len(bits) > 12
    assert {name for name in bits if (done.folder / name).read_bytes() != sound[name]} == set()
    figures = [json.loads(side["metrics.json"]) for side in (before, now)]
    for side in figures:
        for model in side["models"]:
            del model["latency"], model["bytes"]  # timed anew; and the file names its source
    assert [figures[0][key] for key in ("models", "quality", "goal", "removed")] == [
        figures[1][key] for key in ("models", "quality", "goal", "removed")
    ]


@pytest.mark.parametrize("stage", ["teacher", "prune"])
def test_a_damaged_stage_is_named_and_those_after_it_are_kept(done, stage):
    """Its inputs are the same, so it comes out the same."""
    path = done.folder / "checkpoints" / stage / "done" / "logits.npy"
    flip(path)
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_start") == [stage]
    assert done.notes()[0] == f"The stage {stage!r} is done again: {path} does not have the sha256 of its manifest."


@pytest.mark.parametrize("name", ["model.onnx", "model/model.safetensors"])
def test_a_damaged_artifact_is_exported_again(done, name):
    path = done.folder / "artifacts" / name
    before = path.read_bytes()
    flip(path)
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_start") == ["export"]
    assert re.match(rf"The stage 'export' is done again: .*{name} ", done.notes()[0])
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_plan_that_is_damaged_or_gone_comes_back(done, damage):
    before = (done.folder / "plan.json").read_bytes()
    damage(done.folder / "plan.json")
    resume(done.folder, listen=done.heard.append)
    assert (done.folder / "plan.json").read_bytes() == before


def test_a_line_of_events_that_a_kill_has_torn_is_dropped(done):
    events = done.folder / "events.jsonl"
    before = events.read_text()
    events.write_text(before + '{"time": 1.0, "eve')
    resume(done.folder, listen=done.heard.append)
    assert events.read_text().startswith(before)
    assert [json.loads(line)["event"] for line in events.read_text().splitlines()][-1] == "end"


@pytest.mark.parametrize("content", [None, "{", '{"kirsch_run": 1, "base": 5}', "\0"])
def test_a_run_json_that_is_damaged_or_gone_is_written_again(done, content):
    """The events say where the files of the recipe lie."""
    path = done.folder / "run.json"
    before = path.read_bytes()
    path.unlink() if content is None else path.write_text(content)
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_kept") == STAGES
    assert re.match(
        r".*run\.json (is missing|does not have the sha256 of its manifest)\. It is written", done.notes()[0]
    )
    assert json.loads(path.read_bytes()).keys() == json.loads(before).keys()
    assert soundness.check(done.folder).wrong == []


def test_a_run_that_says_nowhere_what_its_files_are_relative_to_is_started_with_its_recipe(done):
    """And keeps its stages."""
    (done.folder / "run.json").unlink()
    (done.folder / "events.jsonl").unlink()
    sentence = (
        r"run cannot be resumed\. run\.json is missing or damaged, and .*kirsch compress RECIPE --run .*run keeps the"
    )
    with pytest.raises(LoadError, match=sentence):
        resume(done.folder, listen=done.heard.append)
    done.do()
    assert done.stages("stage_kept") == STAGES
    assert soundness.check(done.folder).wrong == []


def test_a_recipe_that_is_gone_is_written_again(done):
    before = (done.folder / "recipe.yaml").read_bytes()
    (done.folder / "recipe.yaml").unlink()
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_kept") == STAGES
    assert (done.folder / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"base": 5}', "\0"])
def test_a_folder_that_tells_no_run_is_not_resumed(job, content):
    job.folder.mkdir()
    if content is not None:
        (job.folder / "run.json").write_text(content)
    with pytest.raises(
        LoadError, match=r"run holds no run\. run\.json is missing or damaged\. Start it: kirsch compress"
    ):
        resume(job.folder, listen=job.heard.append)
    assert job.heard == []


def test_a_damaged_recipe_is_named(done):
    (done.folder / "recipe.yaml").write_text("teacher: [\n")
    with pytest.raises(RecipeError, match=r"run/recipe\.yaml is no YAML\. Line 2: .* or delete it: kirsch resume"):
        resume(done.folder, listen=done.heard.append)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_folder_with_the_run_of_another_recipe_is_refused_with_the_differences(done):
    before = contents(done.folder)
    sentence = (
        r"The folder .*run holds a run of another recipe\. They differ in "
        r"prune\.goal\.macs \(0\.6 and 0\.5\), recover \(.*epochs.* and None\), seed \(0 and 1\)\. "
        r"Choose another folder, or go on with it: kirsch resume\."
    )
    with pytest.raises(RecipeError, match=sentence):
        done.do("seed=1", "prune.goal.macs=0.5", "recover=null")
    assert contents(done.folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "recipe.yaml", "plan.json", ".hidden"])
def test_a_folder_with_something_else_is_refused_and_left_as_it_is(job, name):
    job.folder.mkdir()
    (job.folder / name).write_text("mine")
    (job.folder / "inner").mkdir()
    (job.folder / ".tmp-mine").write_text("looks like ours, and is not")
    (job.folder / "inner" / ".tmp-mine").write_text("mine")
    before = contents(job.folder)
    sentence = r"The folder .*run holds something else\. It has '.*', and is no run folder\. Choose another folder\."
    with pytest.raises(OutputError, match=sentence):
        job.do()
    assert contents(job.folder) == before
    assert job.heard == []


def test_a_run_that_was_killed_at_its_very_start_begins_anew(job):
    """Between its first two files there is a recipe and nothing that says that it is a run."""
    job.folder.mkdir()
    (job.folder / ".lock").touch()
    (job.folder / ".tmp-half").write_text("")
    (job.folder / "recipe.yaml").write_text(job.recipe(*MODELS_ALONE).to_yaml())
    with pytest.raises(Interrupted):
        job.do(*MODELS_ALONE, stop=lambda: Interrupted("asked"))
    assert not (job.folder / ".tmp-half").exists()
    assert json.loads((job.folder / "run.json").read_text())["base"] == ".."


def test_a_run_may_follow_its_dry_run_in_the_same_folder(job):
    recipe = job.recipe(*MODELS_ALONE)
    job.folder.mkdir()
    (job.folder / "recipe.yaml").write_text(recipe.to_yaml())
    (job.folder / "plan.json").write_text("{}")
    with pytest.raises(Interrupted):
        job.do(*MODELS_ALONE, stop=lambda: Interrupted("asked"))
    assert (job.folder / "run.json").is_file()


def test_a_folder_in_use_is_refused_until_its_process_is_dead(done):
    hold = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True), input()"
    command = [sys.executable, "-c", hold, str(done.folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = contents(done.folder)
        try:
            with pytest.raises(OutputError, match=r"The run .*run is in use\. Another process works on it\."):
                resume(done.folder, listen=done.heard.append)
        finally:
            other.kill()
        assert contents(done.folder) == before
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_kept") == STAGES


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (["prune.goal.macs=0.001"], GoalError, r"No plan for Net reaches the goal: macs"),
        (["prune.goal.macs=0.05", "prune.min_keep=0.9"], GoalError, r"No plan for Net reaches the goal: macs"),
        (["prune.goal={}"], GoalError, r"A goal needs at least one limit"),
        (["prune.importance=magnitud"], UnknownNameError, r"no importance 'magnitud'\..*Did you mean 'magnitude'"),
        (["prune.exclude=[third]"], KirschError, r"third"),
        (
            ["teacher.model=nets.py:five_classes"],
            ShapeError,
            r"scores of shape \(5,\)\. The data stripes has 3 classes\.",
        ),
        (
            ["student.model=nets.py:five_classes"],
            ShapeError,
            r"scores of shape \(5,\)\. The data stripes has 3 classes\.",
        ),
        (["student.model=nets.py:nobody"], LoadError, r"There is no callable of nets\.py named 'nobody'\."),
        (["data.source=nets.py:nobody"], LoadError, r"There is no callable of nets\.py named 'nobody'\."),
        (["data.options.colors=3"], UsageError, r"does not take these options\. got an unexpected .*'colors'"),
        (
            ["measure.threads=5000"],
            UsageError,
            r"measure\.threads is 5000; this machine has \d+\. Lower measure\.threads",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_trained(job, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        job.do(*changes)
    assert_nothing_was_done(job)


def test_timing_that_is_done_needs_no_threads_again(done, monkeypatch):
    from kirsch.recipes import stages

    monkeypatch.setattr(stages, "usable_cores", lambda: 0)
    resume(done.folder, listen=done.heard.append)
    assert done.stages("stage_kept") == STAGES


def test_a_full_disk_is_said_before_anything_is_trained(job, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: SimpleNamespace(free=2_000_000))
    with pytest.raises(OutputError, match=r"The folder .*run has 2 MB free; the work needs about 10 MB\."):
        job.do()
    assert_nothing_was_done(job)


def test_a_folder_that_cannot_be_made_is_said_before_the_data_is_loaded(job):
    (job.base / "file").write_text("")
    with pytest.raises(OutputError, match=r"The folder .*file/run cannot be written\. Not a directory\."):
        job.do("data.source=nets.py:nobody", folder=job.base / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "stage", "why"),
    [
        (["teacher={model: 'nets.py:Silent'}"], "teacher", r"It says .*Load trained weights in nets\.py:Silent, or"),
        (["teacher.train.learning_rate=1e-9"], "teacher", "It (guesses|says one class for every sample).*Lower the"),
        (
            ["student.model=nets.py:Silent", "student.distill.train.learning_rate=1e-9", "prune=null"],
            "distill",
            "It says one.*Lower the",
        ),
    ],
)
def test_a_dead_model_ends_the_run_with_its_stage(job, changes, stage, why):
    sentence = rf"The model is dead after the stage '{stage}': \d+\.\d% of 60 right, chance is 33\.3%\. {why}"
    with pytest.raises(NumericError, match=sentence) as caught:
        job.do(*changes, *MODELS_ALONE)
    assert caught.value.exit_code == 6
    assert job.stages("stage_end") == STAGES[: STAGES.index(stage)]


# ------------------------------------------------------------------------------------------------ names


def test_a_new_folder_has_date_name_and_four_digits(job):
    plain = r"\d{4}-\d\d-\d\d-stripes-[0-9a-f]{4}"
    assert re.fullmatch(plain, new_folder_name(job.recipe()))
    hostile = job.recipe('name="../<a> [red]\\n\\e[31mé"')
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-----a---red---+31mé-[0-9a-f]{4}", new_folder_name(hostile))
    assert len(new_folder_name(job.recipe(f"name={'n' * 200}"))) == len("2000-01-01-") + 60 + len("-0000")
    assert new_folder_name(job.recipe()) != new_folder_name(job.recipe())


def test_materials_given_as_objects_take_the_place_of_references(job):
    recipe = job.recipe("teacher.model=given", "student=null", "recover=null", "data.source=given", *MODELS_ALONE)
    part = Split(torch.randn(12, 1, 6, 6).numpy(), (torch.arange(12) % 3).numpy())
    materials = runner.Materials(
        make_teacher=lambda: runner.build("nets.py:teacher", base=job.base),
        make_student=None,
        data=DataSet("own", part, part, part, ("a", "b", "c")),
        origin="here",
    )
    with pytest.raises(Interrupted):
        runner.run(recipe, job.folder, listen=job.heard.append, materials=materials, stop=after(job, "first_batch"))
    with pytest.raises(LoadError, match=r"is a run of kirsch\.compress\. .* Call kirsch\.compress again"):
        resume(job.folder, listen=job.heard.append)
