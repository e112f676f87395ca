"""Order and augmentation of data in memory depend on seeds alone."""

from __future__ import annotations

import numpy as np
import pytest

import kirsch
from kirsch.data.augment import sample_seeds
from kirsch.data.batches import ArrayData, Batch
from kirsch.errors import DataError, ShapeError, UsageError


def pair(n):
    """Return n samples and labels: sample i is (i, i) and has the label i."""
    numbers = np.arange(n)
    return np.stack([numbers, numbers], 1).astype(np.float32), numbers


def data(n, batch_size, augment=None):
    return ArrayData(*pair(n), batch_size=batch_size, augment=augment)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),  # batch normalization needs two samples
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_epoch_is_split_into_batches(n, batch_size, sizes):
    found = data(n, batch_size)
    batches = list(found.epoch(0, 0))
    assert [len(batch.inputs) for batch in batches] == sizes
    assert [len(batch.targets) for batch in batches] == sizes
    assert len(found) == len(sizes)


def test_epoch_contains_each_sample_once_with_its_label():
    batches = list(data(11, 3).epoch(5, 2))
    inputs, targets, ids = (np.concatenate([getattr(b, n) for b in batches]) for n in ("inputs", "targets", "ids"))
    assert sorted(targets.tolist()) == list(range(11))
    np.testing.assert_array_equal(inputs[:, 0], targets)
    np.testing.assert_array_equal(ids, targets)


def order(seed, epoch):
    return np.concatenate([batch.targets for batch in data(11, 3).epoch(seed, epoch)]).tolist()


def test_order_depends_on_seed_and_epoch_alone():
    assert order(3, 1) == order(3, 1)
    assert order(3, 1) == np.random.default_rng([3, 1]).permutation(11).tolist()
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def shake(batch, random):
    return batch + random.standard_normal(batch.shape).astype(np.float32)


def test_augmentation_depends_on_seed_view_and_id_alone():
    augmented = data(10, 4, shake)
    for batch, plain in zip(augmented.epoch(1, 2), data(10, 4).epoch(1, 2), strict=True):
        np.testing.assert_array_equal(batch.targets, plain.targets)
        seeds = sample_seeds(1, 2, batch.targets)
        for found, original, seed in zip(batch.inputs, plain.inputs, seeds.tolist(), strict=True):
            noise = np.random.Generator(np.random.Philox(key=seed)).standard_normal((1, 2)).astype(np.float32)
            np.testing.assert_array_equal(found, original + noise[0])


def by_id(data, seed, epoch):
    return {i: x.tobytes() for b in data.epoch(seed, epoch) for i, x in zip(b.ids.tolist(), b.inputs, strict=True)}


def test_single_array_in_a_dict_is_augmented_like_the_array():
    inputs, targets = pair(4)
    named, plain = (
        ArrayData(part, targets, batch_size=4, augment=shake).epoch(0, 0) for part in ({"x": inputs}, inputs)
    )
    np.testing.assert_array_equal(next(named).inputs["x"], next(plain).inputs)


def test_augmentation_does_not_depend_on_batch_size():
    assert by_id(data(10, 4, shake), 1, 2) == by_id(data(10, 3, shake), 1, 2) == by_id(data(10, 10, shake), 1, 2)


def test_augmentation_follows_the_id_and_not_the_position():
    inputs, labels, ids = np.ones((6, 2), np.float32), np.arange(6), np.array([7, 3, 2**40, -1, 0, 12])
    some = by_id(ArrayData(inputs, labels, batch_size=2, augment=shake, ids=ids), 0, 1)
    assert some.keys() == set(ids.tolist())
    assert by_id(ArrayData(inputs, labels, batch_size=3, augment=shake, ids=ids[::-1]), 0, 1) == some
    assert len(set(some.values())) == 6


def test_each_epoch_has_a_new_view_unless_views_are_limited():
    endless, three = data(5, 2, shake), ArrayData(*pair(5), batch_size=2, augment=shake, views=3)
    views = [by_id(endless, 4, epoch) for epoch in range(6)]
    assert len({view[0] for view in views}) == 6
    assert [by_id(three, 4, epoch) for epoch in range(6)] == views[:3] * 2
    assert [next(three.epoch(4, epoch)).view for epoch in range(4)] == [0, 1, 2, 0]
    assert [next(endless.epoch(4, epoch)).view for epoch in range(4)] == [0, 1, 2, 3]


