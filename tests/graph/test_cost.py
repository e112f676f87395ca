"""The price of a plan against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kirsch.graph.cost import Cost, CostModel
from kirsch.graph.facts import Term
from kirsch.graph.labels import Tensor

STEADY = settings(deadline=None, derandomize=True)
LABELS = st.lists(st.integers(0, 7), min_size=1, max_size=6).map(np.array)
TERMS = st.lists(
    st.builds(
        Term,
        st.sampled_from(["parameters", "macs", "activations"]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 9).map(float),
        st.lists(LABELS, max_size=3).map(tuple),
    ),
    max_size=8,
)
KEEP = st.lists(st.booleans(), min_size=8, max_size=8).map(np.array)


def model(*terms, components=8):
    return CostModel(terms, np.arange(components))


def test_two_layers_in_closed_form(chain):
    """3 → 5 → 2 with biases, on one row; then with 3 of the 5."""
    graph = chain(5).graph()
    assert graph.cost == Cost(parameters=3 * 5 + 5 + 5 * 2 + 2, macs=3 * 5 + 5 * 2, activations=0)
    keep = graph.keep({"first": (0, 4)})
    assert graph.prices.price(keep) == Cost(parameters=3 * 3 + 3 + 3 * 2 + 2, macs=3 * 3 + 3 * 2, activations=0)
    assert graph.prices.by_owner(keep) == {"first": (3 * 3 + 3, 3 * 3), "second": (3 * 2 + 2, 3 * 2)}


def test_rows_and_columns_that_go_multiply(heads):
    """3 heads of 4 without one head and one width are 2 heads of 3: 12 channels become 6."""
    graph = heads(3, 4).graph()
    width, head = graph.groups
    keep = graph.keep({head.name: (1,), width.name: (0,)})
    assert graph.prices.by_owner(keep) == {"query": (4 * 6, 4 * 6), "": (3, 0), "out": (6 * 2, 6 * 2)}


def test_what_an_operation_puts_out_is_counted_with_repeats():
    """A channel that is repeated over 2 positions counts twice: (C, 2) flattened, with channel 1 gone."""
    flat = np.array([0, 0, 1, 1, 2, 2])
    prices = model(Term("activations", "", 5.0, (flat,)), Term("activations", "", 1.0, ()))
    assert prices.price(np.ones(8, bool)) == Cost(0, 0, 5 * 6 + 1)
    assert prices.price(np.arange(8) != 1) == Cost(0, 0, 5 * 4 + 1)


def test_an_axis_that_is_there_twice_counts_squared():
    """As in the covariance of channels."""
    channels = np.arange(4)
    prices = model(Term("macs", "", 10.0, (channels, channels)))
    assert prices.price(np.arange(8) != 2).macs == 10 * 3 * 3


def test_labels_are_priced_by_their_components():
    """Labels 1 and 2 are one component, so both go with it."""
    prices = CostModel([Term("macs", "", 1.0, (np.array([1, 2, 3]),))], np.array([0, 1, 1, 2]))
    assert prices.price(np.array([True, False, True])).macs == 1


def test_a_model_without_terms_costs_nothing():
    assert model().price(np.ones(8, bool)) == Cost(0, 0, 0)
    assert model().by_owner(np.ones(8, bool)) == {}


def test_fractions_are_rounded_after_they_are_summed():
    prices = model(*[Term("macs", "", 0.4, ())] * 5)
    assert prices.price(np.ones(8, bool)).macs == 2


def test_a_cost_as_json_names_its_parts():
    assert Cost(1, 2, 3).to_dict() == {"parameters": 1, "macs": 2, "activations": 3}


@STEADY
@given(TERMS, KEEP)
def test_a_price_is_the_sum_of_products_of_kept_counts(terms, keep):
    expected = {"parameters": 0, "macs": 0, "activations": 0}
    for term in terms:
        expected[term.of] += int(term.coefficient) * int(np.prod([keep[labels].sum() for labels in term.factors]))
    prices = model(*terms)
    assert prices.price(keep).to_dict() == expected
    owners = prices.by_owner(keep).values()
    assert sum(parameters for parameters, _ in owners) == expected["parameters"]
    assert sum(macs for _, macs in owners) == expected["macs"]


@STEADY
@given(TERMS, KEEP, KEEP)
def test_removing_more_never_costs_more(terms, first, second):
    prices = model(*terms)
    less, more = prices.price(first & second).to_dict(), prices.price(first).to_dict()
    assert all(less[name] <= more[name] for name in more)


@pytest.mark.parametrize("removed", [{}, {"first": ()}])
def test_removing_nothing_costs_the_whole(chain, removed):
    graph = chain().graph()
    assert graph.prices.price(graph.keep(removed)) == graph.cost


def test_macs_are_counted_once_for_each_row(network):
    net = network()
    net.output(net.linear("layer", Tensor.of((7, 3)), 2))
    assert net.graph().cost.macs == 7 * 3 * 2
