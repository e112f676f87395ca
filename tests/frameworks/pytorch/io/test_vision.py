"""A package that asks for operators of torchvision that are not there is imported all the same."""

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
    """Writes a package of a name of its own, to be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_missing_operators_are_declared_one_after_the_other(package):
    text = ASKS.format(operator="kirsch_first") + ASKS.format(operator="kirsch_second") + "DONE = 7\n"
    assert import_beside(package("kirsch_asks_for_two", text)).DONE == 7
    with pytest.raises(NotImplementedError, match="kirsch_second"):  # declared, and without a kernel
        torch.ops.torchvision.kirsch_second(torch.ones(2))


def test_what_fails_for_another_reason_fails_as_it_is(package):
    with pytest.raises(RuntimeError, match=r"^disk on fire$"):
        import_beside(package("kirsch_on_fire", "raise RuntimeError('disk on fire')\n"))
    with pytest.raises(ModuleNotFoundError):
        import_beside("kirsch_is_not_there")


def test_an_operator_that_stays_missing_ends_the_trials(package):
    text = "raise RuntimeError('operator torchvision::kirsch_never does not exist')\n"
    with pytest.raises(RuntimeError, match="kirsch_never does not exist"):
        import_beside(package("kirsch_never_content", text))


def test_a_package_that_asks_without_end_is_given_up(package):
    text = """
import itertools, builtins
number = builtins.__dict__.setdefault("kirsch_number", itertools.count())
raise RuntimeError(f"operator torchvision::kirsch_endless{next(number)} does not exist")
"""
    with pytest.raises(RuntimeError, match="asks for more than 40 operators"):
        import_beside(package("kirsch_endless", text))
