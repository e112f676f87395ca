"""The few ways in which an operation relates the labels of its tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kirsch.graph import relations
from kirsch.graph.coupling import solve
from kirsch.graph.facts import Facts, Operation
from kirsch.graph.labels import Tensor

STEADY = settings(deadline=None, derandomize=True)


def labeled(facts, *shape, bare=()):
    """A tensor with fresh labels on each axis that is not `bare`."""
    axes = [None if axis in bare or size == 1 else facts.fresh(size) for axis, size in enumerate(shape)]
    return Tensor.of(shape, axes)


def lists(tensor):
    return [axis if axis is None else axis.tolist() for axis in tensor.axes]


def assert_tied(facts, *axes):
    """These axes are one axis, and its positions are free of each other."""
    components = [solve(facts).component[axis].tolist() for axis in axes]
    assert all(found == components[0] for found in components)
    assert len(set(components[0])) == len(components[0])


def assert_apart(facts, *axes):
    """No label of one axis goes with a label of another."""
    components = [set(solve(facts).component[axis].tolist()) for axis in axes]
    assert len(set().union(*components)) == sum(map(len, components))


def test_a_matrix_product_ties_what_it_contracts_and_carries_the_rest():
    facts = Facts()
    x, weight = labeled(facts, 2, 3), labeled(facts, 4, 3)
    facts.begin(Operation("linear"))
    out = relations.relate(facts, [(x, "ni"), (weight, "oi")], "no", (2, 4))
    assert out.shape == (2, 4)
    assert out.axes[0] is x.axes[0]
    assert out.axes[1] is weight.axes[0]
    assert_tied(facts, x.axes[1], weight.axes[1])
    assert_apart(facts, x.axes[0], weight.axes[0], weight.axes[1])
    assert len(facts.lost([x, weight], [out])) == 0
    assert facts.freezes == []


def test_a_letter_met_three_times_is_one_axis():
    facts = Facts()
    a, b, c = (labeled(facts, 3) for _ in range(3))
    relations.relate(facts, [(a, "i"), (b, "i"), (c, "i")], "i", (3,))
    assert_tied(facts, a.axes[0], b.axes[0], c.axes[0])


def test_a_letter_twice_on_one_tensor_ties_its_axes():
    """The diagonal."""
    facts = Facts()
    x = labeled(facts, 3, 3)
    assert relations.relate(facts, [(x, "ii")], "i", (3,)).axes[0] is x.axes[0]
    assert_tied(facts, *x.axes)


def test_an_axis_of_length_one_is_broadcast_and_freezes_nothing():
    facts = Facts()
    x, gate = labeled(facts, 2, 3), labeled(facts, 2, 1)
    out = relations.relate(facts, [(gate, "nc"), (x, "nc")], "nc", (2, 3))
    assert out.axes[1] is x.axes[1]
    assert_tied(facts, x.axes[0], gate.axes[0])
    assert facts.freezes == []


def test_a_letter_left_out_is_summed_over_and_not_lost():
    facts = Facts()
    x = labeled(facts, 2, 3)
    facts.begin(Operation("sum"))
    out = relations.relate(facts, [(x, "nc")], "c", (3,))
    assert lists(out) == [[3, 4, 5]]
    assert len(facts.lost([x], [out])) == 0


def test_a_new_letter_is_an_axis_without_labels():
    facts = Facts()
    x = labeled(facts, 3)
    assert lists(relations.relate(facts, [(x, "c")], "cz", (3, 7))) == [[1, 2, 3], None]


def test_elementwise_aligns_from_the_right():
    facts = Facts()
    x, bias = labeled(facts, 2, 3), labeled(facts, 3)
    out = relations.elementwise(facts, [bias, x], (2, 3))
    assert lists(out) == [[1, 2], [6, 7, 8]]
    assert_tied(facts, x.axes[1], bias.axes[0])
    assert facts.freezes == []


def test_elementwise_ties_all_of_several_tensors():
    facts = Facts()
    a, b, c = (labeled(facts, 3) for _ in range(3))
    relations.elementwise(facts, [a, b, c], (3,))
    assert_tied(facts, a.axes[0], b.axes[0], c.axes[0])


@pytest.mark.parametrize("shape", [(3, 1), (1,), (), (1, 1)])
def test_elementwise_is_told_nothing_by_missing_axes_and_axes_of_length_one(shape):
    facts = Facts()
    x, other = labeled(facts, 3, 4), Tensor.of(shape)
    out = relations.elementwise(facts, [other, x], (3, 4))
    assert out.axes[1] is x.axes[1]
    assert len(facts.freezes) == (shape == (3, 1))  # its first axis has length 3 and no labels


def test_elementwise_with_something_fixed_freezes():
    facts = Facts()
    x = labeled(facts, 2, 3)
    assert lists(relations.elementwise(facts, [x, Tensor.of((3,))], (2, 3))) == [[1, 2], None]
    assert [freeze.labels.tolist() for freeze in facts.freezes] == [[3, 4, 5]]
    assert facts.freezes[0].reason == "it meets an axis that cannot change"


@STEADY
@given(st.permutations(range(4)))
def test_a_permutation_is_undone_by_its_inverse(order):
    x = labeled(Facts(), 2, 3, 4, 5, bare=[1])
    turned = relations.permute(x, order)
    assert turned.shape == tuple(x.shape[axis] for axis in order)
    back = relations.permute(turned, np.argsort(order))
    assert back.shape == x.shape
    assert lists(back) == lists(x)


def test_channels_that_are_flattened_repeat_once_for_each_position():
    """A convolution's (C, 2, 2) before a linear layer."""
    facts = Facts()
    x = labeled(facts, 7, 3, 2, 2, bare=[0, 2, 3])
    assert lists(relations.reshape(facts, x, (7, 12))) == [None, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]]
    assert facts.grids == []


