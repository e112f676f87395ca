"""Damage of a run folder is reported, and repaired by resuming or refused with a fix."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from kirsch import files
from kirsch.errors import CheckpointError, KirschError, LoadError
from kirsch.recipes import integrity, manifest
from kirsch.recipes.runner import resume
from replacements import REPLACEMENTS, folder
from tiny import flip_bit

FILES = [
    "artifacts/model.onnx",
    "artifacts/model/manifest.json",
    "artifacts/model/model.safetensors",
    "artifacts/model/plan.json",
    *(f"checkpoints/{step}/done/{name}" for step in ("train", "recover") for name in (
        "logits.npy", "manifest.json", "record.json", "weights.safetensors")),
    *(f"checkpoints/prune/done/{name}" for name in ("logits.npy", "manifest.json", "record.json")),
    *(f"checkpoints/prune/done/model/{name}" for name in ("manifest.json", "model.safetensors", "plan.json")),
    *(f"checkpoints/export/done/{name}" for name in ("logits.npy", "manifest.json", "record.json")),
    "environment.json",
    "events.jsonl",
    "manifest.json",
    "metrics.json",
    "plan.json",
    "recipe.yaml",
    "report.html",
    "run.json",
]  # fmt: skip
"""All files of a run without student and measurement, except the lock."""


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_case(path):
    path.rename(path.with_name(path.name.swapcase()))


def add_another(path):
    path.with_name(f"my-{path.name}").write_text("notes of the user")


def append_line(path):
    path.write_bytes(path.read_bytes() + b"\n")


def edit_with_its_manifest(path):
    """Change a file and update the manifest of its folder, but not the run's manifest."""
    append_line(path)
    if path.name != files.MANIFEST:
        files.write_manifest(next(parent for parent in path.parents if (parent / files.MANIFEST).is_file()), (".lock",))


CHANGES = [Path.unlink, lambda path: path.write_bytes(b""), truncate, flip_bit, change_case, append_line]
CHANGES += [add_another, edit_with_its_manifest]


@pytest.fixture(scope="module")
def finished_run(new_job):
    """Finished run with few steps, which tests must not change."""
    job = new_job()
    job.run_recipe("student=null", "distill=null", "measure=null", "train.epochs=4", "recover.epochs=1")
    return job


@pytest.fixture
def done(finished_run, tmp_path):
    """Copy of the finished run that a test may change."""
    shutil.copytree(finished_run.base, tmp_path, dirs_exist_ok=True)
    return type(finished_run)(tmp_path)


def names(run):
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.name != ".lock")


def test_list_of_files_is_complete(finished_run):
    assert names(finished_run.folder) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_check_reports_every_change_of_every_file(finished_run, tmp_path, name):
    for number, change in enumerate([*CHANGES, *REPLACEMENTS]):
        run = shutil.copytree(finished_run.folder, tmp_path / str(number))
        change(run / name)
        problems = integrity.check(run).problems
        expected = f"my-{Path(name).name}" if change is add_another else name
        if change is edit_with_its_manifest and "/" not in name:
            expected = files.MANIFEST  # run.json has the sha256 of the manifest
        assert any(expected in text for text in problems), change
        if change in REPLACEMENTS:
            assert f"{run / name} is {REPLACEMENTS[change]}" in problems


@pytest.mark.parametrize("name", FILES)
def test_link_pipe_socket_or_folder_in_place_of_a_file_is_refused_with_a_fix(finished_run, tmp_path, name):
    for change, kind in REPLACEMENTS.items():
        if change is folder and name.count("/") > 1:
            continue  # not refused: a folder inside the folder of a step, because the step is run again
        run = shutil.copytree(finished_run.folder, tmp_path / kind)
        change(run / name)
        before, events = names(run), []
        with pytest.raises(CheckpointError, match=rf"{name} is {kind}\n?.* Delete or move these files"):
            resume(run, listen=events.append)
        assert (names(run), events) == (before, [])


