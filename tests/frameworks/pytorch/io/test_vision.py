"""`import_beside` imports packages that need operators of torchvision, even if these operators are missing."""

from __future__ import annotations

import sys

import pytest
import torch

from kirsch.frameworks.pytorch.io.vision import import_beside

ASKS = """
import torch

@torch.library.register_fake("torchvision::{operator}")
def shape(x):
    return x
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that writes a module, which can then be imported, and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_two_missing_operators_are_declared(package):
    text = ASKS.format(operator="kirsch_first") + ASKS.format(operator="kirsch_second") + "DONE = 7\n"
    assert import_beside(package("kirsch_asks_for_two", text)).DONE == 7
    with pytest.raises(NotImplementedError, match="kirsch_second"):  # declared without a kernel
        torch.ops.torchvision.kirsch_second(torch.ones(2))


def test_other_errors_of_an_import_are_raised_unchanged(package):
    with pytest.raises(RuntimeError, match=r"^disk on fire$"):
        import_beside(package("kirsch_on_fire", "raise RuntimeError('disk on fire')\n"))
    with pytest.raises(ModuleNotFoundError):
        import_beside("kirsch_is_not_there")


def test_an_import_that_still_fails_after_the_operator_was_declared_raises_the_error(package):
    text = "raise RuntimeError('operator torchvision::kirsch_never does not exist')\n"
    with pytest.raises(RuntimeError, match="kirsch_never does not exist"):
        import_beside(package("kirsch_never_content", text))


def test_more_missing_operators_than_the_limit_raise_an_error(package):
    text = """
import itertools, builtins
number = builtins.__dict__.setdefault("kirsch_number", itertools.count())
raise RuntimeError(f"operator torchvision::kirsch_endless{next(number)} does not exist")
"""
    with pytest.raises(RuntimeError, match="needs more than 40 operators"):
        import_beside(package("kirsch_endless", text))
