"""Labels of axes, the facts about them, and the check that no operation loses a label.

Label 0 is a frozen index. A split arranges the labels of an axis in a grid; they are the cells of the grid.
A merge is the inverse.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.graph.expression import Expression
from kirsch.graph.facts import Facts, Freeze, Operation
from kirsch.graph.labels import Tensor

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def pairs(facts):
    """Return all equalities as pairs of labels."""
    return [
        (int(a), int(b))
        for left, right in zip(facts.left, facts.right, strict=True)
        for a, b in zip(left, right, strict=True)
    ]


def frozen(facts):
    """Return the labels and the reason of each freeze."""
    return [(freeze.labels.tolist(), freeze.reason) for freeze in facts.freezes]


def test_fresh_labels_are_unused_and_never_zero():
    facts = Facts()
    assert facts.fresh(3).tolist() == [1, 2, 3]
    assert facts.fresh(2).tolist() == [4, 5]
    assert facts.count == 6


def test_an_axis_of_size_one_has_no_labels():
    tensor = Tensor.of((1, 2), [np.array([7]), np.array([8, 9])])
    assert tensor.axes[0] is None
    assert tensor.axes[1].tolist() == [8, 9]
    assert Tensor.of([2, 3]).axes == (None, None)


def test_a_number_of_labels_that_differs_from_the_size_raises():
    with pytest.raises(ValueError, match="3 labels on an axis of size 2"):
        Tensor.of((2,), [np.array([1, 2, 3])])


def test_equated_axes_are_tied_at_the_indices_where_their_labels_differ():
    facts = Facts()
    first, second = facts.fresh(3), facts.fresh(3)
    second[1] = first[1]
    assert facts.equate(first, second) is first
    assert pairs(facts) == [(1, 4), (3, 6)]
    assert facts.freezes == []


@pytest.mark.parametrize("swapped", [False, True])
def test_an_axis_equated_with_an_axis_without_labels_is_frozen_by_the_current_operation(swapped):
    facts = Facts()
    axis = facts.fresh(3)
    facts.begin(Operation("add", "layer", "net.py:3"))
    assert facts.equate(*([None, axis] if swapped else [axis, None])) is None
    assert frozen(facts) == [([1, 2, 3], "the axis is coupled to a frozen axis")]
    assert facts.freezes[0].operation == Operation("add", "layer", "net.py:3")
    assert pairs(facts) == []


def test_an_axis_frozen_because_of_an_upstream_operation_names_that_operation():
    facts = Facts()
    axis = facts.fresh(2)
    cause = Freeze(np.array([9]), "a cumulative sum runs along it", Operation("cumsum", "sum"))
    facts.begin(Operation("add", "layer"), cause=cause)
    facts.equate(axis, None)
    assert frozen(facts) == [([1, 2], "a cumulative sum runs along it")]
    assert facts.freezes[0].operation.module == "sum"
    assert len(facts.lost([Tensor.of((2,), [axis])], [])) == 0


def test_a_cause_applies_to_one_operation_only():
    facts = Facts()
    facts.begin(Operation("add"), cause=Freeze(np.array([9]), "upstream", Operation("cumsum")))
    facts.begin(Operation("mul"))
    facts.equate(facts.fresh(2), None)
    assert frozen(facts) == [([1, 2], "the axis is coupled to a frozen axis")]


def test_equating_two_axes_without_labels_records_nothing():
    facts = Facts()
    assert facts.equate(None, None) is None
    assert facts.freezes == []


@pytest.mark.parametrize("swapped", [False, True])
def test_a_label_equated_with_zero_is_frozen_and_the_other_labels_are_tied(swapped):
    facts = Facts()
    first, second = facts.fresh(3), facts.fresh(3)
    second[1] = 0
    facts.equate(*([second, first] if swapped else [first, second]))
    assert frozen(facts) == [([2], "the index is coupled to a frozen index")]
    assert {frozenset(pair) for pair in pairs(facts)} == {frozenset((1, 4)), frozenset((3, 6))}


def test_equating_axes_of_different_length_raises():
    facts = Facts()
    with pytest.raises(ValueError, match="axes of 3 and 2 cannot be equal"):
        facts.equate(facts.fresh(3), facts.fresh(2))


def test_a_freeze_has_each_label_once_and_never_the_label_zero():
    facts = Facts()
    facts.begin(Operation("softmax", "a"))
    facts.freeze(np.array([0, 2, 2, 1]), "why", boundary=True)
    facts.freeze(np.array([0, 0]), "nothing is left to freeze")
    facts.freeze(None, "there is no axis")
    assert frozen(facts) == [([1, 2], "why")]
    assert facts.freezes[0].boundary
    assert facts.freezes[0].operation.name == "softmax"


def test_a_split_gives_each_new_axis_new_labels_and_relates_them_to_the_cells():
    facts = Facts()
    rows, columns = facts.split(facts.fresh(6).reshape(2, 3), "view")
    assert (rows.tolist(), columns.tolist()) == ([7, 8], [9, 10, 11])
    (grid,) = facts.grids
    assert grid.cells.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert [marginal.tolist() for marginal in grid.marginals] == [[7, 8], [9, 10, 11]]
    assert grid.kind == "view"


def test_splitting_the_same_cells_again_gives_the_same_labels_and_another_shape_gives_new_ones():
    facts = Facts()
    cells = facts.fresh(6)
    first = facts.split(cells.reshape(2, 3), "view")
    assert facts.split(cells.reshape(2, 3).copy(), "view")[0] is first[0]
    assert len(facts.grids) == 1
    assert facts.split(cells.reshape(3, 2), "view")[1].tolist() == [15, 16]
    assert len(facts.grids) == 2


def test_an_axis_along_which_no_cell_varies_has_no_labels():
    facts = Facts()
    labels = facts.fresh(3)
    assert facts.split(np.tile(labels, (2, 1)), "view")[0] is None
    assert facts.split(np.tile(labels, (2, 1)), "view")[1].tolist() == [1, 2, 3]
    assert facts.grids == []
    assert facts.freezes == []


def test_an_axis_along_which_some_cells_vary_has_labels():
    facts = Facts()
    rows, columns = facts.split(np.array([[1, 1, 2], [3, 3, 3]]), "view")
    assert (len(rows), len(columns)) == (2, 3)


def test_an_axis_without_labels_is_not_part_of_the_grid():
    facts = Facts()
    cells = np.repeat(facts.fresh(6).reshape(2, 1, 3), 4, axis=1)
    axes = facts.split(cells, "view")
    assert [axis if axis is None else len(axis) for axis in axes] == [2, None, 3]
    assert facts.grids[0].cells.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_splitting_an_axis_with_a_single_label_freezes_it():
    facts = Facts()
    assert facts.split(np.full((2, 2), 1), "view") == (None, None)
    assert frozen(facts) == [([1], "all indices of the axis belong to one unit")]


def test_a_merge_repeats_labels_along_axes_without_labels():
    facts = Facts()
    labels = facts.fresh(2)
    assert facts.merge([labels, None], (2, 3), "view").tolist() == [1, 1, 1, 2, 2, 2]
    assert facts.merge([None, labels], (3, 2), "view").tolist() == [1, 2, 1, 2, 1, 2]
    assert facts.merge([None, None], (3, 2), "view") is None


def test_merging_two_labeled_axes_twice_adds_one_grid():
    facts = Facts()
    rows, columns = facts.fresh(2), facts.fresh(3)
    cells = facts.merge([rows, None, columns], (2, 2, 3), "view")
    assert cells.tolist() == [6, 7, 8, 6, 7, 8, 9, 10, 11, 9, 10, 11]
    assert facts.merge([rows, columns], (2, 3), "view").tolist() == [6, 7, 8, 9, 10, 11]
    assert len(facts.grids) == 1
    assert facts.merge([columns, rows], (3, 2), "view").tolist() == [12, 13, 14, 15, 16, 17]


@given(SHAPES)
def test_a_merge_undoes_a_split(shape):
    facts = Facts()
    size = int(np.prod(shape))
    if size == 1:
        return
    cells = facts.fresh(size)
    axes = facts.split(cells.reshape(shape), "view")
    assert facts.merge(axes, shape, "view").tolist() == cells.tolist()
    assert len(facts.grids) == (sum(n > 1 for n in shape) > 1)


@given(SHAPES)
def test_a_split_undoes_a_merge(shape):
    facts = Facts()
    axes = [facts.fresh(n) if n > 1 else None for n in shape]
    cells = facts.merge(axes, shape, "view")
    if cells is None:
        return
    again = facts.split(cells.reshape(shape), "view")
    assert [a if a is None else a.tolist() for a in again] == [a if a is None else a.tolist() for a in axes]


@pytest.mark.parametrize(
    ("account_for", "lost"),
    [
        (lambda facts, labels: None, [1, 2, 3, 4]),
        (lambda facts, labels: facts.equate(labels, facts.fresh(4)), []),
        (lambda facts, labels: facts.equate(facts.fresh(4), labels), []),
        (lambda facts, labels: facts.equate(labels, None), []),
        (lambda facts, labels: facts.freeze(labels, "why"), []),
        (lambda facts, labels: facts.freeze(labels[1:], "why"), [1]),
        (lambda facts, labels: facts.reduce(labels), []),
        (lambda facts, labels: facts.reduce(labels[:2]), [3, 4]),
        (lambda facts, labels: facts.split(labels.reshape(2, 2), "view"), []),
        (lambda facts, labels: facts.merge([labels, facts.fresh(2)], (4, 2), "view"), []),
    ],
)
def test_a_label_that_is_neither_in_the_output_nor_in_a_fact_is_lost(account_for, lost):
    facts = Facts()
    labels = facts.fresh(4)
    facts.begin(Operation("odd"))
    account_for(facts, labels)
    assert facts.lost([Tensor.of((4,), [labels])], []).tolist() == lost


def test_labels_of_the_outputs_are_not_lost():
    facts = Facts()
    rows, columns = facts.fresh(2), facts.fresh(3)
    x = Tensor.of((2, 3, 5), [rows, columns, None])
    facts.begin(Operation("transpose"))
    assert facts.lost([x], [Tensor.of((3,), [columns])]).tolist() == [1, 2]
    facts.begin(Operation("transpose"))
    assert facts.lost([x], [Tensor.of((3, 2), [columns, rows])]).tolist() == []
    assert facts.lost([Tensor.of((5,))], []).tolist() == []


def test_a_label_reduced_by_an_earlier_operation_is_lost_by_the_present_one():
    facts = Facts()
    labels = facts.fresh(2)
    facts.begin(Operation("sum"))
    facts.reduce(labels)
    facts.begin(Operation("odd"))
    assert facts.lost([Tensor.of((2,), [labels])], []).tolist() == [1, 2]


def test_the_label_zero_is_never_lost():
    facts = Facts()
    facts.begin(Operation("odd"))
    assert facts.lost([Tensor.of((3,), [np.array([0, 0, 1])])], []).tolist() == [1]


def test_reduced_labels_are_remembered_when_many_labels_are_added():
    facts = Facts()
    few = facts.fresh(3)
    facts.begin(Operation("odd"))
    facts.reduce(few)
    many = facts.fresh(5000)
    facts.reduce(many[-2:])
    inputs = [Tensor.of((3,), [few]), Tensor.of((5000,), [many])]
    assert facts.lost(inputs, []).tolist() == many[:-2].tolist()


def test_a_cost_has_the_labeled_axes_and_belongs_to_the_module_of_the_operation_by_default():
    facts = Facts()
    labels = facts.fresh(2)
    facts.begin(Operation("linear", "block.0"))
    facts.cost("macs", 6, [None, labels, labels])
    facts.cost("parameters", 2, [None], owner="other")
    macs, parameters = facts.terms
    assert (macs.quantity, macs.owner, macs.coefficient, len(macs.factors)) == ("macs", "block.0", 6.0, 2)
    assert (parameters.quantity, parameters.owner, parameters.factors) == ("parameters", "other", ())


def test_a_statistic_is_recorded_only_for_labeled_axes():
    facts = Facts()
    facts.begin(Operation("mean", node="mean_1"))
    facts.statistic([None, None])
    assert facts.statistics == set()
    facts.statistic([None, facts.fresh(2)])
    assert facts.statistics == {"mean_1"}


def test_a_demand_has_the_operation_and_is_recorded_only_for_a_labeled_axis():
    facts = Facts()
    expression = Expression(lambda values: 3, (), ())
    facts.begin(Operation("view", source="net.py:9"))
    facts.demand(None, expression)
    assert facts.demands == []
    labels = facts.fresh(3)
    facts.demand(labels, expression)
    (demand,) = facts.demands
    assert demand.labels is labels
    assert demand.expression is expression
    assert demand.operation.source == "net.py:9"
