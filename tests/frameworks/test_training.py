"""Settings that are checked at once, and data whose order follows from a seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.frameworks.training import ArrayData, Training


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0; at least 1 is needed"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001; a number of at least 0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; known: sgd, adamw"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; known: cosine, multistep, constant"),
        ({"milestones": (0.75, 0.5)}, r"milestones are \(0.75, 0.5\); ascending fractions between 0 and 1"),
        ({"milestones": (0.5, 1.0)}, "milestones are"),
        ({"milestones": (30, 60)}, r"milestones are \(30, 60\)"),
        ({"epochs": 3, "warmup_epochs": 4}, "warmup_epochs is 4; 0 to 3 is possible"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; a number above 0, or None"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"seed": -1}, "seed is -1; a whole number of at least 0"),
    ],
)
def test_a_wrong_setting_is_named(options, sentence):
    with pytest.raises(UsageError, match=f"The training settings are wrong: {sentence}"):
        Training(**options)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(UsageError, match=r"epochs is 0; .*; learning_rate is -1; .*; optimizer is 'x'"):
        Training(epochs=0, learning_rate=-1, optimizer="x")


def data(n, batch_size, augment=None):
    """Sample i is (i, i) and has the label i."""
    numbers = np.arange(n)
    return ArrayData(np.stack([numbers, numbers], 1).astype(np.float32), numbers, batch_size, augment)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),  # a last batch of one would have no variance to normalise by
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_an_epoch_is_cut_into_batches(n, batch_size, sizes):
    found = data(n, batch_size)
    batches = list(found.epoch(0, 0))
    assert [len(inputs) for inputs, _ in batches] == sizes
    assert len(found) == len(sizes)


def test_an_epoch_holds_each_sample_once_with_its_label():
    inputs, targets = (np.concatenate(parts) for parts in zip(*data(11, 3).epoch(5, 2), strict=True))
    assert sorted(targets.tolist()) == list(range(11))
    np.testing.assert_array_equal(inputs[:, 0], targets)


def order(seed, epoch):
    return np.concatenate([targets for _, targets in data(11, 3).epoch(seed, epoch)]).tolist()


def test_the_order_follows_from_seed_and_epoch_alone():
    assert order(3, 1) == order(3, 1)
    assert order(3, 1) == np.random.default_rng([3, 1]).permutation(11).tolist()
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_augmentation_is_applied_to_each_batch_and_follows_from_its_place_alone():
    def shake(batch, random):
        return batch + random.standard_normal(batch.shape).astype(np.float32)

    plain, shaken = list(data(10, 4).epoch(1, 2)), list(data(10, 4, shake).epoch(1, 2))
    for number, ((before, targets), (after, same)) in enumerate(zip(plain, shaken, strict=True)):
        np.testing.assert_array_equal(targets, same)
        noise = np.random.default_rng([1, 2, number]).standard_normal(before.shape).astype(np.float32)
        np.testing.assert_array_equal(after, before + noise)


@pytest.mark.parametrize("start", range(4))
def test_an_epoch_goes_on_from_any_batch_in_the_same_bits(start):
    def shake(batch, random):
        return batch * random.uniform(size=batch.shape).astype(np.float32)

    whole, rest = list(data(9, 3, shake).epoch(0, 0)), list(data(9, 3, shake).epoch(0, 0, start))
    assert len(rest) == 3 - start
    for wanted, found in zip(whole[start:], rest, strict=True):
        np.testing.assert_array_equal(wanted[0], found[0])
        np.testing.assert_array_equal(wanted[1], found[1])


def test_going_through_the_data_does_not_change_it():
    found = data(6, 2, augment=lambda batch, random: np.multiply(batch, 0, out=batch))
    list(found.epoch(0, 0))
    np.testing.assert_array_equal(found.inputs, data(6, 2).inputs)


def test_no_samples_are_refused():
    with pytest.raises(DataError, match=r"The data is empty\. Give at least one sample"):
        data(0, 4)


def test_unequal_numbers_are_refused():
    with pytest.raises(ShapeError, match="There are 4 inputs and 3 targets"):
        ArrayData(np.zeros((4, 2)), np.zeros(3, int))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(UsageError, match="batch_size is 0; at least 1 is needed"):
        data(4, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_named(value):
    inputs = np.zeros((5, 2, 3))
    inputs[3, 1, 2] = value
    with pytest.raises(DataError, match=r"Sample 3 holds NaN or infinity\. Repair or leave it out"):
        ArrayData(inputs, np.zeros(5, int))
