"""Parameters of a traced model in the copy of this model that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph


class TracedParameters:
    """Finds parameters of a traced model by path, in the model itself, a copy of it or a wrapped copy.

    Training changes a copy of the model, so arrays that were found before the training are not those that are trained.

    Args:
        graph: graph of the model.
        names: parameters of the graph.
        user: name of the class that needs the parameters, for messages.
    """

    def __init__(self, graph: Graph, names: Iterable[str], user: str) -> None:
        self._prefix = f"{graph.tracing.module}." if graph.tracing.module else ""
        self._shapes = {name: graph.tensors[name].shape for name in dict.fromkeys(names)}
        self._model_name, self._user = graph.model_name, user

    def __call__(self, model: Any) -> dict[str, Any]:
        """Return the parameters by name in the graph, as arrays with gradients.

        Raises:
            UsageError: the model lacks a parameter, or has one of another shape.
        """
        found = framework_of(model).training.parameters_by_path(model)
        self._check(found, type(model).__name__)
        return {name: found[self._prefix + name] for name in self._shapes}

    def gradients(self, model: Any) -> dict[str, Any]:
        """Return the gradients of the last backward pass by name in the graph, for the parameters that have one."""
        found = framework_of(model).training.gradients_by_path(model)
        return {name: found[self._prefix + name] for name in self._shapes if self._prefix + name in found}

    def _check(self, found: Mapping[str, Any], model_name: str) -> None:
        for name, shape in self._shapes.items():
            value = found.get(self._prefix + name)
            if value is None or tuple(value.shape) != shape:
                has = "no such parameter" if value is None else f"shape {tuple(value.shape)}"
                raise UsageError(
                    f"{self._user} was made for {self._model_name}, whose parameter {name!r} has shape {shape}; this "
                    f"{model_name} has {has}.",
                    "It applies to the traced model and to copies of it. Pruning changes the shapes.",
                    f"Trace the model that is trained, and make a new {self._user} from the graph.",
                )


class PlacedArrays:
    """Numpy arrays, also as arrays of the framework on the device of another array.

    They are converted once per device: a conversion in each training step would wait for the device.
    """

    def __init__(self, **arrays: NDArray[Any]) -> None:
        self.arrays = arrays
        self._placed: dict[tuple[type, str], dict[str, Any]] = {}

    def beside(self, array: Any, model: Any) -> dict[str, Any]:
        """Return the arrays by name, on the device of an array of a model."""
        key = type(array), str(getattr(array, "device", ""))
        if key not in self._placed:
            self._placed[key] = framework_of(model).inference.from_numpy(self.arrays, like=array)
        return self._placed[key]
