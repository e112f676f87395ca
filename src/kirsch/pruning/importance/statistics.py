"""Statistics of calibration data, from which importances are computed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.errors import NumericError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.importance.activations import (
    InputStatistics,
    contribution_products,
    input_statistics,
    labels_in,
)
from kirsch.pruning.importance.calibration import CalibrationBatches, Loss, no_labels
from kirsch.pruning.importance.gates import gating_entries
from kirsch.pruning.importance.importance import sum_per_unit, unit_of_index
from kirsch.pruning.importance.padding import samples_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.frameworks.protocols import Calibration
    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group, ParameterAxis
    from kirsch.graph.labels import Labels


HESSIAN_VECTORS = 32
"""Number of random vectors for each parameter, from which its second derivatives are estimated."""


@dataclass(frozen=True)
class Gates:
    """Derivatives of the loss of single samples for the gate of each unit.

    The gate of a unit is a factor, with value 1, by which the unit is multiplied.

    Minus the derivative is the change of the loss when the unit is removed, to first order. Arrays have shape (units,).

    Args:
        mean_absolute: mean over the samples of the absolute value.
        mean_square: mean over the samples of the square.
        mean_sum_of_squares: mean over the samples of the sum of (w · ∂L/∂w)² over the weights of the gate.
    """

    mean_absolute: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    mean_sum_of_squares: NDArray[np.float64]


class Statistics:
    """Statistics of calibration data. Each is computed for all groups in one pass over the data, when first used.

    The derivative for the gate of a unit is a sum of w · ∂L/∂w over weights, see `kirsch.pruning.importance.gates`.

    Args:
        graph: graph of the model.
        batches: calibration batches, which are iterated over several times; an attention mask must be an input by
            name. Derivatives of the loss use the labels of all of them.
        loss: loss of a batch, the mean over its samples; None if only inputs are used.
        seed: seed of the random vectors of the Hessian.
    """

    def __init__(self, graph: Graph, batches: Iterable[Batch], loss: Loss | None = None, seed: int = 0) -> None:
        self._graph, self._loss, self._seed = graph, loss, seed
        self._calibration = calibration_of(graph)
        self._batches = batches
        self._labeled = batches.labeled if isinstance(batches, CalibrationBatches) else batches
        self._gating = {group.name: gating_entries(graph, group) for group in graph.groups}

    # ------------------------------------------------------------------------------------------------ derivatives

    def gates(self, group: Group) -> Gates:
        """Return the derivatives for the gates of a group."""
        return self._gates[group.name]

    @cached_property
    def _gates(self) -> dict[str, Gates]:
        groups, samples = self._graph.groups, 0
        sums = {group.name: np.zeros((3, group.size)) for group in groups}
        weights = self._weights
        for sample in self._samples():
            samples += 1
            gradients = self._calibration.gradients(self._graph, sample, self._required_loss)
            products = {name: weights[name] * ops.upcast(gradient) for name, gradient in gradients.items()}
            squares = {name: value * value for name, value in products.items()}
            for group in groups:
                gate = self._per_unit(group, products)
                sums[group.name] += np.stack([np.abs(gate), gate**2, self._per_unit(group, squares)])
        self._check_samples(samples)
        return {name: Gates(*(values / samples)) for name, values in sums.items()}

    def first_order(self, group: Group) -> NDArray[np.float64]:
        """Return the sum over the weights that read each unit of |w · ∂L/∂w|; L is the mean loss."""
        products = self._products_with(self._mean_gradient)
        return self._per_unit(group, {name: ops.abs(value) for name, value in products.items()})

    def gradient_flow(self, group: Group) -> NDArray[np.float64]:
        """Return the sum over the weights that read each unit of w · (H g): Hessian times gradient of the loss."""
        return self._per_unit(group, self._products_with(self._hessian_gradient))

    def second_order(self, group: Group) -> NDArray[np.float64]:
        """Return the sum over the weights that read each unit of w² · ∂²L/∂w², with estimated second derivatives."""
        return self._per_unit(group, self._second_order)

    def loss_changes(self, group: Group) -> NDArray[np.float64]:
        """Return the change of the mean loss when a unit is removed from the model, for each unit of a group."""
        before = self._mean_loss(self._graph.keep({}))
        return np.array([self._mean_loss(self._graph.keep({group.name: (u,)})) - before for u in range(group.size)])

    @cached_property
    def _mean_gradient(self) -> dict[str, Any]:
        return self._mean_over_batches(
            lambda batch: self._calibration.gradients(self._graph, batch, self._required_loss)
        )

    @cached_property
    def _hessian_gradient(self) -> dict[str, Any]:
        direction = self._mean_gradient

        def product(batch: Batch) -> dict[str, Any]:
            [found] = self._calibration.hessian_products(self._graph, batch, self._required_loss, [direction])
            return found

        return self._mean_over_batches(product)

    @cached_property
    def _second_order(self) -> dict[str, Any]:
        """Estimates of w² · ∂²L/∂w² for the weights that gate units, whose sums over a unit are useful.

        The estimate is the mean of v · (H v) over random vectors v = w · z, with signs z (Hutchinson's estimator for
        the diagonal of w · H · w). Each vector is 0 outside of one parameter, because second derivatives by weights of
        two layers would only add noise. All batches use the same vectors, so that the estimate does not depend on the
        division into batches.
        """
        gating = {part.name for parts in self._gating.values() for part in parts}
        weights = {name: value for name, value in self._calibration.weights(self._graph).items() if name in gating}

        def vectors() -> Iterator[dict[str, Any]]:
            random = np.random.default_rng(self._seed)
            for name, value in weights.items():
                for _ in range(HESSIAN_VECTORS):
                    signs = random.choice([-1.0, 1.0], tuple(value.shape))
                    yield {name: value * ops.convert_to_tensor(signs, like=value)}

        def estimate(batch: Batch) -> dict[str, Any]:
            total: dict[str, Any] = {}
            given, again = itertools.tee(vectors())
            products = self._calibration.hessian_products(self._graph, batch, self._required_loss, given)
            for vector, product in zip(again, products, strict=True):
                for name, value in product.items():
                    term = ops.upcast(vector[name]) * ops.upcast(value) / HESSIAN_VECTORS
                    total[name] = total[name] + term if name in total else term
            return total

        return self._mean_over_batches(estimate)

    # ------------------------------------------------------------------------------------------------ activations

    def of_inputs(self, group: Group) -> list[InputStatistics]:
        """Return the statistics of the activations of a group where weights read them.

        The activations of an expert are those that its weights read.

        Raises:
            UsageError: no weight reads the units of the group, or the activations of one of them are not known.
        """
        known, unknown = self._of_inputs
        read = self._graph.input_axes(group)
        hidden = next((name for name, _ in read if name in unknown), None)
        if hidden is not None:
            raise UsageError(
                f"The activations that {hidden!r} reads are not known.",
                "Another weight is computed from it, or an operation of another package uses it.",
                f"Exclude the layer, exclude={group.name!r}, or use another importance, such as 'taylor'.",
            )
        found = [known[key] for key in read if key in known]
        found = found or [inputs for inputs in known.values() if self._occurs(group, inputs.labels)]
        found = found or [
            replace(inputs, labels=inputs.experts)
            for inputs in known.values()
            if inputs.experts is not None and self._occurs(group, inputs.experts)
        ]
        if not found:
            raise UsageError(
                f"The activations of {group.name!r} are not known.",
                "No weight of the model is multiplied with them.",
                f"Exclude the layer, exclude={group.name!r}, or use another importance.",
            )
        return found

    @cached_property
    def has_zeros(self) -> bool:
        """Whether an activation of a unit is 0 in some position."""
        return any((inputs.nonzero < inputs.positions).any() for inputs in self._of_inputs[0].values())

    def contribution_products(self, group: Group) -> list[NDArray[np.float64]]:
        """Return the products of the contributions of the units to each layer that reads them, shape (units, units).

        See `kirsch.pruning.importance.activations.contribution_products`. Runs the model on all batches.
        """
        names = [inputs.name for inputs in self.of_inputs(group)]
        found = []
        for labels, products in contribution_products(self._graph, self._calibration, self._batches, names):
            if self._occurs(group, labels):
                rows = np.stack([sum_per_unit(self._graph, group, labels, row) for row in products])
                found.append(np.stack([sum_per_unit(self._graph, group, labels, column) for column in rows.T]))
        return found

    def _occurs(self, group: Group, labels: Labels) -> bool:
        return bool((unit_of_index(self._graph, group, labels) >= 0).any())

    @cached_property
    def _of_inputs(self) -> tuple[dict[ParameterAxis, InputStatistics], set[str]]:
        return input_statistics(self._graph, self._calibration, self._batches)

    # ------------------------------------------------------------------------------------------------ helpers

    @property
    def _weights(self) -> dict[str, Any]:
        return {name: ops.upcast(value) for name, value in self._calibration.weights(self._graph).items()}

    @property
    def _required_loss(self) -> Loss:
        if self._loss is None:
            raise UsageError("The statistics have no loss.", fix="Give `loss` to kirsch.plan.")
        return self._loss

    def _samples(self) -> Iterator[Batch]:
        """Yield each sample with a label as a batch."""
        for batch in self._labeled:
            for sample in samples_of(batch):
                if labels_in(sample):
                    yield sample

    def _check_samples(self, samples: int) -> None:
        if not samples:
            raise no_labels()

    def _mean_over_batches(self, compute: Callable[[Batch], dict[str, Any]]) -> dict[str, Any]:
        """Return the mean over all labels of arrays that are means over the labels of a batch."""
        total: dict[str, Any] = {}
        count = 0
        for batch in self._labeled:
            labels = labels_in(batch)
            count += labels
            for name, value in compute(batch).items() if labels else ():
                term = ops.upcast(value) * labels
                total[name] = total[name] + term if name in total else term
        self._check_samples(count)
        return {name: value / count for name, value in total.items()}

    def _mean_loss(self, keep: NDArray[np.bool_]) -> float:
        total, count = 0.0, 0
        for batch in self._labeled:
            labels = labels_in(batch)
            count += labels
            if labels:
                loss = self._calibration.loss_without(self._graph, batch, self._required_loss, keep)
                total += labels * loss
        self._check_samples(count)
        return total / count

    def _products_with(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        weights = self._weights
        return {name: weights[name] * array for name, array in arrays.items()}

    def _per_unit(self, group: Group, products: Mapping[str, Any]) -> NDArray[np.float64]:
        """Return the sum of the products over the entries of each unit in the weights that gate the group."""
        total = np.zeros(group.size)
        for part in self._gating[group.name]:
            product = products[part.name]
            others = tuple(other for other in range(len(product.shape)) if other != part.axis)
            sums = host(ops.sum(product, others) if others else product).astype(np.float64)
            if not np.isfinite(sums).all():
                raise NumericError(
                    f"The derivative of the loss for {part.name!r} is NaN or infinite.",
                    "Its units cannot be ranked.",
                    "Check the weights of the model and the calibration data.",
                )
            total += sum_per_unit(self._graph, group, part.labels, sums * part.factor)
        return total


def calibration_of(graph: Graph) -> Calibration:
    """Return the object that runs the model of a graph.

    Raises:
        UsageError: the graph has no model.
    """
    if graph.model is None:
        raise UsageError("This graph cannot run its model.", "The graph was not created by kirsch.trace.")
    return framework_of(graph.model).calibration
