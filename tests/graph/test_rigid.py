"""If no value of an attribute fits an axis after pruning, the axis is tied or frozen before a plan is made.

A demand requires that an expression of attributes, or of the size of another axis, gives the size of an axis.
"""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.graph.expression import Expression, Leaf, Size
from kirsch.graph.facts import Demand, Operation
from kirsch.graph.labels import Tensor

LINE = Operation("aten.view", "net", "net.py:8", "view")
WIDTH, HEADS = Leaf("net", "width"), Leaf("net", "heads")


@pytest.fixture
def layers(network):
    """Build a chain of linear layers with independent widths; return the network and the labels of each width."""

    def build(*widths):
        net, axes = network(), []
        x = Tensor.of((4, 3))
        for number, width in enumerate(widths):
            x = net.linear(f"l{number}", x, width)
            axes.append(x.axes[1])
        net.output(net.linear("last", x, 2))
        return net, axes

    return build


def add_demand(net, axis, leaves, compute=None, *, size=None):
    """Add the demand that `compute` returns the size of `axis`, or 8 if `axis` is None.

    `compute` takes the values of `leaves`, or the size of the axis `size`, if it is given.
    """
    if size is not None:
        key = Size(size.tobytes())
        expression = Expression(lambda values: compute(values[key]), (), (size,), plain=compute is identity)
    else:
        names = [leaf for leaf, _ in leaves]
        expression = Expression(
            lambda values: compute(*(values[n] for n in names)), leaves, (), plain=compute is identity
        )
    constant = 0 if axis is not None else 8
    labels = axis if axis is not None else np.zeros(0, np.int64)
    net.facts.demands.append(Demand(labels, expression, LINE, constant))


def identity(value):
    return value


def group_sizes(net):
    return sorted(group.size for group in net.graph().groups)


def reasons(net):
    """Return the reasons of all freezes except those of the inputs and outputs of the network."""
    causes = net.graph().coupling.why.values()
    return {cause.reason for cause in causes if not cause.boundary} - {"the axis is coupled to a frozen axis"}


def test_an_attribute_used_for_one_axis_leaves_the_axis_free(layers):
    net, (first, _) = layers(8, 8)
    add_demand(net, first, ((WIDTH, 8),), identity)
    assert group_sizes(net) == [8, 8]


def test_two_axes_sized_by_one_attribute_are_tied(layers):
    net, (first, second) = layers(8, 8)
    add_demand(net, first, ((WIDTH, 8),), identity)
    add_demand(net, second, ((WIDTH, 8),), identity)
    assert group_sizes(net) == [8]
    graph = net.graph()
    assert np.array_equal(graph.coupling.component[first], graph.coupling.component[second])


def test_an_axis_that_must_have_the_size_of_another_is_tied_to_it(layers):
    net, (first, second) = layers(8, 8)
    add_demand(net, first, (), identity, size=second)
    assert group_sizes(net) == [8]


def test_a_size_computed_from_the_axis_itself_leaves_the_axis_free(layers):
    net, (first, _) = layers(8, 8)
    add_demand(net, first, (), lambda size: 2 * size // 2, size=first)
    assert group_sizes(net) == [8, 8]


def test_an_attribute_that_must_keep_its_value_freezes_its_axis_with_the_reason(layers):
    net, (first, _) = layers(8, 8)
    add_demand(net, first, ((WIDTH, 8),), identity)
    add_demand(net, None, ((WIDTH, 8),), identity)  # such as a kernel of this size
    assert group_sizes(net) == [8]
    assert reasons(net) == {"`net.width` cannot be updated when the axis is pruned"}
    assert net.graph().blockers[0].source == "net.py:8"


def test_a_size_that_is_used_as_a_number_freezes_its_axis(layers):
    net, (first, _) = layers(8, 8)
    add_demand(net, None, (), identity, size=first)
    assert group_sizes(net) == [8]
    assert reasons(net) == {"the code uses the size of the axis as a number"}


def test_an_axis_sized_by_a_product_of_two_attributes_is_frozen(layers):
    net, (first, _) = layers(8, 8)
    add_demand(net, first, ((HEADS, 2), (WIDTH, 4)), lambda heads, width: heads * width)
    assert group_sizes(net) == [8]
    assert reasons(net) == {"`net.heads`, `net.width` cannot be updated when the axis is pruned"}


def test_an_attribute_of_a_frozen_axis_freezes_the_other_axes_that_use_it(layers):
    net, (first, second) = layers(8, 8)
    fixed = net.softmax(Tensor.of((4, 8), (None, net.facts.fresh(8))), 1).axes[1]
    add_demand(net, fixed, ((HEADS, 8),), identity)
    add_demand(net, first, ((HEADS, 8),), identity)
    assert group_sizes(net) == [8]
    graph = net.graph()
    assert graph.coupling.frozen[graph.coupling.component[first]].all()
    assert not graph.coupling.frozen[graph.coupling.component[second]].any()


def test_a_demand_that_is_violated_without_pruning_freezes_its_axis(layers):
    net, (first, _) = layers(8, 8)
    add_demand(net, first, ((WIDTH, 5), (HEADS, 5)), lambda width, heads: width + heads)  # 10 is not the size 8
    assert group_sizes(net) == [8]


@pytest.mark.parametrize("width", [2, 3, 17])
def test_ties_do_not_depend_on_the_run(width, layers):
    def groups():
        net, (first, second) = layers(width, width)
        add_demand(net, first, ((WIDTH, width),), identity)
        add_demand(net, second, ((WIDTH, width),), identity)
        return [(group.name, group.size, group.footprint) for group in net.graph().groups]

    assert groups() == groups()
    assert len(groups()) == 1
