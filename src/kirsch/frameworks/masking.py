"""Weights that can be set to zero one by one, and the protocol by which a framework holds masks in a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightMatrix:
    """A weight that multiplies activations, or a parameter that is kept dense.

    Args:
        name: path of the parameter in the model without masks.
        layer: path of the module that owns the parameter.
        kind: class of this module.
        shape: shape of the parameter.
        input_axis: axis of the inputs of the layer. The other axis among the first two is that of the outputs, and all
            further axes are those of the kernel.
        groups: number of groups of a convolution, else 1.
        kept: the reason why the parameter is kept dense; empty if it may be masked.
        tied: further paths of the parameter, if several modules share it.
    """

    name: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    input_axis: int = 1
    groups: int = 1
    kept: str = ""
    tied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Masking(Protocol):
    """Masks that keep weights of a model at zero while it is trained.

    Parameters are named as in the model without masks. The gradient of a masked weight is zero, and masks are part of
    copies of the model and of its stored state.
    """

    def weight_matrices(self, model: Any) -> list[WeightMatrix]:
        """Return all parameters of a model, tied ones once, with the reason for those that are always kept dense."""

    def values(self, model: Any, name: str) -> NDArray[Any]:
        """Return the values of a parameter in float32 or float64, with zeros where its mask is False."""

    def hold(
        self, model: Any, masks: Mapping[str, NDArray[np.bool_]], values: Mapping[str, NDArray[Any]] | None = None
    ) -> None:
        """Give parameters of a model masks, or replace their masks, in place; False where the weight is zero.

        `values`: new values of parameters, with or without a mask; the other parameters are not changed.
        """

    def masks(self, model: Any) -> dict[str, NDArray[np.bool_]]:
        """Return the masks of a model by name of the parameter; empty if it has none."""

    def patterns(self, model: Any) -> dict[str, str]:
        """Return the patterns of the masks by name of the parameter; an empty text if `set_patterns` set none."""

    def set_patterns(self, model: Any, names: Mapping[str, str]) -> None:
        """Store the patterns of masks by name of the parameter."""

    def mask_bytes(self, model: Any) -> int:
        """Return the size of the masks in the stored state of a model."""

    def fold(self, model: Any) -> Any:
        """Return a copy of a model without masks, with zeros in its weights."""
