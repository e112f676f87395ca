"""The code blocks of README, CONTRIBUTING and docs run as written."""

from __future__ import annotations

import re

import pytest

import kirsch
from page_names import NAMES, build_my_model
from pages import PAGES, ROOT, RUNNERS, blocks, run_block, run_page

TRANSLATED = {"README.zh.md": "README.md"}
"""Translated page → original page, which has the same code blocks."""

WARNINGS = (  # by Lightning, about its environment, loaders and logs
    "ignore:.*tensorboardX",
    "ignore:.*does not have many workers",
    "ignore:.*is smaller than the logging interval",
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated",
)


def check_readme(names):
    assert kirsch.load("small", build_my_model)
    assert names["result"].artifact.path.exists()


def check_store(names):
    assert names["found"].keys() == {"indices", "log_p", "tail"}
    assert (names["store"].specification.views, names["store"].specification.temperature) == (8, 4.0)


RESULTS = {"README.md": check_readme, "docs/store.md": check_store}


@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize("page", [page for page in PAGES if page not in TRANSLATED])
def test_the_code_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(page, monkeypatch)
    if page in RESULTS:
        RESULTS[page](names)


def test_each_code_block_has_a_language_that_is_run():
    assert {block.language for page in PAGES for block in blocks(page)} <= RUNNERS.keys()


def test_few_code_blocks_are_not_run():
    counts = {page: sum(bool(block.reason) for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in counts.items() if count} == {
        "CONTRIBUTING.md": 3,  # make, tools of the repository, and a framework that does not exist
        "README.md": 1,  # make
        "README.zh.md": 1,
        "docs/models.md": 2,  # an adapter of peft, and a tokenizer
        "docs/sparsity.md": 2,  # trainings
    }


def test_each_section_in_page_names_contains_a_code_block():
    assert NAMES.keys() <= {(block.page, block.section) for page in PAGES for block in blocks(page)}


def test_a_block_that_raises_fails_the_test_of_its_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\n1 / 0\n```\n\n```sh\nkirsch methods nothing\n```\n\n```yaml\nepochs: 0\n```\n"
    )
    monkeypatch.setattr("pages.ROOT", tmp_path)
    python, shell, recipe = blocks("page.md")
    with pytest.raises(ZeroDivisionError):
        run_block(python, {})
    with pytest.raises(AssertionError, match=r"page\.md:7: kirsch methods nothing"):
        run_block(shell, {})
    with pytest.raises(ValueError, match="epochs"):
        run_block(recipe, {})


def test_both_languages_of_the_readme_show_the_same_code_commands_and_numbers():
    def shown(page):
        text = (ROOT / page).read_text()
        code = [re.sub(r"\s+#.*", "", line) for block in blocks(page) for line in block.text.splitlines()]
        return code, re.findall(r"\d[\d.,]*\d", "".join(line for line in text.splitlines(True) if line.startswith("|")))

    assert shown("README.md") == shown("README.zh.md")