def test_order_differs_between_epochs_with_the_same_view():
    once = ArrayData(*pair(9), batch_size=9, views=1)
    assert len({tuple(next(once.epoch(0, epoch)).targets) for epoch in range(4)}) == 4


def test_data_may_have_no_targets():
    for batch in ArrayData(pair(5)[0], None, batch_size=2, augment=shake).epoch(0, 0):
        assert batch.targets is None
        assert len(batch.inputs) == len(batch.ids)


@pytest.mark.parametrize("start", range(4))
def test_epoch_resumed_at_any_batch_is_bitwise_equal(start):
    complete, rest = list(data(9, 3, shake).epoch(0, 0)), list(data(9, 3, shake).epoch(0, 0, start))
    assert len(rest) == 3 - start
    for expected, found in zip(complete[start:], rest, strict=True):
        np.testing.assert_array_equal(expected.inputs, found.inputs)
        np.testing.assert_array_equal(expected.targets, found.targets)


def test_iteration_does_not_change_the_data():
    found = data(6, 2, augment=lambda batch, random: np.multiply(batch, 0, out=batch))
    list(found.epoch(0, 0))
    np.testing.assert_array_equal(found.inputs, data(6, 2).inputs)


def test_empty_data_is_refused():
    with pytest.raises(DataError, match=r"The data is empty: its inputs have no samples\. Give"):
        data(0, 4)


def test_unequal_numbers_of_inputs_and_targets_are_refused():
    with pytest.raises(ShapeError, match="There are 4 inputs and 3 targets"):
        ArrayData(np.zeros((4, 2)), np.zeros(3, int))


@pytest.mark.parametrize(
    ("ids", "error", "sentence"),
    [
        ([4, 8, 8, 1], DataError, r"The sample ids are not unique\. The id 8 belongs to more than one sample"),
        ([4, 8, 1], ShapeError, "There are 4 inputs and 3 ids"),
        ([0.0, 1.0, 2.0, 3.0], DataError, r"The ids have shape \(4,\) and type float64"),
        ([[0], [1], [2], [3]], DataError, r"The ids have shape \(4, 1\)"),
    ],
)
def test_invalid_ids_are_refused(ids, error, sentence):
    with pytest.raises(error, match=sentence):
        ArrayData(*pair(4), ids=np.array(ids))


def test_transform_that_is_not_reproducible_is_refused():
    with pytest.raises(UsageError, match=r"takes 2 arguments.*Write it as transform"):
        ArrayData(*pair(4), augment=lambda batch: batch)
    state = np.random.default_rng(0)
    with pytest.raises(UsageError, match="returns different samples for the same seed"):
        ArrayData(*pair(4), augment=lambda batch, _: batch + state.random())


def test_zero_views_are_refused():
    with pytest.raises(UsageError, match=r"`views` .* is 0; expected a whole number of at least 1"):
        ArrayData(*pair(4), views=0)


def test_batch_size_zero_is_refused():
    with pytest.raises(UsageError, match=r"`batch_size` .* is 0; expected a whole number of at least 1"):
        data(4, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sample_that_is_not_finite_is_named(value):
    inputs = np.zeros((5, 2, 3))
    inputs[3, 1, 2] = value
    with pytest.raises(DataError, match=r"Sample 3 contains NaN or infinity\. Remove the sample"):
        ArrayData(inputs, np.zeros(5, int))


def test_data_print_as_one_line_without_their_values():
    inputs, labels = np.zeros((4, 3), np.float32), np.arange(4) % 2
    shapes = "inputs: float32 of shape (4, 3), targets: int64 of shape (4,)"
    assert repr(ArrayData(inputs, labels, batch_size=2)) == f"<kirsch.ArrayData: 4 samples in batches of 2, {shapes}>"
    assert repr(Batch(inputs, labels)) == f"<kirsch.Batch: 4 samples, {shapes}>"
    assert repr(Batch(inputs)).endswith("targets: none>")
    split = kirsch.Split(inputs, labels)
    assert repr(split) == f"<kirsch.Split: 4 samples, {shapes.replace('targets', 'labels')}>"
    data = kirsch.DataSet("numbers", train=split, validation=split, test=split)
    assert repr(data) == "<kirsch.DataSet numbers: 2 classes, samples: 4 train, 4 validation, 4 test>"
