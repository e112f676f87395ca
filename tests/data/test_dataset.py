"""Checks of data sets and of their parts: arrays, loaders, labels and class names."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from data_sets import data_set, split
from kirsch.data import dataset
from kirsch.data.batches import ArrayData
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
    assert data.test.inputs.dtype == np.float32  # the type that models take
    assert data.sha256 == data_set(test=Split(np.zeros((3, 2), np.float32), np.arange(3))).sha256
    assert Split(list(np.zeros((3, 2))), [0, 1, 2]).inputs.dtype == np.float64  # the type of the given arrays
    loader = DataLoader(TensorDataset(*rows))
    with pytest.raises(DataError, match=r"The inputs of a Split are a DataLoader; expected one .* train=loader\."):
        Split(loader, loader)
    with pytest.raises(DataError, match=r"The labels of a Split are a list of 3 str, the first 'a'; .* Give numbers"):
        Split(np.zeros((3, 2)), ["a", "b", "c"])


def test_split_has_one_label_for_each_input():
    with pytest.raises(DataError, match=r"A Split has 2 inputs and 3 labels\. Give one label for each sample"):
        Split(np.zeros((2, 2), np.float32), np.zeros(3, np.int64))
    assert len(Split(np.zeros((2, 2)), [0, 1])) == 2


def test_parts_with_different_numbers_of_axes_are_refused():
    with pytest.raises(
        DataError, match=r"inputs of the test part of d are of shape \(3, 2, 1\); in the train part .* \(3, 2\)"
    ):
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
        DataSet("\udce9", split(), split(), split(), classes=("a", "b", "c"))


# ------------------------------------------------------------------------------------------------ loaders


def loader(labels=(0, 1, 2), batch_size=2, **options):
    samples = TensorDataset(torch.zeros(len(labels), 2), torch.tensor(labels))
    return DataLoader(samples, batch_size=batch_size, **options)


def test_loaders_are_read_into_memory_except_that_of_the_training_part():
    training = loader((0, 1, 2, 1))
    data = data_set(train=training, validation=loader(), test=loader((2, 1)))
    assert data.is_stream
    assert data.batches(64) is training
    assert data.validation.inputs.shape == (3, 2)
    assert data.test.labels.tolist() == [2, 1]
    assert data.sizes == {"train": 4, "validation": 3, "test": 2}
    assert data.count_batches(64) == 2


@pytest.mark.parametrize(
    "batches",
    [
        [(np.zeros((2, 2), np.float32), [0, 1]), (np.zeros((1, 2), np.float32), [2])],
        [((np.zeros((3, 2), np.float32),), np.arange(3))],
    ],
)
def test_any_iterable_of_batches_can_be_a_part(batches):
    data = data_set(train=batches, validation=batches, test=batches)
    assert data.test.inputs.shape == (3, 2)
    assert data.test.labels.tolist() == [0, 1, 2]
    assert [inputs.shape for inputs in data.first_inputs(2)] == [(2, 2)]
    assert data.sizes["train"] is None
    assert data.count_batches(64) == len(batches)


def test_pair_of_arrays_can_be_a_part():
    pair = torch.zeros(3, 2), [0, 1, 2]
    assert data_set(train=pair, validation=pair, test=pair).sha256 == data_set().sha256


def test_without_class_names_the_classes_are_the_numbers_up_to_the_largest_label():
    assert data_set(classes=(), test=split((0, 3))).classes == ("0", "1", "2", "3")
    assert data_set(classes=(), train=loader(), validation=loader((1, 4))).classes == ("0", "1", "2", "3", "4")
    rows = Split(np.zeros((3, 2)), np.eye(3))  # a task decides whether these labels are valid
    assert data_set(classes=(), train=rows, validation=rows, test=rows).classes == ()


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_generator_is_refused_as_a_part(part):
    with pytest.raises(DataError, match=rf"The {part} part of d is a generator, which can be read only once\."):
        data_set(**{part: (batch for batch in loader())})


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([torch.zeros(2, 2)], r"Batch 1 of the test part of d has no labels\."),
        (
            [(torch.zeros(2, 2), [0, 1]), (torch.zeros(2, 3), [0, 1])],
            r"the test part of d differ in shape: \(2,\), \(3",
        ),
        ([], r"The test part of d is empty"),
        (loader(()), r"The test part of d has no batches"),
        (loader().dataset, r"The test part of d is a TensorDataset, which yields single samples.*DataLoader\("),
        ([(torch.zeros(2), torch.tensor(1))], r"Batch 1 of the test part of d: .*looks like a single sample"),
        (ArrayData(np.zeros((2, 2)), np.arange(2)), r"The test part of d is .* Give kirsch\.Split"),
    ],
)
def test_loader_that_does_not_yield_samples_with_labels_is_refused(batches, sentence):
    with pytest.raises(DataError, match=sentence):
        data_set(test=batches)


def test_dataset_is_refused_as_the_training_part():
    with pytest.raises(DataError, match=r"The train part of d is a TensorDataset, which yields single samples"):
        data_set(train=loader().dataset)


def test_loader_of_more_samples_than_memory_is_refused_at_its_first_batch(monkeypatch):
    class Endless:
        read = 0

        def __len__(self):
            return 1000

        def __iter__(self):
            while True:
                self.read += 1
                yield np.zeros((500, 2), np.float32), np.zeros(500, np.int64)

    batches = Endless()
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=10_000_000))
    with pytest.raises(DataError, match=r"The samples of the test part of d take 8\.00 MB, and 10\.0 MB of memory"):
        data_set(test=batches)
    assert batches.read == 1


def test_empty_list_is_refused_as_the_training_part():
    with pytest.raises(DataError, match=r"The train part of d is empty\. Give it at least one sample\."):
        data_set(train=[])


def test_augmentation_of_a_loader_is_refused():
    with pytest.raises(UsageError, match=r"`augment` of d has no effect: its training part is a loader\."):
        data_set(train=loader(), augment=lambda batch, _random: batch)


def test_hash_of_a_loader_depends_on_the_name_and_on_the_other_parts():
    hashes = [
        data_set(train=loader()).sha256,
        data_set(train=loader(), test=split((0, 2, 1))).sha256,
        data_set().sha256,
        DataSet("e", loader(), split(), split(), classes=("a", "b", "c")).sha256,
    ]
    assert len(set(hashes)) == 4
    assert data_set(train=loader((0, 0, 0))).sha256 == hashes[0]


def test_test_samples_in_another_part_are_counted():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 6, 3)).astype(np.float32)
    labels = np.arange(6) % 3
    data = data_set(train=Split(first, labels), validation=(second, labels), test=(first[[4, 1, 1]], labels[:3]))
    assert data.test_samples_in_other_parts() == {"train": 3, "validation": 0}
    pair = Split((first[:, 0], first), labels)
    other = Split((second[:, 0], first), labels)  # the samples differ in one of their inputs
    data = data_set(train=other, validation=pair, test=pair)
    assert data.test_samples_in_other_parts() == {"train": 0, "validation": 6}
    loader = [(first, labels)]
    data = data_set(train=loader, validation=(second, labels), test=(first, labels))
    assert data.test_samples_in_other_parts() == {"validation": 0}


def test_each_part_is_hashed_once_to_find_test_samples_in_other_parts(monkeypatch):
    hashed = []
    monkeypatch.setattr(dataset, "_row_hashes", lambda part: hashed.append(part) or [])
    data = data_set()
    data.test_samples_in_other_parts()
    assert hashed == [data.test, data.train, data.validation]
