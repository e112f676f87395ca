"""Cost of a plan, compared with counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.graph.cost import Cost, CostModel
from kirsch.graph.facts import CostTerm
from kirsch.graph.labels import Tensor

LABELS = st.lists(st.integers(0, 7), min_size=1, max_size=6).map(np.array)
TERMS = st.lists(
    st.builds(
        CostTerm,
        st.sampled_from(["parameters", "macs", "activations", "size"]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 9).map(float),
        st.lists(LABELS, max_size=3).map(tuple),
    ),
    max_size=8,
)
KEEP = st.lists(st.booleans(), min_size=8, max_size=8).map(np.array)


def model(*terms, components=8):
    return CostModel(terms, np.arange(components))


def test_the_cost_of_two_layers_equals_its_closed_form(chain):
    """Layers 3 → 5 → 2 with biases on one row; then 3 of the 5 units are kept."""
    graph = chain(5).graph()
    assert graph.cost == Cost(parameters=3 * 5 + 5 + 5 * 2 + 2, macs=3 * 5 + 5 * 2, activations=0)
    keep = graph.keep({"first": (0, 4)})
    assert graph.prices.price(keep) == Cost(parameters=3 * 3 + 3 + 3 * 2 + 2, macs=3 * 3 + 3 * 2, activations=0)
    assert graph.prices.by_owner(keep) == {"first": (3 * 3 + 3, 3 * 3), "second": (3 * 2 + 2, 3 * 2)}


def test_the_channels_kept_in_a_view_are_the_product_of_the_kept_rows_and_columns(heads):
    """3 heads of width 4 become 2 heads of width 3, so 12 channels become 6."""
    graph = heads(3, 4).graph()
    width, head = graph.groups
    keep = graph.keep({head.name: (1,), width.name: (0,)})
    assert graph.prices.by_owner(keep) == {"query": (4 * 6, 4 * 6), "": (3, 0), "out": (6 * 2, 6 * 2)}


def test_a_channel_that_is_repeated_in_an_output_counts_each_time():
    """Three channels of two positions each are flattened, and channel 1 is removed."""
    flat = np.array([0, 0, 1, 1, 2, 2])
    prices = model(CostTerm("activations", "", 5.0, (flat,)), CostTerm("activations", "", 1.0, ()))
    assert prices.price(np.ones(8, bool)) == Cost(0, 0, 5 * 6 + 1)
    assert prices.price(np.arange(8) != 1) == Cost(0, 0, 5 * 4 + 1)


def test_an_axis_that_occurs_twice_counts_squared():
    """An example is the covariance matrix of channels."""
    channels = np.arange(4)
    prices = model(CostTerm("macs", "", 10.0, (channels, channels)))
    assert prices.price(np.arange(8) != 2).macs == 10 * 3 * 3


def test_the_labels_of_a_component_are_removed_together():
    """Labels 1 and 2 are one component."""
    prices = CostModel([CostTerm("macs", "", 1.0, (np.array([1, 2, 3]),))], np.array([0, 1, 1, 2]))
    assert prices.price(np.array([True, False, True])).macs == 1


def test_a_model_without_terms_costs_nothing():
    assert model().price(np.ones(8, bool)) == Cost(0, 0, 0)
    assert model().by_owner(np.ones(8, bool)) == {}


def test_costs_are_rounded_after_they_are_summed():
    prices = model(*[CostTerm("macs", "", 0.4, ())] * 5)
    assert prices.price(np.ones(8, bool)).macs == 2


def test_the_json_of_a_cost_has_all_fields():
    expected = {"parameters": 1, "macs": 2, "activations": 3, "size": 4, "memory": 5}
    assert Cost(1, 2, 3, 4, 5).to_dict() == expected


def test_memory_is_the_largest_sum_of_tensors_that_exist_at_the_same_time():
    channels = np.arange(4)
    lives = {(0, 1): 10.0, (1, 2): 20.0, (2, 5): 5.0, (4, 5): 21.0}
    prices = model(*(CostTerm("memory", str(life), size, (channels,), life) for life, size in lives.items()))
    whole, half = np.ones(8, bool), np.arange(8) % 2 == 0
    assert prices.price(whole).memory == 4 * 30
    assert prices.price(half).memory == 2 * 30
    assert prices.shares(whole, "memory") == {"(0, 1)": 40, "(1, 2)": 80}
    assert model(CostTerm("size", "a", 3.0, (channels,))).shares(half, "size") == {"a": 6}


@given(TERMS, KEEP)
def test_a_cost_is_the_sum_of_products_of_kept_counts(terms, keep):
    expected = {"parameters": 0, "macs": 0, "activations": 0, "size": 0, "memory": 0}
    for term in terms:
        expected[term.quantity] += int(term.coefficient) * int(np.prod([keep[labels].sum() for labels in term.factors]))
    prices = model(*terms)
    assert prices.price(keep).to_dict() == expected
    owners = prices.by_owner(keep).values()
    assert sum(parameters for parameters, _ in owners) == expected["parameters"]
    assert sum(macs for _, macs in owners) == expected["macs"]


@given(TERMS, KEEP, KEEP)
def test_removing_more_never_costs_more(terms, first, second):
    prices = model(*terms)
    smaller, larger = prices.price(first & second).to_dict(), prices.price(first).to_dict()
    assert all(smaller[name] <= larger[name] for name in larger)


@pytest.mark.parametrize("removed", [{}, {"first": ()}])
def test_the_cost_without_removals_is_the_cost_of_the_model(chain, removed):
    graph = chain().graph()
    assert graph.prices.price(graph.keep(removed)) == graph.cost


def test_macs_are_proportional_to_the_number_of_rows(network):
    net = network()
    net.output(net.linear("layer", Tensor.of((7, 3)), 2))
    assert net.graph().cost.macs == 7 * 3 * 2
