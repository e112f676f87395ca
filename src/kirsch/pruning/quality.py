"""Quality of a model without some of its units, on the same samples as the original, without training."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures, ops
from kirsch.data.annotations import has_arrays
from kirsch.data.arrays import host, map_arrays
from kirsch.data.batches import ArrayData, Batch, SeededData, naming
from kirsch.data.inputs import named_arrays
from kirsch.errors import DataError, KirschError, NumericError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.graph.plan import Plan
from kirsch.measurement.statistics import Difference, bootstrap_difference, paired_difference
from kirsch.pruning.importance.calibration import read_batches
from kirsch.pruning.importance.statistics import calibration_of
from kirsch.tasks.metrics import class_number, default_metric, metric_of
from kirsch.tasks.next_token import tokens_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Removal, Skip
    from kirsch.tasks.metrics import Metric

ROWS = 64
"""Samples of one forward pass, for data in memory."""

MOST_STORED = 2**28
"""Largest number of bytes of the original's outputs that are kept; beyond it, the original runs again in each pass."""


@dataclass(frozen=True)
class Measured:
    """Quality of one model.

    Args:
        value: value of the metric, larger for better outputs.
        n: number of samples.
        values: the arrays from which the metric is computed, with one row for each labeled sample or position.
        sample: number of the sample of each row.
    """

    value: float
    n: int
    values: tuple[NDArray[Any], ...]
    sample: NDArray[np.int64]


