"""Runs of recipes: finished steps are kept if their inputs and files are unchanged, and run again otherwise."""

from __future__ import annotations

import collections
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from folders import contents
from kirsch.data.dataset import DataSet, Split
from kirsch.errors import (
    Interrupted,
    LoadError,
    RecipeError,
)
from kirsch.recipes import integrity, runner
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.runner import new_folder_name, resume
from tiny import NO_EXPORT, STEPS, flip_bit, same_weights

# ------------------------------------------------------------------------------------------------ steps


def test_run_emits_events_of_its_steps_in_order(finished):
    job, outcome = finished
    assert job.events[0]["event"] == "start"
    assert job.steps("step_start") == job.steps("step_end") == STEPS
    assert [event["number"] for event in job.events if event["event"] == "step_end"] == [1, 2, 3, 4, 5, 6]
    epochs = collections.Counter(event["step"] for event in job.events if event["event"] == "epoch")
    assert epochs == {"train": 6, "distill": 4, "recover": 3}
    assert job.events[-1]["event"] == "end"
    assert (outcome.exit_code, job.events[-1]["met"]) == (0, True)


def test_events_file_contains_all_events(finished):
    job, _ = finished
    lines = [json.loads(line) for line in (job.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{name: value for name, value in line.items() if name != "time"} for line in lines] == job.events
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_resuming_a_finished_run_returns_the_same_result(finished, done):
    before = contents(done.folder)
    outcome = resume(done.folder, listen=done.events.append)
    after = contents(done.folder)
    assert done.steps("step_kept") == STEPS
    assert done.steps("step_start") == done.notes() == []
    assert after.keys() == before.keys()
    written_anew = {"events.jsonl", "metrics.json", "report.html", "manifest.json", "run.json"}
    assert {name for name in before if before[name] != after[name]} <= written_anew
    assert same_weights(outcome.model, finished[1].model)
    assert not outcome.model.training
    assert outcome.metrics | {"created": ""} == finished[1].metrics | {"created": ""}


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [("goal.max_drop", 0.4, 5), ("recover.temperature", 3.0, 3), ("prune.norm", 1, 2)],
)
def test_changed_section_runs_its_step_and_later_steps_again(done, key, value, first):
    """The recipe is changed in the run folder. The measurement is left out to save time."""
    changed = read_recipe(done.folder / "recipe.yaml", [f"{key}={value}", "measure=null"])
    (done.folder / "recipe.yaml").write_text(changed.to_yaml())
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_kept") == STEPS[:first]
    assert done.steps("step_start") == STEPS[first:5]
    again = [f"The step {step!r} is run again: its inputs have changed." for step in STEPS[first:5]]
    assert [note for note in done.notes() if note.startswith("The step")] == again


@pytest.mark.parametrize("change", ["seed", "batches", "models", "data"])
def test_change_of_seed_batches_models_or_data_runs_all_steps_again(done, change, monkeypatch):
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
        resume(done.folder, listen=done.events.append, stop=after(done, "first_batch"))
    changed = [note for note in done.notes() if note.endswith("The steps that depend on the change are run again.")]
    assert len(changed) == (change in ("seed", "batches"))
    again = ["The step 'train' is run again: its inputs have changed."]
    assert done.notes()[: len(changed) + 1] == changed + again
    assert done.steps("step_start") == ["train"]


def after(job, name, times=1):
    """Return a stop callback that stops a run after this number of events with this name."""
    return lambda: Interrupted("asked") if [e["event"] for e in job.events].count(name) >= times else None


def test_training_does_not_resume_from_a_checkpoint_of_other_settings(job):
    """The result would mix two recipes."""
    alone = ("student=null", "distill=null", "prune=null", "recover=null", *NO_EXPORT)
    with pytest.raises(Interrupted):
        job.run_recipe(*alone, stop=after(job, "epoch", 3))
    assert len(list(job.folder.glob("checkpoints/train/step-*"))) == 2
    changed = [*alone, "train.learning_rate=0.01"]
    (job.folder / "recipe.yaml").write_text(job.recipe(*changed).to_yaml())
    found = job.run_recipe(*changed)
    assert sum("the inputs of its step have changed" in note for note in job.notes()) == 2
    assert same_weights(found.model, job.run_recipe(*changed, folder=job.base / "fresh").model)


