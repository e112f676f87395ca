"""Integers in the code of a model that follow what is kept."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kirsch.errors import PlanError
from kirsch.graph.constants import solve
from kirsch.graph.expression import Expression, Leaf, Size
from kirsch.graph.facts import Demand, Operation

STEADY = settings(deadline=None, derandomize=True)
WIDTH, HEADS, EACH = Leaf("block", "width"), Leaf("block", "heads"), Leaf("block", "each")
TODAY = {WIDTH: 12, HEADS: 3, EACH: 4}
LINE = Operation("aten.view", "block", "net.py:8")


def demand(kept, compute, *leaves, sizes=(), operation=LINE):
    """`compute` of the leaves' values must equal the number of kept labels, which stands in the labels themselves."""
    expression = Expression(
        lambda values: compute(*(values[leaf] for leaf in leaves), *(values[Size(s.tobytes())] for s in sizes)),
        tuple((leaf, TODAY[leaf]) for leaf in leaves),
        tuple(sizes),
    )
    return Demand(np.array([kept]), expression, operation)


def kept(labels):
    return int(labels[0])


@pytest.mark.parametrize(
    ("leaf", "name"),
    [
        (Leaf("", "heads"), "heads"),
        (Leaf("block.0", "heads"), "block.0.heads"),
        (Leaf("block", "shape", 1), "block.shape[1]"),
        (Leaf("block", "shape", 0), "block.shape[0]"),
    ],
)
def test_a_leaf_is_written_as_in_code(leaf, name):
    assert str(leaf) == name


def test_an_attribute_takes_the_number_that_is_kept():
    assert solve([demand(7, lambda width: width, WIDTH)], kept) == {WIDTH: 7}


def test_what_need_not_change_is_not_named():
    demands = [demand(12, lambda width: width, WIDTH), demand(2, lambda heads: heads, HEADS)]
    assert solve(demands, kept) == {HEADS: 2}
    assert solve([], kept) == {}


@pytest.mark.parametrize(
    ("compute", "wanted", "value"),
    [
        (lambda width: width // 2, 5, 10),
        (lambda width: width * 3, 21, 7),
        (lambda width: width - 2, 6, 8),
        (lambda width: 24 // width, 8, 3),
        (lambda width: width // 3, 4, 12),
    ],
)
def test_the_value_is_searched_below_the_present_one(compute, wanted, value):
    assert solve([demand(wanted, compute, WIDTH)], kept).get(WIDTH, TODAY[WIDTH]) == value


def test_a_present_value_that_fits_is_kept():
    """11 // 2 is 5 as well, but 10 is there."""
    half = Demand(np.array([5]), Expression(lambda values: values[WIDTH] // 2, ((WIDTH, 11),), ()), LINE)
    assert solve([half], kept) == {}


def test_two_attributes_of_one_size_are_found_when_another_line_gives_one():
    demands = [demand(8, lambda heads, each: heads * each, HEADS, EACH), demand(2, lambda heads: heads, HEADS)]
    assert solve(demands, kept) == {HEADS: 2}
    demands = [demand(6, lambda heads, each: heads * each, HEADS, EACH), demand(2, lambda heads: heads, HEADS)]
    assert solve(demands, kept) == {HEADS: 2, EACH: 3}


def test_a_place_of_a_tuple_is_an_attribute_of_its_own():
    first, second = Leaf("", "shape", 0), Leaf("", "shape", 1)
    demands = [
        Demand(np.array([n]), Expression(lambda values, leaf=leaf: values[leaf], ((leaf, 8),), ()), LINE)
        for leaf, n in ((first, 8), (second, 5))
    ]
    assert solve(demands, kept) == {second: 5}


def test_a_size_that_is_read_at_run_time_follows_by_itself():
    """`channels // heads` with 6 channels left: two heads of 3, and nothing has to be written into `each`."""
    channels = np.array([6])
    each = demand(3, lambda heads, size: size // heads, HEADS, sizes=(channels,))
    assert solve([each, demand(2, lambda heads: heads, HEADS)], kept) == {HEADS: 2}
    assert solve([each], kept) == {HEADS: 2}


CHAIN = [
    demand(2, lambda heads: heads, HEADS),
    demand(6, lambda heads, each: heads * each, HEADS, EACH),
    demand(13, lambda each, width: each + width, EACH, WIDTH),
]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)])
def test_attributes_are_found_one_from_the_other_in_any_order(order):
    """heads = 2 gives each = 3 by 2 * 3 = 6, which gives width = 10 by 3 + 10 = 13."""
    assert solve([CHAIN[place] for place in order], kept) == {HEADS: 2, EACH: 3, WIDTH: 10}


@pytest.mark.parametrize("swapped", [False, True])
def test_an_attribute_meets_all_its_lines_and_not_the_first_alone(swapped):
    """Half of it is 3, which 6 and 7 fulfill; twice it is 14."""
    demands = [demand(3, lambda width: width // 2, WIDTH), demand(14, lambda width: 2 * width, WIDTH)]
    assert solve(demands[::-1] if swapped else demands, kept) == {WIDTH: 7}


def assert_refused(demands, sentence):
    with pytest.raises(PlanError, match=f"^{re.escape(sentence)}$"):
        solve(demands, kept)


def test_an_attribute_that_two_lines_want_differently_is_refused():
    other = Operation("aten.view", "block", "net.py:9")
    demands = [demand(7, lambda width: width, WIDTH), demand(6, lambda width: width, WIDTH, operation=other)]
    with pytest.raises(PlanError, match=r"No value of `block\.width` fits the plan\. net\.py:[89] needs [67], and"):
        solve(demands, kept)


def test_a_number_without_a_solution_is_refused_with_its_line_and_attribute():
    assert_refused(
        [demand(5, lambda width: width * 2, WIDTH)],
        "No value of `block.width` fits the plan. net.py:8 needs 5, and would get 24. "
        "Exclude the layers it belongs to, compute the size from the tensor's own shape, or trace the model with "
        "kirsch.trace(..., as_graph=True), which gives its operations without its code.",
    )


def test_two_attributes_that_nothing_tells_apart_are_refused_and_both_named():
    assert_refused(
        [demand(8, lambda heads, each: heads * each, HEADS, EACH, operation=Operation("aten.view"))],
        "No value of `block.heads`, `block.each` fits the plan. aten.view needs 8, and would get 12. "
        "Exclude the layers it belongs to, compute the size from the tensor's own shape, or trace the model with "
        "kirsch.trace(..., as_graph=True), which gives its operations without its code.",
    )


def test_a_size_that_the_code_reads_elsewhere_and_does_not_fit_is_refused():
    assert_refused(
        [demand(5, lambda size: size, sizes=(np.array([6]),))],
        "No value of a size read at run time fits the plan. net.py:8 needs 5, and would get 6. "
        "Exclude the layers it belongs to, compute the size from the tensor's own shape, or trace the model with "
        "kirsch.trace(..., as_graph=True), which gives its operations without its code.",
    )


@STEADY
@given(st.integers(1, 3), st.integers(1, 4), st.permutations(range(3)))
def test_values_that_are_found_meet_every_demand(heads, each, order):
    demands = [
        demand(heads * each, lambda h, e: h * e, HEADS, EACH),
        demand(each, lambda e: e, EACH),
        demand(heads * each, lambda width: width, WIDTH),
    ]
    found = TODAY | solve([demands[place] for place in order], kept)
    assert (found[WIDTH], found[HEADS], found[EACH]) == (heads * each, heads, each)
