"""No module of Kirsch is in an import cycle; imports within functions and for types alone count, too."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


def modules_of(root):
    """Return the file of each module, by module name."""
    files = sorted(root.rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports_of(modules):
    """Return the names of the modules that each module imports anywhere in its code, by module name.

    Relative imports count, too. So do texts that are the name of a module of the package, since `importlib` may import
    it. The texts in kirsch/__init__.py, the table of public names, do not count.
    """
    found = {}
    for name, file in modules.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        targets = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names = {f"{source}.{alias.name}" for alias in node.names}
                targets |= names & modules.keys() if names <= modules.keys() else {source, *names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                targets |= {node.value} - {"kirsch"} if name != "kirsch" else set()
        found[name] = targets & modules.keys() - {name}
    return found


def cycle_in(imports):
    """Return one cycle as a list of module names that begins and ends with the same module; empty if there is none."""
    done = set()

    def search(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(imports[name]):
            cycle = search(target, [*path, name])
            if cycle:
                return cycle
        done.add(name)
        return []

    return next(filter(None, (search(name, []) for name in sorted(imports))), [])


EXCEPTIONS = {
    # The operations for tensors are imported when the first tensor is used; see docs/design.md.
    "kirsch.ops.implementation": "kirsch.frameworks.pytorch.ops",
    # A name in messages, not an import.
    "kirsch.annotations": "kirsch.steps",
}


def test_no_modules_import_each_other_in_a_cycle():
    imports = imports_of(modules_of(SOURCE))
    for module, named in EXCEPTIONS.items():
        imports[module].remove(named)
    assert cycle_in(imports) == []


@pytest.mark.parametrize(
    "back",
    [
        "from kirsch.a import x",
        "import kirsch.a",
        "from kirsch import a",
        "from kirsch import a, __doc__",
        "from kirsch.a import *",
        "from . import a",
        "from .a import x",
        "import importlib\nimportlib.import_module('kirsch.a')",
        "from importlib import import_module\nimport_module('kirsch.a')",
        "MODULES = {'torch': 'kirsch.a'}",
        "def f():\n    from kirsch.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kirsch.a import x",
    ],
)
def test_a_planted_cycle_is_found(tmp_path, back):
    package = tmp_path / "kirsch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from kirsch.b import y")
    (package / "b.py").write_text(back)
    assert cycle_in(imports_of(modules_of(tmp_path))) == ["kirsch.a", "kirsch.b", "kirsch.a"]
    (package / "b.py").write_text("")
    assert cycle_in(imports_of(modules_of(tmp_path))) == []