def test_checkpoints_of_a_finished_step_are_removed(done):
    """A run may be killed after a step is finished and before its last checkpoints are removed."""
    checkpoint = shutil.copytree(
        done.folder / "checkpoints" / "train" / "done", done.folder / "checkpoints" / "train" / "step-00006-000000"
    )
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_kept") == STEPS
    assert not checkpoint.exists()


def test_recovery_does_not_change_earlier_models(job, monkeypatch):
    """A loaded step must not write its weights to the model of an earlier step."""
    jobs = []
    metrics_of = runner.metrics_of
    monkeypatch.setattr(runner, "metrics_of", lambda job, *rest: jobs.append(job) or metrics_of(job, *rest))
    alone = ("student=null", "distill=null", "prune=null", *NO_EXPORT)
    for _ in range(2):
        job.run_recipe(*alone)
    assert job.steps("step_kept") == ["train", "recover"]
    stored = safetensors.torch.load_file(job.folder / "checkpoints" / "train" / "done" / "weights.safetensors")
    for finished_job in jobs:
        assert same_weights(finished_job.teacher, stored)
        assert not same_weights(finished_job.model, stored)


def test_trained_teacher_is_returned_in_inference_mode(job, monkeypatch):
    """The result of a run and of a resumed run have the same mode."""
    monkeypatch.setattr(runner.Job, "check_usable", lambda *_: None)
    shortest = ("train=null", "student=null", "distill=null", "recover=null", *NO_EXPORT)
    assert [job.run_recipe(*shortest).model.training for _ in range(2)] == [False, False]
    assert job.steps("step_kept") == ["evaluate", "prune"]


# ------------------------------------------------------------------------------------------------ damage


def test_damaged_files_are_restored_bit_for_bit(done):
    """One bit is flipped in each file, except those that describe the run."""
    before = contents(done.folder)
    damaged = before.keys() - {".lock", "recipe.yaml", "run.json", "events.jsonl"}
    original = {name: (done.folder / name).read_bytes() for name in damaged}
    for name in damaged:
        flip_bit(done.folder / name)
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_start") == STEPS
    now = contents(done.folder)
    assert now.keys() == before.keys()
    bits = {
        name for name in damaged if not name.endswith(("record.json", "manifest.json", "metrics.json", "report.html"))
    }
    assert len(bits) > 12
    assert {name for name in bits if (done.folder / name).read_bytes() != original[name]} == set()
    figures = [json.loads(side["metrics.json"]) for side in (before, now)]
    for side in figures:
        for model in side["models"]:
            del model["latency"]  # measured again
    assert [figures[0][key] for key in ("models", "quality", "goal", "removals")] == [
        figures[1][key] for key in ("models", "quality", "goal", "removals")
    ]


@pytest.mark.parametrize("step", ["train", "prune"])
def test_only_the_damaged_step_is_run_again(done, step):
    path = done.folder / "checkpoints" / step / "done" / "logits.npy"
    flip_bit(path)
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_start") == [step]
    assert (
        done.notes()[0] == f"The step {step!r} is run again: {path} does not have the sha256 that its manifest states."
    )


