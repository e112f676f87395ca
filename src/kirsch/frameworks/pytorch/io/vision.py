"""Import torchvision when its compiled operators are missing.

A torchvision wheel for another build of torch (often a CUDA wheel beside a CPU torch) cannot load its compiled
operators, and its import fails although most models do not call them. `import_beside` declares the operators without
kernels, so that the import succeeds. A model that calls such an operator raises an error that names the operator.
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
MOST_OPERATORS = 40
"""torchvision has about 15 operators; more declarations mean that another fault causes the errors."""

_declared: dict[str, torch.library.Library] = {}  # a declaration exists as long as its library object


def import_beside(name: str) -> ModuleType:
    """Import a package that imports torchvision, and declare the operators that are missing.

    Raises:
        ImportError, RuntimeError: the import fails for another reason.
    """
    for _ in range(MOST_OPERATORS):
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            match = MISSING.search(str(error))
            if match is None or match.group(1) in _declared:
                raise
            _declare(match.group(1))
            for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", name)]:
                del sys.modules[module]  # partially imported
    raise RuntimeError(f"{name} needs more than {MOST_OPERATORS} operators that do not exist")


def _declare(operator: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # has no annotations
    library.define(f"{operator}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]  # likewise
    _declared[operator] = library
