"""Importing torchvision where its compiled operators are missing.

A torchvision wheel that was built for another build of torch (CUDA wheels beside a CPU torch are common) cannot load
its compiled operators, and then fails to import although most models never call them. The operators are declared,
without kernels, so that the import goes through; a model that does call one fails there, by its name.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
MOST = 40
"""torchvision has some fifteen operators; more rounds than this mean that something else is wrong."""

_declared: dict[str, torch.library.Library] = {}  # a declaration lives as long as its library object


def import_beside(name: str) -> ModuleType:
    """Import a package that imports torchvision, declaring the operators that turn out to be missing.

    Raises:
        ImportError, RuntimeError: the import fails for another reason.
    """
    for _ in range(MOST):
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            found = MISSING.search(str(error))
            if found is None or found.group(1) in _declared:
                raise
            _declare(found.group(1))
            for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", name)]:
                del sys.modules[module]  # half imported
    raise RuntimeError(f"{name} asks for more than {MOST} operators that do not exist")


def _declare(operator: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # has no annotations
    library.define(f"{operator}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]  # likewise
    _declared[operator] = library
