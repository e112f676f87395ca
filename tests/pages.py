"""Code blocks of the pages of documentation: reading and running them."""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli import main
from kirsch.deploy.export import EXPORTERS
from kirsch.distillation.losses import LOSSES
from kirsch.frameworks.pytorch.features.adapters import ADAPTERS
from kirsch.pruning.importance import IMPORTANCES
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.yaml import read
from kirsch.steps import STEPS
from kirsch.tasks import TASKS
from page_names import NAMES

if TYPE_CHECKING:
    import pytest

REGISTRIES = (ADAPTERS, EXPORTERS, IMPORTANCES, LOSSES, STEPS, TASKS)
"""Registries to which the code on a page may add objects."""

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGES = sorted(str(path.relative_to(ROOT)) for path in FILES if "```" in path.read_text())
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: ([^>]+?) -->\s*$")
FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
"""The first line of a block, if it names a file. The block is then also written to this file."""


@dataclass(frozen=True)
class Block:
    """One code block of a page.

    Args:
        page: path of the page from the root of the repository.
        line: line of the opening fence.
        section: the heading above the block.
        language: text behind the fence; empty for output.
        text: the code.
        reason: why the block is not run; empty if it is run.
    """

    page: str
    line: int
    section: str
    language: str
    text: str
    reason: str


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page in order."""
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", before), re.MULTILINE)
        reason = NOT_RUN.search(before)
        found.append(
            Block(
                page,
                before.count("\n") + 1,
                headings[-1] if headings else "",
                match[2],
                textwrap.dedent(match[3]),
                reason[1] if reason else "",
            )
        )
    return found


def run_page(page: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the blocks of a page, and return the variables that they define. `monkeypatch` restores the registries."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
    names: dict[str, Any] = {"__name__": "my_package.my_module"}
    prepared = dict(NAMES)
    for block in blocks(page):
        names |= prepared.pop((page, block.section), dict)()
        if not block.reason:
            run_block(block, names)
    return names


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Run a block in the current folder. Python code reads its variables from `names` and writes them to it."""
    if file := FILE.match(block.text):
        Path(file[1]).write_text(block.text)
    RUNNERS[block.language](block, names)


def _run_python(block: Block, names: dict[str, Any]) -> None:
    padding = "\n" * block.line  # tracebacks show the line of the page
    exec(compile(padding + block.text, block.page, "exec", dont_inherit=True), names)


def _run_shell(block: Block, names: dict[str, Any]) -> None:
    """Run the `kirsch` commands of a block. A block with other programs needs a `not run` comment in the page."""
    del names
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in line.removeprefix("$ ").split(" && "):
            program, *arguments = shlex.split(command, comments=True) or [""]
            if program:
                assert program == "kirsch", (
                    f"{block.page}:{block.line}: {command!r} is not run; add <!-- not run: reason -->"
                )
                assert main(arguments) == 0, f"{block.page}:{block.line}: {command}"


def _read_yaml(block: Block, names: dict[str, Any]) -> None:
    """Read a recipe, or options of a step."""
    del names
    keys = read(block.text).data.keys()
    if "steps" in keys:
        read_recipe(block.text)
    else:
        step = next(STEPS[name] for name in STEPS if keys <= STEPS[name].model_fields.keys())
        step.model_validate(dict(read(block.text).data))


def _read_toml(block: Block, names: dict[str, Any]) -> None:
    del names
    tomllib.loads(block.text)


def _skip_output(block: Block, names: dict[str, Any]) -> None:
    """Check that a block without a language contains no code. Such a block shows output or a drawing."""
    del names
    assert "import " not in block.text
    assert not re.search(r"^(\$ )?(kirsch|pip|python) [a-z-]", block.text, re.MULTILINE)


RUNNERS = {
    "python": _run_python,
    "sh": _run_shell,
    "yaml": _read_yaml,
    "toml": _read_toml,
    "": _skip_output,
}
