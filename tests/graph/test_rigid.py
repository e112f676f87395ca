"""What no value of an attribute could follow is tied, or else frozen, before anybody plans with it."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.graph.expression import Expression, Leaf, Size
from kirsch.graph.facts import Demand, Operation
from kirsch.graph.labels import Tensor

LINE = Operation("aten.view", "net", "net.py:8", "view")
WIDTH, HEADS = Leaf("net", "width"), Leaf("net", "heads")


@pytest.fixture
def rows(network):
    """Builds linear layers in a row, each width free on its own, and gives the labels of each."""

    def build(*widths):
        net, axes = network(), []
        x = Tensor.of((4, 3))
        for number, width in enumerate(widths):
            x = net.linear(f"l{number}", x, width)
            axes.append(x.axes[1])
        net.output(net.linear("last", x, 2))
        return net, axes

    return build


def follows(net, axis, leaves, compute=None, *, size=None):
    """The code says that the axis has the size of an attribute, or of another axis."""
    if size is not None:
        key = Size(size.tobytes())
        expression = Expression(lambda values: compute(values[key]), (), (size,), plain=compute is same)
    else:
        names = [leaf for leaf, _ in leaves]
        expression = Expression(lambda values: compute(*(values[n] for n in names)), leaves, (), plain=compute is same)
    constant = 0 if axis is not None else 8
    labels = axis if axis is not None else np.zeros(0, np.int64)
    net.facts.demands.append(Demand(labels, expression, LINE, constant))


def same(value):
    return value


def free(net):
    return sorted(group.size for group in net.graph().groups)


def reasons(net):
    """Why something is held, but for the input of the network."""
    causes = net.graph().coupling.why.values()
    return {cause.reason for cause in causes if not cause.boundary} - {"it meets an axis that cannot change"}


def test_an_attribute_of_its_own_follows(rows):
    net, (first, _) = rows(8, 8)
    follows(net, first, ((WIDTH, 8),), same)
    assert free(net) == [8, 8]


def test_two_axes_of_one_attribute_are_tied(rows):
    net, (first, second) = rows(8, 8)
    follows(net, first, ((WIDTH, 8),), same)
    follows(net, second, ((WIDTH, 8),), same)
    assert free(net) == [8]
    graph = net.graph()
    assert np.array_equal(graph.coupling.component[first], graph.coupling.component[second])


def test_a_size_that_must_be_that_of_another_axis_ties_the_two(rows):
    net, (first, second) = rows(8, 8)
    follows(net, first, (), same, size=second)
    assert free(net) == [8]


def test_a_size_of_itself_needs_no_tie(rows):
    net, (first, _) = rows(8, 8)
    follows(net, first, (), lambda size: 2 * size // 2, size=first)
    assert free(net) == [8, 8]


def test_an_attribute_that_something_else_holds_freezes_its_axis_and_says_so(rows):
    net, (first, _) = rows(8, 8)
    follows(net, first, ((WIDTH, 8),), same)
    follows(net, None, ((WIDTH, 8),), same)  # a kernel of this size, say
    assert free(net) == [8]
    assert reasons(net) == {"`net.width` cannot follow it"}
    assert net.graph().blockers[0].source == "net.py:8"


def test_a_size_that_is_used_as_a_number_freezes_its_axis(rows):
    net, (first, _) = rows(8, 8)
    follows(net, None, (), same, size=first)
    assert free(net) == [8]
    assert reasons(net) == {"the code uses its size as a number"}


def test_a_product_of_two_attributes_can_follow_nothing(rows):
    net, (first, _) = rows(8, 8)
    follows(net, first, ((HEADS, 2), (WIDTH, 4)), lambda heads, width: heads * width)
    assert free(net) == [8]
    assert reasons(net) == {"`net.heads`, `net.width` cannot follow it"}


def test_what_fails_by_a_frozen_axis_freezes_what_moves_its_attribute(rows):
    net, (first, second) = rows(8, 8)
    fixed = net.softmax(Tensor.of((4, 8), (None, net.facts.fresh(8))), 1).axes[1]
    follows(net, fixed, ((HEADS, 8),), same)
    follows(net, first, ((HEADS, 8),), same)
    assert free(net) == [8]
    graph = net.graph()
    assert graph.coupling.frozen[graph.coupling.component[first]].all()
    assert not graph.coupling.frozen[graph.coupling.component[second]].any()


def test_a_demand_that_never_held_ends_the_search(rows):
    net, (first, _) = rows(8, 8)
    follows(net, first, ((WIDTH, 5), (HEADS, 5)), lambda width, heads: width + heads)  # 10 for 8
    assert free(net) == [8]


@pytest.mark.parametrize("width", [2, 3, 17])
def test_the_outcome_is_the_same_each_time(width, rows):
    def groups():
        net, (first, second) = rows(width, width)
        follows(net, first, ((WIDTH, width),), same)
        follows(net, second, ((WIDTH, width),), same)
        return [(group.name, group.size, group.footprint) for group in net.graph().groups]

    assert groups() == groups()
    assert len(groups()) == 1
