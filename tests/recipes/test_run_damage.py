"""Whatever happens to a file of a run: it is seen and named, and made again or refused with what to do about it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from kirsch import files
from kirsch.errors import CheckpointError, KirschError, LoadError
from kirsch.recipes import seal, soundness
from kirsch.recipes.runner import resume

FILES = [
    "artifacts/model.onnx",
    "artifacts/model/manifest.json",
    "artifacts/model/model.safetensors",
    "artifacts/model/plan.json",
    *(f"checkpoints/{stage}/done/{name}" for stage in ("teacher", "recover") for name in (
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
"""Every file of a run without student and timing, but its lock."""


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_case(path):
    path.rename(path.with_name(path.name.swapcase()))


def add_another(path):
    path.with_name(f"my-{path.name}").write_text("mine")


def add_to_it(path):
    path.write_bytes(path.read_bytes() + b"\n")


def edit_with_its_manifest(path):
    """As somebody does who knows of the manifest beside the file, and of no other."""
    add_to_it(path)
    if path.name != files.MANIFEST:
        files.write_manifest(next(place for place in path.parents if (place / files.MANIFEST).is_file()), (".lock",))


def link(path):
    path.rename(path.with_name(".tmp-moved"))
    path.symlink_to(".tmp-moved")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def socket_(path):
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):  # such paths must be short
        made.bind(path.name)


def folder(path):
    path.unlink()
    path.mkdir()


CHANGES = [Path.unlink, lambda path: path.write_bytes(b""), truncate, flip, change_case, add_to_it]
CHANGES += [add_another, edit_with_its_manifest]
REPLACEMENTS = {link: "a symbolic link", pipe: "a named pipe", socket_: "a socket", folder: "a folder"}


@pytest.fixture(scope="module")
def whole(new_job):
    """A finished run of few stages. Not to be changed."""
    made = new_job()
    made.do("student=null", "measure=null", "teacher.train.epochs=4", "recover.train.epochs=1")
    return made


@pytest.fixture
def done(whole, tmp_path):
    """A copy of it, for changing."""
    shutil.copytree(whole.base, tmp_path, dirs_exist_ok=True)
    return type(whole)(tmp_path)


def names(run):
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.name != ".lock")


def test_the_table_below_is_of_every_file(whole):
    assert names(whole.folder) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_change_of_every_file_is_seen_and_named(whole, tmp_path, name):
    for number, change in enumerate([*CHANGES, *REPLACEMENTS]):
        run = shutil.copytree(whole.folder, tmp_path / str(number))
        change(run / name)
        wrong = soundness.check(run).wrong
        named = f"my-{Path(name).name}" if change is add_another else name
        if change is edit_with_its_manifest and "/" not in name:
            named = files.MANIFEST  # which does not fit the sha256 in run.json; no other copy of the file is there
        assert any(named in text for text in wrong), change
        if change in REPLACEMENTS:
            assert f"{run / name} is {REPLACEMENTS[change]}" in wrong


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_with_its_name_and_what_to_do(whole, tmp_path, name):
    for change, kind in REPLACEMENTS.items():
        if change is folder and name.count("/") > 1:
            continue  # within the folder of a stage, which is made again as a whole
        run = shutil.copytree(whole.folder, tmp_path / kind)
        change(run / name)
        before, heard = names(run), []
        with pytest.raises(CheckpointError, match=rf"{name} is {kind}\n?.* Delete or move these"):
            resume(run, listen=heard.append)
        assert (names(run), heard) == (before, [])


@pytest.mark.parametrize(("name", "change"), list(zip(FILES, itertools.cycle(CHANGES), strict=False)))
def test_a_run_with_any_file_changed_is_sound_after_resuming_or_says_what_to_delete(done, name, change):
    """A change for each file, so that each change meets several kinds of files."""
    change(done.folder / name)
    refused = []
    try:
        resume(done.folder, listen=done.heard.append)
    except KirschError as error:
        refused = [error]
    found = soundness.check(done.folder)
    if refused:
        assert str(done.folder) in refused[0].what
        assert "elete" in refused[0].fix
        assert done.heard == []
    else:
        assert (found.finished, found.wrong) == (True, [])
        assert any("again" in note or "is left as it is" in note or "are kept" in note for note in done.notes())


def test_altered_numbers_are_seen_and_written_again(done):
    path = done.folder / "metrics.json"
    metrics = json.loads(path.read_text())
    right = metrics["models"][-1]["accuracy"]["value"]
    metrics["models"][-1]["accuracy"]["value"] = 1.0 - right
    files.write_json(path, metrics)
    assert soundness.check(done.folder).wrong == [f"{path} does not have the sha256 of its manifest"]
    resume(done.folder, listen=done.heard.append)
    assert json.loads(path.read_text())["models"][-1]["accuracy"]["value"] == right
    assert done.notes() == [f"{path} does not have the sha256 of its manifest. It is written again."]


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/teacher", "checkpoints/prune/done", "artifacts"])
@pytest.mark.parametrize("put", [None, Path.touch, lambda path: path.symlink_to("/tmp"), os.mkfifo])
def test_a_folder_that_is_gone_or_something_else_is_named(done, name, put):
    path = done.folder / name
    shutil.rmtree(path)
    if put is not None:
        put(path)
    assert any(str(path) in text for text in soundness.check(done.folder).wrong)
    if put is not None:
        with pytest.raises(
            CheckpointError, match=rf"{name} is a (file|symbolic link|named pipe).*\n*.*Delete or move these"
        ):
            resume(done.folder, listen=done.heard.append)
        path.unlink()
    if name == "artifacts":
        resume(done.folder, listen=done.heard.append)
        assert done.stages("stage_start") == ["export"]
        assert soundness.check(done.folder).wrong == []


@pytest.mark.parametrize("name", ["step-00001-000000", "done"])
@pytest.mark.parametrize("put", [Path.touch, lambda path: path.symlink_to("done.old"), os.mkfifo])
def test_a_checkpoint_that_is_no_folder_is_refused_with_its_name(done, name, put):
    stage = done.folder / "checkpoints" / "teacher"
    (stage / "done").rename(stage / "done.old")
    put(stage / name)
    with pytest.raises(CheckpointError, match=rf"checkpoints/teacher/{name} is a .*\n*.*Delete or move these"):
        resume(done.folder, listen=done.heard.append)


def test_a_file_of_the_user_is_kept_and_recorded(done):
    (done.folder / "notes.txt").write_text("mine")
    assert soundness.check(done.folder).wrong == [f"{done.folder / 'notes.txt'} is not in its manifest"]
    resume(done.folder, listen=done.heard.append)
    (note,) = done.notes()
    assert note.endswith(
        "notes.txt is not in its manifest. It is left as it is, and the new manifest covers what is there."
    )
    assert (done.folder / "notes.txt").read_text() == "mine"
    assert soundness.check(done.folder).wrong == []


def test_a_run_json_that_was_edited_sends_nobody_to_other_models(done):
    path = done.folder / "run.json"
    run = json.loads(path.read_text())
    files.write_json(path, run | {"base": "../elsewhere"})
    resume(done.folder, listen=done.heard.append)
    assert done.notes() == [f"{path} does not have the sha256 of its manifest. It is written again."]
    assert json.loads(path.read_text())["base"] == run["base"]


def test_a_resume_that_fails_at_once_leaves_a_finished_run_as_it_is(done):
    (done.base / "nets.py").unlink()
    before = {name: (done.folder / name).read_bytes() for name in names(done.folder)}
    with pytest.raises(LoadError, match=r"nets\.py does not exist"):
        resume(done.folder, listen=done.heard.append)
    assert before == {name: (done.folder / name).read_bytes() for name in names(done.folder)}


def test_events_that_cannot_be_read_are_dropped_and_the_others_kept(done):
    events = done.folder / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join([*lines[:2], b"\xff\n", b"3\n", *lines[3:]]))
    resume(done.folder, listen=done.heard.append)
    assert events.read_bytes().startswith(b"".join([*lines[:2], *lines[3:]]))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("models", lambda models: models[-1]["accuracy"].update(value=0.123)),
        ("stages", lambda stages: stages[0].update(did="nothing")),
        ("curves", lambda curves: curves[0]["loss"].reverse()),
        ("removed", lambda removed: removed["groups"].pop()),
        ("verification", lambda verification: verification.update(passed=False)),
        ("export", lambda export: export.update(n=1)),
    ],
)
def test_metrics_of_a_run_without_manifest_are_compared_with_the_records_of_its_stages(done, part, change):
    seal.lift(done.folder)
    path = done.folder / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics[part])
    files.write_json(path, metrics)
    assert soundness.check(done.folder).wrong == [
        f"{path} does not have the {part} that the records of the stages give"
    ]
    resume(done.folder, listen=done.heard.append)
    assert soundness.check(done.folder).wrong == []


@pytest.mark.parametrize("content", [None, "[1]"])
def test_metrics_that_are_missing_or_no_object_are_named_without_a_manifest_too(done, content):
    seal.lift(done.folder)
    path = done.folder / "metrics.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert soundness.check(done.folder).wrong == [f"{path} is missing, or holds no JSON object"]


def test_metrics_that_an_earlier_process_wrote_are_no_damage(done):
    """A run that is resumed does stages again, and may be killed before it writes its metrics."""
    seal.lift(done.folder)
    with (done.folder / "events.jsonl").open("a") as events:
        events.write('{"event": "start"}\n')
    record = done.folder / "checkpoints/recover/done/record.json"
    files.write_json(record, json.loads(record.read_text()) | {"seconds": 99.0})
    files.write_manifest(record.parent)
    found = soundness.check(done.folder)
    assert (found.finished, found.wrong) == (False, [])
    assert "metrics.json" in found.uncovered


def test_a_run_that_has_not_ended_is_checked_by_its_parts(done):
    """Without its manifest, as while it runs."""
    run = json.loads((done.folder / "run.json").read_text())
    del run["manifest_sha256"]
    files.write_json(done.folder / "run.json", run)
    (done.folder / files.MANIFEST).unlink()
    found = soundness.check(done.folder)
    assert (found.finished, found.wrong) == (False, [])
    assert set(found.uncovered) >= {"metrics.json", "recipe.yaml", "run.json"}
    shutil.rmtree(done.folder / "checkpoints" / "teacher")
    (done.folder / "plan.json").write_text("{}")
    with (done.folder / "recipe.yaml").open("a") as recipe:
        recipe.write("# changed\n")
    (done.folder / "artifacts" / "model.onnx").write_bytes(b"")
    events = done.folder / "events.jsonl"
    events.write_bytes(b"?" + events.read_bytes())
    assert soundness.check(done.folder).wrong == [
        f"{events} has lines that are no events",
        f"{done.folder / 'checkpoints/teacher/done'} is missing, and a later stage is done",
        f"{done.folder / 'recipe.yaml'} is not the recipe that run.json states",
        f"{done.folder / 'plan.json'} is missing, or is not the plan of the pruned model",
        f"{done.folder / 'artifacts/model.onnx'} does not have the sha256 of its stage",
    ]
    resume(done.folder, listen=done.heard.append)
    assert soundness.check(done.folder).wrong == []
