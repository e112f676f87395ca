"""Interface of a task: the purpose of a model, and the evaluation of its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kirsch.errors import UsageError
from kirsch.json_schema import integer, number, record
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
        """Return the quality of the outputs on the test part, as JSON.

        A job needs the key "accuracy" with "value", the limits "low" and "high" of its interval, and the number "n" of
        samples, as `Rate.to_dict` returns them. The task defines what counts as correct; the value is a fraction, and
        larger is better. "balanced_accuracy", a fraction, is optional.
        """

    def weakness(self, quality: dict[str, Any]) -> tuple[str, str]:
        """Return the numbers and the reason that make a model of this quality unusable; empty texts if it is usable."""

    def compare(self, before: NDArray[Any], after: NDArray[Any], data: DataSet) -> dict[str, Any]:
        """Return the comparison of two models on the test part from their outputs, as JSON.

        The report shows those keys that `kirsch.tasks.classification.Classification` returns, too; each is optional.
        "paired" is the result of `Paired.to_dict`, whose text is the significance of the change of accuracy.
        """


ACCURACY = record({"value": number(0, most=1), "low": number(), "high": number(), "n": integer(0)}, more=True)


def check_quality(task: Task, quality: dict[str, Any]) -> None:
    """Check that the result of `evaluate` has what a job needs.

    Raises:
        UsageError: the accuracy is missing, or one of its values is missing or out of range.
    """
    try:
        record({"accuracy": ACCURACY}, more=True)(quality, "")
    except ValueError as error:
        raise UsageError(
            f"The result of `evaluate` of the task {type(task).__name__} cannot be used in a job: {error}.",
            "A job compares models by their accuracy, as the task defines it.",
            'Add "accuracy": kirsch.measurement.statistics.rate(correct, n).to_dict() to the result.',
        ) from error


TASKS: Registry[type[Task]] = Registry("task")