@pytest.mark.parametrize(("name", "change"), list(zip(FILES, itertools.cycle(CHANGES), strict=False)))
def test_resume_repairs_any_changed_file_or_names_what_to_delete(done, name, change):
    """One change per file; each change is applied to several kinds of files."""
    change(done.folder / name)
    refused = []
    try:
        resume(done.folder, listen=done.events.append)
    except KirschError as error:
        refused = [error]
    result = integrity.check(done.folder)
    if refused:
        assert str(done.folder) in refused[0].what
        assert "elete" in refused[0].fix
        assert done.events == []
    else:
        assert (result.finished, result.problems) == (True, [])
        assert any("again" in note or "is left as it is" in note or "are kept" in note for note in done.notes())


def test_altered_metrics_are_reported_and_written_again(done):
    path = done.folder / "metrics.json"
    metrics = json.loads(path.read_text())
    accuracy = metrics["models"][-1]["accuracy"]["value"]
    metrics["models"][-1]["accuracy"]["value"] = 1.0 - accuracy
    files.write_json(path, metrics)
    assert integrity.check(done.folder).problems == [f"{path} does not have the sha256 that its manifest states"]
    resume(done.folder, listen=done.events.append)
    assert json.loads(path.read_text())["models"][-1]["accuracy"]["value"] == accuracy
    assert done.notes() == [f"{path} does not have the sha256 that its manifest states. It is written again."]


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/train", "checkpoints/prune/done", "artifacts"])
@pytest.mark.parametrize("put", [None, Path.touch, lambda path: path.symlink_to("/tmp"), os.mkfifo])
def test_missing_or_replaced_folder_is_reported(done, name, put):
    path = done.folder / name
    shutil.rmtree(path)
    if put is not None:
        put(path)
    assert any(str(path) in text for text in integrity.check(done.folder).problems)
    if put is not None:
        with pytest.raises(
            CheckpointError, match=rf"{name} is a (file|symbolic link|named pipe).*\n*.*Delete or move these files"
        ):
            resume(done.folder, listen=done.events.append)
        path.unlink()
    if name == "artifacts":
        resume(done.folder, listen=done.events.append)
        assert done.steps("step_start") == ["export"]
        assert integrity.check(done.folder).problems == []


@pytest.mark.parametrize("name", ["step-00001-000000", "done"])
@pytest.mark.parametrize("put", [Path.touch, lambda path: path.symlink_to("done.old"), os.mkfifo])
def test_checkpoint_that_is_not_a_folder_is_refused(done, name, put):
    step = done.folder / "checkpoints" / "train"
    (step / "done").rename(step / "done.old")
    put(step / name)
    with pytest.raises(CheckpointError, match=rf"checkpoints/train/{name} is a .*\n*.*Delete or move these files"):
        resume(done.folder, listen=done.events.append)


def test_file_of_the_user_is_kept_and_added_to_the_manifest(done):
    (done.folder / "notes.txt").write_text("notes of the user")
    assert integrity.check(done.folder).problems == [f"{done.folder / 'notes.txt'} is not in its manifest"]
    resume(done.folder, listen=done.events.append)
    (note,) = done.notes()
    assert note.endswith("notes.txt is not in its manifest. It is left as it is, and the new manifest lists it.")
    assert (done.folder / "notes.txt").read_text() == "notes of the user"
    assert integrity.check(done.folder).problems == []


def test_edited_run_json_does_not_change_the_base_folder(done):
    path = done.folder / "run.json"
    run = json.loads(path.read_text())
    files.write_json(path, run | {"base": "../elsewhere"})
    resume(done.folder, listen=done.events.append)
    assert done.notes() == [f"{path} does not have the sha256 that its manifest states. It is written again."]
    assert json.loads(path.read_text())["base"] == run["base"]


