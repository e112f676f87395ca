"""CIFAR-10 from the files of the dataset hubs."""

from __future__ import annotations

import io

import numpy as np
import pytest

from kirsch.errors import DataError
from kirsch.recipes.tasks.cifar10 import CLASSES, crop_and_flip, data_folder
from kirsch.recipes.tasks.data import load_data


class Drawn:
    """Chance that says what it was told: shifts downwards, shifts to the right, and the draws for mirroring."""

    def __init__(self, down, right, mirror):
        self.shifts, self.mirror = np.array([down, right]), np.array(mirror)

    def integers(self, low, high, size):
        assert (low, high, size) == (0, 9, self.shifts.shape)
        return self.shifts

    def random(self, size):
        assert size == len(self.mirror)
        return self.mirror


def test_a_shift_of_four_without_mirror_changes_nothing():
    batch = np.random.default_rng(0).standard_normal((3, 2, 5, 6)).astype(np.float32)
    found = crop_and_flip(batch, Drawn([4] * 3, [4] * 3, [0.5] * 3))
    assert np.array_equal(found, batch)
    assert found.flags.c_contiguous


def test_images_are_shifted_over_zeros_and_mirrored():
    image = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
    batch = np.repeat(image, 4, axis=0)
    found = crop_and_flip(batch, Drawn([4, 5, 3, 8], [4, 4, 6, 4], [0.49, 0.9, 0.9, 0.9]))
    assert found[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]  # mirrored
    assert found[1, 0].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]  # one up
    assert found[2, 0].tolist() == [[0, 0, 0], [3, 0, 0], [6, 0, 0]]  # one down, two to the left
    assert found[3, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0]]  # four up: nothing is left


def test_each_color_moves_alike():
    batch = np.random.default_rng(1).standard_normal((8, 1, 7, 7)).astype(np.float32)
    colors = np.concatenate([batch, 2 * batch], axis=1)
    found = crop_and_flip(colors, np.random.default_rng(2))
    assert np.array_equal(found[:, 1], 2 * found[:, 0])
    assert np.array_equal(found[:, :1], crop_and_flip(batch, np.random.default_rng(2)))


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data folder with twenty training and four test images of one color each: 20 times their class."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")

    def encoded(label):
        file = io.BytesIO()
        image.new("RGB", (32, 32), (20 * label, 0, 255)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    (tmp_path / "cifar10").mkdir()
    for name, labels in (("train", [*range(10), *range(10)]), ("test", [3, 5, 7, 9])):
        table = pa.table({"img": [encoded(label) for label in labels], "label": labels})
        pq.write_table(table, tmp_path / "cifar10" / f"{name}.parquet")
    monkeypatch.setenv("KIRSCH_DATA", str(tmp_path))


def test_images_become_scaled_planes_of_colors_beside_their_labels(hub):
    options = {"train": 19, "validation": 1, "test": 4, "mean": (0.0, 0.5, 0.5), "deviation": (1.0, 1.0, 0.25)}
    data = load_data("cifar10", options, seed=3)
    assert data.classes == CLASSES
    assert sorted(data.test.labels.tolist()) == [3, 5, 7, 9]
    assert sorted([*data.train.labels, *data.validation.labels]) == sorted([*range(10), *range(10)])
    for part in (data.train, data.validation, data.test):
        assert part.inputs.shape == (len(part), 3, 32, 32)
        assert part.inputs[:, 0].mean((1, 2)) == pytest.approx(20 * part.labels / 255, abs=1e-6)
        assert np.allclose(part.inputs[:, 1], -0.5)
        assert np.allclose(part.inputs[:, 2], (1 - 0.5) / 0.25)


def test_the_seed_decides_the_samples_and_augmentation_can_be_left_out(hub):
    small = {"train": 19, "validation": 1, "test": 2}
    assert load_data("cifar10", small, seed=3).sha256 == load_data("cifar10", small, seed=3).sha256
    assert load_data("cifar10", small, seed=3).sha256 != load_data("cifar10", small, seed=4).sha256
    assert load_data("cifar10", small, seed=3).augment is crop_and_flip
    assert load_data("cifar10", {**small, "augment": False}, seed=3).augment is None


@pytest.mark.parametrize(
    "wanted", [{"train": 20, "validation": 1, "test": 1}, {"train": 1, "validation": 1, "test": 5}]
)
def test_more_samples_than_there_are_are_refused(hub, wanted):
    sentence = (
        rf"CIFAR-10 has 20 training and 4 test images\. {wanted['train']} \+ 1 and {wanted['test']} were asked for"
    )
    with pytest.raises(DataError, match=sentence):
        load_data("cifar10", wanted, seed=0)


def test_a_missing_folder_is_named_with_the_variable_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("KIRSCH_DATA", str(tmp_path))
    sentence = (
        r"CIFAR-10 is not there: .*cifar10/train\.parquet does not exist\. Set KIRSCH_DATA to a folder that holds"
    )
    with pytest.raises(DataError, match=sentence):
        load_data("cifar10", {}, seed=0)


def test_the_hubs_files_are_what_they_are_said_to_be():
    if not (data_folder() / "cifar10" / "train.parquet").is_file():
        pytest.skip(f"CIFAR-10 is not in {data_folder()}; KIRSCH_DATA names the folder that holds it")
    data = load_data("cifar10", {"train": 300, "validation": 20, "test": 50}, seed=0)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [300, 20, 50]
    assert np.bincount(data.train.labels, minlength=10).min() > 10, "the files are sorted by class, the choice is not"
    assert abs(data.train.inputs.mean()) < 0.3, "about standardized by the usual mean and deviation"
