"""Settings that are checked at once, and data whose order follows from a seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.frameworks.augment import sample_seeds
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.training import Training, doubts


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "`epochs` .* is 0; expected a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; a number above 0"),
        ({"learning_rate": math.inf}, "`learning_rate` .* is inf; expected a finite number"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001; a number of at least 0"),
        ({"weight_decay": math.nan}, "`weight_decay` .* is nan; expected a finite number"),
        ({"optimizer": "adam"}, "`optimizer` .* is 'adam'; expected 'sgd' or 'adamw'"),
        ({"schedule": "cosin"}, "`schedule` .* is 'cosin'; .*Did you mean 'cosine'"),
        ({"milestones": (0.75, 0.5)}, r"milestones are \(0.75, 0.5\); ascending fractions between 0 and 1"),
        ({"milestones": (0.5, 1.0)}, "milestones are"),
        ({"milestones": (30, 60)}, r"milestones are \(30, 60\)"),
        ({"epochs": 3, "warmup_epochs": 4}, "warmup_epochs is 4; a number from 0 to 3 is needed"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; a number above 0, or None"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"seed": -1}, "`seed` .* is -1; expected a whole number"),
    ],
)
def test_a_wrong_setting_is_named(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        Training(**options)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(UsageError, match=r"learning_rate is -1; .*; weight_decay is -2"):
        Training(learning_rate=-1, weight_decay=-2)
    with pytest.raises(UsageError, match=r"`epochs` .* is 0; .* `optimizer` .* is 'x'; .*\. The default is epochs=10"):
        Training(epochs=0, optimizer="x")


def pair(n):
    """Sample i is (i, i) and has the label i."""
    numbers = np.arange(n)
    return np.stack([numbers, numbers], 1).astype(np.float32), numbers


def data(n, batch_size, augment=None):
    return ArrayData(*pair(n), batch_size, augment)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),  # a last batch of one would have no variance to normalize by
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_an_epoch_is_cut_into_batches(n, batch_size, sizes):
    found = data(n, batch_size)
    batches = list(found.epoch(0, 0))
    assert [len(batch.inputs) for batch in batches] == sizes
    assert [len(batch.targets) for batch in batches] == sizes
    assert len(found) == len(sizes)


def test_an_epoch_holds_each_sample_once_with_its_label():
    batches = list(data(11, 3).epoch(5, 2))
    inputs, targets, ids = (np.concatenate([getattr(b, n) for b in batches]) for n in ("inputs", "targets", "ids"))
    assert sorted(targets.tolist()) == list(range(11))
    np.testing.assert_array_equal(inputs[:, 0], targets)
    np.testing.assert_array_equal(ids, targets)


def order(seed, epoch):
    return np.concatenate([batch.targets for batch in data(11, 3).epoch(seed, epoch)]).tolist()


def test_the_order_follows_from_seed_and_epoch_alone():
    assert order(3, 1) == order(3, 1)
    assert order(3, 1) == np.random.default_rng([3, 1]).permutation(11).tolist()
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def shake(batch, random):
    return batch + random.standard_normal(batch.shape).astype(np.float32)


def test_augmentation_of_a_sample_follows_from_seed_view_and_id_alone():
    whole = data(10, 4, shake)
    for batch, plain in zip(whole.epoch(1, 2), data(10, 4).epoch(1, 2), strict=True):
        np.testing.assert_array_equal(batch.targets, plain.targets)
        seeds = sample_seeds(1, 2, batch.targets)
        for found, given, seed in zip(batch.inputs, plain.inputs, seeds.tolist(), strict=True):
            noise = np.random.Generator(np.random.Philox(key=seed)).standard_normal((1, 2)).astype(np.float32)
            np.testing.assert_array_equal(found, given + noise[0])


def by_id(data, seed, epoch):
    return {i: x.tobytes() for b in data.epoch(seed, epoch) for i, x in zip(b.ids.tolist(), b.inputs, strict=True)}


def test_the_size_of_batches_does_not_change_what_a_sample_looks_like():
    assert by_id(data(10, 4, shake), 1, 2) == by_id(data(10, 3, shake), 1, 2) == by_id(data(10, 10, shake), 1, 2)


def test_a_sample_that_is_moved_keeps_its_look_by_its_id():
    inputs, labels, ids = np.ones((6, 2), np.float32), np.arange(6), np.array([7, 3, 2**40, -1, 0, 12])
    some = by_id(ArrayData(inputs, labels, 2, shake, ids), 0, 1)
    assert some.keys() == set(ids.tolist())
    assert by_id(ArrayData(inputs, labels, 3, shake, ids[::-1]), 0, 1) == some
    assert len(set(some.values())) == 6


def test_an_epoch_has_a_view_of_its_own_unless_their_number_is_said():
    endless, three = data(5, 2, shake), ArrayData(*pair(5), 2, shake, views=3)
    looks = [by_id(endless, 4, epoch) for epoch in range(6)]
    assert len({look[0] for look in looks}) == 6
    assert [by_id(three, 4, epoch) for epoch in range(6)] == looks[:3] * 2
    assert [next(three.epoch(4, epoch)).view for epoch in range(4)] == [0, 1, 2, 0]
    assert [next(endless.epoch(4, epoch)).view for epoch in range(4)] == [0, 1, 2, 3]


def test_the_order_is_another_in_each_epoch_whatever_the_views():
    once = ArrayData(*pair(9), 9, views=1)
    assert len({tuple(next(once.epoch(0, epoch)).targets) for epoch in range(4)}) == 4


def test_samples_may_have_no_labels():
    for batch in ArrayData(pair(5)[0], None, 2, shake).epoch(0, 0):
        assert batch.targets is None
        assert len(batch.inputs) == len(batch.ids)


@pytest.mark.parametrize("start", range(4))
def test_an_epoch_goes_on_from_any_batch_in_the_same_bits(start):
    whole, rest = list(data(9, 3, shake).epoch(0, 0)), list(data(9, 3, shake).epoch(0, 0, start))
    assert len(rest) == 3 - start
    for wanted, found in zip(whole[start:], rest, strict=True):
        np.testing.assert_array_equal(wanted.inputs, found.inputs)
        np.testing.assert_array_equal(wanted.targets, found.targets)


def test_going_through_the_data_does_not_change_it():
    found = data(6, 2, augment=lambda batch, random: np.multiply(batch, 0, out=batch))
    list(found.epoch(0, 0))
    np.testing.assert_array_equal(found.inputs, data(6, 2).inputs)


def test_no_samples_are_refused():
    with pytest.raises(DataError, match=r"The data is empty: its inputs have no sample\. Give"):
        data(0, 4)


def test_unequal_numbers_are_refused():
    with pytest.raises(ShapeError, match="There are 4 inputs and 3 targets"):
        ArrayData(np.zeros((4, 2)), np.zeros(3, int))


@pytest.mark.parametrize(
    ("ids", "error", "sentence"),
    [
        ([4, 8, 8, 1], DataError, r"The sample ids are not unique\. 8 stands for more than one sample"),
        ([4, 8, 1], ShapeError, "There are 4 inputs and 3 ids"),
        ([0.0, 1.0, 2.0, 3.0], DataError, r"The ids have shape \(4,\) and type float64"),
        ([[0], [1], [2], [3]], DataError, r"The ids have shape \(4, 1\)"),
    ],
)
def test_ids_must_name_each_sample(ids, error, sentence):
    with pytest.raises(error, match=sentence):
        ArrayData(*pair(4), ids=np.array(ids))


def test_a_transform_that_cannot_be_drawn_again_is_refused_before_any_work():
    with pytest.raises(UsageError, match=r"takes 2 arguments.*Write it as transform"):
        ArrayData(*pair(4), augment=lambda batch: batch)
    state = np.random.default_rng(0)
    with pytest.raises(UsageError, match="does not follow from its generator"):
        ArrayData(*pair(4), augment=lambda batch, _: batch + state.random())


def test_no_views_are_refused():
    with pytest.raises(UsageError, match=r"`views` .* is 0; expected a whole number of at least 1"):
        ArrayData(*pair(4), views=0)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(UsageError, match=r"`batch_size` .* is 0; expected a whole number of at least 1"):
        data(4, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_named(value):
    inputs = np.zeros((5, 2, 3))
    inputs[3, 1, 2] = value
    with pytest.raises(DataError, match=r"Sample 3 holds NaN or infinity\. Repair or leave it out"):
        ArrayData(inputs, np.zeros(5, int))


def test_a_term_that_has_become_small_during_training_is_not_warned_of():
    assert doubts({"label": 0.0007, "kd": 0.9993}, {"label": 0.05, "kd": 0.95}) == {}


def test_a_term_that_never_had_a_share_is_doubted_for_its_weight():
    shares = {"label": 0.0007, "kd": 0.9993}
    for began in (shares, {"label": 0.0, "kd": 1.0}):
        found = doubts(shares, began)
        assert "another convention: a loss that is averaged" in found["label"]
        assert "another convention: a loss that is summed" in found["kd"]
    assert doubts({"label": 0.0, "kd": 1.0}, {"label": 0.5, "kd": 0.5}) == {}


def test_a_term_that_begins_without_a_gradient_is_doubted():
    shares = {"label": 1.0, "kd": 0.0}
    assert list(doubts(shares, shares)) == ["kd"]
    assert doubts(shares, shares)["kd"] == (
        "The term 'kd' is 0 on the first batch, and has no gradient. This is expected if student and teacher agree "
        "already, as copies do. Otherwise the term compares outputs that cannot differ, such as the softmax over one "
        "class."
    )
    assert doubts({"label": 0.0, "kd": math.nan}, {"label": 0.0, "kd": math.nan}) == {}  # which is an error of its own
