"""Models built on the meta device from changed configurations, as sizes and attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.transformers.blueprint import build, sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from kirsch.frameworks.pytorch.transformers.blueprint import Sizes


@dataclass(frozen=True)
class Built:
    """Sizes and attributes of a built model.

    Args:
        sizes: size of each axis of each parameter and buffer.
        attributes: (module path, attribute) → value, for the numbers in the attributes of modules.
    """

    sizes: Sizes
    attributes: Mapping[tuple[str, str], float]

    def changed_modules(self, other: Built) -> set[str]:
        """Return the paths of the modules whose sizes or attributes differ from those of another build."""
        sizes_, attributes = other.sizes, other.attributes
        tensors = {name for (name, axis), size in self.sizes.items() if sizes_.get((name, axis)) != size}
        changed = {path for (path, name), value in self.attributes.items() if attributes.get((path, name)) != value}
        return changed | {name.rpartition(".")[0] for name in tensors}


class Builds:
    """Models of one class for different numbers of its configuration, each built once.

    Args:
        model: the model with the original configuration.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[frozenset[tuple[str, float]], Built | None] = {}
        self.start = self({})

    @property
    def count(self) -> int:
        """Number of models that were built."""
        return len(self._found)

    def __call__(self, changes: Mapping[str, float]) -> Built | None:
        """Return the model for changed numbers; None if it cannot be built, or has other tensors than the original."""
        key = frozenset(changes.items())
        if key not in self._found:
            found = self._build(changes)
            same = found is not None and (not changes or (self.start and found.sizes.keys() == self.start.sizes.keys()))
            self._found[key] = found if same else None
        return self._found[key]

    def _build(self, changes: Mapping[str, float]) -> Built | None:
        try:
            built = build(self._model, changes, "meta")
        except Exception:  # noqa: BLE001 - the code of the model can raise any exception if numbers do not fit
            return None
        attributes = {
            (path, name): value
            for path, module in built.named_modules()
            for name, value in vars(module).items()
            if type(value) in (int, float)
        }
        return Built(sizes(built), attributes)