class Quality:
    """Evaluation of a traced model and of models pruned from it, on the same samples.

    A pruned model is cut as `kirsch.prune` cuts it, without verification, and exists only during its evaluation. Its
    outputs are therefore those of the result of `kirsch.prune`.

    Args:
        graph: graph of the model.
        data: batches of (inputs, labels) or of inputs, or one such batch. Of data in memory, evenly spaced samples are
            used; of a loader, the first ones.
        metric: name of a metric, or a function (outputs, labels) → number; None for the metric that fits the labels.
        class_weights: class number → weight, see `kirsch.tasks.metrics.metric_of`.
        samples: largest number of samples; None for all.
        argument: name of the argument that holds the data, for messages.

    Raises:
        UsageError: the metric is unknown, the data can be read only once, or the model does not have a class of
            `class_weights`. If no label has one of these classes, the error is raised when the quality is measured.
        DataError: there are no samples, or the metric needs other labels.
    """

    def __init__(
        self,
        graph: Graph,
        data: Any,
        metric: str | Callable[..., Any] | None = None,
        class_weights: Mapping[str | int, float] | None = None,
        *,
        samples: int | None = None,
        argument: str = "data",
    ) -> None:
        calibration_of(graph)  # refuses a graph without a model
        if isinstance(data, Iterator):
            raise UsageError(
                f"`{argument}` is a {type(data).__name__}, which can be iterated over only once.",
                fix="Give a DataLoader, or a list: list(data).",
            )
        self._graph, self._data, self._samples, self._argument = graph, data, samples, argument
        self._framework = framework_of(graph.model)
        self._checksums: list[int] = []
        self._stored: list[NDArray[Any]] | None = []
        self._weighted = [class_number(key) for key in class_weights or {}]
        chosen = metric_of(metric, class_weights) if metric is not None else None
        self.metric = self._checked_metric(chosen, class_weights)

    def _checked_metric(self, metric: Metric | None, class_weights: Mapping[str | int, float] | None) -> Metric:
        """Return the metric, after a check that it can be computed for the first samples of the data."""
        first = self._framework.training.seeded(lambda: next(self._batches(), None), 0)
        if first is None:
            raise DataError(f"`{self._argument}` has no batches.", fix="Give at least one batch.")
        few = _head(first, 2)
        outputs = self._outputs(self._graph.model, few, 1)
        labels = None if few.targets is None else host(few.targets)
        if metric is None:
            name = "accuracy" if class_weights else default_metric(outputs, labels, few.inputs)
            metric = metric_of(name, class_weights)
        reference = self._reference(metric, few, 1, outputs)
        with naming(f"Batch 1 of `{self._argument}`"):
            metric.items(outputs, reference, few.inputs)
        classes = ops.classes_last(outputs).shape[-1]
        unknown = next((number for number in self._weighted if number >= classes), None)
        if unknown is not None:
            raise UsageError(
                f"`class_weights` names the class {unknown}.",
                f"{self._graph.model_name} has the classes 0 to {classes - 1}.",
                "Correct the class.",
            )
        return metric

    @property
    def batches(self) -> list[Batch]:
        """The batches on which the quality is measured."""
        found: list[Batch] = self._framework.training.seeded(lambda: list(self._batches()), 0)
        return found

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches, up to the number of samples."""
        data, left = self._data, self._samples
        if isinstance(data, ArrayData):
            source = _spread(Batch(data.inputs, data.targets), left)
        elif hasattr(data, "inputs") and hasattr(data, "labels"):  # a Split
            source = _spread(Batch(data.inputs, data.labels), left)
        elif isinstance(data, (SeededData, list)) or not has_arrays(data):
            source = data
        else:
            source = _spread(Batch.of(data), left)
        for batch in read_batches(source, self._graph.model, f"`{self._argument}`"):
            part = batch if left is None or len(batch) <= left else _head(batch, left)
            if len(part):
                yield part
            left = None if left is None else left - len(part)
            if left == 0:
                return

    def _outputs(self, model: Any, batch: Batch, number: int) -> NDArray[Any]:
        """Return the outputs of a model for a batch.

        Raises:
            NumericError: an output is NaN.
        """
        with naming(f"Batch {number} of `{self._argument}`"):
            outputs: NDArray[Any] = self._framework.inference.predict(model, batch.inputs)
        if np.isnan(outputs).any():
            raise NumericError(
                "The model returns NaN." if model is self._graph.model else "The pruned model returns NaN.",
                fix="Check the weights of the model, and that the inputs are prepared as it expects.",
            )
        return outputs

    def _reference(self, metric: Metric, batch: Batch, number: int, original: NDArray[Any] | None) -> NDArray[Any]:
        """Return what the outputs for a batch are compared with; `original` holds the outputs of the original."""
        if metric.reference == "original":
            return self._outputs(self._graph.model, batch, number) if original is None else original
        labels = batch.targets
        if labels is None and metric.reference == "tokens":
            labels = tokens_in(batch.inputs)
        if labels is None:
            raise DataError(
                f"Batch {number} of `{self._argument}` has no labels.",
                f"The metric {metric.name!r} compares outputs with labels.",
                "Give batches of (inputs, labels), or metric='kl', which compares the outputs with the original.",
            )
        return host(labels)

    @cached_property
    def original(self) -> Measured:
        """Quality of the original model."""
        measured = self._measured(self._graph.model)
        labels = set(measured.values[1].tolist()) if self._weighted else set()
        if self._weighted and not labels & set(self._weighted):
            raise UsageError(
                f"`class_weights` has no effect: no label of `{self._argument}` has a class that it names.",
                f"The labels are {figures.listed([str(number) for number in sorted(labels)])}.",
                "Correct the classes, or remove `class_weights`: only classes with labels have a recall.",
            )
        return measured

    def without(self, groups: Sequence[Removal] = (), blocks: Sequence[Skip] = ()) -> Measured:
        """Return the quality of the model without some units and residual blocks.

        Raises:
            KirschError: the pruned model cannot be built, or does not run.
            NumericError: an output of the pruned model is NaN.
        """
        _ = self.original  # its pass stores the outputs and the checksums
        graph = self._graph
        removal = Plan(
            graph.fingerprint,
            graph.model_name,
            tuple(groups),
            graph.cost,
            graph.cost,
            blocks=tuple(blocks),
            graph=graph,
        )
        pruned, _ = self._framework.surgery.prune(graph.model, removal, graph, verify=False)
        return self._measured(pruned)

    def _measured(self, model: Any) -> Measured:
        parts = self._framework.training.seeded(lambda: list(self._items(model)), 0)
        counts = [count for count, _, _ in parts]
        values = tuple(np.concatenate(arrays) for arrays in zip(*(values for _, values, _ in parts), strict=True))
        starts = np.cumsum([0, *counts[:-1]])
        sample = np.concatenate([start + index for start, (_, _, index) in zip(starts, parts, strict=True)])
        if not len(sample):
            raise DataError(f"`{self._argument}` has no sample with a label.", fix="Give at least one.")
        value = self.metric.value(*values)
        if not np.isfinite(value):
            raise NumericError(f"The metric {self.metric.name!r} is {value}.", fix="Check the outputs of the model.")
        return Measured(value, sum(counts), values, sample)

    def _items(self, model: Any) -> Iterator[tuple[int, tuple[NDArray[Any], ...], NDArray[np.int64]]]:
        """Yield for each batch the number of samples, and the items of the metric."""
        is_original = model is self._graph.model
        for number, batch in enumerate(self._batches(), start=1):
            self._check_same(batch, number, is_original)
            outputs = self._outputs(model, batch, number)
            original = outputs if is_original else None
            if self.metric.reference == "original":
                if is_original:
                    self._store(outputs)
                elif self._stored is not None:
                    original = self._stored[number - 1]
            reference = self._reference(self.metric, batch, number, original)
            with naming(f"Batch {number} of `{self._argument}`"):
                items = self.metric.items(outputs, reference, batch.inputs)
            yield len(batch), items.values, items.sample

    def _store(self, outputs: NDArray[Any]) -> None:
        if self._stored is not None:
            self._stored.append(outputs)
            if sum(array.nbytes for array in self._stored) > MOST_STORED:
                self._stored = None

    def _check_same(self, batch: Batch, number: int, is_original: bool) -> None:
        """Refuse data that gives other samples than in the pass of the original."""
        checksum = 0
        for array in (part for part in named_arrays(batch.inputs).values() if hasattr(part, "shape")):
            checksum = zlib.crc32(np.ascontiguousarray(host(ops.upcast(array))).tobytes(), checksum)
        if is_original:
            self._checksums.append(checksum)
        elif number > len(self._checksums) or self._checksums[number - 1] != checksum:
            raise DataError(
                f"`{self._argument}` gives other samples each time it is iterated over.",
                "Models can be compared only on the same samples.",
                "Give data without shuffling and without random augmentation, or a list of batches.",
            )

    def drop(self, pruned: Measured) -> Difference:
        """Return by how much the quality of a pruned model is below that of the original, with a 95 % interval."""
        before, after = self.original, pruned
        one_each = len(before.sample) == before.n
        if self.metric.correct is not None and one_each:
            return paired_difference(self.metric.correct(*before.values), self.metric.correct(*after.values))
        order = np.argsort(before.sample, kind="stable")
        numbers, starts = np.unique(before.sample[order], return_index=True)
        rows = np.split(order, starts[1:])

        def difference(samples: NDArray[np.int64]) -> float:
            index = order[samples] if one_each else np.concatenate([rows[sample] for sample in samples])
            try:
                old, new = (self.metric.value(*(array[index] for array in each.values)) for each in (before, after))
            except KirschError:  # a metric may not be defined for some samples alone, such as those of one class
                return np.nan
            return float(old - new)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bootstrap_difference(difference, len(numbers))


def _head(batch: Batch, count: int) -> Batch:
    """Return the first samples of a batch."""
    return _rows(batch, slice(count))


def _rows(batch: Batch, indices: Any) -> Batch:
    inputs = map_arrays(lambda part: part[indices] if hasattr(part, "shape") else part, batch.inputs)
    return Batch(inputs, None if batch.targets is None else batch.targets[indices])


def _spread(batch: Batch, count: int | None) -> Iterator[Batch]:
    """Yield samples that are evenly spread over data in memory, which may be sorted by class, as small batches."""
    size = len(batch)
    chosen = np.unique(np.linspace(0, size - 1, size if count is None else min(count, size)).round().astype(np.int64))
    for start in range(0, len(chosen), ROWS):
        yield _rows(batch, chosen[start : start + ROWS])