def test_positions_before_channels_repeat_the_whole_axis():
    facts = Facts()
    x = labeled(facts, 2, 3, bare=[0])
    assert lists(relations.reshape(facts, x, (6,))) == [[1, 2, 3, 1, 2, 3]]


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 3), (2, 3, 1), (1, 2, 1, 1, 3, 1)])
def test_axes_of_length_one_come_and_go(shape):
    facts = Facts()
    x = labeled(facts, 2, 3)
    there = relations.reshape(facts, x, shape)
    assert [axis for axis in lists(there) if axis is not None] == lists(x)
    assert lists(relations.reshape(facts, there, (2, 3))) == lists(x)
    assert facts.grids == []


@pytest.mark.parametrize(("before", "after"), [((1, 2), (2,)), ((2,), (1, 2)), ((2, 1), (1, 2))])
def test_an_axis_that_one_unit_fills_is_carried_as_it_is(before, after):
    """One channel of two positions, flattened: only a split of it would freeze it."""
    facts = Facts()
    x = Tensor.of(before, [None if size == 1 else facts.fresh(1).repeat(2) for size in before])
    assert [axis for axis in lists(relations.reshape(facts, x, after)) if axis is not None] == [[1, 1]]
    assert facts.freezes == []


def test_only_the_axes_that_change_are_touched_by_a_reshape():
    """(2, 6, 5) → (2, 2, 3, 5): the first and the last go through."""
    facts = Facts()
    x = labeled(facts, 2, 6, 5)
    out = relations.reshape(facts, x, (2, 2, 3, 5))
    assert out.axes[0] is x.axes[0]
    assert out.axes[3] is x.axes[2]
    assert [grid.cells.tolist() for grid in facts.grids] == [x.axes[1].reshape(2, 3).tolist()]


@st.composite
def shapes(draw):
    """A shape of 60 numbers, with or without axes of length one."""
    factors = draw(st.permutations([1, 2, 2, 3, 5]))
    cuts = draw(st.sets(st.integers(1, 4)).map(sorted))
    return tuple(int(part.prod()) for part in np.split(np.array(factors), cuts))


@STEADY
@given(shapes(), shapes(), st.data())
def test_there_and_back_by_reshape_gives_the_same_labels(before, after, data):
    facts = Facts()
    bare = data.draw(st.sets(st.integers(0, len(before) - 1)))
    x = labeled(facts, *before, bare=bare)
    facts.begin(Operation("view"))
    there = relations.reshape(facts, x, after)
    assert there.shape == after
    assert len(facts.lost([x], [there])) == 0
    assert lists(relations.reshape(facts, there, before)) == lists(x)
    assert facts.freezes == []


