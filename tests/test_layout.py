"""Rules of the package layout that no other tool checks."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kirsch

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = (
    "torch",
    "keras",
    "tensorflow",
    "jax",
    "numpy",
    "scipy",
    "onnx",
    "onnxruntime",
    "accelerate",
    "timm",
    "rich",
)
MAX_LINES = 450
MEANINGLESS_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "core"}


def packages_loaded_by(program: str) -> list[str]:
    """Return the heavy packages that are loaded after a program ran in a new Python process."""
    program += f"\nimport sys; print('loaded', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()[-1].split()[1:]


def test_importing_kirsch_loads_no_framework_and_no_numpy():
    assert packages_loaded_by("import kirsch") == []


def test_a_loaded_framework_is_detected():
    assert "numpy" in packages_loaded_by("import kirsch; kirsch.Plan; kirsch.Graph")


def test_all_lists_exactly_the_names_that_resolve():
    assert sorted(kirsch.__all__) == list(kirsch.__all__)
    assert set(dir(kirsch)) == {*kirsch.__all__, "__version__"}
    assert kirsch._MODULES.keys() == set(kirsch.__all__)
    for name in kirsch.__all__:
        assert getattr(kirsch, name).__name__ == name


def test_the_imports_for_type_checkers_agree_with_the_table_of_modules():
    tree = ast.parse((ROOT / "src/kirsch/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    modules = {alias.name: node.module for node in block.body for alias in node.names}
    assert modules == kirsch._MODULES


def test_a_name_that_is_not_public_does_not_resolve():
    with pytest.raises(AttributeError, match="module 'kirsch' has no attribute 'plane'"):
        _ = kirsch.plane


@pytest.mark.parametrize("name", kirsch.__all__)
def test_every_public_name_has_a_docstring(name):
    public = getattr(kirsch, name)
    assert public.__doc__
    members = vars(public) if inspect.isclass(public) else {}
    methods = {key: value for key, value in members.items() if inspect.isfunction(value) and not key.startswith("_")}
    undocumented = [key for key, method in methods.items() if not method.__doc__]
    assert undocumented == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_file_is_short_documented_and_meaningfully_named(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))
    assert not MEANINGLESS_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT / "src").parts}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_the_library_has_no_assert_statements(path):
    """`python -O` removes asserts; only the conformance suites, which are tests, may use them."""
    asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert asserts == [] or "testing" in path.parts


def test_the_package_is_marked_as_typed():
    assert (ROOT / "src/kirsch/py.typed").is_file()
