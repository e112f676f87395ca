"""New values of the integers in the model's code after pruning.

A leaf is an integer attribute of a module. A demand requires that an expression of leaves gives the number of units.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.errors import PlanError
from kirsch.graph.constants import solve
from kirsch.graph.expression import Expression, Leaf, Size
from kirsch.graph.facts import Demand, Operation

WIDTH, HEADS, EACH = Leaf("block", "width"), Leaf("block", "heads"), Leaf("block", "each")
PRESENT = {WIDTH: 12, HEADS: 3, EACH: 4}
LINE = Operation("aten.view", "block", "net.py:8")


def demand(kept, compute, *leaves, sizes=(), operation=LINE):
    """Return the demand that `compute(*leaves, *sizes)` equals `kept`, which is stored in place of the labels."""
    expression = Expression(
        lambda values: compute(*(values[leaf] for leaf in leaves), *(values[Size(s.tobytes())] for s in sizes)),
        tuple((leaf, PRESENT[leaf]) for leaf in leaves),
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
def test_a_leaf_is_printed_as_in_code(leaf, name):
    assert str(leaf) == name


def test_an_attribute_is_set_to_the_number_of_kept_units():
    assert solve([demand(7, lambda width: width, WIDTH)], kept) == {WIDTH: 7}


def test_attributes_that_keep_their_value_are_not_returned():
    demands = [demand(12, lambda width: width, WIDTH), demand(2, lambda heads: heads, HEADS)]
    assert solve(demands, kept) == {HEADS: 2}
    assert solve([], kept) == {}


@pytest.mark.parametrize(
    ("compute", "required", "value"),
    [
        (lambda width: width // 2, 5, 10),
        (lambda width: width * 3, 21, 7),
        (lambda width: width - 2, 6, 8),
        (lambda width: 24 // width, 8, 3),
        (lambda width: width // 3, 4, 12),
    ],
)
def test_the_new_value_is_searched_up_to_the_present_value(compute, required, value):
    assert solve([demand(required, compute, WIDTH)], kept).get(WIDTH, PRESENT[WIDTH]) == value


def test_a_present_value_that_meets_the_demand_is_kept():
    """Both 10 // 2 and 11 // 2 are 5."""
    half = Demand(np.array([5]), Expression(lambda values: values[WIDTH] // 2, ((WIDTH, 11),), ()), LINE)
    assert solve([half], kept) == {}


def test_two_attributes_of_one_size_are_solved_if_another_demand_determines_one_of_them():
    demands = [demand(8, lambda heads, each: heads * each, HEADS, EACH), demand(2, lambda heads: heads, HEADS)]
    assert solve(demands, kept) == {HEADS: 2}
    demands = [demand(6, lambda heads, each: heads * each, HEADS, EACH), demand(2, lambda heads: heads, HEADS)]
    assert solve(demands, kept) == {HEADS: 2, EACH: 3}


def test_items_of_a_tuple_attribute_are_solved_separately():
    first, second = Leaf("", "shape", 0), Leaf("", "shape", 1)
    demands = [
        Demand(np.array([n]), Expression(lambda values, leaf=leaf: values[leaf], ((leaf, 8),), ()), LINE)
        for leaf, n in ((first, 8), (second, 5))
    ]
    assert solve(demands, kept) == {second: 5}


def test_a_size_read_at_run_time_needs_no_new_value():
    """`channels // heads` with 6 kept channels gives two heads of 3; only `heads` is set."""
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
def test_attributes_are_solved_one_after_the_other_in_any_order_of_demands(order):
    """heads = 2 gives each = 3 by 2 * 3 = 6, which gives width = 10 by 3 + 10 = 13."""
    assert solve([CHAIN[index] for index in order], kept) == {HEADS: 2, EACH: 3, WIDTH: 10}


@pytest.mark.parametrize("swapped", [False, True])
def test_an_attribute_meets_all_its_demands(swapped):
    """width // 2 = 3 has the solutions 6 and 7; 2 * width = 14 has only 7."""
    demands = [demand(3, lambda width: width // 2, WIDTH), demand(14, lambda width: 2 * width, WIDTH)]
    assert solve(demands[::-1] if swapped else demands, kept) == {WIDTH: 7}


def assert_raises(demands, message):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        solve(demands, kept)


def test_two_demands_that_need_different_values_of_an_attribute_raise():
    other = Operation("aten.view", "block", "net.py:9")
    demands = [demand(7, lambda width: width, WIDTH), demand(6, lambda width: width, WIDTH, operation=other)]
    with pytest.raises(PlanError, match=r"No value of `block\.width` fits the plan\. net\.py:[89] requires [67]; the"):
        solve(demands, kept)


def test_a_demand_without_a_solution_raises_with_its_line_and_attribute():
    assert_raises(
        [demand(5, lambda width: width * 2, WIDTH)],
        "No value of `block.width` fits the plan. net.py:8 requires 5; the code would give 24. "
        "Exclude the layers of this size, compute the size from the shape of the tensor, or trace the model with "
        "kirsch.trace(..., as_graph=True), which prunes the traced program instead of the code.",
    )


def test_the_error_for_a_division_by_a_removed_size_names_the_division():
    with pytest.raises(PlanError, match=r"net\.py:8 requires 1; the code would divide by 0\."):
        solve([demand(1, lambda size: 6 // size, sizes=(np.array([0]),))], kept)


def test_a_demand_on_two_undetermined_attributes_raises_and_names_both():
    assert_raises(
        [demand(8, lambda heads, each: heads * each, HEADS, EACH, operation=Operation("aten.view"))],
        "No value of `block.heads`, `block.each` fits the plan. aten.view requires 8; the code would give 12. "
        "Exclude the layers of this size, compute the size from the shape of the tensor, or trace the model with "
        "kirsch.trace(..., as_graph=True), which prunes the traced program instead of the code.",
    )


def test_a_demand_that_the_size_of_another_axis_does_not_meet_raises():
    assert_raises(
        [demand(5, lambda size: size, sizes=(np.array([6]),))],
        "The plan does not fit a size that the code reads at run time. net.py:8 requires 5; the code would give 6. "
        "Exclude the layers of this size, compute the size from the shape of the tensor, or trace the model with "
        "kirsch.trace(..., as_graph=True), which prunes the traced program instead of the code.",
    )


@given(st.integers(1, 3), st.integers(1, 4), st.permutations(range(3)))
def test_the_solution_meets_every_demand(heads, each, order):
    demands = [
        demand(heads * each, lambda h, e: h * e, HEADS, EACH),
        demand(each, lambda e: e, EACH),
        demand(heads * each, lambda width: width, WIDTH),
    ]
    values = PRESENT | solve([demands[index] for index in order], kept)
    assert (values[WIDTH], values[HEADS], values[EACH]) == (heads * each, heads, each)
