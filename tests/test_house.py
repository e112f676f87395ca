"""The rules of the house that no other tool holds."""

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
HEAVY = ("torch", "keras", "tensorflow", "jax", "numpy", "scipy", "onnx", "onnxruntime", "accelerate", "timm", "rich")
MOST_LINES = 450
NOWHERE = {"utils", "util", "helpers", "helper", "misc", "common", "core"}


def loaded_by(program: str) -> list[str]:
    """Which heavy packages a fresh Python holds after a program."""
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
    assert loaded_by("import kirsch") == []


def test_the_check_above_sees_what_is_loaded():
    assert "numpy" in loaded_by("import kirsch; kirsch.Plan; kirsch.Graph")


def test_all_names_what_resolves_and_no_more():
    assert sorted(kirsch.__all__) == list(kirsch.__all__)
    assert set(dir(kirsch)) == {*kirsch.__all__, "__version__"}
    assert kirsch._HOMES.keys() == set(kirsch.__all__)
    for name in kirsch.__all__:
        assert getattr(kirsch, name).__name__ == name


def test_the_names_for_type_checkers_are_those_that_resolve():
    """The imports below TYPE_CHECKING and the table of homes say the same."""
    tree = ast.parse((ROOT / "src/kirsch/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert homes == kirsch._HOMES


def test_a_name_that_is_not_public_does_not_resolve():
    with pytest.raises(AttributeError, match="module 'kirsch' has no attribute 'plane'"):
        _ = kirsch.plane


@pytest.mark.parametrize("name", kirsch.__all__)
def test_every_public_name_says_what_it_is(name):
    thing = getattr(kirsch, name)
    assert thing.__doc__
    members = [m for m in vars(thing).values() if inspect.isfunction(m)] if inspect.isclass(thing) else []
    undocumented = [m.__name__ for m in members if not m.__name__.startswith("_") and not m.__doc__]
    assert undocumented == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_file_is_one_concept(path):
    """Not too long, said in a first line, and with a name that means something."""
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))
    assert not NOWHERE & {part.removesuffix(".py") for part in path.relative_to(ROOT / "src").parts}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_the_library_does_not_assert(path):
    """`python -O` drops asserts; only the conformance suites, which are tests, may use them."""
    asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert asserts == [] or "testing" in path.parts


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "src/kirsch/py.typed").is_file()
