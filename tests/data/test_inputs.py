"""Data sets for models with several inputs: tuples and dicts of arrays, and loaders that return them."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_sets import data_set
from kirsch.data.batches import ArrayData, Batch
from kirsch.data.dataset import DataSet, Split
from kirsch.errors import DataError, ShapeError, UsageError

LABELS = np.array([0, 1, 2])


def ids(samples=3, length=4):
    return np.arange(samples * length).reshape(samples, length)


def texts(samples=3, length=4, **changes):
    """Return token ids and mask of some texts; an entry that is None is left out."""
    entries = {"input_ids": ids(samples, length), "mask": np.ones((samples, length), np.int64), **changes}
    return {name: value for name, value in entries.items() if value is not None}


def batch(samples=2, length=4, **changes):
    """Return a batch of texts with labels, as a loader returns it."""
    return {**texts(samples, length, **changes), "labels": np.arange(samples)}


def of_texts(inputs=None, **parts):
    """Return the data set "d" of texts; parts that are not given have three texts."""
    part = Split(texts() if inputs is None else inputs, LABELS)
    return data_set(**{"train": part, "validation": part, "test": part, **parts})


PAIR = (np.zeros((3, 2), np.float32), np.ones((3, 5), np.float32))


# ------------------------------------------------------------------------------------------------ arrays in memory


def test_inputs_of_a_split_keep_their_names_and_order():
    split = Split(UserDict(input_ids=torch.tensor(ids()), mask=[[1, 1, 1, 1]] * 3), LABELS.tolist())
    assert list(split.inputs) == ["input_ids", "mask"]
    np.testing.assert_array_equal(split.inputs["input_ids"], ids())
    assert split.inputs["mask"].dtype == np.int64
    assert "mask: int64 of shape (3, 4)" in repr(split)
    left, right = Split(PAIR, LABELS).inputs
    assert (left.shape, right.shape) == ((3, 2), (3, 5))


def test_dict_in_a_tuple_is_a_positional_argument():
    split = Split((texts(),), LABELS)
    assert list(split.inputs[0]) == ["input_ids", "mask"]


def test_dict_with_one_array_keeps_its_name():
    assert list(of_texts(texts(mask=None)).test.inputs) == ["input_ids"]
    loaded = of_texts(train=[batch(mask=None)], validation=[batch(mask=None)], test=[batch(mask=None)])
    assert list(loaded.test.inputs) == list(loaded.first_inputs(1)[0]) == ["input_ids"]


def test_tuple_with_one_array_is_a_single_input():
    part = Split((PAIR[0],), LABELS)
    assert data_set(train=part, validation=part, test=part).sha256 == data_set().sha256
    assert part.inputs.shape == (3, 2)


def test_hash_of_a_single_input_is_that_of_earlier_versions():
    assert data_set().sha256 == "91530c04765efb10060d2c21093fedf01c309168ffb7810db0c48bdbc520aaa4"


def test_hash_depends_on_the_values_and_names_of_all_inputs():
    changed = [
        of_texts(),
        of_texts(texts(mask=np.zeros((3, 4), np.int64))),
        of_texts({"mask": ids(), "input_ids": np.ones((3, 4), np.int64)}),
        of_texts((ids(), np.ones((3, 4), np.int64))),
    ]
    assert len({data.sha256 for data in changed}) == 4


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (texts(mask=np.ones((2, 4))), r"A Split has 2 samples of the input 'mask' and 3 labels\."),
        (texts(mask=["a"] * 3), r"The input 'mask' of a Split is a list of 3 str, .* Give numbers of the same shape"),
        (texts(mask=True), r"The input 'mask' of a Split is a bool; expected one array"),
        (({"ids": ids()}, {"ids": ids(2)}), r"A Split has 2 samples of the input '1\.ids' and 3 labels"),
        (texts(labels=LABELS), r"The inputs of a Split contain 'labels'\. .* the exported file would take the labels"),
        (list(PAIR), r"The inputs of a Split are a list of .*; expected one array"),
        (
            [ids(), ids()],
            r"A Split has 2 inputs and 3 labels\. .* Give several inputs as a tuple or dict",
        ),
        ((), r"The inputs of a Split are a tuple.*; expected one array"),
    ],
)
def test_input_that_is_not_one_row_per_label_is_refused_by_name(inputs, sentence):
    with pytest.raises(DataError, match=sentence):
        Split(inputs, LABELS)


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            texts(mask=None),
            r"The {} part of d has the inputs input_ids; the train part of d has .* input_ids, mask\.",
        ),
        (
            {"ids": ids(), "mask": ids()},
            r"The {} part of d has the inputs ids, mask; the train .* input_ids, mask\.",
        ),
        ((ids(), ids()), r"The {} part of d has the inputs 0, 1; .* Give the same inputs in all parts"),
        (
            texts(mask=np.ones(3)),
            r"The input 'mask' of the {} part of d is of shape \(3,\); in the .* \(3, 4\)\.",
        ),
        (texts(mask=np.full((3, 4), np.nan)), r"The {} part of d contains NaN"),
    ],
)
def test_part_with_other_inputs_is_refused(part, inputs, sentence):
    with pytest.raises(DataError, match=sentence.format(part)):
        of_texts(**{part: Split(inputs, LABELS)})


def test_parts_may_differ_in_length_and_in_the_order_of_names():
    found = of_texts(validation=Split(texts(length=9), LABELS), test=Split(dict(reversed(texts().items())), LABELS))
    assert [list(part.inputs) for part in (found.train, found.test)] == [list(texts()), list(reversed(texts()))]


@pytest.mark.parametrize("inputs", [texts(), tuple(texts().values())])
def test_training_batches_have_the_structure_of_the_inputs(inputs):
    (found,) = of_texts(inputs).batches(3).epoch(seed=0, epoch=0)
    first, second = found.inputs.values() if isinstance(inputs, dict) else found.inputs
    np.testing.assert_array_equal(first, ids()[found.targets])
    assert second.shape == (3, 4)
    assert type(found.inputs) is type(inputs)
    (few,) = of_texts(inputs).first_batches(1, 2).epoch(seed=0, epoch=0)
    assert len(few) == 2


def test_tuple_of_arrays_in_array_data_is_checked():
    with pytest.raises(ShapeError, match=r"There are 3 samples of the first input and 2 of '1'"):
        ArrayData((ids(), ids(2)), LABELS)
    with pytest.raises(UsageError, match=r"`augment` takes one array, and the data has 2 inputs: 0, 1"):
        ArrayData(PAIR, LABELS, augment=lambda batch, _random: batch)


# ------------------------------------------------------------------------------------------------ loaders


@pytest.mark.parametrize(
    "samples",
    [
        [({"a": left, "b": right}, label) for left, right, label in zip(*PAIR, LABELS, strict=True)],
        [{"a": left, "b": right, "labels": label} for left, right, label in zip(*PAIR, LABELS, strict=True)],
        [((left, right), label) for left, right, label in zip(*PAIR, LABELS, strict=True)],
    ],
)
def test_loader_is_read_with_the_structure_of_its_batches(samples):
    loader = DataLoader(samples, batch_size=2)
    data = data_set(train=loader, validation=loader, test=loader)
    inputs = data.test.inputs
    assert list(inputs) == ["a", "b"] if isinstance(inputs, dict) else isinstance(inputs, tuple)
    for found, expected in zip(inputs.values() if isinstance(inputs, dict) else inputs, PAIR, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert data.test.labels.tolist() == [0, 1, 2]
    data.check_first(Batch.of(next(iter(loader))))


def test_batch_encoding_beside_its_labels_is_a_batch():
    loader = [(UserDict(texts(2)), np.arange(2))]
    assert list(of_texts(train=loader, test=loader).test.inputs) == ["input_ids", "mask"]


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        (
            [batch(), batch(length=3)],
            r"The samples of the test part of d differ in the shape of 'input_ids': \(3,\)",
        ),
        (
            [batch(), batch(mask=None)],
            r"Batch 2 of the test part of d has the inputs input_ids; batch 1 has the in",
        ),
        (
            [batch(mask=np.ones((1, 4)))],
            r"The input 'mask' of batch 1 of the test part of d is float64 .*; expected 2",
        ),
        ([batch(flag=True)], r"The input 'flag' of batch 1 of the test part of d is a bool; expected an array"),
    ],
)
def test_batches_that_do_not_form_arrays_are_refused(batches, sentence):
    with pytest.raises(DataError, match=sentence):
        of_texts(test=batches)


def test_training_batches_of_different_lengths_are_read():
    data = of_texts(train=[batch(length=3), batch(length=6)])
    assert [inputs["mask"].shape for inputs in data.first_inputs(3)] == [(2, 3), (1, 6)]
    assert [len(each) for each in data.first_batches(2, 64)] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"mask": None},
            r"The train part of d has the inputs input_ids; the test part of d has the inputs input_ids, mask",
        ),
        ({"types": ids(2)}, r"The train part of d has the inputs input_ids, mask, types; the test part of d has"),
    ],
)
def test_training_loader_with_other_inputs_is_refused_at_its_first_batch(changes, sentence):
    data = of_texts(train=[batch(**changes)])
    with pytest.raises(DataError, match=sentence):
        data.check_first(Batch.of(batch(**changes)))
    with pytest.raises(DataError, match=sentence):
        data.first_inputs(1)


def test_hash_of_a_loader_of_several_inputs_is_that_of_its_arrays():
    rows = [{**{name: part[i] for name, part in texts().items()}, "labels": i} for i in range(3)]
    loader = DataLoader(rows, batch_size=2)
    assert of_texts(validation=loader, test=loader).sha256 == of_texts().sha256
    assert DataSet("e", loader, loader, loader).sha256 != DataSet("f", loader, loader, loader).sha256
