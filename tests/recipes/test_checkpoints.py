"""Training states on disk: never a damaged one in silence, never one of other inputs."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kirsch import files
from kirsch.errors import CheckpointError
from kirsch.frameworks.training import TrainingState
from kirsch.recipes import checkpoints


def state(epoch: int, batch: int = 0) -> TrainingState:
    arrays = {"model.weight": np.full((2, 3), epoch + batch / 10, np.float32), "random": np.arange(5, dtype=np.uint8)}
    return TrainingState(arrays, {"epoch": epoch, "batch": batch, "sums": {"loss": 0.1 + 0.2}, "history": []})


def assert_same(found: TrainingState, expected: TrainingState) -> None:
    """Equal bit for bit, types included."""
    assert found.values == expected.values
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)


def refuse(sentence: str) -> None:
    pytest.fail(f"nothing was to be told, found {sentence!r}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A stage with the checkpoints of epochs 1 to 3, of which two are kept. Not to be changed."""
    folder = tmp_path_factory.mktemp("stage")
    for epoch in (1, 2, 3):
        checkpoints.save(folder, state(epoch), "inputs")
    return folder


@pytest.fixture
def stage(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "stage")


def test_the_newest_two_are_kept(made):
    assert sorted(path.name for path in made.iterdir()) == ["step-00002-000000", "step-00003-000000"]


def test_the_newest_is_taken_bit_for_bit(made):
    assert_same(checkpoints.newest(made, "inputs", refuse), state(3))


def test_batches_count_after_epochs(tmp_path):
    for epoch, batch in ((2, 11), (10, 0), (2, 7)):
        checkpoints.save(tmp_path, state(epoch, batch), "inputs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00002-000011", "step-00010-000000"]
    assert_same(checkpoints.newest(tmp_path, "inputs", refuse), state(10))


def test_a_stage_without_checkpoints_begins_anew(tmp_path):
    assert checkpoints.newest(tmp_path, "inputs", refuse) is None
    (tmp_path / ".tmp-half").mkdir()
    (tmp_path / "done").mkdir()
    assert checkpoints.newest(tmp_path / "none", "inputs", refuse) is None
    assert checkpoints.newest(tmp_path, "inputs", refuse) is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_named_and_the_one_before_is_taken(made, data):
    newest = made / "step-00003-000000"
    path = data.draw(st.sampled_from(sorted(newest.iterdir())))
    before = path.read_bytes()
    content = bytearray(before)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    told = []
    try:
        found = checkpoints.newest(made, "inputs", told.append)
    finally:
        path.write_bytes(before)
    if found.values["epoch"] == 3:  # such as the name of an entry that JSON passes over
        assert path.name == files.MANIFEST
        assert_same(found, state(3))
    else:
        assert_same(found, state(2))
        (sentence,) = told
        assert sentence.startswith("The checkpoint step-00003-000000 is damaged: ")
        assert path.name in sentence or path.name == files.MANIFEST, "which names what it misses by its damaged entry"


@pytest.mark.parametrize("name", ["arrays.safetensors", "values.json", "manifest.json"])
def test_a_missing_file_is_named_and_the_one_before_is_taken(stage, name):
    (stage / "step-00003-000000" / name).unlink()
    told = []
    assert_same(checkpoints.newest(stage, "inputs", told.append), state(2))
    assert len(told) == 1
    assert f"{name} is missing" in told[0]


@pytest.mark.parametrize(("name", "content"), [("arrays.safetensors", b"none"), ("values.json", b"{")])
def test_a_sealed_checkpoint_that_cannot_be_read_is_passed_over(stage, name, content):
    path = stage / "step-00003-000000"
    (path / name).write_bytes(content)
    files.write_manifest(path)
    told = []
    assert_same(checkpoints.newest(stage, "inputs", told.append), state(2))
    assert told[0].startswith("The checkpoint step-00003-000000 cannot be read: ")


def test_nothing_is_gone_on_from_where_all_are_damaged(stage):
    for path in stage.iterdir():
        (path / "arrays.safetensors").unlink()
    told = []
    with pytest.raises(CheckpointError, match=r"All checkpoints in .* are damaged\..*Remove the folder to start"):
        checkpoints.newest(stage, "inputs", told.append)
    assert [sentence.split()[2] for sentence in told] == ["step-00003-000000", "step-00002-000000"]


def test_checkpoints_of_other_inputs_are_removed_and_said(stage):
    """Gone on from, they would give a model that neither recipe asks for; kept, they would push out the new ones."""
    told = []
    assert checkpoints.newest(stage, "others", told.append) is None
    assert [sentence.split()[2] for sentence in told] == ["step-00003-000000", "step-00002-000000"]
    assert all("the inputs of its stage have changed" in sentence for sentence in told)
    assert list(stage.iterdir()) == []
