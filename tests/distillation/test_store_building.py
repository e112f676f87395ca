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

from distillation.stores import IDS, data, network, tiny_store
from folders import contents
from kirsch import files
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import Dense, TeacherStore, TopK, build_store, record
from kirsch.distillation.store.record import pack_records
from kirsch.errors import OutputError, StoreError


class InterruptedBuildError(Exception):
    pass


def interrupt(_event):
    raise InterruptedBuildError


def test_an_interrupted_build_continues_and_gives_identical_files(store_folder, tmp_path):
    folder, events = tmp_path / "s", []

    def record_and_interrupt(event):
        events.append(event)
        raise InterruptedBuildError

    for count in range(1, 6):
        with pytest.raises(InterruptedBuildError):
            tiny_store(folder, event=record_and_interrupt)
        assert len(events) == count
        with pytest.raises(StoreError, match=rf"is partial\. {6 - count} of 6 ranges are missing"):
            TeacherStore.open(folder)
    assert (folder / "view-0001-range-000001.bin").exists()
    tiny_store(folder, event=events.append)
    assert [(e["view"], e["range"]) for e in events] == [(v, r) for v in range(2) for r in range(3)]
    assert contents(folder) == contents(store_folder)


def test_the_error_of_a_partial_store_names_the_first_missing_range(tmp_path):
    with pytest.raises(InterruptedBuildError):
        tiny_store(tmp_path, event=interrupt)
    with pytest.raises(StoreError, match=r"the first is view 0, samples 8 to 15\. Build it again with the same arg"):
        TeacherStore.open(tmp_path)


def test_a_finished_store_is_not_built_again(store_copy):
    before = contents(store_copy)
    tiny_store(store_copy, event=lambda event: pytest.fail("a range was built again"))
    assert contents(store_copy) == before


def test_the_size_of_batches_and_ranges_does_not_change_the_records(store_folder, tmp_path):
    other = tiny_store(tmp_path / "s", batch_size=256, range_size=None)
    for name, array in other.read(IDS, 1).items():
        expected = TeacherStore.open(store_folder).read(IDS, 1)[name]
        np.testing.assert_allclose(array.astype(float), expected.astype(float), rtol=2**-10)


def test_a_range_file_has_at_most_64_mebibytes(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 2**20))
    with pytest.raises(InterruptedBuildError):
        build_store(tmp_path, model, data(None), keep=Dense(), event=interrupt, batch_size=4)
    assert json.loads((tmp_path / "store.json").read_text())["range_size"] == 31


def test_a_range_file_has_at_least_a_32nd_of_the_samples_so_that_a_batch_is_found_in_few_files(tmp_path):
    many = ArrayData(np.zeros((600_000, 1), np.float32), None)
    with pytest.raises(InterruptedBuildError):
        build_store(tmp_path, nn.Linear(1, 2), many, keep=TopK(1), event=interrupt, batch_size=20_000)
    assert json.loads((tmp_path / "store.json").read_text())["range_size"] == 600_000 // 32


PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
from distillation.stores import tiny_store
from kirsch import files
from kirsch.distillation.store import record
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
    record.pack_records = kill_after(5, record.pack_records)
elif fault == "before a range has its name":
    os.fsync = kill_after(5, os.fsync)
elif fault == "before the specification is written":
    files.write_json = kill_after(1, files.write_json, early=True)
elif fault == "after the last range":
    files.remove_temporary = kill_after(1, files.remove_temporary, early=True)
