"""Relations between the labels of the inputs and outputs of an operation. Ties are equalities between labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kirsch.graph import relations
from kirsch.graph.coupling import solve
from kirsch.graph.facts import Facts, Operation
from kirsch.graph.labels import Tensor


def labeled(facts, *shape, bare=()):
    """Return a tensor with new labels on each axis that is not in `bare`."""
    axes = [None if axis in bare or size == 1 else facts.fresh(size) for axis, size in enumerate(shape)]
    return Tensor.of(shape, axes)


def label_lists(tensor):
    """Return the labels of each axis as a list; None for an axis without labels."""
    return [axis if axis is None else axis.tolist() for axis in tensor.axes]


def assert_tied(facts, *axes):
    """Assert that the axes are tied index by index, and that different indices are not tied."""
    components = [solve(facts).component[axis].tolist() for axis in axes]
    assert all(component == components[0] for component in components)
    assert len(set(components[0])) == len(components[0])


def assert_apart(facts, *axes):
    """Assert that no label of one axis is tied to a label of another."""
    components = [set(solve(facts).component[axis].tolist()) for axis in axes]
    assert len(set().union(*components)) == sum(map(len, components))


def test_a_matrix_product_ties_the_contracted_axes_and_keeps_the_others():
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


def test_an_index_shared_by_three_tensors_ties_their_axes():
    facts = Facts()
    a, b, c = (labeled(facts, 3) for _ in range(3))
    relations.relate(facts, [(a, "i"), (b, "i"), (c, "i")], "i", (3,))
    assert_tied(facts, a.axes[0], b.axes[0], c.axes[0])


def test_an_index_that_occurs_twice_on_one_tensor_ties_its_axes():
    """An example is the diagonal of a matrix."""
    facts = Facts()
    x = labeled(facts, 3, 3)
    assert relations.relate(facts, [(x, "ii")], "i", (3,)).axes[0] is x.axes[0]
    assert_tied(facts, *x.axes)


def test_an_axis_of_size_one_is_broadcast_and_freezes_nothing():
    facts = Facts()
    x, gate = labeled(facts, 2, 3), labeled(facts, 2, 1)
    out = relations.relate(facts, [(gate, "nc"), (x, "nc")], "nc", (2, 3))
    assert out.axes[1] is x.axes[1]
    assert_tied(facts, x.axes[0], gate.axes[0])
    assert facts.freezes == []


def test_an_index_missing_from_the_result_is_reduced_and_not_lost():
    facts = Facts()
    x = labeled(facts, 2, 3)
    facts.begin(Operation("sum"))
    out = relations.relate(facts, [(x, "nc")], "c", (3,))
    assert label_lists(out) == [[3, 4, 5]]
    assert len(facts.lost([x], [out])) == 0


def test_a_new_index_is_an_axis_without_labels():
    facts = Facts()
    x = labeled(facts, 3)
    assert label_lists(relations.relate(facts, [(x, "c")], "cz", (3, 7))) == [[1, 2, 3], None]


def test_elementwise_aligns_from_the_right():
    facts = Facts()
    x, bias = labeled(facts, 2, 3), labeled(facts, 3)
    out = relations.elementwise(facts, [bias, x], (2, 3))
    assert label_lists(out) == [[1, 2], [6, 7, 8]]
    assert_tied(facts, x.axes[1], bias.axes[0])
    assert facts.freezes == []


def test_elementwise_ties_the_axes_of_all_operands():
    facts = Facts()
    a, b, c = (labeled(facts, 3) for _ in range(3))
    relations.elementwise(facts, [a, b, c], (3,))
    assert_tied(facts, a.axes[0], b.axes[0], c.axes[0])


@pytest.mark.parametrize("shape", [(3, 1), (1,), (), (1, 1)])
def test_missing_axes_and_axes_of_size_one_tie_nothing_in_an_elementwise_operation(shape):
    facts = Facts()
    x, other = labeled(facts, 3, 4), Tensor.of(shape)
    out = relations.elementwise(facts, [other, x], (3, 4))
    assert out.axes[1] is x.axes[1]
    assert len(facts.freezes) == (shape == (3, 1))  # the axis of size 3 without labels freezes the axis of x


def test_an_elementwise_operation_with_an_unlabeled_axis_freezes_the_labeled_one():
    facts = Facts()
    x = labeled(facts, 2, 3)
    assert label_lists(relations.elementwise(facts, [x, Tensor.of((3,))], (2, 3))) == [[1, 2], None]
    assert [freeze.labels.tolist() for freeze in facts.freezes] == [[3, 4, 5]]
    assert facts.freezes[0].reason == "the axis is coupled to a frozen axis"


@given(st.permutations(range(4)))
def test_a_permutation_is_undone_by_its_inverse(order):
    x = labeled(Facts(), 2, 3, 4, 5, bare=[1])
    permuted = relations.permute(x, order)
    assert permuted.shape == tuple(x.shape[axis] for axis in order)
    restored = relations.permute(permuted, np.argsort(order))
    assert restored.shape == x.shape
    assert label_lists(restored) == label_lists(x)


def test_flattening_repeats_the_label_of_a_channel_for_each_position():
    """An example is the output (C, 2, 2) of a convolution before a linear layer."""
    facts = Facts()
    x = labeled(facts, 7, 3, 2, 2, bare=[0, 2, 3])
    assert label_lists(relations.reshape(facts, x, (7, 12))) == [None, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]]
    assert facts.grids == []


def test_flattening_positions_before_channels_repeats_the_labels_of_all_channels():
    facts = Facts()
    x = labeled(facts, 2, 3, bare=[0])
    assert label_lists(relations.reshape(facts, x, (6,))) == [[1, 2, 3, 1, 2, 3]]


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 3), (2, 3, 1), (1, 2, 1, 1, 3, 1)])
def test_a_reshape_can_add_and_remove_axes_of_size_one(shape):
    facts = Facts()
    x = labeled(facts, 2, 3)
    reshaped = relations.reshape(facts, x, shape)
    assert [axis for axis in label_lists(reshaped) if axis is not None] == label_lists(x)
    assert label_lists(relations.reshape(facts, reshaped, (2, 3))) == label_lists(x)
    assert facts.grids == []


@pytest.mark.parametrize(("before", "after"), [((1, 2), (2,)), ((2,), (1, 2)), ((2, 1), (1, 2))])
def test_an_axis_filled_by_one_label_passes_through_a_reshape(before, after):
    """An example is one channel, flattened with two positions. Only a split of this axis would freeze the label."""
    facts = Facts()
    x = Tensor.of(before, [None if size == 1 else facts.fresh(1).repeat(2) for size in before])
    assert [axis for axis in label_lists(relations.reshape(facts, x, after)) if axis is not None] == [[1, 1]]
    assert facts.freezes == []


def test_a_reshape_does_not_change_the_labels_of_unchanged_axes():
    """(2, 6, 5) → (2, 2, 3, 5): the first and the last axis do not change."""
    facts = Facts()
    x = labeled(facts, 2, 6, 5)
    out = relations.reshape(facts, x, (2, 2, 3, 5))
    assert out.axes[0] is x.axes[0]
    assert out.axes[3] is x.axes[2]
    assert [grid.cells.tolist() for grid in facts.grids] == [x.axes[1].reshape(2, 3).tolist()]


@st.composite
def shapes(draw):
    """Return a shape with 60 elements, with or without axes of size one."""
    factors = draw(st.permutations([1, 2, 2, 3, 5]))
    cuts = draw(st.sets(st.integers(1, 4)).map(sorted))
    return tuple(int(part.prod()) for part in np.split(np.array(factors), cuts))


@given(shapes(), shapes(), st.data())
def test_a_reshape_is_undone_by_the_inverse_reshape(before, after, data):
    facts = Facts()
    bare = data.draw(st.sets(st.integers(0, len(before) - 1)))
    x = labeled(facts, *before, bare=bare)
    facts.begin(Operation("view"))
    reshaped = relations.reshape(facts, x, after)
    assert reshaped.shape == after
    assert len(facts.lost([x], [reshaped])) == 0
    assert label_lists(relations.reshape(facts, reshaped, before)) == label_lists(x)
    assert facts.freezes == []


@given(shapes(), shapes(), st.data())
def test_each_element_keeps_its_label_through_a_reshape(before, after, data):
    """Compare the label of each element before and after the reshape, with labels on one axis only."""
    facts = Facts()
    axis = data.draw(st.integers(0, len(before) - 1))
    assume(before[axis] > 1)
    x = labeled(facts, *before, bare=set(range(len(before))) - {axis})
    shape = [1] * len(before)
    shape[axis] = before[axis]
    expected = np.broadcast_to(x.axes[axis].reshape(shape), before).ravel()
    reshaped = relations.reshape(facts, x, after)
    assert facts.merge(reshaped.axes, after, "view").tolist() == expected.tolist()


def test_concatenated_parts_keep_their_labels_and_tie_the_other_axes():
    facts = Facts()
    a, b = labeled(facts, 2, 3), labeled(facts, 2, 2)
    facts.begin(Operation("cat"))
    out = relations.concat(facts, [a, b], 1, (2, 5))
    assert label_lists(out) == [[1, 2], [3, 4, 5, 8, 9]]
    assert_tied(facts, a.axes[0], b.axes[0])
    assert_apart(facts, a.axes[1], b.axes[1])
    assert len(facts.lost([a, b], [out])) == 0


def test_a_concatenated_part_without_labels_is_frozen_and_the_other_parts_are_not():
    facts = Facts()
    a = labeled(facts, 2)
    out = relations.concat(facts, [Tensor.of((1,)), a, Tensor.of((2,))], 0, (5,))
    assert label_lists(out) == [[0, 1, 2, 0, 0]]
    assert facts.freezes == []
    assert relations.concat(facts, [Tensor.of((2,)), Tensor.of((3,))], 0, (5,)) == Tensor.of((5,))


@pytest.mark.parametrize(
    ("index", "expected"),
    [([1, 2], [2, 3]), ([3, 2, 1, 0], [4, 3, 2, 1]), ([0, 0, 3], [1, 1, 4]), ([-1, 0], [4, 1])],
)
def test_a_gather_selects_labels_as_it_selects_elements(index, expected):
    facts = Facts()
    x = labeled(facts, 4, 3)
    facts.begin(Operation("slice"))
    out = relations.gather(facts, x, 0, np.array(index))
    assert out.shape == (len(index), 3)
    assert label_lists(out) == [expected, [5, 6, 7]]
    assert len(facts.lost([x], [out])) == 0
    assert facts.freezes == []


def test_a_single_selected_index_is_frozen():
    """An axis of size one has no labels, so no later operation could freeze the index."""
    facts = Facts()
    x = labeled(facts, 2, 4)
    out = relations.gather(facts, x, 1, np.array([2]))
    assert (out.shape, label_lists(out)) == ((2, 1), [[1, 2], None])
    assert [freeze.labels.tolist() for freeze in facts.freezes] == [[5]]
    assert facts.freezes[0].reason == "a single index of the axis is selected by number"


def test_an_axis_without_labels_has_none_after_a_gather():
    facts = Facts()
    out = relations.gather(facts, labeled(facts, 4, 3, bare=[0]), 0, np.array([2]))
    assert (out.shape, label_lists(out)) == ((1, 3), [None, [1, 2, 3]])
    assert facts.freezes == []


@given(st.integers(4, 9), st.integers(2, 7))
def test_concatenated_slices_have_the_labels_of_the_tensor(size, cut):
    assume(2 <= cut <= size - 2)  # a slice of size one is frozen
    facts = Facts()
    x = labeled(facts, 2, size)
    parts = [relations.gather(facts, x, 1, part) for part in np.split(np.arange(size), [cut])]
    assert label_lists(relations.concat(facts, parts, 1, x.shape)) == label_lists(x)


@pytest.mark.parametrize(("keepdim", "shape"), [(False, (3,)), (True, (1, 3, 1))])
def test_a_reduction_drops_axes_and_loses_no_label(keepdim, shape):
    facts = Facts()
    x = labeled(facts, 2, 3, 4)
    facts.begin(Operation("mean"))
    out = relations.drop(facts, x, [0, 2], keepdim=keepdim)
    assert out.shape == shape
    assert [axis for axis in label_lists(out) if axis is not None] == [[3, 4, 5]]
    assert len(facts.lost([x], [out])) == 0


@pytest.mark.parametrize(("dims", "expected"), [([1], [[3, 4, 5]]), (None, [[1, 2], [3, 4, 5]])])
def test_a_freeze_covers_the_given_axes_or_all(dims, expected):
    facts = Facts()
    relations.freeze(facts, [labeled(facts, 2, 3)], "why", dims)
    assert [freeze.labels.tolist() for freeze in facts.freezes] == expected
    assert {freeze.reason for freeze in facts.freezes} == {"why"}
