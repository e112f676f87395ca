"""All benchmarks and all examples can be imported, so that none needs a module or a name that was removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_all_files_are_imported(folder):
    """In another process, because a benchmark may register losses."""
    names = sorted(file.stem for file in (ROOT / folder).glob("*.py"))
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, capture_output=True, text=True, check=False)
    assert names
    assert done.returncode == 0, done.stderr