@STEADY
@given(shapes(), shapes(), st.data())
def test_each_number_keeps_its_label_through_a_reshape(before, after, data):
    """One labeled axis, written out over all numbers of the tensor, before and after."""
    facts = Facts()
    place = data.draw(st.integers(0, len(before) - 1))
    assume(before[place] > 1)
    x = labeled(facts, *before, bare=set(range(len(before))) - {place})
    wide = [1] * len(before)
    wide[place] = before[place]
    expected = np.broadcast_to(x.axes[place].reshape(wide), before).ravel()
    there = relations.reshape(facts, x, after)
    assert facts.merge(there.axes, after, "view").tolist() == expected.tolist()


def test_parts_laid_end_to_end_keep_their_labels_and_agree_on_the_other_axes():
    facts = Facts()
    a, b = labeled(facts, 2, 3), labeled(facts, 2, 2)
    facts.begin(Operation("cat"))
    out = relations.concat(facts, [a, b], 1, (2, 5))
    assert lists(out) == [[1, 2], [3, 4, 5, 8, 9]]
    assert_tied(facts, a.axes[0], b.axes[0])
    assert_apart(facts, a.axes[1], b.axes[1])
    assert len(facts.lost([a, b], [out])) == 0


def test_a_part_without_labels_cannot_go_and_its_neighbours_can():
    facts = Facts()
    a = labeled(facts, 2)
    out = relations.concat(facts, [Tensor.of((1,)), a, Tensor.of((2,))], 0, (5,))
    assert lists(out) == [[0, 1, 2, 0, 0]]
    assert facts.freezes == []
    assert relations.concat(facts, [Tensor.of((2,)), Tensor.of((3,))], 0, (5,)) == Tensor.of((5,))


@pytest.mark.parametrize(
    ("index", "expected"),
    [([1, 2], [2, 3]), ([3, 2, 1, 0], [4, 3, 2, 1]), ([0, 0, 3], [1, 1, 4]), ([-1, 0], [4, 1])],
)
def test_a_gather_takes_labels_as_it_takes_numbers(index, expected):
    facts = Facts()
    x = labeled(facts, 4, 3)
    facts.begin(Operation("slice"))
    out = relations.gather(facts, x, 0, np.array(index))
    assert out.shape == (len(index), 3)
    assert lists(out) == [expected, [5, 6, 7]]
    assert len(facts.lost([x], [out])) == 0
    assert facts.freezes == []


def test_a_single_index_that_is_taken_is_frozen():
    """An axis of length one carries no label, so nothing downstream could hold the index."""
    facts = Facts()
    x = labeled(facts, 2, 4)
    out = relations.gather(facts, x, 1, np.array([2]))
    assert (out.shape, lists(out)) == ((2, 1), [[1, 2], None])
    assert [freeze.labels.tolist() for freeze in facts.freezes] == [[5]]
    assert facts.freezes[0].reason == "a single index of the axis is taken by number"


def test_an_axis_without_labels_is_gathered_without_any():
    facts = Facts()
    out = relations.gather(facts, labeled(facts, 4, 3, bare=[0]), 0, np.array([2]))
    assert (out.shape, lists(out)) == ((1, 3), [None, [1, 2, 3]])
    assert facts.freezes == []


@STEADY
@given(st.integers(4, 9), st.integers(2, 7))
def test_slices_laid_end_to_end_are_the_whole(size, cut):
    assume(2 <= cut <= size - 2)  # a slice of length one is frozen
    facts = Facts()
    x = labeled(facts, 2, size)
    parts = [relations.gather(facts, x, 1, part) for part in np.split(np.arange(size), [cut])]
    assert lists(relations.concat(facts, parts, 1, x.shape)) == lists(x)


@pytest.mark.parametrize(("keepdim", "shape"), [(False, (3,)), (True, (1, 3, 1))])
def test_a_reduction_drops_axes_and_loses_no_label(keepdim, shape):
    facts = Facts()
    x = labeled(facts, 2, 3, 4)
    facts.begin(Operation("mean"))
    out = relations.drop(facts, x, [0, 2], keepdim=keepdim)
    assert out.shape == shape
    assert [axis for axis in lists(out) if axis is not None] == [[3, 4, 5]]
    assert len(facts.lost([x], [out])) == 0


@pytest.mark.parametrize(("dims", "expected"), [([1], [[3, 4, 5]]), (None, [[1, 2], [3, 4, 5]])])
def test_a_freeze_holds_the_axes_asked_for_or_all(dims, expected):
    facts = Facts()
    relations.freeze(facts, [labeled(facts, 2, 3)], "why", dims)
    assert [freeze.labels.tolist() for freeze in facts.freezes] == expected
    assert {freeze.reason for freeze in facts.freezes} == {"why"}
