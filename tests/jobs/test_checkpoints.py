"""Damaged checkpoints are reported and skipped; checkpoints of other inputs are removed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kirsch import files
from kirsch.errors import CheckpointError
from kirsch.frameworks.training import TrainingState
from kirsch.jobs import checkpoints


def state(epoch: int, batch: int = 0) -> TrainingState:
    arrays = {"model.weight": np.full((2, 3), epoch + batch / 10, np.float32), "random": np.arange(5, dtype=np.uint8)}
    return TrainingState(arrays, {"epoch": epoch, "batch": batch, "sums": {"loss": 0.1 + 0.2}, "history": []})


def assert_same(found: TrainingState, expected: TrainingState) -> None:
    """Check that two states are equal bit for bit, including types."""
    assert found.values == expected.values
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)


def refuse(sentence: str) -> None:
    pytest.fail(f"unexpected note {sentence!r}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a step after three saves, which tests must not change."""
    folder = tmp_path_factory.mktemp("step")
    for epoch in (1, 2, 3):
        checkpoints.save(folder, state(epoch), "inputs")
    return folder


@pytest.fixture
def step(saved, tmp_path):
    """Copy of `saved` that a test may change."""
    return shutil.copytree(saved, tmp_path / "step")


def test_newest_two_checkpoints_are_kept(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["step-00002-000000", "step-00003-000000"]


def test_newest_checkpoint_is_loaded_bit_for_bit(saved):
    assert_same(checkpoints.newest(saved, "inputs", refuse), state(3))


def test_checkpoints_are_ordered_by_epoch_then_batch(tmp_path):
    for epoch, batch in ((2, 11), (10, 0), (2, 7)):
        checkpoints.save(tmp_path, state(epoch, batch), "inputs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00002-000011", "step-00010-000000"]
    assert_same(checkpoints.newest(tmp_path, "inputs", refuse), state(10))


def test_step_without_checkpoints_has_no_state(tmp_path):
    assert checkpoints.newest(tmp_path, "inputs", refuse) is None
    (tmp_path / ".tmp-half").mkdir()
    (tmp_path / "done").mkdir()
    assert checkpoints.newest(tmp_path / "none", "inputs", refuse) is None
    assert checkpoints.newest(tmp_path, "inputs", refuse) is None


@settings(max_examples=40)
@given(st.data())
def test_flipped_bit_is_reported_and_the_previous_checkpoint_is_used(saved, data):
    newest = saved / "step-00003-000000"
    path = data.draw(st.sampled_from(sorted(newest.iterdir())))
    before = path.read_bytes()
    content = bytearray(before)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    notes = []
    try:
        found = checkpoints.newest(saved, "inputs", notes.append)
    finally:
        path.write_bytes(before)
    assert_same(found, state(2))
    (sentence,) = notes
    assert sentence.startswith("The checkpoint step-00003-000000 is damaged: ")
    # If the bit is in the manifest, the note may name the file whose entry was changed.
    assert path.name in sentence or path.name == files.MANIFEST


@pytest.mark.parametrize("name", ["arrays.safetensors", "values.json", "manifest.json"])
def test_missing_file_is_reported_and_the_previous_checkpoint_is_used(step, name):
    (step / "step-00003-000000" / name).unlink()
    notes = []
    assert_same(checkpoints.newest(step, "inputs", notes.append), state(2))
    assert len(notes) == 1
    assert f"{name} is missing" in notes[0]


@pytest.mark.parametrize(("name", "content"), [("arrays.safetensors", b"none"), ("values.json", b"{")])
def test_unreadable_checkpoint_with_valid_manifest_is_skipped(step, name, content):
    path = step / "step-00003-000000"
    (path / name).write_bytes(content)
    files.write_manifest(path)
    notes = []
    assert_same(checkpoints.newest(step, "inputs", notes.append), state(2))
    assert notes[0].startswith("The checkpoint step-00003-000000 cannot be read: ")


def test_error_if_all_checkpoints_are_damaged(step):
    for path in step.iterdir():
        (path / "arrays.safetensors").unlink()
    notes = []
    with pytest.raises(CheckpointError, match=r"All checkpoints in .* are damaged\..*Remove the folder to start"):
        checkpoints.newest(step, "inputs", notes.append)
    assert [note.split()[2] for note in notes] == ["step-00003-000000", "step-00002-000000"]


def test_checkpoints_of_other_inputs_are_removed_with_a_note(step):
    """Their state belongs to another recipe. If they remained, they would count among the newest two."""
    notes = []
    assert checkpoints.newest(step, "others", notes.append) is None
    assert [note.split()[2] for note in notes] == ["step-00003-000000", "step-00002-000000"]
    assert all("the inputs of its step have changed" in sentence for sentence in notes)
    assert list(step.iterdir()) == []
