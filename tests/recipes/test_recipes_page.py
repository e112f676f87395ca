"""The table on the page about recipes lists all steps, and its recipe and changes are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from kirsch.recipes.recipe import read_recipe
from kirsch.steps import STEPS

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_table_of_the_page_lists_all_steps():
    names = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(names) == sorted(STEPS)


def test_recipe_and_changes_are_valid():
    (text, *_), (command,) = blocks("yaml"), blocks("sh")
    steps = read_recipe(text, re.findall(r"--set (\S+)", command)).all_steps
    assert list(steps) == ["train", "prune", "recover", "prune-2", "recover-2", "recover-3", "export"]
    assert steps["recover-2"].epochs == 20
    assert shlex.split(command)[:2] == ["kirsch", "compress"]
