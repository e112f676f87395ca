"""Every name of Kirsch on the pages and in the messages exists. Pages import public names from `kirsch` itself."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

import kirsch
from kirsch.frameworks.pytorch.io.vision import import_beside
from pages import FILES, PAGES, REGISTRIES, ROOT, blocks

# transformers and Lightning import torchvision. `import_beside` imports it even if its compiled operators are missing.
import_beside("torchvision")

NAME = re.compile(r"(?<![\w./-])kirsch\.(\w+(?:\.\w+)*)")
ENTRY_POINTS = {registry.kind for registry in REGISTRIES}
"""Last parts of names such as kirsch.importance and kirsch.loss, which are entry point groups, not Python names."""
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def names_in(text):
    return {name for name in NAME.findall(text) if name not in ENTRY_POINTS}


def texts_of(source):
    """Return the strings of a source file that may be docstrings or messages: those with a space or a parenthesis."""
    constants = [node.value for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str) and re.search(r"[ (]", value)]


def exists(name):
    """Return whether a dotted name is an attribute or a module of Kirsch. A class name may be in the plural."""
    return resolves(name) or (name[0].isupper() and "." not in name and resolves(name.removesuffix("s")))


def resolves(name):
    found, path = kirsch, "kirsch"
    for part in name.split("."):
        path = f"{path}.{part}"
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError:
            if hasattr(found, part):
                found = getattr(found, part)
            elif part not in getattr(found, "__annotations__", {}):
                return False
    return True


@pytest.mark.parametrize("page", FILES, ids=lambda path: path.name)
def test_each_name_on_a_page_exists(page):
    assert [name for name in sorted(names_in(page.read_text())) if not exists(name)] == []


def test_each_name_in_docstrings_and_messages_exists():
    names = {name for source in SOURCES for text in texts_of(source) for name in names_in(text)}
    assert {"distill", "Goal", "ArrayData"} <= names
    assert [name for name in sorted(names) if not exists(name)] == []


def test_a_wrong_name_does_not_exist():
    assert not exists("distil")
    assert not exists("Objective.presets")
    assert exists("Objective.preset")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_pages_import_public_names_from_kirsch_itself(page):
    """CONTRIBUTING shows code for the package itself, which imports from inner modules."""
    imports = [node for block in blocks(page) if block.language == "python" for node in ast.walk(ast.parse(block.text))]
    deep = [
        f"{node.module}.{alias.name}"
        for node in imports
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kirsch.")
        for alias in node.names
    ]
    assert [name for name in deep if name.rpartition(".")[2] in kirsch.__all__] == []
    assert {name.rpartition(".")[0] for name in deep} <= PUBLIC_MODULES


PUBLIC_MODULES = {
    "kirsch.data.augment",
    "kirsch.errors",
    "kirsch.integrations.huggingface",
    "kirsch.integrations.lightning",
    "kirsch.ops",
    "kirsch.steps",
    "kirsch.testing",
}
"""Modules that users import beside `kirsch`; all other names are in `kirsch` itself."""