ranges = tuple(int(part) for part in fault.split("/")) if "/" in fault else (0, 1)
tiny_store(folder, ranges=ranges)
"""


def start(folder, fault):
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", program, str(folder), fault], env=environment)


@pytest.mark.parametrize(
    "faults",
    [
        ["before the specification is written"],
        ["in a range", "before a range has its name"],
        ["before a range has its name", "after the last range"],
    ],
    ids=lambda faults: ", ".join(faults),
)
def test_a_killed_build_continues_and_gives_identical_files(store_folder, tmp_path, faults):
    folder = tmp_path / "s"
    for fault in faults:
        assert start(folder, fault).wait() == -signal.SIGKILL
        if fault == "after the last range":
            TeacherStore.open(folder).verify()
        else:
            with pytest.raises(StoreError, match=r"is partial|There is no store"):
                TeacherStore.open(folder)
    assert ("before a range has its name" in faults) == bool(list(folder.glob(f"{files.TEMPORARY}*")))
    tiny_store(folder).verify()
    assert contents(folder) == contents(store_folder)  # temporary files are removed


def test_two_processes_share_a_build(store_folder, tmp_path):
    folder = tmp_path / "s"
    running = [start(folder, f"{share}/2") for share in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    TeacherStore.open(folder).verify()
    assert contents(folder) == contents(store_folder)


def test_shared_builds_do_not_overlap(tmp_path):
    events = []
    for share in range(3):
        store = tiny_store(tmp_path, ranges=(share, 3), event=events.append)
        assert (store is None) == (share < 2)
    assert sorted((e["view"], e["range"]) for e in events) == [(v, r) for v in range(2) for r in range(3)]
    store.verify()


def test_a_build_cannot_be_shared_with_another_teacher(tmp_path):
    tiny_store(tmp_path, ranges=(0, 2))
    with pytest.raises(StoreError, match=r"another value of the teacher's weights \(teacher_sha256"):
        tiny_store(tmp_path, network(seed=1), ranges=(1, 2))


def test_a_range_damaged_during_the_build_is_found(tmp_path):
    tiny_store(tmp_path, ranges=(0, 2))
    path = tmp_path / "view-0000-range-000002.bin"
    original = path.read_bytes()
    path.write_bytes(original[:-40] + bytes(40))
    with pytest.raises(
        StoreError, match=r"view-0000-range-000002.bin \(view 0, samples 16 to 20\)\. Delete the damaged"
    ):
        tiny_store(tmp_path).verify()
    path.unlink()
    tiny_store(tmp_path).verify()
    assert path.read_bytes() == original


def test_a_build_does_not_continue_records_without_a_specification(tmp_path):
    tiny_store(tmp_path, ranges=(0, 2))
    (tmp_path / "store.json").unlink()
    with pytest.raises(
        StoreError, match=r"has records without a store\.json\. Remove the records, or choose another folder"
    ):
        tiny_store(tmp_path)


def test_a_process_ends_without_error_if_another_has_finished_the_build(store_folder, tmp_path, monkeypatch):
    ran = []

    def overtaken(*args):
        monkeypatch.setattr(record, "pack_records", pack_records)
        tiny_store(tmp_path / "s")
        ran.append("overtaken")
        return pack_records(*args)

    monkeypatch.setattr(record, "pack_records", overtaken)
    tiny_store(tmp_path / "s").verify()
    assert ran == ["overtaken"]
    assert contents(tmp_path / "s") == contents(store_folder)


def test_a_missing_temporary_file_is_not_an_error_if_another_process_has_built_the_range(tmp_path, monkeypatch):
    original, overtaken_ranges = files.write_chunks, []

    def overtaken(path, chunks):
        original(path, chunks)
        if path.suffix == ".bin" and path.name.startswith("view"):
            overtaken_ranges.append(path.name)
            raise OutputError("The temporary file is gone.")

    monkeypatch.setattr(files, "write_chunks", overtaken)
    tiny_store(tmp_path / "s").verify()
    assert overtaken_ranges


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
            tiny_store(tmp_path / "s")
    assert not list(tmp_path.rglob(f"{files.TEMPORARY}*"))
    tiny_store(tmp_path / "s").verify()


def test_the_disk_space_is_checked_before_the_build(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    with pytest.raises(OutputError, match=r"has 0 MB free; the work needs about"):
        tiny_store(tmp_path / "s")


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file"):
        tiny_store(tmp_path / "file")
