"""The coupling analysis of one model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kirsch
from kirsch.graph import relations
from kirsch.graph.cost import Cost
from kirsch.graph.expression import Expression, Leaf
from kirsch.graph.facts import Freeze, Operation
from kirsch.graph.labels import Tensor
from kirsch.graph.plan import Plan, Removal


def blocked_sizes(graph):
    """Return the reason, module and number of blocked parameters of each blocker."""
    total = sum(int(np.prod(graph.tensors[name].shape)) for name in graph.parameters)
    return [(blocker.reason, blocker.where, round(blocker.share * total)) for blocker in graph.blockers]


def test_models_with_the_same_layers_have_the_same_fingerprint_whatever_the_weights(chain):
    def weights(name):
        raise AssertionError(f"the values of {name} were read")

    first, second = chain().graph(values=weights), chain().graph("Another", values=np.zeros)
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


def test_the_fingerprint_depends_on_shapes(chain):
    assert len({chain(width).graph().fingerprint for width in (4, 5, 6)}) == 3


def test_the_fingerprint_depends_on_names(network):
    fingerprints = set()
    for name in ("a", "b"):
        net = network()
        net.output(net.linear(name, Tensor.of((1, 3)), 2))
        assert net.graph().groups == ()
        fingerprints.add(net.graph().fingerprint)
    assert len(fingerprints) == 2


def test_the_fingerprint_depends_on_shapes_outside_all_groups(network):
    fingerprints = set()
    for width in (2, 3):
        net = network()
        net.output(net.linear("only", Tensor.of((1, 3)), width))
        assert net.graph().groups == ()
        fingerprints.add(net.graph().fingerprint)
    assert len(fingerprints) == 2


WIRINGS = ["none", "sum", "reversed sum", "freeze", "one unit"]


@pytest.mark.parametrize("tie", WIRINGS)
def test_the_fingerprint_depends_on_how_the_same_parameters_are_connected(network, tie):

    def build(tie):
        net = network()
        a, b = (net.linear(name, Tensor.of((1, 3)), 4) for name in "ab")
        if tie == "sum":
            net.add(a, b)
        elif tie == "reversed sum":
            net.add(a, Tensor.of(b.shape, [None, b.axes[1][::-1]]))
        elif tie == "freeze":
            net.facts.freeze(b.axes[1], "why")
        elif tie == "one unit":
            net.facts.freeze(b.axes[1][:1], "why")
        return net.graph()

    fingerprints = {other: build(other).fingerprint for other in WIRINGS}
    assert [other for other, fingerprint in fingerprints.items() if fingerprint == fingerprints[tie]] == [tie]


def test_the_fingerprint_depends_on_the_kinds_of_units(network):
    fingerprints = set()
    for kind in ("norm groups", "conv groups"):
        net = network()
        net.facts.split(net.parameter("norm.weight", 6).axes[0].reshape(2, 3), kind)
        fingerprints.add(net.graph().fingerprint)
    assert len(fingerprints) == 2


def test_exactly_the_removed_units_are_missing_from_every_axis_of_the_group(chain):
    graph = chain(5).graph()
    keep = graph.keep({"first": (1, 3)})
    expected = [True, False, True, False, True]
    assert [graph.kept(graph.axes[key], keep).tolist() for key in graph.groups[0].footprint] == [expected] * 3
    assert np.count_nonzero(~keep) == 2
    assert graph.keep({}).all()


def test_the_mask_of_a_plan_is_the_mask_of_its_removed_units(chain):
    graph = chain(5).graph()
    plan = Plan("", "", (Removal("first", "channel", 5, (1, 3), ""),), graph.cost, Cost(0, 0, 0))
    assert plan.keep(graph).tolist() == graph.keep({"first": (1, 3)}).tolist()


def test_the_mask_of_an_axis_that_loses_no_index_is_none(chain):
    graph = chain(5).graph()
    keep = graph.keep({"first": (1,)})
    assert graph.kept(graph.axes["second.weight", 0], keep) is None
    assert graph.kept(None, keep) is None


def test_units_of_several_groups_can_be_removed_at_once(heads):
    """Head 1 of 2, and index 2 of 3 in each head, are removed. Indices 0 and 1 of the six remain."""
    graph = heads(2, 3).graph()
    width, head = graph.groups
    keep = graph.keep({head.name: (1,), width.name: (2,)})
    assert graph.kept(graph.axes["query.weight", 0], keep).tolist() == [True, True, False, False, False, False]
    assert graph.kept(graph.axes["scale", 0], keep).tolist() == [True, True, False]


def test_a_parameter_axis_that_would_lose_all_indices_is_named(shuffle):
    graph = shuffle().graph()
    name = graph.groups[0].name
    assert graph.too_small(graph.keep({name: (0,)})) is None
    assert graph.too_small(graph.keep({name: (0, 1)})) == (("before.weight", 0), 1)
    assert graph.too_small(np.zeros_like(graph.coupling.frozen)) == (("before.weight", 0), 1)


def test_tied_tensors_are_counted_once(network):
    """An embedding table that is also the weight of the last layer."""
    net = network()
    table = net.parameter("embed.weight", 9, 4)
    net.facts.freeze(table.axes[0], "rows are looked up", boundary=True)
    net.tensors["head.weight"] = table
    hidden = Tensor.of((1, 4), [None, table.axes[1]])
    net.facts.begin(Operation("linear", "head"))
    net.output(relations.relate(net.facts, [(hidden, "ni"), (table, "vi")], "nv", (1, 9)))
    graph = net.graph()
    assert list(graph.axes) == [("embed.weight", 0), ("embed.weight", 1)]
    assert graph.groups[0].footprint == (("embed.weight", 1),)
    assert graph.cost.parameters == 36


def test_integers_in_the_code_become_the_numbers_of_kept_units(heads):
    net = heads(4, 3)
    rows, columns = net.facts.grids[0].marginals
    number, width = Leaf("query", "heads"), Leaf("query", "width")
    for axis, leaf, value in ((rows, number, 4), (columns, width, 3)):
        net.facts.demand(axis, Expression(lambda values, leaf=leaf: values[leaf], ((leaf, value),), ()))
    graph = net.graph()
    columns, rows = graph.groups
    assert graph.constants(graph.keep({})) == {}
    assert graph.constants(graph.keep({rows.name: (0, 2), columns.name: (1,)})) == {number: 2, width: 2}
    assert graph.constants(graph.keep({rows.name: (3,)})) == {number: 3}


def test_a_label_that_occurs_twice_on_an_axis_counts_twice(chain):
    """The code flattens 5 channels with 2 positions each."""
    net = chain(5)
    flat = np.repeat(net.tensors["first.weight"].axes[0], 2)
    leaf = Leaf("", "flat")
    net.facts.demand(flat, Expression(lambda values: values[leaf], ((leaf, 10),), ()))
    graph = net.graph()
    assert graph.constants(graph.keep({"first": (0,)})) == {leaf: 8}


def test_a_blocker_has_the_share_of_parameters_that_it_blocks(network):
    """Layers 3 → 4 → 5 → 2 without biases. A softmax freezes the axis of size 5, so only the last layer is blocked."""
    net = network()
    x = net.linear("a", Tensor.of((1, 3)), 4, bias=False)
    x = net.softmax(net.linear("b", x, 5, bias=False), 1)
    net.output(net.linear("c", x, 2, bias=False))
    (blocker,) = net.graph().blockers
    assert (blocker.reason, blocker.where) == ("a softmax is computed over the axis", "softmax")
    assert (blocker.operation, blocker.source) == ("softmax", "net.py:7")
    assert blocker.share == pytest.approx(5 * 2 / (3 * 4 + 4 * 5 + 5 * 2))


def test_a_parameter_with_a_removable_axis_has_no_blocker(chain):
    assert chain().graph().blockers == ()


def test_a_parameter_of_which_a_part_can_be_removed_has_no_blocker(network):
    net = network()
    axis = net.parameter("scale", 5).axes[0]
    net.softmax(Tensor.of((2,), [axis[:2]]), 0)
    graph = net.graph()
    assert [group.size for group in graph.groups] == [3]
    assert graph.blockers == ()


def test_inputs_and_outputs_are_not_blockers(network):
    net = network()
    weight = net.parameter("only.weight", 2, 3)
    net.facts.freeze(weight.axes[1], "it is an input", boundary=True)
    net.output(Tensor.of((2,), [weight.axes[0]]))
    assert net.graph().groups == ()
    assert net.graph().blockers == ()


def test_a_blocker_is_named_although_another_axis_is_an_output(network):
    net = network()
    weight = net.parameter("only.weight", 2, 3)
    net.facts.freeze(weight.axes[0], "it is an output", boundary=True)
    net.softmax(weight, 1)
    assert blocked_sizes(net.graph()) == [("a softmax is computed over the axis", "softmax", 6)]


def test_blockers_of_one_module_are_summed_and_the_largest_is_first(network):
    net = network()
    for name, rows, module in (("a", 2, "first"), ("b", 3, "second"), ("c", 4, "first"), ("d", 20, "third")):
        net.softmax(net.parameter(f"{name}.weight", rows), 0, module=module)
    net.parameter("free.weight", 21)
    assert blocked_sizes(net.graph()) == [
        ("a softmax is computed over the axis", "third", 20),
        ("a softmax is computed over the axis", "first", 2 + 4),
        ("a softmax is computed over the axis", "second", 3),
    ]
    assert net.graph().blockers[0].share == pytest.approx(20 / 50)


def test_a_blocker_names_the_operation_that_lost_the_labels_and_not_a_later_one(network):
    net = network()
    x = net.parameter("late.weight", 3)
    cause = Freeze(np.array([99]), "there is no rule for fft", Operation("fft", "early"))
    net.facts.begin(Operation("add", "late"), cause=cause)
    net.facts.equate(x.axes[0], None)
    assert blocked_sizes(net.graph()) == [("there is no rule for fft", "early", 3)]


def test_buffers_do_not_count_as_blocked_parameters(network):
    net = network()
    net.softmax(net.parameter("norm.weight", 3), 0)
    buffer = net.parameter("norm.mean", 7)
    net.softmax(buffer, 0, module="other")
    graph = net.graph()
    graph = type(graph)("Net", net.facts, net.tensors, ("norm.weight",), (), graph.values, graph.fits)
    assert [(blocker.where, blocker.share) for blocker in graph.blockers] == [("softmax", 1.0)]


def test_freezing_both_axes_of_a_view_blocks_the_layers_before_and_after(network):
    """Frozen rows and columns of the view freeze all channels: 6 parameters of the first layer, 6 * 2 of the second."""
    net = network()
    first = net.parameter("first.bias", 6)
    x = net.view(Tensor.of((1, 6), [None, first.axes[0]]), 1, 2, 3)
    x = net.view(net.softmax(x, 1, 2), 1, 6)
    net.output(net.linear("second", x, 2, bias=False))
    assert net.graph().groups == ()
    assert blocked_sizes(net.graph()) == [("a softmax is computed over the axis", "softmax", 6 + 6 * 2)]


@given(st.data())
def test_the_counted_parameters_are_the_elements_of_the_cut_tensors(heads, shuffle, chain, data):
    """Two ways: the sum over cost terms, and the sizes of the tensors after cutting."""
    graph = data.draw(st.sampled_from([heads(3, 4), shuffle(), chain(5)])).graph()
    keep = graph.keep({g.name: tuple(data.draw(st.sets(st.integers(0, g.size - 1)))) for g in graph.groups})
    elements = 0
    for tensor in graph.tensors.values():
        masks = [graph.kept(labels, keep) for labels in tensor.axes]
        elements += np.prod([n if mask is None else mask.sum() for n, mask in zip(tensor.shape, masks, strict=True)])
    assert graph.prices.price(keep).parameters == elements


def test_the_representation_of_a_graph_is_one_line():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    text = repr(kirsch.trace(model, torch.ones(2, 4)))
    assert text == "<kirsch.Graph of Sequential: 67 parameters, 8 units in 1 group, inputs float32 (2, 4)>"


def test_indices_of_a_buffer_without_cost_are_not_a_group(chain):
    net = chain()
    net.tensors["positions"] = Tensor.of((1, 7), [None, net.facts.fresh(7)])
    graph = replace(net.graph(), parameters=tuple(net.tensors)[:-1])
    assert [group.name for group in graph.groups] == ["first"]
    assert graph.explain("positions").startswith("positions[:, i] stays: it is an axis of a buffer, and neither")
