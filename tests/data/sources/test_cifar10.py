"""CIFAR-10, read from Parquet files in the format of dataset hubs."""

from __future__ import annotations

import io

import numpy as np
import pytest

from kirsch.data.augment import Chain, Crop, Flip
from kirsch.data.sources import load_data
from kirsch.data.sources.cifar10 import CLASSES, data_folder
from kirsch.errors import DataError

# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Set KIRSCH_DATA to a folder with 20 training and 4 test images of one color. Red is 20 times the class."""
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


def test_images_are_normalized_by_color_and_keep_their_labels(hub):
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


def test_seed_selects_the_samples_and_augmentation_is_optional(hub):
    small = {"train": 19, "validation": 1, "test": 2}
    assert load_data("cifar10", small, seed=3).sha256 == load_data("cifar10", small, seed=3).sha256
    assert load_data("cifar10", small, seed=3).sha256 != load_data("cifar10", small, seed=4).sha256
    assert load_data("cifar10", small, seed=3).augment == Chain(Crop(4), Flip(0.5))
    assert load_data("cifar10", {**small, "augment": False}, seed=3).augment is None


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_an_empty_part_is_refused(hub, part):
    with pytest.raises(DataError, match=rf"The {part} part of CIFAR-10 would be empty\. Give {part}=1 or more"):
        load_data("cifar10", {"train": 2, "validation": 2, "test": 2, part: 0}, seed=3)


@pytest.mark.parametrize("sizes", [{"train": 20, "validation": 1, "test": 1}, {"train": 1, "validation": 1, "test": 5}])
def test_too_many_samples_are_refused(hub, sizes):
    sentence = rf"CIFAR-10 has 20 training and 4 test images; {sizes['train']} \+ 1 and {sizes['test']} are requested"
    with pytest.raises(DataError, match=sentence):
        load_data("cifar10", sizes, seed=0)


def test_missing_folder_is_named_with_the_variable_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("KIRSCH_DATA", str(tmp_path))
    sentence = (
        r"CIFAR-10 was not found: .*cifar10/train\.parquet does not exist\. Set KIRSCH_DATA to a folder that holds"
    )
    with pytest.raises(DataError, match=sentence):
        load_data("cifar10", {}, seed=0)


def test_downloaded_files_have_the_expected_content():
    if not (data_folder() / "cifar10" / "train.parquet").is_file():
        pytest.skip(f"CIFAR-10 is not in {data_folder()}; KIRSCH_DATA names the folder that holds it")
    data = load_data("cifar10", {"train": 300, "validation": 20, "test": 50}, seed=0)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [300, 20, 50]
    assert np.bincount(data.train.labels, minlength=10).min() > 10, (
        "samples are selected at random from files sorted by class"
    )
    assert abs(data.train.inputs.mean()) < 0.3, "inputs are approximately standardized"
