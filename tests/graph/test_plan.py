"""Plans as data: reading, writing and checks."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.errors import GoalError, PlanError, UsageError
from kirsch.graph.cost import Cost
from kirsch.graph.graph import Tracing
from kirsch.graph.inputs import InputSpec
from kirsch.graph.kinds import KINDS
from kirsch.graph.plan import Goal, Plan, Removal

SMALL, LARGE = st.integers(0, 10**6), st.integers(10**6, 10**12)
TEXT = st.text(max_size=12)  # no lone surrogates, which cannot be encoded in UTF-8
NAME = st.text(min_size=1, max_size=12)
PLANS = st.builds(
    Plan,
    fingerprint=st.text("0123456789abcdef", min_size=64, max_size=64),
    model=NAME,
    groups=st.lists(
        st.builds(
            Removal,
            NAME,
            st.sampled_from(sorted(KINDS)),
            st.just(99),
            st.sets(st.integers(0, 98), max_size=9).map(lambda units: tuple(sorted(units))),
            TEXT,
        ),
        max_size=3,
        unique_by=lambda removal: removal.name,
    ).map(tuple),
    before=st.builds(Cost, LARGE, LARGE, LARGE),
    after=st.builds(Cost, SMALL, SMALL, SMALL),
    configuration=st.dictionaries(TEXT, st.integers(2, 99) | st.floats(1, 9)),
    goal=st.dictionaries(st.sampled_from(["macs", "parameters"]), st.floats(0.01, 0.99)),
    method=st.fixed_dictionaries(
        {"importance": NAME},
        optional={
            "norm": st.sampled_from([1, 2]),
            "round_to": st.just("auto") | st.integers(1, 64) | st.just({"head": 2}),
            "exclude": st.lists(NAME, max_size=2),
            "kinds": st.dictionaries(st.sampled_from(sorted(KINDS)), st.floats(0, 9), max_size=2),
            "uniform": st.booleans(),
        },
    ),
    inputs=st.lists(
        st.builds(
            InputSpec, TEXT, st.lists(st.integers(1, 9), max_size=4).map(tuple), st.just("int64"), st.integers(0, 99)
        ),
        max_size=2,
        unique_by=lambda spec: spec.name,
    ).map(tuple),
    notes=st.lists(TEXT, max_size=2).map(tuple),
)


def make_plan(*groups, fingerprint="0123456789abcdef" * 4):
    return Plan(fingerprint, "Net", groups, Cost(1000, 10, 5), Cost(500, 5, 3))


def removal(name="first", removed=(0,), size=5):
    return Removal(name, "channel", size, removed, "by hand")


def edited(**changes):
    """Return the JSON of a plan with one group after replacing some fields; None removes a field."""
    content = json.loads(make_plan(removal()).to_json()) | changes
    return json.dumps({name: value for name, value in content.items() if value is not None})


@pytest.fixture(scope="module")
def graph(chain):
    """Return a graph with the group "first" of 5 units and 32 parameters."""
    return chain(5).graph()


@given(PLANS)
def test_a_plan_is_equal_after_a_round_trip_through_json(original):
    restored = Plan.from_json(original.to_json())
    assert restored == original
    assert restored.to_json() == original.to_json()


def test_the_json_of_a_plan_has_all_fields_and_is_not_escaped():
    before, after = Cost(32, 25, 7, 128, 40), Cost(20, 15, 7)
    text = Plan("f", "Netz für Größe", (removal(),), before, after, goal={"macs": 0.5}).to_json()
    assert "Netz für Größe" in text
    assert json.loads(text) == {
        "kirsch_plan": 1,
        "model": {"class": "Netz für Größe", "fingerprint": "f", "parameters": 32},
        "goal": {"macs": 0.5},
        "method": {},
        "groups": [{"name": "first", "kind": "channel", "size": 5, "removed": [0], "reason": "by hand"}],
        "blocks": [],
        "cost": {
            "before": {"parameters": 32, "macs": 25, "activations": 7, "size": 128, "memory": 40},
            "after": {"parameters": 20, "macs": 15, "activations": 7, "size": 0, "memory": 0},
        },
        "inputs": [],
        "tracing": {"outputs": [], "decisions": "refuse", "module": "", "softmax": "freeze", "as_graph": False},
        "notes": [],
        "configuration": {},
    }


def test_equality_and_json_of_a_plan_ignore_its_graph(graph):
    first, second = make_plan(removal()), Plan(**{**vars(make_plan(removal())), "graph": graph})
    assert first == second
    assert first.to_json() == second.to_json()


def test_units_listed_in_any_order_are_sorted():
    group = json.loads(edited())["groups"][0] | {"removed": [4, 0, 2]}
    assert Plan.from_json(edited(groups=[group])).groups[0].removed == (0, 2, 4)


def assert_check_raises(plan, graph, message):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        plan.check(graph)


def plan_for(graph, *groups):
    return make_plan(*groups, fingerprint=graph.fingerprint)


@pytest.mark.parametrize("removed", [(0,), (4,), (0, 1, 3, 4)])
def test_a_plan_that_fits_passes_the_check(graph, removed):
    assert plan_for(graph, removal(removed=removed)).check(graph) is None


def test_the_error_for_a_plan_of_another_model_names_both_models(graph):
    assert_check_raises(
        make_plan(),
        graph,
        "The plan is for another model: Net with 1,000 parameters, fingerprint 0123456789ab. "
        f"This model is Net with 32 parameters, fingerprint {graph.fingerprint[:12]}. "
        "Use the model that the plan was made for, or make a new plan.",
    )


def test_the_error_for_an_unknown_group_suggests_the_nearest_name(graph):
    plan = plan_for(graph, removal("fist"))
    assert_check_raises(
        plan, graph, "The plan names a group 'fist'. The model has no such group. Did you mean 'first'?"
    )


@pytest.mark.parametrize(
    ("removed", "unit"), [((5,), 5), ((0, 4, 7), 7), ((-1,), -1), ((-2, 3), -2), ((-2, -1), -2), ((-1, 9), -1)]
)
def test_the_error_for_an_unknown_unit_names_it(graph, removed, unit):
    plan = plan_for(graph, removal(removed=removed))
    assert_check_raises(plan, graph, f"The plan removes unit {unit} of 'first'. The group has units 0 to 4.")


def test_removing_all_units_of_a_group_raises(graph):
    plan = plan_for(graph, removal(removed=(0, 1, 2, 3, 4)))
    assert_check_raises(plan, graph, "The plan removes all 5 units of 'first'. Keep at least one of them.")


def test_a_repeated_group_raises(graph):
    plan = plan_for(graph, removal(removed=(0,)), removal(removed=(1,)))
    assert_check_raises(plan, graph, "The plan names the group 'first' twice. Merge the two entries.")


def test_a_plan_that_removes_nothing_raises(graph):
    for groups in ((), (removal(removed=()),)):
        with pytest.raises(PlanError, match=r"^The plan removes nothing\. The list `removed` of each group"):
            plan_for(graph, *groups).check(graph)


def test_the_error_for_a_wrong_size_or_kind_of_a_group_names_the_stated_and_the_actual_value(graph):
    with pytest.raises(
        PlanError, match=r"'first' has 6 units of the kind 'channel'.*has 5 units of the kind 'channel'"
    ):
        plan_for(graph, removal(size=6)).check(graph)
    plan = plan_for(graph, replace(removal(), kind="head"))
    with pytest.raises(PlanError, match=r"'first' has 5 units of the kind 'head'.*has 5 units of the kind 'channel'"):
        plan.check(graph)


def test_a_repeated_unit_raises(graph):
    assert_check_raises(
        plan_for(graph, removal(removed=(1, 1))),
        graph,
        "The plan removes unit 1 of 'first' twice. List each unit once.",
    )


def test_the_fingerprint_depends_on_the_options_of_the_trace(chain):
    plain = chain(5).graph()
    options = [{}, {"softmax": "kept"}, {"as_graph": True}, {"module": "first"}, {"outputs": ("logits",)}]
    assert len({replace(plain, tracing=Tracing(**changed)).fingerprint for changed in options}) == len(options)
    plan = replace(plan_for(plain, removal()), tracing=Tracing(softmax="kept"))
    with pytest.raises(PlanError, match=r"made with other options of kirsch\.trace"):
        plan.check(plain)


def test_the_costs_in_a_plan_are_replaced_by_counted_costs(graph):
    plan = plan_for(graph, removal(removed=(0, 1)))
    assert plan.after == Cost(500, 5, 3)
    counted = plan.priced(graph)
    assert counted.before == graph.cost
    assert counted.after == graph.prices.price(graph.keep({"first": (0, 1)}))


def test_the_fractions_of_a_cost_equal_their_closed_form():
    original = Cost(parameters=200, macs=1000, activations=9)
    goal = Goal(macs=0.5, parameters=0.25)
    assert goal.fractions(Cost(40, 600, 9), original) == {"macs": (0.6, 0.5), "parameters": (0.2, 0.25)}
    assert Goal(parameters=0.25).fractions(Cost(40, 600, 9), original) == {"parameters": (0.2, 0.25)}
    assert goal.to_dict() == {"macs": 0.5, "parameters": 0.25}
    assert Goal(macs=0.5).to_dict() == {"macs": 0.5}


@pytest.mark.parametrize(
    ("cost", "met"),
    [((50, 500), True), ((51, 500), False), ((50, 501), False), ((0, 0), True)],
)
def test_a_goal_is_met_if_the_cost_is_within_every_limit(cost, met):
    assert Goal(macs=0.5, parameters=0.25).met_by(Cost(*cost, 0), Cost(200, 1000, 0)) is met


def test_a_model_without_macs_meets_a_goal_on_macs():
    """A network of embedding tables is an example. 0 / 0 must not raise."""
    assert Goal(macs=0.5).met_by(Cost(10, 0, 0), Cost(10, 0, 0))


def test_the_fingerprint_is_compared_before_the_groups():
    """The other graph has no attribute `groups`, so an access to its groups would raise an AttributeError."""
    other = SimpleNamespace(fingerprint="else", model_name="Other", cost=Cost(7, 0, 0), inputs=())
    with pytest.raises(PlanError, match="This model is Other with 7 parameters, fingerprint else"):
        make_plan(removal()).check(other)


@pytest.mark.parametrize("name", ["latency", "latency_ms", "max_latency", "ms", "speedup", "fps"])
def test_the_error_for_a_latency_goal_names_the_alternatives(name):
    with pytest.raises(GoalError, match=r"latency goals do not exist yet.*macs=0\.5.*kirsch\.measure"):
        Goal(**{name: 5})


def test_the_error_for_a_goal_in_flops_names_the_macs():
    with pytest.raises(GoalError, match=r"FLOPs are not counted.*Use macs, such as macs=0\.5"):
        Goal(flops=0.5)


def test_a_goal_that_is_missed_by_little_is_shown_with_as_many_digits_as_differ():
    goal, original = Goal(macs=0.0208, parameters=0.5), Cost(100, 100_000, 0)
    assert goal.shortfall(Cost(60, 2081, 0), original).startswith(
        "macs 2.08% is requested, 2.081% is the least reachable with these options; parameters 50% is requested, 60% is"
    )
    assert goal.shortfall(Cost(50, 2080, 0), original) == ""


def test_the_error_for_an_unknown_goal_lists_the_known_goals():
    with pytest.raises(
        UsageError, match=r"has no argument 'mac'\. Known: macs, parameters, size, memory, of\. Did you mean 'macs'\?"
    ):
        Goal(mac=0.5)


INTEGERS = {
    **{name: int(np.iinfo(name).max) for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32")},
    **dict.fromkeys(("int64", "uint64"), 2**63 - 2),  # the largest number that is drawn at random
    "bool": 1,
}


@pytest.mark.parametrize("dtype", INTEGERS)
def test_an_integer_input_has_at_most_the_largest_value_of_its_type(dtype):
    def text(high):
        return replace(make_plan(removal()), inputs=(InputSpec("", (1, 4), dtype, high),)).to_json()

    largest = INTEGERS[dtype]
    assert Plan.from_json(text(largest)).inputs[0].high == largest
    with pytest.raises(PlanError, match=rf"{largest + 1}; {largest} is the largest for {dtype}"):
        Plan.from_json(text(largest + 1))


def test_a_goal_can_be_copied_and_pickled():
    goal = Goal(macs=0.5)
    assert pickle.loads(pickle.dumps(goal)) == copy.deepcopy(goal) == replace(goal) == goal