def test_failed_resume_does_not_change_a_finished_run(done):
    (done.base / "nets.py").unlink()
    before = {name: (done.folder / name).read_bytes() for name in names(done.folder)}
    with pytest.raises(LoadError, match=r"nets\.py does not exist"):
        resume(done.folder, listen=done.events.append)
    assert before == {name: (done.folder / name).read_bytes() for name in names(done.folder)}


def test_unreadable_events_are_dropped(done):
    events = done.folder / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join([*lines[:2], b"\xff\n", b"3\n", *lines[3:]]))
    resume(done.folder, listen=done.events.append)
    assert events.read_bytes().startswith(b"".join([*lines[:2], *lines[3:]]))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("models", lambda models: models[-1]["accuracy"].update(value=0.123)),
        ("steps", lambda steps: steps[0].update(did="nothing")),
        ("curves", lambda curves: curves[0]["loss"].reverse()),
        ("removals", lambda removals: removals[0]["groups"].pop()),
        ("removals", lambda removals: removals[0]["verification"].update(passed=False)),
        ("export", lambda export: export.update(n=1)),
    ],
)
def test_metrics_without_manifest_are_compared_with_the_records(done, part, change):
    manifest.remove(done.folder)
    path = done.folder / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics[part])
    files.write_json(path, metrics)
    assert integrity.check(done.folder).problems == [
        f"the key {part!r} of {path} does not agree with the records of the steps"
    ]
    resume(done.folder, listen=done.events.append)
    assert integrity.check(done.folder).problems == []


@pytest.mark.parametrize("content", [None, "[1]"])
def test_missing_or_invalid_metrics_are_reported_without_manifest(done, content):
    manifest.remove(done.folder)
    path = done.folder / "metrics.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert integrity.check(done.folder).problems == [f"{path} is missing, or is not a JSON object"]


def test_metrics_of_an_earlier_process_are_not_reported(done):
    """A resumed run may run steps again, and be killed before it writes metrics.json."""
    manifest.remove(done.folder)
    with (done.folder / "events.jsonl").open("a") as events:
        events.write('{"event": "start"}\n')
    record = done.folder / "checkpoints/recover/done/record.json"
    files.write_json(record, json.loads(record.read_text()) | {"seconds": 99.0})
    files.write_manifest(record.parent)
    found = integrity.check(done.folder)
    assert (found.finished, found.problems) == (False, [])
    assert "metrics.json" in found.uncovered


def test_unfinished_run_is_checked_by_its_parts(done):
    """The folder of an unfinished run has no manifest, so its files are compared with run.json and the step records."""
    run = json.loads((done.folder / "run.json").read_text())
    del run["manifest_sha256"]
    files.write_json(done.folder / "run.json", run)
    (done.folder / files.MANIFEST).unlink()
    found = integrity.check(done.folder)
    assert (found.finished, found.problems) == (False, [])
    assert set(found.uncovered) >= {"metrics.json", "recipe.yaml", "run.json"}
    shutil.rmtree(done.folder / "checkpoints" / "train")
    (done.folder / "plan.json").write_text("{}")
    with (done.folder / "recipe.yaml").open("a") as recipe:
        recipe.write("# changed\n")
    (done.folder / "artifacts" / "model.onnx").write_bytes(b"")
    events = done.folder / "events.jsonl"
    events.write_bytes(b"?" + events.read_bytes())
    assert integrity.check(done.folder).problems == [
        f"{events} has lines that are not events",
        f"{done.folder / 'checkpoints/train/done'} is missing, and a later step is done",
        f"{done.folder / 'recipe.yaml'} is not the recipe that run.json states",
        f"{done.folder / 'plan.json'} is missing, or is not the plan of the pruned model",
        f"{done.folder / 'artifacts/model.onnx'} does not have the sha256 that the record of its step states",
    ]
    resume(done.folder, listen=done.events.append)
    assert integrity.check(done.folder).problems == []
