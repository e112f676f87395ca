"""From facts to components."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kirsch.graph.coupling import equalities, solve
from kirsch.graph.facts import Facts, Operation


def together(coupling, labels):
    """The labels as a partition: those with the same component in one set."""
    parts = {}
    for label in labels:
        parts.setdefault(int(coupling.component[label]), set()).add(int(label))
    return sorted(parts.values(), key=min)


def freeze(facts, labels, reason, **options):
    facts.begin(Operation(reason))
    facts.freeze(np.asarray(labels), reason, **options)


def why(coupling, label):
    found = coupling.why.get(int(coupling.component[label]))
    return found and found.reason


def test_without_facts_only_the_label_zero_is_frozen():
    facts = Facts()
    facts.fresh(3)
    found = solve(facts)
    assert together(found, range(4)) == [{0}, {1}, {2}, {3}]
    assert found.frozen[found.component].tolist() == [True, False, False, False]
    assert found.grids == ()
    assert found.why == {}


def test_equality_is_transitive_and_position_by_position():
    facts = Facts()
    a, b, c = facts.fresh(2), facts.fresh(2), facts.fresh(2)
    facts.equate(a, b)
    facts.equate(c, b[::-1])
    assert together(solve(facts), range(1, 7)) == [{1, 3, 6}, {2, 4, 5}]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 30), st.data())
def test_components_are_those_of_scipy(size, data):
    """Random ties come to any depth; numbered by the first label, as scipy numbers them."""
    facts = Facts()
    facts.fresh(size)
    label = st.integers(1, size)
    for pairs in data.draw(st.lists(st.lists(st.tuples(label, label), min_size=1, max_size=8), max_size=5)):
        facts.equate(*np.array(pairs).T)
    ties = np.concatenate(
        [np.zeros((2, 0), int), *(np.stack(tie) for tie in zip(facts.left, facts.right, strict=True))], 1
    )
    edges = coo_array((np.ones(ties.shape[1]), tuple(ties)), shape=(size + 1, size + 1))
    assert equalities(facts).tolist() == connected_components(edges, directed=False)[1].tolist()


def test_a_long_row_of_ties_is_one_component():
    facts = Facts()
    labels = facts.fresh(1000)
    facts.equate(labels[1:], labels[:-1])
    assert equalities(facts).tolist() == [0] + [1] * 1000


def test_a_component_is_frozen_by_any_of_its_labels_and_the_first_reason_stays():
    facts = Facts()
    a, b = facts.fresh(2), facts.fresh(2)
    facts.equate(a, b)
    freeze(facts, b[:1], "first")
    freeze(facts, a, "second")
    found = solve(facts)
    assert found.frozen[found.component[a]].tolist() == [True, True]
    assert [why(found, label) for label in a] == ["first", "second"]


def test_a_grid_of_free_axes_is_left_as_it_is():
    facts = Facts()
    rows, columns = facts.split(facts.fresh(6).reshape(2, 3), "view")
    found = solve(facts)
    (grid,) = found.grids
    assert grid.cells.tolist() == found.component[np.arange(1, 7)].reshape(2, 3).tolist()
    assert [m.tolist() for m in grid.marginals] == [found.component[m].tolist() for m in (rows, columns)]
    assert len(np.unique(found.component)) == facts.count


def test_an_axis_with_one_free_position_is_still_an_axis():
    facts = Facts()
    rows, _ = facts.split(facts.fresh(6).reshape(3, 2), "view")
    freeze(facts, rows[:2], "why")
    found = solve(facts)
    assert found.grids[0].cells.shape == (3, 2)
    assert not found.frozen[found.component[1:7]].any()


def test_a_fused_projection_ties_its_parts_when_their_number_is_fixed():
    """(3 * H * D) → (3, H, D) with the 3 frozen: what is left is a grid (H, D) of query, key and value together."""
    facts = Facts()
    parts, heads, width = facts.split(facts.fresh(12).reshape(3, 2, 2), "view")
    freeze(facts, parts, "the parts are told apart")
    found = solve(facts)
    assert together(found, range(1, 13)) == [{1, 5, 9}, {2, 6, 10}, {3, 7, 11}, {4, 8, 12}]
    (grid,) = found.grids
    assert grid.cells.tolist() == found.component[np.arange(1, 5)].reshape(2, 2).tolist()
    assert [m.tolist() for m in grid.marginals] == [found.component[m].tolist() for m in (heads, width)]
    assert grid.kind == "view"
    assert not found.frozen[found.component[1:13]].any()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_of_one_free_axis_is_no_grid(axis):
    """Its cells are tied along the frozen axis, and to the marginals of the other."""
    facts = Facts()
    cells = facts.fresh(6).reshape((2, 3) if axis == 0 else (3, 2))
    marginals = facts.split(cells, "view")
    freeze(facts, marginals[axis], "why")
    found = solve(facts)
    assert found.grids == ()
    free = marginals[1 - axis]
    lines = cells.T if axis == 0 else cells
    assert together(found, [*cells.ravel(), *free]) == [
        {*map(int, line), int(label)} for line, label in zip(lines, free, strict=True)
    ]
    assert not found.frozen[found.component[cells]].any()


@pytest.mark.parametrize("free", [0, 1, 2])
def test_one_free_axis_of_three_is_left(free):
    facts = Facts()
    cells = facts.fresh(24).reshape(2, 3, 4)
    marginals = facts.split(cells, "view")
    for axis, marginal in enumerate(marginals):
        if axis != free:
            freeze(facts, marginal, "why")
    found = solve(facts)
    assert found.grids == ()
    lines = np.moveaxis(cells, free, 0).reshape(cells.shape[free], -1)
    assert together(found, [*cells.ravel(), *marginals[free]]) == [
        {*map(int, line), int(label)} for line, label in zip(lines, marginals[free], strict=True)
    ]


def test_cells_of_a_grid_without_a_free_axis_are_frozen_and_name_what_did_it():
    facts = Facts()
    rows, columns = facts.split(facts.fresh(4).reshape(2, 2), "view")
    freeze(facts, columns, "a softmax spans it")
    freeze(facts, rows, "a sort runs along it")
    found = solve(facts)
    assert found.grids == ()
    assert found.frozen[found.component[1:5]].all()
    assert {why(found, label) for label in range(1, 5)} <= {"a softmax spans it", "a sort runs along it"}


def test_grids_fall_one_after_the_other():
    """The rows of the second grid are the cells of the first, which has no free axis."""
    facts = Facts()
    rows = facts.fresh(4)
    first = facts.split(rows.reshape(2, 2), "view")
    second = facts.merge([rows, facts.fresh(3)], (4, 3), "view").reshape(4, 3)
    for marginal in first:
        freeze(facts, marginal, "why")
    found = solve(facts)
    assert found.grids == ()
    assert found.frozen[found.component[rows]].all()
    assert [len(part) for part in together(found, second.ravel())] == [4, 4, 4]
    assert not found.frozen[found.component[second]].any()


def test_a_grid_that_falls_because_of_another_names_the_root():
    facts = Facts()
    rows = facts.fresh(4)
    for marginal in facts.split(rows.reshape(2, 2), "view"):
        freeze(facts, marginal, "the root")
    columns = facts.fresh(3)
    second = facts.merge([rows, columns], (4, 3), "view")
    facts.begin(Operation("other"))
    facts.freeze(columns, "another")
    found = solve(facts)
    assert found.frozen[found.component[second]].all()
    assert {why(found, label) for label in rows} == {"the root"}
    assert {why(found, label) for label in second} <= {"the root", "another"}


def test_a_frozen_cell_names_its_own_reason_before_that_of_its_grid():
    facts = Facts()
    cells = facts.fresh(4)
    marginals = facts.split(cells.reshape(2, 2), "view")
    for marginal in marginals:
        freeze(facts, marginal, "of the grid")
    freeze(facts, cells[:1], "its own")
    found = solve(facts)
    assert [why(found, label) for label in cells] == ["its own", "of the grid", "of the grid", "of the grid"]


def test_grids_that_turn_out_the_same_are_kept_once():
    """Query and key are seen as (heads, width) each, and are then multiplied: heads and width agree."""
    facts = Facts()
    query, key = facts.fresh(6), facts.fresh(6)
    for axes in zip(*(facts.split(c.reshape(2, 3), "view") for c in (query, key)), strict=True):
        facts.equate(*axes)
    assert len(solve(facts).grids) == 2
    facts.equate(query, key)
    assert len(solve(facts).grids) == 1


def test_grids_that_cut_the_same_cells_into_the_same_slabs_are_one():
    """The same channels are seen as (heads, width) twice, the second time with the heads in another order."""
    facts = Facts()
    cells = facts.fresh(6).reshape(2, 3)
    heads, width = facts.split(cells, "view")
    others, same = facts.split(cells[::-1], "view")
    found = solve(facts)
    assert len(found.grids) == 2  # in another order, over the same components
    assert found.component[heads].tolist() == found.component[others[::-1]].tolist()
    assert found.component[width].tolist() == found.component[same].tolist()


def test_grids_that_have_some_slabs_in_common_stay_apart():
    """The first cells of a wide grid are a grid of their own: its columns are the same, its rows are not."""
    facts = Facts()
    cells = facts.fresh(6).reshape(2, 3)
    rows, columns = facts.split(cells[:, :2], "view")
    wide, more = facts.split(cells, "view")
    assert together(solve(facts), [*rows, *columns, *wide, *more]) == [{n} for n in [*rows, *columns, *wide, *more]]


def test_solving_leaves_the_facts_as_they_are():
    facts = Facts()
    rows, _ = facts.split(facts.fresh(4).reshape(2, 2), "view")
    freeze(facts, rows, "why")
    number = (len(facts.left), len(facts.right), len(facts.freezes), len(facts.grids))
    first, second = solve(facts), solve(facts)
    assert (len(facts.left), len(facts.right), len(facts.freezes), len(facts.grids)) == number
    assert first.component.tolist() == second.component.tolist()
