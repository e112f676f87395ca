"""docs/options.md lists the options of the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from kirsch.cli import main
from kirsch.pruning.options import PlanOptions
from kirsch.recipes.recipe import Recipe
from kirsch.steps import STEPS

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "options.md").read_text()


def section(title):
    return PAGE.partition(f"{title}\n")[2].partition("\n#")[0]


def test_the_page_has_the_options_of_the_code():
    page = runpy.run_path(str(DOCS / "write_options.py"))["page"]()
    assert page == PAGE, "Write the page again: python docs/write_options.py"


@pytest.mark.parametrize("name", list(STEPS))
def test_each_option_of_a_step_is_in_its_section_or_in_a_section_that_it_names(name):
    text = section(f"### {name}")
    shared = section("## Plan") * ("(#plan)" in text) + section("## Training") * ("(#training)" in text)
    shared += section("## Sparsity") * ("(#sparsity)" in text)
    assert [field for field in STEPS[name].model_fields if f"| `{field}` |" not in text + shared] == []


def test_each_section_of_a_recipe_is_listed():
    assert [name for name in Recipe.model_fields if f"| `{name}` |" not in section("## Recipe")] == []


def test_each_option_of_a_plan_is_a_flag_on_the_page_and_each_flag_on_the_page_is_a_flag_of_the_command(capsys):
    on_the_page = set(re.findall(r"\| `(--[\w-]+)` \|", section("## Plan")))
    assert {f"--{name.replace('_', '-')}" for name in PlanOptions.model_fields} <= on_the_page
    assert main(["plan", "--help"]) == 0
    of_the_command = re.findall(r"^ +(?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert on_the_page <= set(of_the_command)
