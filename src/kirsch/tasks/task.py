"""Interface of a task: the purpose of a model, and the evaluation of its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kirsch.registry import Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.data.dataset import DataSet


class Task(Protocol):
    """Interface of a task. All arrays are numpy arrays; outputs are arrays that `Inference.predict` returns.

    Attributes:
        label_loss: name of the label loss, as `kirsch.Objective` takes it.
    """

    label_loss: str

    def check_data(self, data: DataSet) -> None:
        """Check the labels of all parts of a data set.

        Raises:
            DataError: the labels are not valid for the task. The message names the part and the sample.
        """

    def check_outputs(self, outputs: NDArray[Any], data: DataSet) -> None:
        """Check that a model returns outputs of the shape that the data needs.

        Raises:
            ShapeError: the outputs have another shape.
        """

    def decode(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the predictions from the outputs of a model, with the samples on the first axis."""

    def evaluate(self, outputs: NDArray[Any], data: DataSet) -> dict[str, Any]:
        """Return the quality of the outputs on the test part, as JSON."""

    def weakness(self, quality: dict[str, Any]) -> tuple[str, str]:
        """Return the numbers and the reason that make a model of this quality unusable; empty texts if it is usable."""

    def compare(self, before: NDArray[Any], after: NDArray[Any], data: DataSet) -> dict[str, Any]:
        """Return the comparison of two models on the test part from their outputs, as JSON for the report."""


TASKS: Registry[type[Task]] = Registry("task")
