"""Units that can be removed, and groups of interchangeable units.

A view of an axis as (A, B) is a grid with A rows and B columns, and its cells are the labels of the axis.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kirsch.graph import relations
from kirsch.graph.coupling import solve
from kirsch.graph.facts import Facts, Operation
from kirsch.graph.group import Group, find_groups
from kirsch.graph.kinds import GRID_UNIT_KINDS
from kirsch.graph.labels import Tensor


def summary(graph):
    return [(group.name, group.kind, group.size) for group in graph.groups]


def units(graph, group):
    """Return for each unit the indices that it removes from each parameter axis."""
    removed = [np.isin(graph.coupling.component, group.components_of([unit])) for unit in range(group.size)]
    return [{key: np.flatnonzero(mask[labels]).tolist() for key, labels in graph.axes.items()} for mask in removed]


def assert_products(coupling, keep):
    """Assert for each grid that a cell is kept if and only if the labels of its row and its column are kept."""
    for grid in coupling.grids:
        product = np.ones((), bool)
        for marginal in grid.marginals:
            product = np.multiply.outer(product, keep[marginal])
        assert (keep[grid.cells] == product).all()


def test_the_units_between_two_layers_form_one_group(chain):
    graph = chain(5).graph()
    assert summary(graph) == [("first", "channel", 5)]
    (group,) = graph.groups
    assert group.footprint == (("first.weight", 0), ("first.bias", 0), ("second.weight", 1))
    assert group.layers == ("first", "second")
    assert units(graph, group)[3] == {
        ("first.weight", 0): [3],
        ("first.weight", 1): [],
        ("first.bias", 0): [3],
        ("second.weight", 0): [],
        ("second.weight", 1): [3],
        ("second.bias", 0): [],
    }


def test_a_residual_stream_is_one_group_and_each_branch_another(network):
    net = network()
    stream = net.linear("stem", Tensor.of((1, 3)), 4)
    for block in ("a", "b"):
        inner = net.linear(f"{block}.up", stream, 6)
        stream = net.add(stream, net.linear(f"{block}.down", inner, 4))
    net.output(net.linear("head", stream, 2))
    graph = net.graph()
    assert summary(graph) == [("stem", "channel", 4), ("a.up", "channel", 6), ("b.up", "channel", 6)]
    assert graph.groups[0].layers == ("stem", "a.up", "a.down", "b.up", "b.down", "head")


def test_a_group_is_named_after_the_producer_although_the_reader_is_defined_first(network):
    """The units are on axis 1 of the reader's weight and on axis 0 of the producer's."""
    net = network()
    reader = net.parameter("reader.weight", 2, 4)
    produced = net.linear("producer", Tensor.of((1, 3)), 4)
    net.facts.begin(Operation("linear"))
    net.output(relations.relate(net.facts, [(produced, "ni"), (reader, "oi")], "no", (1, 2)))
    assert summary(net.graph()) == [("producer", "channel", 4)]


@pytest.mark.parametrize(
    ("names", "expected"), [(("table", "reader.weight"), "table"), (("a.b.table", "reader.weight"), "a.b")]
)
def test_units_are_named_after_the_module_of_their_parameter_or_after_a_top_level_parameter(network, names, expected):
    net = network()
    table, weight = net.parameter(names[0], 4), net.parameter(names[1], 2, 4)
    net.facts.begin(Operation("linear"))
    net.output(relations.relate(net.facts, [(table, "i"), (weight, "oi")], "o", (2,)))
    assert summary(net.graph()) == [(expected, "channel", 4)]


def test_units_without_a_producer_are_named_after_their_first_reader(network):
    net = network()
    weight = net.parameter("reader.weight", 2, 4)
    net.facts.freeze(weight.axes[0], "it is an output")
    assert summary(net.graph()) == [("reader", "channel", 4)]


def test_a_single_unit_is_not_a_group(network):
    net = network()
    weight = net.parameter("only.weight", 3, 2)
    net.facts.freeze(weight.axes[0][1:], "why")
    net.facts.freeze(weight.axes[1], "why")
    assert net.graph().groups == ()


def test_labels_without_a_parameter_form_no_unit(chain):
    net = chain(5)
    net.facts.fresh(7)
    rows, columns = net.facts.fresh(2), net.facts.fresh(2)
    net.facts.merge([rows, columns], (2, 2), "view")
    assert summary(net.graph()) == [("first", "channel", 5)]


def test_rows_and_columns_of_a_view_are_two_groups(heads):
    graph = heads(2, 3).graph()
    assert summary(graph) == [("query", "position in chunk", 3), ("query#2", "chunk", 2)]
    columns, rows = (units(graph, group) for group in graph.groups)
    assert rows[1] == {
        ("query.weight", 0): [3, 4, 5],
        ("query.weight", 1): [],
        ("scale", 0): [],
        ("out.weight", 0): [],
        ("out.weight", 1): [3, 4, 5],
    }
    assert columns[1] == rows[1] | {("query.weight", 0): [1, 4], ("scale", 0): [1], ("out.weight", 1): [1, 4]}
    assert graph.groups[0].footprint == (("query.weight", 0), ("scale", 0), ("out.weight", 1))
    assert graph.groups[1].footprint == (("query.weight", 0), ("out.weight", 1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("norm groups", ["norm group", "position in norm group"]),
        ("conv groups", ["conv group", "position in conv group"]),
        ("pixel shuffle", ["chunk", "position in chunk"]),
    ],
)
def test_the_kind_of_a_unit_follows_from_the_kind_of_its_grid(network, kind, expected):
    net = network()
    weight = net.parameter("norm.weight", 6)
    net.facts.split(weight.axes[0].reshape(2, 3), kind)
    assert summary(net.graph()) == [("norm", expected[0], 2), ("norm#2", expected[1], 3)]


def test_rows_and_columns_with_a_frozen_channel_are_not_units(heads):
    net = heads(3, 3)
    net.facts.freeze(net.tensors["query.weight"].axes[0][:1], "why")  # row 0, column 0
    graph = net.graph()
    columns, rows = (units(graph, group) for group in graph.groups)
    assert [unit["query.weight", 0] for unit in rows] == [[3, 4, 5], [6, 7, 8]]
    assert [unit["query.weight", 0] for unit in columns] == [[1, 4, 7], [2, 5, 8]]


def test_the_columns_of_a_grid_with_frozen_rows_are_channels(heads):
    """The number of rows is a constant, so a column is removed from all rows at once, and no grid remains."""
    net = heads(2, 3)
    net.facts.freeze(net.facts.grids[0].marginals[0], "the code fixes the number of rows")
    graph = net.graph()
    assert summary(graph) == [("query", "channel", 3)]
    assert units(graph, graph.groups[0])[2]["query.weight", 0] == [2, 5]


def test_a_shuffled_channel_is_removed_with_the_channels_that_share_its_row_before_or_after_the_shuffle(shuffle):
    """The shuffle swaps channels 1 and 2. Row 0 has channels 0 and 1 before the shuffle, and 0 and 2 after it.

    The removal of row 0 therefore removes channels 0, 1 and 2. The two units overlap in channels 1 and 2.
    """
    graph = shuffle().graph()
    (group,) = graph.groups
    assert group.size == 2
    assert [unit["before.weight", 0] for unit in units(graph, group)] == [[0, 1, 2], [1, 2, 3]]
    assert [unit["after.weight", 1] for unit in units(graph, group)] == [[0, 1, 2], [1, 2, 3]]
    for chosen in ((), (0,), (1,), (0, 1)):
        assert_products(graph.coupling, graph.keep({group.name: chosen}))
    assert graph.too_small(graph.keep({group.name: (0, 1)})) == (("before.weight", 0), 1)


def test_a_head_is_removed_from_all_layers_with_tied_heads(network):
    """A head of query and one of value have different widths, 3 and 2, and are tied by their heads."""
    net = network()
    query, value = net.parameter("query.bias", 6).axes[0], net.parameter("value.bias", 4).axes[0]
    heads = [net.facts.split(channels.reshape(2, -1), "view")[0] for channels in (query, value)]
    net.facts.equate(*heads)
    graph = net.graph()
    assert summary(graph) == [
        ("query", "position in chunk", 3),
        ("query#2", "chunk", 2),
        ("value", "position in chunk", 2),
    ]
    assert units(graph, graph.groups[1])[1] == {("query.bias", 0): [3, 4, 5], ("value.bias", 0): [2, 3]}


@pytest.mark.parametrize(("extra", "expected"), [(1, [[0, 1], [2, 3]]), (2, [])])
def test_a_removed_cell_removes_the_row_or_column_that_adds_the_fewest_cells(network, monkeypatch, extra, expected):
    """Four channels form a grid (2, 2). A second grid has the same two rows with `extra` further channels each.

    If a row of the first grid is removed, the second grid can lose its row, which adds `extra` cells, or two columns,
    which add one cell each. With `extra=1`, the row is chosen. With `extra=2`, the columns are chosen, as each adds
    fewer cells. The two columns contain all four channels. Removing either row of the first grid therefore removes all
    four, so the two rows are the same unit, and a single unit is not a group.
    """
    monkeypatch.setitem(GRID_UNIT_KINDS, "four", ("row", "column"))
    net = network()
    four = net.parameter("four.weight", 4).axes[0].reshape(2, 2)
    others = net.parameter("others.weight", 2 * extra).axes[0].reshape(2, extra)
    net.facts.split(four, "four")
    net.facts.split(np.hstack([four, others]), "wide")
    graph = net.graph()
    rows = [unit for group in graph.groups if group.kind == "row" for unit in units(graph, group)]
    columns = [unit for group in graph.groups if group.kind == "column" for unit in units(graph, group)]
    assert [unit["four.weight", 0] for unit in rows] == expected
    assert [unit["four.weight", 0] for unit in columns] == [[0, 2], [1, 3]]


def test_a_removed_cell_removes_its_row_if_the_column_with_fewer_cells_is_frozen(network):
    """As above with `extra=2`. The columns of the four channels are frozen, so a row of the wide grid is removed."""
    net = network()
    four = net.parameter("four.weight", 4).axes[0].reshape(2, 2)
    others = net.parameter("others.weight", 4).axes[0].reshape(2, 2)
    net.facts.split(four, "four")
    columns = net.facts.split(np.hstack([four, others]), "wide")[1]
    net.facts.freeze(columns[:2], "why")
    graph = net.graph()
    rows = [unit for group in graph.groups if group.kind == "chunk" for unit in units(graph, group)]
    assert [unit["four.weight", 0] for unit in rows] == [[0, 1], [2, 3]]
    assert [unit["others.weight", 0] for unit in rows] == [[0, 1], [2, 3]]


def test_a_cell_whose_row_and_column_are_both_frozen_is_in_no_unit(network):
    """Channel 0 is in row 0 and column 0 of a second grid, and both are frozen."""
    net = network()
    channels = net.parameter("layer.weight", 9).axes[0]
    net.facts.split(channels.reshape(3, 3), "first")
    for marginal in net.facts.split(channels.reshape(3, 3).T, "second"):
        net.facts.freeze(marginal[:1], "why")
    graph = net.graph()
    removed = [unit["layer.weight", 0] for group in graph.groups for unit in units(graph, group)]
    assert removed
    assert not any(0 in indices for indices in removed)


def test_a_cell_that_occurs_twice_in_a_grid_is_removed_at_both_positions(network):
    """The rows are (0, 0) and (1, 2). The removal of column 0 removes channel 0.

    Channel 0 is also a cell of column 1, which is not removed, so row 0 must be removed, too.
    """
    net = network()
    a, b, c = net.parameter("layer.weight", 3).axes[0]
    rows = net.parameter("rows", 2).axes[0]
    for axis, labels in enumerate(net.facts.split(np.array([[a, a], [b, c]]), "view")):
        if axis == 0:
            net.facts.equate(labels, rows)
    graph = net.graph()
    by_kind = {group.kind: units(graph, group) for group in graph.groups}
    assert [unit["layer.weight", 0] for unit in by_kind["position in chunk"]] == [[0, 1], [0, 2]]
    assert [unit["rows", 0] for unit in by_kind["position in chunk"]] == [[0], [0]]
    assert [unit["layer.weight", 0] for unit in by_kind["chunk"]] == [[0], [1, 2]]


def test_groups_are_in_the_order_of_the_model(network):
    net = network()
    x = Tensor.of((1, 3))
    for name, width in (("z", 4), ("a", 5), ("m", 4)):
        x = net.linear(name, x, width)
    net.output(net.linear("b", x, 2))
    assert [group.name for group in net.graph().groups] == ["z", "a", "m"]


def test_the_components_of_units_are_slices_of_all_components():
    group = Group("layer", "channel", np.array([3, 5, 7, 9, 11, 13]), np.array([0, 1, 4]), ())
    assert group.size == 3
    assert group.unit_of().tolist() == [0, 1, 1, 1, 2, 2]
    assert group.components_of([]).tolist() == []
    assert group.components_of([2, 0]).tolist() == [3, 11, 13]
    assert group.components_of((1,)).tolist() == [5, 7, 9]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_units_are_in_one_group_exactly_if_they_are_on_the_same_axes(masks):
    """Each component is on a random subset of two axes, given by the bits of its mask."""
    facts = Facts()
    labels = facts.fresh(len(masks))
    axes = {(f"p{bit}", 0): labels[[mask >> bit & 1 == 1 for mask in masks]] for bit in range(2)}
    groups = {group.footprint: group.components.tolist() for group in find_groups(solve(facts), axes)}
    expected = {}
    for label, mask in zip(labels.tolist(), masks, strict=True):
        expected.setdefault(tuple((f"p{bit}", 0) for bit in range(2) if mask >> bit & 1), []).append(label)
    assert groups == {footprint: members for footprint, members in expected.items() if footprint and len(members) > 1}


INDICES = st.integers(0, 11)


@st.composite
def shuffled(draw):
    """Return random facts: grids of channels in several orders, with or without repeats, and tied and frozen labels."""
    facts = Facts()
    size = draw(st.sampled_from([4, 6, 8, 12]))
    channels = facts.fresh(size)
    axes = {("layer.weight", 0): channels}
    for number in range(draw(st.integers(1, 3))):
        rows = draw(st.sampled_from([n for n in range(2, size) if size % n == 0]))
        order = draw(
            st.just(range(size)) | st.permutations(range(size)) | st.lists(INDICES, min_size=size, max_size=size)
        )
        marginals = facts.split(channels[np.array(order) % size].reshape(rows, -1), "view")
        for axis, labels in enumerate(marginals):
            if labels is not None and draw(st.booleans()):
                axes[f"p{number}", axis] = labels
    pairs = draw(st.lists(st.tuples(*[st.integers(1, facts.count - 1)] * 2), max_size=3))
    for a, b in pairs:
        facts.equate(np.array([a]), np.array([b]))
    facts.freeze(np.array(draw(st.lists(st.integers(1, facts.count - 1), max_size=3)), np.int64), "why")
    return facts, axes


@given(shuffled(), st.data())
def test_after_removal_of_any_units_each_grid_is_a_product_and_no_frozen_component_is_removed(network, data):
    facts, axes = network
    coupling = solve(facts)
    groups = find_groups(coupling, axes)
    event(f"{sum(group.size for group in groups)} units")
    keep = np.ones(len(coupling.frozen), bool)
    for group in groups:
        keep[group.components_of(data.draw(st.sets(st.integers(0, group.size - 1))))] = False
    assert_products(coupling, keep)
    assert keep[coupling.frozen].all()


@given(shuffled())
def test_units_of_a_group_are_distinct_and_not_empty(network):
    facts, axes = network
    for group in find_groups(solve(facts), axes):
        components = [tuple(group.components_of([unit]).tolist()) for unit in range(group.size)]
        assert len(set(components)) == group.size > 1
        assert all(components)
        assert list(itertools.chain(*components)) == group.components.tolist()


def test_a_group_prints_as_one_line_without_its_arrays():
    group = Group("stem", "channel", np.arange(8), np.arange(0, 8, 2), (("stem.weight", 0), ("head.weight", 1)))
    assert repr(group) == "<Group stem: 4 units of kind channel, in 2 layers>"
