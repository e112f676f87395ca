"""Interrupted, killed and shared builds of a store give the same files as an uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from distillation.stores import IDS, build_store, content, data, network
from kirsch import files
from kirsch.distillation.store import Dense, TeacherStore, build, building, finish
from kirsch.distillation.store.record import pack_records
from kirsch.errors import OutputError, StoreError


class InterruptedBuildError(Exception):
    pass


def test_a_stopped_build_continues_and_gives_identical_files(store_folder, tmp_path):
    folder, events = tmp_path / "s", []
    for count in range(1, 6):
        with pytest.raises(InterruptedBuildError):
            build_store(folder, event=events.append, stop=InterruptedBuildError)
        assert len(events) == count
        with pytest.raises(StoreError, match=rf"is partial\. {6 - count} of 6 ranges are missing"):
            TeacherStore.open(folder)
        with pytest.raises(StoreError, match="is partial"):
            finish(folder)
    build_store(folder, event=events.append)
    assert [(e["view"], e["range"]) for e in events] == [(v, r) for v in range(2) for r in range(3)]
    assert content(folder) == content(store_folder)


def test_the_error_of_a_partial_store_names_the_first_missing_range(tmp_path):
    with pytest.raises(InterruptedBuildError):
        build_store(tmp_path, stop=InterruptedBuildError)
    with pytest.raises(StoreError, match=r"the first of view 0, samples 8 to 15\. Build it again with the same arg"):
        TeacherStore.open(tmp_path)


def test_a_finished_store_is_not_built_again(store_copy):
    before = content(store_copy)
    build_store(store_copy, event=lambda event: pytest.fail("a range was built again"))
    assert content(store_copy) == before


def test_the_size_of_batches_and_ranges_does_not_change_the_records(store_folder, tmp_path):
    other = build_store(tmp_path / "s", batch_size=256, range_size=None)
    for name, array in other.read(IDS, 1).items():
        expected = TeacherStore.open(store_folder).read(IDS, 1)[name]
        np.testing.assert_allclose(array.astype(float), expected.astype(float), rtol=2**-10)


def test_a_range_has_at_most_64_mebibytes(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 2**20))
    with pytest.raises(InterruptedBuildError):
        build(tmp_path, model, data(None), keep=Dense(), stop=InterruptedBuildError, batch_size=4)
    assert json.loads((tmp_path / "building.json").read_text())["range_size"] == 31


PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
from distillation.stores import build_store
from kirsch import files
from kirsch.distillation.store import building
folder, fault = Path(sys.argv[1]), sys.argv[2]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(count, function, early=False):
    left = [count]

    def counting(*args, **options):
        left[0] -= 1
        if early and left[0] == 0:
            kill()
        result = function(*args, **options)
        if left[0] == 0:
            kill()
        return result

    return counting


if fault == "in a range":
    building.pack_records = kill_after(5, building.pack_records)
elif fault == "before a range has its name":
    os.fsync = kill_after(6, os.fsync)
elif fault == "before the views are made":
    building.finish = kill_after(1, building.finish, early=True)
elif fault == "between two views":
    building._finish_view = kill_after(1, building._finish_view)
elif fault == "before the ranges of a view are removed":
    building.shutil.rmtree = kill_after(1, building.shutil.rmtree, early=True)
elif fault == "before the manifest":
    building._finish_view = kill_after(2, building._finish_view)
elif fault == "after the manifest":
    building.shutil.rmtree = kill_after(3, building.shutil.rmtree, early=True)
ranges = tuple(int(part) for part in fault.split("/")) if "/" in fault else (0, 1)
build_store(folder, ranges=ranges)
"""


def start(folder, fault):
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", program, str(folder), fault], env=environment)


@pytest.mark.parametrize(
    "faults",
    [
        ["in a range", "before a range has its name", "before the views are made"],
        ["between two views"],
        ["before the ranges of a view are removed", "before the manifest"],
        ["after the manifest"],
    ],
    ids=lambda faults: faults[0],
)
def test_a_killed_build_continues_and_gives_identical_files(store_folder, tmp_path, faults):
    for fault in faults:
        assert start(tmp_path / "s", fault).wait() == -signal.SIGKILL
        if fault != "after the manifest":
            with pytest.raises(StoreError, match=r"is partial|is not finished\. All its ranges are built"):
                TeacherStore.open(tmp_path / "s")
    if faults == ["after the manifest"]:
        TeacherStore.open(tmp_path / "s").verify()
        finish(tmp_path / "s")
    build_store(tmp_path / "s").verify()
    result, expected = content(tmp_path / "s"), content(store_folder)
    assert {name: result[name] for name in expected} == expected
    assert not list((tmp_path / "s").rglob(f"{files.TEMPORARY}*"))


