"""Compensation of a pruned model from calibration data, one layer after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.errors import DataError, NumericError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.compensation.layers import ReadingLayer, reading_layers
from kirsch.pruning.compensation.least_squares import Products, least_squares, mean_shift, relative_error
from kirsch.pruning.compensation.record import CompensatedLayer, Compensation
from kirsch.pruning.importance.calibration import read_batches
from kirsch.pruning.importance.padding import Padding, only_padding, refuse_padding, without_padding
from kirsch.tasks.padding import counted_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.frameworks.protocols import Framework
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Plan

SAMPLED = 256
"""Largest number of positions of a sample, on average, at which a convolution is observed; they are drawn at random."""

NO_BIAS = "it has no bias of its own; least_squares and batch_norm do not need one"
UNSEEN = "it does not read activations exactly once in a run of the model"
GROUPS = "whole groups of the convolution were removed together with inputs of the others"


def compensate(pruned: Any, plan: Plan, graph: Graph, methods: Sequence[str], data: Any) -> Compensation:
    """Change the kept weights of a pruned model in place, so that its outputs are closer to those of the original.

    Args:
        pruned: the pruned model.
        plan: the plan by which it was pruned.
        graph: graph of the original.
        methods: names of `methods.METHODS`, in their order.
        data: calibration data.

    Raises:
        DataError: there are no batches.
        NumericError: activations or outputs contain NaN or infinity.
        UsageError: padding cannot be left out.
    """
    framework = framework_of(graph.model)
    run = _Run(pruned, graph, framework, data)
    # Models and loaders may draw random numbers: the caller's random state is kept.
    found: Compensation = framework.training.seeded(lambda: _compensated(run, plan.keep(graph), methods), 0)
    return found


def _compensated(run: _Run, keep: NDArray[np.bool_], methods: Sequence[str]) -> Compensation:
    errors, layers = {"none": run.output_error()}, list[CompensatedLayer]()
    skipped, batch_norms = dict[str, str](), list[str]()
    for method in methods:
        if method == "batch_norm":
            batch_norms = run.estimate_batch_norms()
        else:
            layers, skipped = run.fit_layers(keep, method)
        errors[method] = run.output_error()
    return Compensation(errors, tuple(layers), skipped, tuple(batch_norms))


class _Run:
    """A model, its pruned copy, and calibration data."""

    def __init__(self, pruned: Any, graph: Graph, framework: Framework, data: Any) -> None:
        self._pruned, self._graph, self._data = pruned, graph, data
        self._calibration, self._surgery = framework.calibration, framework.surgery

    def _batches(self) -> Iterator[Batch]:
        empty = True
        for batch in read_batches(self._data, self._graph.model):
            empty = False
            yield batch
        if empty:
            raise DataError("`data` of kirsch.prune has no batches.", fix="Give at least one batch.")

    def output_error(self) -> float:
        """Return the RMS of the difference of the outputs, relative to the RMS of the outputs of the original."""
        difference, size, read, count = 0.0, 0.0, 0, 0
        for batch in self._batches():
            for original, pruned in self._calibration.paired_outputs(self._graph, self._pruned, batch.inputs):
                counted = counted_tokens(batch.inputs, original.shape)
                chosen = slice(None) if counted is None else counted
                difference += float(((original - pruned)[chosen] ** 2).sum())
                size += float((original[chosen] ** 2).sum())
                read, count = read + original.size, count + original[chosen].size
        if read and not count:
            raise only_padding()
        if not np.isfinite([difference, size]).all():
            raise NumericError(
                f"The outputs of the {self._graph.model_name} on the calibration data contain NaN or infinity.",
                "The pruned model cannot be compensated.",
                "Check the weights of the model and the calibration data.",
            )
        return (difference / size) ** 0.5 if size > 0 else float(difference > 0)

    def estimate_batch_norms(self) -> list[str]:
        """Estimate the statistics of batch normalization; return the paths of the modules."""
        self._surgery.estimate_batch_norms(self._pruned, map(_size_and_inputs, self._batches()))
        return self._surgery.batch_norms(self._pruned)

    def fit_layers(self, keep: NDArray[np.bool_], method: str) -> tuple[list[CompensatedLayer], dict[str, str]]:
        """Change the layers that have lost inputs, in the order of the forward pass.

        Least squares fits each layer to the outputs of the original, from its inputs in the pruned model whose earlier
        layers have already been changed. Biases are computed from the inputs in the original alone, for all layers at
        once, as in FLAP. docs/compensation.md compares both choices with their alternatives.

        Returns:
            The changed layers; and the reason for each layer that was not changed.
        """
        linear = self._calibration.linear_layers(self._graph)
        found, skipped = reading_layers(self._graph, keep, linear, self._surgery, self._pruned)
        if method == "bias":
            skipped |= {layer.name: NO_BIAS for layer in found if layer.bias is None}
        layers = {layer.name: layer for layer in found if layer.name not in skipped}
        first, _ = next(without_padding(self._batches()))
        stages = self._calibration.reading_order(self._graph, self._pruned, first.inputs, list(layers))
        if method == "bias" and stages:
            stages = [[name for stage in stages for name in stage]]
        changed = []
        for stage in stages:
            products = self._products([layers[name] for name in stage], of_original=method == "bias")
            for name in stage:
                sums = products.get(name)
                if sums is not None:
                    changed.append(self._fit(layers[name], sums, method))
                elif name in products:
                    skipped[name] = GROUPS
        fitted = {layer.weight for layer in changed}
        return changed, skipped | {name: UNSEEN for name in layers if name not in fitted and name not in skipped}

    def _products(self, layers: Sequence[ReadingLayer], *, of_original: bool) -> dict[str, Products | None]:
        """Return the sums of products of some layers; None for a convolution whose groups cannot be paired.

        `of_original`: use the kept inputs of the layers in the original in place of the inputs in the pruned model.
        """
        found: dict[str, Products | None] = {}
        targets: dict[str, Any] = {}
        by_name = {layer.name: layer for layer in layers}
        random = np.random.default_rng(0)
        for batch, padding in without_padding(self._batches()):
            other = Padding(batch)  # the object counts the calls of each layer

            def choose(
                name: str, positions: int, padding: Padding = padding, samples: int = len(batch)
            ) -> NDArray[np.int64] | None:
                is_convolution = len(by_name[name].shape) > len("OI")
                return _drawn(random, positions, samples) if is_convolution and not padding.exists else None

            def see(
                name: str,
                groups: tuple[int, int],
                x: Any,
                y: Any,
                padding: Padding = padding,
                other: Padding = other,
                samples: int = len(batch),
            ) -> None:
                if groups[0] != groups[1]:
                    found[name] = None
                    return
                x, y = ops.upcast(padding.left_out(name, x, None)), ops.upcast(other.left_out(name, y, None))
                if of_original:
                    y = x[:, np.flatnonzero(np.tile(by_name[name].kept, groups[0]))]
                if padding.exists and len(by_name[name].shape) > len("OI"):
                    chosen = _drawn(random, x.shape[0], samples)
                    x, y = x[chosen], y[chosen]
                if name not in targets:
                    target = by_name[name].target
                    grouped = target.reshape(groups[0], -1, target.shape[1])
                    targets[name] = ops.convert_to_tensor(grouped, like=x)
                sums = _sums(x, y, targets[name])
                if not sums.is_finite:
                    raise NumericError(
                        f"The activations that {name!r} reads contain NaN or infinity.",
                        "The layer cannot be compensated.",
                        "Check the weights of the model and the calibration data.",
                    )
                present = found.get(name)
                if present is None:
                    found[name] = sums
                else:
                    present.add(sums)

            self._calibration.paired_inputs(self._graph, self._pruned, batch.inputs, list(by_name), choose, see)
        return found

    def _fit(self, layer: ReadingLayer, products: Products, method: str) -> CompensatedLayer:
        """Set the weight and the bias of a layer, and return its errors before and after."""
        weight = self._grouped(layer, products)
        before = relative_error(products, weight, np.zeros_like(products.y))
        fitted, shift = weight, np.zeros_like(products.y)
        if method == "bias":
            shift = mean_shift(products, weight)
        else:
            fitted, shift = least_squares(products, weight, intercept=layer.bias is not None)
        values = {layer.name: layer.unflattened(fitted.reshape(-1, fitted.shape[-1]))} if method != "bias" else {}
        if layer.bias is not None:
            bias = self._surgery.parameter_values(self._pruned, self._graph, layer.bias)
            values[layer.bias] = bias + shift.ravel()
        self._surgery.set_parameters(self._pruned, self._graph, values)
        if layer.bias is not None:
            shift = (self._surgery.parameter_values(self._pruned, self._graph, layer.bias) - bias).reshape(shift.shape)
        after = relative_error(products, self._grouped(layer, products), shift)
        inputs = products.xx.shape[-1]
        return CompensatedLayer(layer.name, before, after, products.count, inputs, layer.bias is not None)

    def _grouped(self, layer: ReadingLayer, products: Products) -> NDArray[np.float64]:
        """Return the weight of a layer in the pruned model, shape (groups, outputs, inputs)."""
        matrix = layer.matrix(self._surgery.parameter_values(self._pruned, self._graph, layer.name))
        return matrix.reshape(len(products.xx), -1, matrix.shape[1])


def _size_and_inputs(batch: Batch) -> tuple[int, Any]:
    refuse_padding(batch, "remove 'batch_norm' from `compensate`")
    return len(batch), batch.inputs


def _drawn(random: np.random.Generator, positions: int, samples: int) -> NDArray[np.int64]:
    """Return the numbers of the positions of some samples at which a convolution is observed, in ascending order."""
    return np.sort(random.permutation(positions)[: SAMPLED * samples])


def _sums(x: Any, y: Any, target: Any) -> Products:
    """Return the sums of products of some positions.

    Args:
        x: inputs in the original, shape (positions, channels, kernel size).
        y: inputs in the pruned model.
        target: weight of the original for the kept outputs, shape (groups, outputs, inputs).
    """
    groups = target.shape[0]
    x, y = (ops.reshape(value, (value.shape[0], groups, -1)) for value in (x, y))
    outputs = ops.einsum("pgi,goi->pgo", x, target)
    return Products(
        count=y.shape[0],
        x=_host(ops.sum(y, 0)),
        y=_host(ops.sum(outputs, 0)),
        xx=_host(ops.einsum("pgi,pgj->gij", y, y)),
        yx=_host(ops.einsum("pgo,pgi->goi", outputs, y)),
        yy=float(_host(ops.sum(outputs * outputs))),
    )


def _host(array: Any) -> NDArray[np.float64]:
    return host(array).astype(np.float64)
