"""Removal of residual blocks by the command and by a recipe."""

from __future__ import annotations

import pytest

NETS = """
from torch import nn

from nets import stripes


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()


def teacher():
    stem, head = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)
    blocks = (Residual() for _ in range(3))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


teacher.example_shape = (1, 1, 6, 6)
"""

RECIPE = """
name: stripes
data: {source: "deep.py:stripes", batch_size: 16}
teacher: {model: "deep.py:teacher"}
steps:
- train
- prune: {goal: {macs: 0.7}, kinds: block}
- recover
"""

GOAL = ("--macs", "0.7", "--kinds", "block")


@pytest.fixture
def deep(folder):
    (folder / "deep.py").write_text(NETS)
    (folder / "deep.yaml").write_text(RECIPE)
    return "deep.py:teacher"


def test_blocks_are_ranked_on_the_example_inputs_with_a_note(run_json, deep):
    found = run_json("plan", deep, *GOAL)
    assert len(found["plan"]["blocks"]) == 1
    assert found["plan"]["method"]["kinds"] == ["block"]
    assert any("ranked on example inputs, which are random; --data SOURCE" in note for note in found["notes"])


def test_blocks_are_ranked_on_a_data_source(run_json, deep):
    found = run_json("prune", deep, *GOAL, "--data", "nets.py:stripes", "-o", "small")
    assert len(found["plan"]["blocks"]) == 1
    assert found["verification"]["passed"]
    assert not any("example inputs" in note for note in found["notes"])


def test_the_option_data_is_refused_unless_kinds_is_block(kirsch, deep):
    code, _, err = kirsch("plan", deep, "--macs", "0.7", "--data", "nets.py:stripes")
    assert code == 2
    assert "`data` of kirsch.plan has no effect" in err


def test_a_recipe_can_remove_blocks(run_json, deep):
    assert len(run_json("compress", "deep.yaml", "--dry-run")["plans"]["prune"]["blocks"]) == 1
