"""A plan as data: read, written, checked."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kirsch.errors import GoalError, PlanError, UsageError
from kirsch.graph.cost import Cost
from kirsch.graph.graph import InputSpec, Tracing
from kirsch.graph.group import KINDS
from kirsch.graph.plan import Goal, Plan, Removal

STEADY = settings(deadline=None, derandomize=True)
SMALL, LARGE = st.integers(0, 10**6), st.integers(10**6, 10**12)
TEXT = st.text(max_size=12)  # without half surrogates, which are not Unicode
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
    goal=st.dictionaries(st.sampled_from(["macs", "params"]), st.floats(0.01, 0.99)),
    method=st.fixed_dictionaries(
        {"importance": NAME},
        optional={
            "norm": st.sampled_from([1, 2]),
            "round_to": st.just("auto") | st.integers(1, 64) | st.just({"head": 2}),
            "exclude": st.lists(NAME, max_size=2),
            "granularity": st.dictionaries(st.sampled_from(sorted(KINDS)), st.floats(0, 9), max_size=2),
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


def plan(*groups, fingerprint="0123456789abcdef" * 4):
    return Plan(fingerprint, "Net", groups, Cost(1000, 10, 5), Cost(500, 5, 3))


def removal(name="first", removed=(0,), size=5):
    return Removal(name, "channel", size, removed, "by hand")


def edited(**changes):
    """The JSON of a plan with one group, with some fields replaced; None takes a field out."""
    content = json.loads(plan(removal()).to_json()) | changes
    return json.dumps({name: value for name, value in content.items() if value is not None})


@pytest.fixture(scope="module")
def graph(chain):
    """Groups "first" of 5 units; 32 parameters."""
    return chain(5).graph()


@STEADY
@given(PLANS)
def test_a_plan_survives_json(made):
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()


def test_the_json_is_for_reading():
    text = Plan("f", "Netz für Größe", (removal(),), Cost(32, 25, 7), Cost(20, 15, 7), goal={"macs": 0.5}).to_json()
    assert "Netz für Größe" in text
    assert json.loads(text) == {
        "kirsch_plan": 1,
        "model": {"class": "Netz für Größe", "fingerprint": "f", "parameters": 32},
        "goal": {"macs": 0.5},
        "method": {},
        "groups": [{"name": "first", "kind": "channel", "size": 5, "removed": [0], "reason": "by hand"}],
        "blocks": [],
        "cost": {
            "before": {"parameters": 32, "macs": 25, "activations": 7},
            "after": {"parameters": 20, "macs": 15, "activations": 7},
        },
        "inputs": [],
        "tracing": {"outputs": [], "decisions": "refuse", "scope": "", "softmax": "freeze", "as_graph": False},
        "notes": [],
        "configuration": {},
    }


def test_the_graph_is_no_part_of_what_a_plan_is(graph):
    first, second = plan(removal()), Plan(**{**vars(plan(removal())), "graph": graph})
    assert first == second
    assert first.to_json() == second.to_json()


def test_units_edited_in_any_order_are_read_ascending():
    group = json.loads(edited())["groups"][0] | {"removed": [4, 0, 2]}
    assert Plan.from_json(edited(groups=[group])).groups[0].removed == (0, 2, 4)


def assert_refused(made, graph, sentence):
    with pytest.raises(PlanError, match=f"^{re.escape(sentence)}$"):
        made.check(graph)


def fitting(graph, *groups):
    return plan(*groups, fingerprint=graph.fingerprint)


@pytest.mark.parametrize("removed", [(0,), (4,), (0, 1, 3, 4)])
def test_a_plan_that_fits_is_let_through(graph, removed):
    assert fitting(graph, removal(removed=removed)).check(graph) is None


def test_a_plan_for_another_model_names_both(graph):
    assert_refused(
        plan(),
        graph,
        "The plan is for another model: Net with 1,000 parameters, fingerprint 0123456789ab. "
        f"The model given is Net with 32 parameters, fingerprint {graph.fingerprint[:12]}. "
        "Give the model that the plan was made for, or make a new plan.",
    )


def test_a_group_that_is_not_there_is_named_with_the_nearest(graph):
    made = fitting(graph, removal("fist"))
    assert_refused(made, graph, "The plan names a group 'fist'. The model has none of that name. Did you mean 'first'?")


@pytest.mark.parametrize(
    ("removed", "unit"), [((5,), 5), ((0, 4, 7), 7), ((-1,), -1), ((-2, 3), -2), ((-2, -1), -2), ((-1, 9), -1)]
)
def test_a_unit_that_is_not_there_is_named(graph, removed, unit):
    made = fitting(graph, removal(removed=removed))
    assert_refused(made, graph, f"The plan removes unit {unit} of 'first'. The group has units 0 to 4.")


def test_a_group_that_would_be_emptied_is_named(graph):
    made = fitting(graph, removal(removed=(0, 1, 2, 3, 4)))
    assert_refused(made, graph, "The plan removes all 5 units of 'first'. Leave at least one of them.")


def test_a_group_that_is_named_twice_is_refused(graph):
    made = fitting(graph, removal(removed=(0,)), removal(removed=(1,)))
    assert_refused(made, graph, "The plan names the group 'first' twice. Join the two entries.")


def test_a_plan_that_removes_nothing_is_refused(graph):
    for groups in ((), (removal(removed=()),)):
        with pytest.raises(PlanError, match=r"^The plan removes nothing\. No group lists a unit"):
            fitting(graph, *groups).check(graph)


def test_another_size_or_kind_of_a_group_is_refused_with_both(graph):
    with pytest.raises(PlanError, match=r"'first' has 6 units of the kind 'channel'.*has 5 of the kind 'channel'"):
        fitting(graph, removal(size=6)).check(graph)
    made = fitting(graph, replace(removal(), kind="head"))
    with pytest.raises(PlanError, match=r"'first' has 5 units of the kind 'head'.*has 5 of the kind 'channel'"):
        made.check(graph)


def test_a_unit_that_is_listed_twice_is_refused(graph):
    assert_refused(
        fitting(graph, removal(removed=(1, 1))), graph, "The plan removes unit 1 of 'first' twice. List it once."
    )


def test_what_the_trace_was_asked_for_is_part_of_the_fingerprint(chain):
    plain = chain(5).graph()
    other = replace(plain, tracing=Tracing(softmax="kept"))
    assert plain.fingerprint != other.fingerprint
    made = replace(fitting(plain, removal()), tracing=Tracing(softmax="kept"))
    with pytest.raises(PlanError, match=r"made with other options of kirsch\.trace"):
        made.check(plain)


def test_costs_are_counted_anew_whatever_a_plan_states(graph):
    made = fitting(graph, removal(removed=(0, 1)))
    assert made.after == Cost(500, 5, 3)
    counted = made.priced(graph)
    assert counted.before == graph.cost
    assert counted.after == graph.prices.price(graph.keep({"first": (0, 1)}))


def test_a_goal_is_held_against_the_original_in_closed_form():
    original = Cost(parameters=200, macs=1000, activations=9)
    goal = Goal(macs=0.5, params=0.25)
    assert goal.fractions(Cost(40, 600, 9), original) == {"macs": (0.6, 0.5), "params": (0.2, 0.25)}
    assert Goal(params=0.25).fractions(Cost(40, 600, 9), original) == {"params": (0.2, 0.25)}
    assert goal.to_dict() == {"macs": 0.5, "params": 0.25}
    assert Goal(macs=0.5).to_dict() == {"macs": 0.5}


@pytest.mark.parametrize(
    ("cost", "met"),
    [((50, 500), True), ((51, 500), False), ((50, 501), False), ((0, 0), True)],
)
def test_a_goal_is_met_within_every_limit(cost, met):
    assert Goal(macs=0.5, params=0.25).met_by(Cost(*cost, 0), Cost(200, 1000, 0)) is met


def test_a_model_without_macs_meets_a_goal_on_them():
    """A network of lookups alone: nothing is divided by nothing."""
    assert Goal(macs=0.5).met_by(Cost(10, 0, 0), Cost(10, 0, 0))


def test_a_plan_of_another_shape_never_reaches_the_groups():
    """The fingerprint is compared first: the groups of another model need not even exist."""
    stranger = SimpleNamespace(fingerprint="else", model_name="Other", cost=Cost(7, 0, 0))
    with pytest.raises(PlanError, match="The model given is Other with 7 parameters, fingerprint else"):
        plan(removal()).check(stranger)


@pytest.mark.parametrize("name", ["latency", "latency_ms", "max_latency", "ms", "speedup", "fps"])
def test_a_latency_goal_is_refused_with_what_to_use(name):
    with pytest.raises(GoalError, match=r"latency goals do not exist yet.*macs=0\.5.*kirsch\.measure"):
        Goal(**{name: 5})


def test_a_goal_of_an_unknown_name_lists_those_there_are():
    with pytest.raises(UsageError, match=r"has no argument 'mac'\. Known: macs, params\. Did you mean 'macs'\?"):
        Goal(mac=0.5)


def test_a_goal_is_copied_and_pickled_as_any_other():
    goal = Goal(macs=0.5)
    assert pickle.loads(pickle.dumps(goal)) == copy.deepcopy(goal) == replace(goal) == goal
