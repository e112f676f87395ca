"""A tree that holds each group once, at its place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kirsch.cli import drawing
from kirsch.cli.drawing import Hanging
from kirsch.cli.terminal import plain
from kirsch.graph.cost import Cost
from kirsch.graph.graph import Blocker, InputSpec
from kirsch.graph.plan import Plan, Removal, Skip


@dataclass
class Group:
    """A group as far as it is drawn."""

    name: str
    size: int = 8
    kind: str = "channel"
    layers: tuple[str, ...] = ()


@dataclass
class Graph:
    """A graph as far as it is drawn."""

    groups: tuple[Group, ...] = ()
    blockers: tuple[Blocker, ...] = ()
    blocks: tuple[str, ...] = ()
    model_name: str = "Net"
    cost: Cost = field(default_factory=lambda: Cost(1_210_000, 402_000, 0))
    inputs: tuple[InputSpec, ...] = (InputSpec("", (1, 3, 8, 8), "float32"),)


def tree(*names: str) -> list[str]:
    found = [Hanging(Group(name), 1200, 34) for name in names]
    return [plain(line) for line in drawing.trace_lines(Graph(), found)][2:-2]


def labels(*names: str) -> list[str]:
    """The lines of a tree without their figures."""
    return [re.split(r" +\d+ channels", line)[0] for line in tree(*names)]


def test_modules_that_hold_one_thing_share_a_line():
    assert labels("stem", "layers.0.conv", "layers.1.conv1", "layers.1.conv2") == [
        "stem",
        "layers",
        "├─ 0.conv",
        "└─ 1",
        "   ├─ conv1",
        "   └─ conv2",
    ]


def test_a_module_that_is_a_group_and_holds_groups_shows_both():
    assert labels("a", "a.b") == ["a", "└─ b"]


def test_columns_of_all_groups_begin_at_the_same_place():
    lines = [line for line in tree("stem", "a.very.long.path", "a.short") if "channels" in line]
    assert len(lines) == 3
    assert len({line.index("channels") for line in lines}) == 1
    assert len({line.index("MACs") for line in lines}) == 1


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
def test_a_tree_holds_each_group_once(names):
    assert sum("channels" in line for line in tree(*names)) == len(names)


def test_three_layers_are_named_and_the_rest_counted():
    found = Hanging(Group("a", layers=("a", "b", "", "c", "d", "e")), 1, 1)
    line = plain(drawing.trace_lines(Graph(), [found])[2])
    assert line.endswith("with b, the model itself, c + 2 more")


def test_a_second_group_of_a_layer_does_not_count_the_layer_as_another():
    assert Hanging(Group("a#2", layers=("a", "b")), 1, 1).others == ("b",)


def test_units_are_named_in_the_plural():
    for kind, several in (("channel", "channels"), ("position in norm group", "positions in norm group")):
        line = plain(drawing.trace_lines(Graph(), [Hanging(Group("a", kind=kind), 1, 1)])[2])
        assert f"8 {several} " in line


def test_a_model_of_which_nothing_may_go_says_so():
    lines = [plain(line) for line in drawing.trace_lines(Graph(), [])]
    assert lines[2] == "no groups  nothing of this model may go"
    assert lines[-1] == "no blockers  only inputs and outputs hold anything"


def test_many_blockers_are_shown_up_to_a_number_and_the_rest_counted():
    blockers = tuple(Blocker("a softmax spans it", f"b{i}", "net.py:3", "aten.softmax", 0.5 / 2**i) for i in range(15))
    lines = [plain(line) for line in drawing.trace_lines(Graph(blockers=blockers), [])][4:]
    assert len(lines) == 1 + 12 + 1
    assert lines[1] == "  50.0 %  b0   a softmax spans it  aten.softmax  net.py:3"
    assert lines[-1].strip() == "and 3 more; --json lists them all"


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


def test_a_plan_is_a_bar_a_group():
    lines = [plain(line) for line in drawing.plan_lines(plan(), Graph((Group("a"), Group("long.name"))))]
    assert lines[2] == "a          " + "█" * 18 + "░" * 6 + "      8 → 6       −25.0 %"
    assert lines[3] == "long.name  " + "█" * 24 + "      8 → 8          kept"


def test_costs_say_what_they_are_a_share_of_and_whether_the_goal_is_met():
    lines = [plain(line) for line in drawing.cost_lines(plan(goal={"macs": 0.5, "params": 0.755}))]
    assert lines == [
        "parameters   1.00 k → 800      80.0 % of the original   goal missed: ≤ 75.5 %",
        "MACs         2.00 k → 900      45.0 % of the original   goal met: ≤ 50 %",
        "activations      30 → 20       66.7 % of the original",
    ]


def test_a_bar_of_what_is_kept_is_never_empty():
    lines = drawing.plan_lines(
        plan(groups=(Removal("a", "channel", 100, tuple(range(99)), ""),)), Graph((Group("a", 100),))
    )
    assert lines[2][1].text == "█"


def test_notes_of_a_plan_are_shown():
    lines = [plain(line) for line in drawing.plan_lines(plan(notes=("widths go in steps",)), Graph())]
    assert lines[-1] == "note         widths go in steps"


def test_blocks_that_may_be_left_out_are_named_up_to_a_number():
    names = tuple(f"layer{number}" for number in range(8))
    lines = [plain(line) for line in drawing.trace_lines(Graph(blocks=names), [])]
    assert f"residual blocks that may be left out: {', '.join(names[:6])} and 2 more" in lines


def test_a_plan_of_blocks_names_what_is_left_out():
    cost = Cost(100, 100, 0)
    method = {"importance": "influence", "exclude": ["head"], "seed": 0}
    plan = Plan("", "Net", (), cost, Cost(50, 50, 0), method=method, blocks=(Skip("layer1", "least influence"),))
    lines = [plain(line) for line in drawing.plan_lines(plan, Graph())]
    assert lines[0] == "Net   influence of residual blocks, without head"
    assert "layer1  left out" in lines