def test_two_processes_share_a_build(store_folder, tmp_path):
    folder = tmp_path / "s"
    running = [start(folder, f"{share}/2") for share in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert not (folder / "manifest.json").exists()
    with pytest.raises(StoreError, match=r"is not finished\. All its ranges are built\. Finish it"):
        TeacherStore.open(folder)
    finish(folder).verify()
    assert content(folder) == content(store_folder)


def test_shared_builds_do_not_overlap(tmp_path):
    events = []
    for share in range(3):
        assert build_store(tmp_path, ranges=(share, 3), event=events.append) is None
    assert sorted((e["view"], e["range"]) for e in events) == [(v, r) for v in range(2) for r in range(3)]
    finish(tmp_path).verify()
    assert build_store(tmp_path, ranges=(0, 3)) is None


def test_a_build_cannot_be_shared_with_another_teacher(tmp_path):
    build_store(tmp_path, ranges=(0, 2))
    with pytest.raises(StoreError, match=r"has another store\. It differs in the teacher's weights \(teacher_sha256"):
        build_store(tmp_path, network(seed=1), ranges=(1, 2))


def test_the_error_names_a_range_damaged_during_the_build(tmp_path):
    build_store(tmp_path, ranges=(0, 2))
    build_store(tmp_path, ranges=(1, 2))
    path = tmp_path / "parts" / "view-0001" / "range-000002.bin"
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    with pytest.raises(StoreError, match=r"range-000002.bin is damaged.*Remove it and build again"):
        finish(tmp_path)
    path.unlink()
    build_store(tmp_path).verify()


def test_the_error_names_a_view_damaged_before_the_manifest(store_folder, tmp_path, monkeypatch):
    """The expected hashes are those from the build, not those of the files when the build continues."""
    with monkeypatch.context() as patch:
        patch.setattr(building.files, "write_text", interrupt_at("manifest.json"))
        with pytest.raises(InterruptedBuildError):
            build_store(tmp_path / "s")
    path = tmp_path / "s" / "view-0001.bin"
    original = path.read_bytes()
    path.write_bytes(original[:50] + bytes([original[50] ^ 64]) + original[51:])
    with pytest.raises(StoreError, match=r"view-0001.bin is damaged.*Remove it and build again"):
        build_store(tmp_path / "s")
    path.unlink()
    build_store(tmp_path / "s").verify()
    assert content(tmp_path / "s") == content(store_folder)


def interrupt_at(name):
    original = files.write_text

    def write(path, text):
        if path.name == name:
            raise InterruptedBuildError
        original(path, text)

    return write


def test_a_process_that_another_overtakes_ends_without_error(store_folder, tmp_path, monkeypatch):
    def overtaken(*args):
        monkeypatch.setattr(building, "pack_records", pack_records)
        build_store(tmp_path / "s")
        return pack_records(*args)

    monkeypatch.setattr(building, "pack_records", overtaken)
    build_store(tmp_path / "s").verify()
    assert content(tmp_path / "s") == content(store_folder)


def test_only_one_process_can_finish_a_store(tmp_path):
    import filelock

    build_store(tmp_path, ranges=(0, 2))
    with filelock.FileLock(tmp_path / "store.lock"), pytest.raises(OutputError, match="finished by another process"):
        finish(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_no_partial_file(tmp_path, monkeypatch):
    original, left = os.fsync, [4]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot be written\. No space left on device\. Free space"):
            build_store(tmp_path / "s")
    assert not list(tmp_path.rglob(f"{files.TEMPORARY}*"))
    build_store(tmp_path / "s").verify()


def test_the_disk_space_is_checked_before_the_build(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    with pytest.raises(OutputError, match=r"has 0 MB free; the work needs about"):
        build_store(tmp_path / "s")


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file"):
        build_store(tmp_path / "file")
