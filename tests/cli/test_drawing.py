"""The tree of groups, the bars of a plan, and cost lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kirsch.cli import drawing
from kirsch.cli.drawing import GroupCost
from kirsch.cli.terminal import plain
from kirsch.graph.cost import Cost
from kirsch.graph.graph import Blocker, InputSpec
from kirsch.graph.plan import Plan, Removal, Skip


@dataclass
class Group:
    """The attributes of a group that are drawn."""

    name: str
    size: int = 8
    kind: str = "channel"
    layers: tuple[str, ...] = ()


@dataclass
class Graph:
    """The attributes of a graph that are drawn."""

    groups: tuple[Group, ...] = ()
    blockers: tuple[Blocker, ...] = ()
    blocks: tuple[str, ...] = ()
    model_name: str = "Net"
    cost: Cost = field(default_factory=lambda: Cost(1_210_000, 402_000, 0))
    inputs: tuple[InputSpec, ...] = (InputSpec("", (1, 3, 8, 8), "float32"),)


def tree(*names: str) -> list[str]:
    costs = [GroupCost(Group(name), 1200, 34) for name in names]
    return [plain(line) for line in drawing.trace_lines(Graph(), costs)][2:-2]


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


def test_a_group_with_groups_in_it_has_its_own_line():
    assert labels("a", "a.b") == ["a", "└─ b"]


def test_the_columns_of_all_groups_are_aligned():
    lines = [line for line in tree("stem", "a.very.long.path", "a.short") if "channels" in line]
    assert len(lines) == 3
    assert len({line.index("channels") for line in lines}) == 1
    assert len({line.index("MACs") for line in lines}) == 1


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
def test_the_tree_contains_each_group_once(names):
    assert sum("channels" in line for line in tree(*names)) == len(names)


def test_three_tied_layers_are_named_and_the_others_counted():
    cost = GroupCost(Group("a", layers=("a", "b", "", "c", "d", "e")), 1, 1)
    line = plain(drawing.trace_lines(Graph(), [cost])[2])
    assert line.endswith("with b, the model itself, c + 2 more")


def test_the_layer_of_a_second_group_is_not_a_tied_layer():
    assert GroupCost(Group("a#2", layers=("a", "b")), 1, 1).tied_layers == ("b",)


def test_units_are_named_in_the_plural():
    for kind, plural in (("channel", "channels"), ("position in norm group", "positions in norm group")):
        line = plain(drawing.trace_lines(Graph(), [GroupCost(Group("a", kind=kind), 1, 1)])[2])
        assert f"8 {plural} " in line


def test_a_model_without_groups_and_blockers_has_a_line_for_both():
    lines = [plain(line) for line in drawing.trace_lines(Graph(), [])]
    assert lines[2] == "no groups  no unit of this model can be removed"
    assert lines[-1] == "no blockers  only inputs and outputs are frozen"


def test_twelve_blockers_are_shown_and_the_others_counted():
    blockers = tuple(Blocker("a softmax spans it", f"b{i}", "net.py:3", "aten.softmax", 0.5 / 2**i) for i in range(15))
    lines = [plain(line) for line in drawing.trace_lines(Graph(blockers=blockers), [])][4:]
    assert len(lines) == 1 + 12 + 1
    assert lines[1] == "  50.0 %  b0   a softmax spans it  aten.softmax  net.py:3"
    assert lines[-1].strip() == "and 3 more; --json lists all"


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
    lines = [plain(line) for line in drawing.plan_lines(plan(graph=Graph((Group("a"), Group("long.name")))))]
    assert lines[2] == "a          " + "█" * 18 + "░" * 6 + "      8 → 6       −25.0 %"
    assert lines[3] == "long.name  " + "█" * 24 + "      8 → 8          kept"


def test_cost_lines_have_the_remaining_share_and_the_goal():
    lines = [plain(line) for line in drawing.cost_lines(plan(goal={"macs": 0.5, "parameters": 0.755}))]
    assert lines == [
        "parameters   1.00 k → 800      80.0 % of the original   goal missed: ≤ 75.5 %",
        "MACs         2.00 k → 900      45.0 % of the original   goal met: ≤ 50 %",
        "activations      30 → 20       66.7 % of the original",
    ]


def test_the_bar_of_a_group_is_never_empty():
    lines = drawing.plan_lines(
        plan(groups=(Removal("a", "channel", 100, tuple(range(99)), ""),), graph=Graph((Group("a", 100),)))
    )
    assert lines[2][1].text == "█"


def test_notes_of_a_plan_are_shown():
    lines = [plain(line) for line in drawing.plan_lines(plan(notes=("widths go in steps",)))]
    assert lines[-1] == "note         widths go in steps"


def test_six_residual_blocks_are_named_and_the_others_counted():
    names = tuple(f"layer{number}" for number in range(8))
    lines = [plain(line) for line in drawing.trace_lines(Graph(blocks=names), [])]
    assert f"residual blocks that can be removed: {', '.join(names[:6])} and 2 more" in lines


def test_a_plan_of_blocks_names_the_removed_blocks():
    cost = Cost(100, 100, 0)
    method = {"importance": "influence", "exclude": ["head"], "seed": 0}
    plan = Plan("", "Net", (), cost, Cost(50, 50, 0), method=method, blocks=(Skip("layer1", "least influence"),))
    lines = [plain(line) for line in drawing.plan_lines(plan)]
    assert lines[0] == "Net   influence of residual blocks, without head"
    assert "layer1  removed" in lines
