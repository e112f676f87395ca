"""The coupling analysis of one model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kirsch
from kirsch.graph import relations
from kirsch.graph.cost import Cost
from kirsch.graph.expression import Expression, Leaf
from kirsch.graph.facts import Freeze, Operation
from kirsch.graph.labels import Tensor
from kirsch.graph.plan import Plan, Removal

STEADY = settings(deadline=None, derandomize=True)


def blocked(graph):
    return [(blocker.reason, blocker.where, round(blocker.share * size(graph))) for blocker in graph.blockers]


def size(graph):
    return sum(int(np.prod(graph.tensors[name].shape)) for name in graph.parameters)


def test_a_fingerprint_is_the_same_for_the_same_model_and_any_weights(chain):
    def weights(name):
        raise AssertionError(f"the values of {name} are looked at")

    first, second = chain().graph(values=weights), chain().graph("Another", values=np.zeros)
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


def test_a_fingerprint_follows_shapes(chain):
    assert len({chain(width).graph().fingerprint for width in (4, 5, 6)}) == 3


def test_a_fingerprint_follows_names(network):
    found = set()
    for name in ("a", "b"):
        net = network()
        net.output(net.linear(name, Tensor.of((1, 3)), 2))
        assert net.graph().groups == ()
        found.add(net.graph().fingerprint)
    assert len(found) == 2


def test_a_fingerprint_follows_shapes_outside_all_groups(network):
    found = set()
    for width in (2, 3):
        net = network()
        net.output(net.linear("only", Tensor.of((1, 3)), width))
        assert net.graph().groups == ()
        found.add(net.graph().fingerprint)
    assert len(found) == 2


WIRINGS = ["none", "sum", "reversed sum", "freeze", "one unit"]


@pytest.mark.parametrize("tie", WIRINGS)
def test_a_fingerprint_follows_what_belongs_together(network, tie):
    """The same parameters, wired otherwise."""

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

    prints = {other: build(other).fingerprint for other in WIRINGS}
    assert [other for other, found in prints.items() if found == prints[tie]] == [tie]


def test_a_fingerprint_follows_what_the_units_are(network):
    found = set()
    for kind in ("norm groups", "conv groups"):
        net = network()
        net.facts.split(net.parameter("norm.weight", 6).axes[0].reshape(2, 3), kind)
        found.add(net.graph().fingerprint)
    assert len(found) == 2


def test_what_is_removed_goes_and_all_else_stays(chain):
    graph = chain(5).graph()
    keep = graph.keep({"first": (1, 3)})
    expected = [True, False, True, False, True]
    assert [graph.kept(graph.axes[site], keep).tolist() for site in graph.groups[0].footprint] == [expected] * 3
    assert np.count_nonzero(~keep) == 2
    assert graph.keep({}).all()


def test_the_choice_of_a_plan_is_its_removals(chain):
    graph = chain(5).graph()
    plan = Plan("", "", (Removal("first", "channel", 5, (1, 3), ""),), graph.cost, Cost(0, 0, 0))
    assert plan.keep(graph).tolist() == graph.keep({"first": (1, 3)}).tolist()


def test_an_axis_that_is_left_whole_needs_no_positions(chain):
    graph = chain(5).graph()
    keep = graph.keep({"first": (1,)})
    assert graph.kept(graph.axes["second.weight", 0], keep) is None
    assert graph.kept(None, keep) is None


def test_units_of_several_groups_go_together(heads):
    """Head 1 of 2 and width 2 of 3: positions 0 and 1 of the six are left."""
    graph = heads(2, 3).graph()
    width, head = graph.groups
    keep = graph.keep({head.name: (1,), width.name: (2,)})
    assert graph.kept(graph.axes["query.weight", 0], keep).tolist() == [True, True, False, False, False, False]
    assert graph.kept(graph.axes["scale", 0], keep).tolist() == [True, True, False]


def test_an_axis_of_which_nothing_is_left_is_found(shuffle, chain):
    graph = shuffle().graph()
    name = graph.groups[0].name
    assert graph.emptied(graph.keep({name: (0,)})) is None
    assert graph.emptied(graph.keep({name: (0, 1)})) == ("before.weight", 0)
    assert graph.emptied(np.zeros_like(graph.coupling.frozen)) == ("before.weight", 0)


def test_tied_tensors_are_one(network):
    """An embedding that is read again as the last layer."""
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


def test_integers_in_the_code_follow_what_is_kept(heads):
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


def test_a_repeated_label_counts_as_often_as_it_is_there(chain):
    """The code flattens 5 channels of 2 positions."""
    net = chain(5)
    flat = np.repeat(net.tensors["first.weight"].axes[0], 2)
    leaf = Leaf("", "flat")
    net.facts.demand(flat, Expression(lambda values: values[leaf], ((leaf, 10),), ()))
    graph = net.graph()
    assert graph.constants(graph.keep({"first": (0,)})) == {leaf: 8}


def test_what_holds_a_layer_is_named_with_its_share(network):
    """3 → 4 → 5 → 2 without biases; a softmax over the 5 leaves the 4 free, so that the last layer alone is whole."""
    net = network()
    x = net.linear("a", Tensor.of((1, 3)), 4, bias=False)
    x = net.softmax(net.linear("b", x, 5, bias=False), 1)
    net.output(net.linear("c", x, 2, bias=False))
    (blocker,) = net.graph().blockers
    assert (blocker.reason, blocker.where) == ("a softmax spans it", "softmax")
    assert (blocker.operation, blocker.source) == ("softmax", "net.py:7")
    assert blocker.share == pytest.approx(5 * 2 / (3 * 4 + 4 * 5 + 5 * 2))


def test_a_parameter_that_may_go_along_any_axis_has_no_blocker(chain):
    assert chain().graph().blockers == ()


def test_a_parameter_of_which_a_part_may_go_has_no_blocker(network):
    net = network()
    axis = net.parameter("scale", 5).axes[0]
    net.softmax(Tensor.of((2,), [axis[:2]]), 0)
    graph = net.graph()
    assert [group.size for group in graph.groups] == [3]
    assert graph.blockers == ()


def test_inputs_and_outputs_are_no_blockers(network):
    net = network()
    weight = net.parameter("only.weight", 2, 3)
    net.facts.freeze(weight.axes[1], "it is an input", boundary=True)
    net.output(Tensor.of((2,), [weight.axes[0]]))
    assert net.graph().groups == ()
    assert net.graph().blockers == ()


def test_an_obstacle_beside_a_boundary_is_named(network):
    net = network()
    weight = net.parameter("only.weight", 2, 3)
    net.facts.freeze(weight.axes[0], "it is an output", boundary=True)
    net.softmax(weight, 1)
    assert blocked(net.graph()) == [("a softmax spans it", "softmax", 6)]


def test_blockers_of_one_place_are_summed_and_the_costliest_is_first(network):
    net = network()
    for name, rows, place in (("a", 2, "first"), ("b", 3, "second"), ("c", 4, "first"), ("d", 20, "third")):
        net.softmax(net.parameter(f"{name}.weight", rows), 0, module=place)
    net.parameter("free.weight", 21)
    assert blocked(net.graph()) == [
        ("a softmax spans it", "third", 20),
        ("a softmax spans it", "first", 2 + 4),
        ("a softmax spans it", "second", 3),
    ]
    assert net.graph().blockers[0].share == pytest.approx(20 / 50)


def test_a_blocker_is_the_root_of_what_it_freezes(network):
    """An axis lost its labels in one layer, and another layer meets it."""
    net = network()
    x = net.parameter("late.weight", 3)
    root = Freeze(np.array([99]), "there is no rule for fft", Operation("fft", "early"))
    net.facts.begin(Operation("add", "late"), cause=root)
    net.facts.equate(x.axes[0], None)
    assert blocked(net.graph()) == [("there is no rule for fft", "early", 3)]


def test_a_buffer_is_no_parameter(network):
    net = network()
    net.softmax(net.parameter("norm.weight", 3), 0)
    buffer = net.parameter("norm.mean", 7)
    net.softmax(buffer, 0, module="other")
    graph = net.graph()
    only = type(graph)("Net", net.facts, net.tensors, ("norm.weight",), (), graph.values, graph.fits)
    assert [(blocker.where, blocker.share) for blocker in only.blockers] == [("softmax", 1.0)]


def test_what_holds_both_axes_of_a_view_holds_the_layers_around_it(network):
    """Rows and columns of the view are frozen, and so is each channel: 6 of the first and 6 * 2 of the second layer."""
    net = network()
    first = net.parameter("first.bias", 6)
    x = net.view(Tensor.of((1, 6), [None, first.axes[0]]), 1, 2, 3)
    x = net.view(net.softmax(x, 1, 2), 1, 6)
    net.output(net.linear("second", x, 2, bias=False))
    assert net.graph().groups == ()
    assert blocked(net.graph()) == [("a softmax spans it", "softmax", 6 + 6 * 2)]


@STEADY
@given(st.data())
def test_the_price_of_a_choice_is_the_size_of_what_is_left(heads, shuffle, chain, data):
    """Two ways: the sum over terms, and the numbers of each parameter that its kept positions span."""
    graph = data.draw(st.sampled_from([heads(3, 4), shuffle(), chain(5)])).graph()
    keep = graph.keep({g.name: tuple(data.draw(st.sets(st.integers(0, g.size - 1)))) for g in graph.groups})
    left = 0
    for tensor in graph.tensors.values():
        masks = [graph.kept(labels, keep) for labels in tensor.axes]
        left += np.prod([n if mask is None else mask.sum() for n, mask in zip(tensor.shape, masks, strict=True)])
    assert graph.prices.price(keep).parameters == left


def test_a_graph_is_printed_as_one_line():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    text = repr(kirsch.trace(model, torch.ones(2, 4)))
    assert text == "<kirsch.Graph of Sequential: 67 parameters, 8 units in 1 group, inputs float32 (2, 4)>"