def test_damaged_artifact_is_exported_again(done):
    path = done.folder / "artifacts" / "model.onnx"
    before = path.read_bytes()
    flip_bit(path)
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_start") == ["export"]
    assert re.match(r"The step 'export' is run again: .*model.onnx ", done.notes()[0])
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_damaged_pruned_model_is_saved_again(done, name):
    path = done.folder / "artifacts" / "model" / name
    before = path.read_bytes()
    flip_bit(path)
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_start") == []
    assert done.notes() == [f"{path} does not have the sha256 that its manifest states. It is written again."]
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [flip_bit, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_or_missing_plan_is_restored(done, damage):
    before = (done.folder / "plan.json").read_bytes()
    damage(done.folder / "plan.json")
    resume(done.folder, listen=done.events.append)
    assert (done.folder / "plan.json").read_bytes() == before


def test_truncated_last_event_is_dropped(done):
    events = done.folder / "events.jsonl"
    before = events.read_text()
    events.write_text(before + '{"time": 1.0, "eve')
    resume(done.folder, listen=done.events.append)
    assert events.read_text().startswith(before)
    assert [json.loads(line)["event"] for line in events.read_text().splitlines()][-1] == "end"


@pytest.mark.parametrize("content", [None, "{", '{"kirsch_run": 1, "base": 5}', "\0"])
def test_damaged_or_missing_run_json_is_written_again(done, content):
    """The base folder is read from the events."""
    path = done.folder / "run.json"
    before = path.read_bytes()
    path.unlink() if content is None else path.write_text(content)
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_kept") == STEPS
    assert re.match(
        r".*run\.json (is missing|does not have the sha256 that its manifest states)\. It is written", done.notes()[0]
    )
    assert json.loads(path.read_bytes()).keys() == json.loads(before).keys()
    assert integrity.check(done.folder).problems == []


def test_run_without_base_folder_can_be_continued_with_its_recipe(done):
    """The finished steps are kept."""
    (done.folder / "run.json").unlink()
    (done.folder / "events.jsonl").unlink()
    sentence = (
        r"run cannot be resumed\. run\.json is missing or damaged, and .*kirsch compress RECIPE --run .*run keeps the"
    )
    with pytest.raises(LoadError, match=sentence):
        resume(done.folder, listen=done.events.append)
    done.run_recipe()
    assert done.steps("step_kept") == STEPS
    assert integrity.check(done.folder).problems == []


def test_missing_recipe_is_written_again(done):
    before = (done.folder / "recipe.yaml").read_bytes()
    (done.folder / "recipe.yaml").unlink()
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_kept") == STEPS
    assert (done.folder / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"base": 5}', "\0"])
def test_folder_without_run_is_not_resumed(job, content):
    job.folder.mkdir()
    if content is not None:
        (job.folder / "run.json").write_text(content)
    with pytest.raises(
        LoadError, match=r"run is not a run folder\. run\.json is missing or damaged\. Start a run: kirsch compress"
    ):
        resume(job.folder, listen=job.events.append)
    assert job.events == []


def test_damaged_recipe_is_refused(done):
    (done.folder / "recipe.yaml").write_text("teacher: [\n")
    with pytest.raises(RecipeError, match=r"run/recipe\.yaml is not valid YAML\. Line 2: .* delete it: kirsch resume"):
        resume(done.folder, listen=done.events.append)


# ------------------------------------------------------------------------------------------------ names


def test_folder_name_has_date_name_and_four_digits(job):
    plain = r"\d{4}-\d\d-\d\d-stripes-[0-9a-f]{4}"
    assert re.fullmatch(plain, new_folder_name(job.recipe()))
    hostile = job.recipe('name="../<a> [red]\\n\\e[31mé"')
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-----a---red---+31mé-[0-9a-f]{4}", new_folder_name(hostile))
    assert len(new_folder_name(job.recipe(f"name={'n' * 200}"))) == len("2000-01-01-") + 60 + len("-0000")
    assert new_folder_name(job.recipe()) != new_folder_name(job.recipe())


def test_a_run_accepts_models_and_data_as_objects(job):
    names = ("teacher.model=null", "student=null", "distill=null", "recover=null", "data.source=null")
    recipe = job.recipe(*names, *NO_EXPORT)
    part = Split(torch.randn(12, 1, 6, 6).numpy(), (torch.arange(12) % 3).numpy())
    materials = runner.Materials(
        make_teacher=lambda: runner.build("nets.py:teacher", base=job.base),
        make_student=None,
        data=DataSet("own", part, part, part, classes=("a", "b", "c")),
        origin="here",
    )
    with pytest.raises(Interrupted):
        runner.run(recipe, job.folder, listen=job.events.append, materials=materials, stop=after(job, "first_batch"))
    with pytest.raises(LoadError, match=r"is a run of kirsch\.compress\. .* Call kirsch\.compress again"):
        resume(job.folder, listen=job.events.append)
