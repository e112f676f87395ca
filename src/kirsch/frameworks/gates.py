"""Interface between gates and the frameworks that train them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class Gating(Protocol):
    """Function from trainable numbers to the factors of the weights of a model.

    Attributes:
        size: number of gates.
        steps: number of forward passes in training mode in which the budget is lowered.
        train_weights: whether the weights of the model are trained together with the gates.
        speed: factor from the trainable numbers to the locations of the gates.
    """

    size: int
    steps: int
    train_weights: bool
    speed: float

    def gates(self, values: Any, model: Any, uniform: Any = None, step: Any = None) -> Any:
        """Return the gates, shape (size,).

        Args:
            values: the trainable numbers, shape (size,).
            model: the model that has the gates.
            uniform: random numbers between 0 and 1 (exclusive), shape (size,), for random gates. None: the gates that
                are used after training.
            step: number of completed steps, a scalar array. None: after the last step.
        """

    def factors(self, gates: Any, model: Any) -> Mapping[str, Any]:
        """Return the factor of each parameter that reads gated units, by path, in shapes that broadcast."""
