"""Students with adapters, as `Features.with_adapters` of a framework returns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class StudentOutputs:
    """Results of one forward pass of a student with adapters.

    Args:
        features: the student's features by layer.
        adapted: the pair of features that each adapter returns for the loss, student's and teacher's, by name of the
            adapter.
        adapter_losses: losses that train only an adapter, by name of the adapter.
    """

    features: dict[str, Any]
    adapted: dict[str, tuple[Any, Any]]
    adapter_losses: dict[str, Any]


class StudentWithAdapters(Protocol):
    """A student and its adapters as one model, so that one forward pass computes all inputs of the loss.

    Attributes:
        student: the student alone.
        adapters: the adapters as one object of the framework.
        training: whether student and adapters are in training mode.
    """

    student: Any
    adapters: Any
    training: bool

    def __call__(
        self, inputs: Any, teacher_features: Mapping[str, Any] | None = None, ids: Any = None
    ) -> StudentOutputs:
        """Run the student on one batch, and each adapter on the student's and the teacher's features.

        `teacher_features`: the teacher's features by name of the adapter. `ids`: ids of the samples, for adapters that
        store features by sample.
        """

    def parameters(self) -> Iterator[Any]:
        """Return the parameters of student and adapters."""

    def train(self, mode: bool = True) -> Any:
        """Set student and adapters to training mode, or to inference mode."""

    def adapter_state(self) -> dict[str, Any]:
        """Return the arrays of all adapters by name."""

    def load_adapter_state(self, state: Mapping[str, Any], /) -> None:
        """Load arrays of `adapter_state`; names and shapes must agree."""

    def close(self) -> None:
        """Remove the hooks."""
