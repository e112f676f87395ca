"""Data sets check their parts, and sources of data sets are called with their options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from data_sets import data_set, split
from kirsch.data.dataset import DataSet, Split
from kirsch.errors import DataError, UsageError


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (split(()), r"The {} part of d is empty\. Give it at least one sample\."),
        (split(value=np.nan), r"The {} part of d contains NaN or infinity\."),
        (split(value=-np.inf), r"The {} part of d contains NaN or infinity\."),
    ],
)
def test_invalid_part_is_named(part, wrong, sentence):
    with pytest.raises(DataError, match=sentence.format(part)):
        data_set(**{part: wrong})


def test_split_takes_tensors_and_lists_and_refuses_a_loader():
    rows = torch.zeros(3, 2), torch.tensor([0, 1, 2])
    data = data_set(train=Split(*rows), test=Split([[0.0, 0.0]] * 3, [0, 1, 2]))
    assert isinstance(data.train.inputs, np.ndarray)
    assert data.test.inputs.dtype == np.float32  # as the models take them
    assert data.sha256 == data_set(test=Split(np.zeros((3, 2), np.float32), np.arange(3))).sha256
    assert Split(list(np.zeros((3, 2))), [0, 1, 2]).inputs.dtype == np.float64  # as they are given
    loader = DataLoader(TensorDataset(*rows))
    with pytest.raises(DataError, match=r"The inputs of a Split are a DataLoader; expected one .* numpy\.concatenate"):
        Split(loader, loader)
    with pytest.raises(DataError, match=r"The labels of a Split are a list of 3 str, the first 'a'; .* Give numbers"):
        Split(np.zeros((3, 2)), ["a", "b", "c"])


def test_split_has_one_label_for_each_input():
    with pytest.raises(DataError, match=r"A Split has 2 inputs and 3 labels\. Give one label for each input"):
        Split(np.zeros((2, 2), np.float32), np.zeros(3, np.int64))
    assert len(Split(np.zeros((2, 2)), [0, 1])) == 2


def test_parts_with_different_numbers_of_axes_are_refused():
    with pytest.raises(DataError, match=r"The test part of d has inputs of shape \(3, 2, 1\), the train part \(3, 2\)"):
        data_set(test=Split(np.zeros((3, 2, 1), np.float32), np.arange(3)))


@pytest.mark.parametrize("classes", [3, "cat"])
def test_classes_must_be_a_tuple_of_names(classes):
    sentence = (
        rf"`classes` of kirsch\.DataSet is {classes!r}; .*Give the name of each class.*tuple\(map\(str, range\(10\)\)\)"
    )
    with pytest.raises(UsageError, match=sentence):
        data_set(classes=classes)


def test_hash_depends_on_inputs_and_labels_of_each_part():
    changed = [
        data_set(**{part: other})
        for part in ("train", "validation", "test")
        for other in (split((0, 2, 1)), split(value=1))
    ]
    hashes = {data.sha256 for data in changed}
    assert len(hashes) == 6
    assert data_set().sha256 not in hashes
    assert data_set().sha256 == data_set(classes=("x", "y", "z")).sha256


def test_batches_contain_the_augmented_training_part():
    data = data_set(augment=lambda batch, _random: batch + 1)
    batches = list(data.batches(2).epoch(seed=0, epoch=0))
    assert sorted(np.concatenate([batch.targets for batch in batches]).tolist()) == [0, 1, 2]
    assert all((batch.inputs == 1).all() for batch in batches)


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (("a", "\udce9", "c"), r"The class 1 of d has the name '\\udce9'\. It is not valid text\."),
        (("a", "b", 2), r"`classes\[2\]` of kirsch\.DataSet is 2; expected text"),
        (("a", None, "c"), r"`classes\[1\]` of kirsch\.DataSet is None; expected text"),
        (("a", b"b", "c"), r"`classes\[1\]` of kirsch\.DataSet is b'b'; expected text"),
        (("a", "b", "a"), r"Two classes of d have the name 'a'\."),
    ],
)
def test_invalid_class_name_is_refused(classes, sentence):
    with pytest.raises((DataError, UsageError), match=sentence):
        data_set(classes=classes)


def test_name_that_is_not_valid_text_is_refused():
    with pytest.raises(DataError, match=r"The data set has the name '\\udce9'\. It is not valid text\."):
        DataSet("\udce9", split(), split(), split(), ("a", "b", "c"))
