"""Components: labels that are removed together. The marginals of a grid are the labels of its rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kirsch.graph.coupling import equalities, solve
from kirsch.graph.facts import Facts, Operation


def partition(coupling, labels):
    """Return the sets of labels with the same component."""
    parts = {}
    for label in labels:
        parts.setdefault(int(coupling.component[label]), set()).add(int(label))
    return sorted(parts.values(), key=min)


def freeze(facts, labels, reason, **options):
    facts.begin(Operation(reason))
    facts.freeze(np.asarray(labels), reason, **options)


def reason(coupling, label):
    freeze = coupling.why.get(int(coupling.component[label]))
    return freeze and freeze.reason


def test_without_facts_only_the_label_zero_is_frozen():
    facts = Facts()
    facts.fresh(3)
    coupling = solve(facts)
    assert partition(coupling, range(4)) == [{0}, {1}, {2}, {3}]
    assert coupling.frozen[coupling.component].tolist() == [True, False, False, False]
    assert coupling.grids == ()
    assert coupling.why == {}


def test_equalities_are_transitive_and_index_by_index():
    facts = Facts()
    a, b, c = facts.fresh(2), facts.fresh(2), facts.fresh(2)
    facts.equate(a, b)
    facts.equate(c, b[::-1])
    assert partition(solve(facts), range(1, 7)) == [{1, 3, 6}, {2, 4, 5}]


@given(st.integers(1, 30), st.data())
def test_components_are_the_connected_components_of_scipy(size, data):
    """Ties are equalities between labels. Components are numbered by their first label, as in scipy."""
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


def test_a_long_chain_of_ties_is_one_component():
    facts = Facts()
    labels = facts.fresh(1000)
    facts.equate(labels[1:], labels[:-1])
    assert equalities(facts).tolist() == [0] + [1] * 1000


def test_a_component_is_frozen_by_any_of_its_labels_and_keeps_the_first_reason():
    facts = Facts()
    a, b = facts.fresh(2), facts.fresh(2)
    facts.equate(a, b)
    freeze(facts, b[:1], "first")
    freeze(facts, a, "second")
    coupling = solve(facts)
    assert coupling.frozen[coupling.component[a]].tolist() == [True, True]
    assert [reason(coupling, label) for label in a] == ["first", "second"]


def test_a_grid_with_free_axes_is_not_changed():
    facts = Facts()
    rows, columns = facts.split(facts.fresh(6).reshape(2, 3), "view")
    coupling = solve(facts)
    (grid,) = coupling.grids
    assert grid.cells.tolist() == coupling.component[np.arange(1, 7)].reshape(2, 3).tolist()
    assert [m.tolist() for m in grid.marginals] == [coupling.component[m].tolist() for m in (rows, columns)]
    assert len(np.unique(coupling.component)) == facts.count


def test_a_grid_axis_with_one_free_index_is_kept():
    facts = Facts()
    rows, _ = facts.split(facts.fresh(6).reshape(3, 2), "view")
    freeze(facts, rows[:2], "why")
    coupling = solve(facts)
    assert coupling.grids[0].cells.shape == (3, 2)
    assert not coupling.frozen[coupling.component[1:7]].any()


def test_a_frozen_axis_of_a_fused_projection_ties_query_key_and_value():
    """In the view (3 * H * D) → (3, H, D), the axis of size 3 is frozen. Query, key and value share one grid (H, D)."""
    facts = Facts()
    parts, heads, width = facts.split(facts.fresh(12).reshape(3, 2, 2), "view")
    freeze(facts, parts, "the parts have different roles")
    coupling = solve(facts)
    assert partition(coupling, range(1, 13)) == [{1, 5, 9}, {2, 6, 10}, {3, 7, 11}, {4, 8, 12}]
    (grid,) = coupling.grids
    assert grid.cells.tolist() == coupling.component[np.arange(1, 5)].reshape(2, 2).tolist()
    assert [m.tolist() for m in grid.marginals] == [coupling.component[m].tolist() for m in (heads, width)]
    assert grid.kind == "view"
    assert not coupling.frozen[coupling.component[1:13]].any()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_with_one_free_axis_becomes_ties(axis):
    """The cells are tied along the frozen axis, and to the labels of the other axis."""
    facts = Facts()
    cells = facts.fresh(6).reshape((2, 3) if axis == 0 else (3, 2))
    marginals = facts.split(cells, "view")
    freeze(facts, marginals[axis], "why")
    coupling = solve(facts)
    assert coupling.grids == ()
    free = marginals[1 - axis]
    lines = cells.T if axis == 0 else cells
    assert partition(coupling, [*cells.ravel(), *free]) == [
        {*map(int, line), int(label)} for line, label in zip(lines, free, strict=True)
    ]
    assert not coupling.frozen[coupling.component[cells]].any()


@pytest.mark.parametrize("free", [0, 1, 2])
def test_a_grid_with_one_free_axis_of_three_becomes_ties(free):
    facts = Facts()
    cells = facts.fresh(24).reshape(2, 3, 4)
    marginals = facts.split(cells, "view")
    for axis, marginal in enumerate(marginals):
        if axis != free:
            freeze(facts, marginal, "why")
    coupling = solve(facts)
    assert coupling.grids == ()
    lines = np.moveaxis(cells, free, 0).reshape(cells.shape[free], -1)
    assert partition(coupling, [*cells.ravel(), *marginals[free]]) == [
        {*map(int, line), int(label)} for line, label in zip(lines, marginals[free], strict=True)
    ]


def test_cells_of_a_grid_without_a_free_axis_are_frozen_for_the_reason_of_one_of_its_axes():
    facts = Facts()
    rows, columns = facts.split(facts.fresh(4).reshape(2, 2), "view")
    freeze(facts, columns, "a softmax is computed over the axis")
    freeze(facts, rows, "a sort runs along the axis")
    coupling = solve(facts)
    assert coupling.grids == ()
    assert coupling.frozen[coupling.component[1:5]].all()
    assert {reason(coupling, label) for label in range(1, 5)} <= {
        "a softmax is computed over the axis",
        "a sort runs along the axis",
    }


def test_a_grid_without_free_axes_freezes_the_rows_of_the_next_grid():
    """The rows of the second grid are the cells of the first."""
    facts = Facts()
    rows = facts.fresh(4)
    first = facts.split(rows.reshape(2, 2), "view")
    second = facts.merge([rows, facts.fresh(3)], (4, 3), "view").reshape(4, 3)
    for marginal in first:
        freeze(facts, marginal, "why")
    coupling = solve(facts)
    assert coupling.grids == ()
    assert coupling.frozen[coupling.component[rows]].all()
    assert [len(part) for part in partition(coupling, second.ravel())] == [4, 4, 4]
    assert not coupling.frozen[coupling.component[second]].any()


def test_cells_frozen_through_two_grids_name_the_first_cause():
    facts = Facts()
    rows = facts.fresh(4)
    for marginal in facts.split(rows.reshape(2, 2), "view"):
        freeze(facts, marginal, "the root")
    columns = facts.fresh(3)
    second = facts.merge([rows, columns], (4, 3), "view")
    facts.begin(Operation("other"))
    facts.freeze(columns, "another")
    coupling = solve(facts)
    assert coupling.frozen[coupling.component[second]].all()
    assert {reason(coupling, label) for label in rows} == {"the root"}
    assert {reason(coupling, label) for label in second} <= {"the root", "another"}


def test_a_frozen_cell_names_its_own_reason_before_the_reason_of_its_grid():
    facts = Facts()
    cells = facts.fresh(4)
    marginals = facts.split(cells.reshape(2, 2), "view")
    for marginal in marginals:
        freeze(facts, marginal, "of the grid")
    freeze(facts, cells[:1], "its own")
    coupling = solve(facts)
    assert [reason(coupling, label) for label in cells] == ["its own", "of the grid", "of the grid", "of the grid"]


def test_equal_grids_are_kept_once():
    """Query and key are each viewed as (heads, width) and multiplied, which ties heads and width."""
    facts = Facts()
    query, key = facts.fresh(6), facts.fresh(6)
    for axes in zip(*(facts.split(c.reshape(2, 3), "view") for c in (query, key)), strict=True):
        facts.equate(*axes)
    assert len(solve(facts).grids) == 2
    facts.equate(query, key)
    assert len(solve(facts).grids) == 1


def test_grids_that_split_the_same_cells_into_the_same_rows_and_columns_are_tied():
    """The same channels are viewed as (heads, width) twice, the second time with the heads in another order."""
    facts = Facts()
    cells = facts.fresh(6).reshape(2, 3)
    heads, width = facts.split(cells, "view")
    others, same = facts.split(cells[::-1], "view")
    coupling = solve(facts)
    assert len(coupling.grids) == 2  # the same components, with the rows in another order
    assert coupling.component[heads].tolist() == coupling.component[others[::-1]].tolist()
    assert coupling.component[width].tolist() == coupling.component[same].tolist()


def test_grids_that_share_only_some_columns_are_not_tied():
    """One grid has only the first two columns of the other grid, so its rows are different sets of cells."""
    facts = Facts()
    cells = facts.fresh(6).reshape(2, 3)
    rows, columns = facts.split(cells[:, :2], "view")
    wide, more = facts.split(cells, "view")
    assert partition(solve(facts), [*rows, *columns, *wide, *more]) == [{n} for n in [*rows, *columns, *wide, *more]]


def test_solving_does_not_change_the_facts():
    facts = Facts()
    rows, _ = facts.split(facts.fresh(4).reshape(2, 2), "view")
    freeze(facts, rows, "why")
    counts = (len(facts.left), len(facts.right), len(facts.freezes), len(facts.grids))
    first, second = solve(facts), solve(facts)
    assert (len(facts.left), len(facts.right), len(facts.freezes), len(facts.grids)) == counts
    assert first.component.tolist() == second.component.tolist()
