"""Printed graphs and plans: a tree of groups, bars and cost lines."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.graph.cost import Cost, GroupCost
from kirsch.graph.graph import Blocker
from kirsch.graph.inputs import InputSpec
from kirsch.graph.layout import graph_parts
from kirsch.graph.plan import Goal, Plan, Removal, Skip
from kirsch.tables import lines, plain


@dataclass
class Group:
    """The attributes of a group that are shown."""

    name: str
    size: int = 8
    kind: str = "channel"
    footprint: tuple[tuple[str, int], ...] = ()


@dataclass
class Groups:
    """The attributes of a graph that a plan shows."""

    groups: tuple[Group, ...]


SOFTMAX = "a softmax is computed over the axis"


def shown(costs=(), *, blocks=(), blockers=()) -> list[str]:
    """Return the printed lines of a graph."""
    parts = graph_parts("Net", Cost(1_210_000, 402_000, 0), [(1, 3, 8, 8)], list(costs), blocks, blockers)
    return [plain(line) for line in lines(parts)]


def tree(*names: str) -> list[str]:
    return shown([GroupCost(Group(name), 1200, 34) for name in names])[2:-2]


def labels(*names: str) -> list[str]:
    """Return the lines of a tree without the numbers."""
    return [re.split(r" +\d+ channels", line)[0] for line in tree(*names)]


def test_modules_with_a_single_child_share_a_line():
    assert labels("stem", "layers.0.conv", "layers.1.conv1", "layers.1.conv2") == [
        "stem",
        "layers",
        "├─ 0.conv",
        "└─ 1",
        "   ├─ conv1",
        "   └─ conv2",
    ]


def test_a_group_whose_module_contains_other_groups_has_its_own_line():
    assert labels("a", "a.b") == ["a", "└─ b"]


def test_the_columns_of_all_groups_are_aligned():
    rows = [line for line in tree("stem", "a.very.long.path", "a.short") if "channels" in line]
    assert len(rows) == 3
    assert len({line.index("channels") for line in rows}) == 1
    assert len({line.index("MACs") for line in rows}) == 1


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
def test_the_tree_contains_each_group_once(names):
    assert sum("channels" in line for line in tree(*names)) == len(names)


def test_three_tied_layers_are_named_and_the_others_counted():
    names = ("a.weight", "b.weight", "b.bias", "mix", "c.weight", "d.weight", "e.weight")
    line = shown([GroupCost(Group("a", footprint=tuple((name, 0) for name in names)), 1, 1)])[2]
    assert line.endswith("with b, mix, c and 2 more")


def test_the_tied_layers_of_a_group_do_not_include_the_layer_that_names_the_group():
    assert GroupCost(Group("a#2", footprint=(("a.weight", 0), ("b.weight", 1))), 1, 1).tied_layers == ("b",)


def test_units_are_named_in_the_plural():
    for kind, plural in (("channel", "channels"), ("position in norm group", "positions in norm group")):
        line = shown([GroupCost(Group("a", kind=kind), 1, 1)])[2]
        assert f"8 {plural} " in line


def test_a_model_without_groups_and_blockers_has_a_line_for_both():
    found = shown()
    assert found[2] == "no groups  no unit of this model can be removed"
    assert found[-1] == "no blockers  only inputs and outputs are frozen"


def test_twelve_blockers_are_shown_and_the_others_counted():
    blockers = [Blocker(SOFTMAX, f"b{i}", f"net.py:{i}", "aten.softmax", 0.5 / 2**i) for i in range(15)]
    found = shown(blockers=blockers)[4:]
    assert len(found) == 1 + 12 + 1
    assert found[1] == "  50.0 %  b0   a softmax is computed over the axis  aten.softmax  net.py:0"
    assert found[-1].strip() == "and 3 more; `blockers` of the graph and --json list all"


def test_blockers_of_one_line_of_code_share_a_row_with_their_number_and_sum():
    lines_of = {"a": 3, "b": 7, "c": 7, "d": 7}
    blockers = [Blocker(SOFTMAX, name, f"net.py:{n}", "aten.softmax", 0.2) for name, n in lines_of.items()]
    assert shown(blockers=blockers)[5:] == [
        "  60.0 %  in 3 layers  a softmax is computed over the axis  aten.softmax  net.py:7",
        "  20.0 %  a            a softmax is computed over the axis  aten.softmax  net.py:3",
    ]


@pytest.mark.parametrize(("macs", "explained"), [(201_000, False), (201_001, True)])
def test_groups_that_add_up_to_more_than_the_model_are_explained(macs, explained):
    found = shown([GroupCost(Group("a"), 1, macs), GroupCost(Group("b"), 1, 201_000)])
    assert any("add up to more than the model" in line for line in found) is explained


def plan(**changes) -> Plan:
    removal = Removal("a", "channel", 8, (1, 2), "smallest")
    settings = {
        "fingerprint": "f",
        "model": "Net",
        "groups": (removal,),
        "before": Cost(1000, 2000, 30),
        "after": Cost(800, 900, 20),
    }
    return Plan(**settings | changes)


def test_a_plan_has_one_bar_per_group():
    found = str(plan(graph=Groups((Group("a"), Group("long.name"))))).splitlines()
    assert found[2] == "a          " + "█" * 18 + "░" * 6 + "      8 → 6       −25.0 %"
    assert found[3] == "long.name  " + "█" * 24 + "      8 → 8          kept"


def test_a_plan_without_its_graph_shows_the_groups_that_lose_units():
    assert str(plan()).splitlines()[2].startswith("a  █")


def test_cost_lines_have_the_remaining_share_and_the_goal():
    table = plan(goal={"macs": 0.5, "parameters": 0.755}).cost_table()
    assert [plain(line) for line in table.lines()] == [
        "parameters   1.00 k → 800      80.0 % of the original   goal missed: ≤ 75.5 %",
        "MACs         2.00 k → 900      45.0 % of the original   goal met: ≤ 50 %",
        "activations      30 → 20       66.7 % of the original",
    ]


def test_the_bar_of_a_group_is_never_empty():
    removal = Removal("a", "channel", 100, tuple(range(99)), "")
    assert "a  █░░░" in str(plan(groups=(removal,)))


def test_notes_of_a_plan_are_shown():
    assert str(plan(notes=("widths go in steps",))).splitlines()[-1] == "note         widths go in steps"


def test_six_residual_blocks_are_named_and_the_others_counted():
    names = tuple(f"layer{number}" for number in range(8))
    assert f"residual blocks that can be removed: {', '.join(names[:6])} and 2 more" in shown(blocks=names)


def test_a_plan_of_blocks_names_the_removed_blocks():
    method = {"importance": "influence", "norm": 2, "kinds": ["block"], "exclude": ["head"], "seed": 0}
    found = str(plan(groups=(), method=method, blocks=(Skip("layer1", "least influence"),))).splitlines()
    assert found[0] == "Net   influence of residual blocks, without head   MACs for the example inputs"
    assert "layer1  removed" in found


def test_a_plan_of_blocks_does_not_show_groups_that_keep_all_units():
    """The group of a layer in a removed block is not kept."""
    graph = Groups((Group("layer1.conv"), Group("a"), Group("head")))
    found = str(plan(graph=graph, blocks=(Skip("layer1", "least influence"),)))
    assert "layer1.conv" not in found
    assert "kept" not in found
    assert "a       " in found  # loses two units


def test_a_graph_and_a_plan_name_the_inputs_of_which_macs_are_counted():
    assert shown()[0] == "Net   1.21 M parameters   402 k MACs for the input 1×3×8×8"
    inputs = tuple(InputSpec(name, (2, 24), "float32") for name in "ab")
    assert str(plan(inputs=inputs)).splitlines()[0] == "Net   MACs for the inputs 2×24, 2×24"


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ({}, ""),
        (
            {"importance": "magnitude", "norm": 1, "ranking": "local", "round_to": 8},
            "magnitude (L1), local, widths in steps of 8",
        ),
        (
            {"importance": "random", "ranking": "global", "round_to": "auto", "uniform": True},
            "random, global, round widths, uniform",
        ),
        ({"importance": "random", "keep_outputs": ["a", "b"]}, "random, round widths, all outputs of a, b"),
    ],
)
def test_the_first_line_of_a_plan_has_its_main_options(method, text):
    title = f"Net   {text}".rstrip() + "   MACs for the example inputs"
    assert str(plan(method=method)).splitlines()[0] == title


def test_a_goal_prints_its_limits():
    assert str(Goal(macs=0.5, parameters=0.125)) == "MACs ≤ 50 %, parameters ≤ 12.5 % of the original"


def test_the_repr_of_a_plan_is_one_short_line():
    groups = (Removal("a", "channel", 1000, tuple(range(999)), "smallest"),)
    assert repr(plan(groups=groups, blocks=(Skip("b", ""),))) == (
        "<kirsch.Plan of Net: removes 999 units, 1 block, 2,000 → 900 MACs, 1,000 → 800 parameters>"
    )


def test_a_graph_prints_its_groups_and_costs(chain):
    found = str(chain(5).graph()).splitlines()
    assert found[0] == "Net   32 parameters   25 MACs for the example inputs"
    assert found[2] == "first       5 channels       30 parameters       25 MACs   with second"


def test_names_are_escaped_in_html():
    html = plan(graph=Groups((Group("<script>"),)), model="<b>")._repr_html_()
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;" in html
    assert "<script>" not in html
    assert html.count("<table>") == html.count("</table>") == 3
