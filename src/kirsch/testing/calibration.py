"""Conformance checks of the runs of a model on calibration data, and of changed weights; see `frameworks.py`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from kirsch.data.arrays import host
from kirsch.data.batches import Batch
from kirsch.graph.plan import Goal
from kirsch.pruning.choose import plan
from kirsch.pruning.sparsity.matrix import matrix_shape
from kirsch.tasks.label_losses import LABEL_LOSSES
from kirsch.testing.framework_example import ROUNDING, assert_close

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kirsch.testing.framework_example import FrameworkExample

APPROXIMATE = 0.05
"""Tolerance for differences in place of derivatives, relative to the norm."""


def check_gradients_predict_the_change_of_loss_and_gradient(example: FrameworkExample) -> None:
    """A small step along the gradient changes the loss by step · gradient, and the gradient by Hessian · step."""
    calibration, model = example.framework.calibration, example.model()
    graph, batch = example.graph(model), Batch(example.inputs, example.labels)
    gradient = calibration.gradients(graph, batch, _cross_entropy)
    (product,) = calibration.hessian_products(graph, batch, _cross_entropy, [gradient])
    assert set(gradient) == set(graph.parameters), "gradients and parameters have different names"
    arrays = {name: host(value).astype(np.float64) for name, value in gradient.items()}
    square = sum(float((value**2).sum()) for value in arrays.values())
    step = 1e-4 / square**0.5  # the gradient jumps where a ReLU changes its sign, so the step is small
    losses, gradients = [], []
    for sign in (1, -1):
        moved = _moved(example, model, {name: sign * step * value for name, value in arrays.items()})
        graph = example.graph(moved)
        losses.append(calibration.loss_without(graph, batch, _cross_entropy, graph.keep({})))
        gradients.append(calibration.gradients(graph, batch, _cross_entropy))
    change = (losses[0] - losses[1]) / (2 * step)
    assert abs(change - square) < APPROXIMATE * square, f"the loss changes by {change}, the gradient says {square}"
    changes = {name: (host(gradients[0][name]) - host(gradients[1][name])) / (2 * step) for name in arrays}
    error, norm = (
        sum(float((value**2).sum()) for value in values) ** 0.5
        for values in ((changes[name] - host(product[name]) for name in arrays), changes.values())
    )
    assert error < APPROXIMATE * norm, f"the products with the Hessian have an error of {error} (norm {norm})"


def check_loss_without_units_is_that_of_the_pruned_model(example: FrameworkExample) -> None:
    """`loss_without` returns the loss of the pruned model, and does not change the model."""
    framework, model = example.framework, example.model()
    graph, batch = example.graph(model), Batch(example.inputs, example.labels)
    chosen, before = plan(graph, Goal(macs=0.6)), framework.inference.fingerprint(model)
    pruned, _ = framework.surgery.prune(model, chosen, graph, verify=False)
    for each, keep in ((model, graph.keep({})), (pruned, chosen.keep(graph))):
        found = framework.calibration.loss_without(graph, batch, _cross_entropy, keep)
        logits = framework.inference.predict(each, example.inputs)
        expected = float(_cross_entropy(logits, example.labels))
        assert abs(found - expected) < ROUNDING * abs(expected), f"the loss is {found}, the model has {expected}"
    assert framework.inference.fingerprint(model) == before, "loss_without changes the model"


def check_outputs_without_units_are_those_of_the_pruned_model(example: FrameworkExample) -> None:
    """`outputs_without` returns the logits of the pruned model first, and does not change the model."""
    framework, model = example.framework, example.model()
    graph = example.graph(model)
    chosen, before = plan(graph, Goal(macs=0.6)), framework.inference.fingerprint(model)
    pruned, _ = framework.surgery.prune(model, chosen, graph, verify=False)
    for each, keep in ((model, graph.keep({})), (pruned, chosen.keep(graph))):
        first, found = framework.calibration.outputs_without(graph, [example.inputs, example.inputs], keep)
        assert_close(found[0], first[0], "the outputs of the same batch again")
        assert all(isinstance(output, np.ndarray) for output in found), "an output is not a numpy array"
        assert_close(found[0], framework.inference.predict(each, example.inputs), "the first output")
    assert framework.inference.fingerprint(model) == before, "outputs_without changes the model"


def check_activations_belong_to_weights_and_samples(example: FrameworkExample) -> None:
    """`weight_inputs` and `weight_input_patches` pass the activations of each sample for each channel of a weight."""
    calibration, model = example.framework.calibration, example.model()
    graph = example.graph(model)
    outputs = calibration.outputs(graph, example.inputs)
    assert_close(outputs[0], example.framework.inference.predict(model, example.inputs), "the outputs")
    sums = []
    for inputs in (example.inputs, example.inputs[::2], example.inputs[1::2]):
        read: list[tuple[str, int, Any, NDArray[np.float64]]] = []

        def see(name: str, axis: int, labels: Any, x: Any, _: Any, read: Any = read) -> None:
            read.append((name, axis, labels, host(x).astype(np.float64)))

        calibration.weight_inputs(graph, inputs, see)
        found: dict[str, NDArray[np.float64]] = {}
        for name, axis, labels, x in (each for each in read if each[2] is not None):
            assert len(x) % len(inputs) == 0, f"{name!r} reads {len(x)} positions of {len(inputs)} samples"
            assert x.shape[1] == len(labels), f"{name!r} reads {x.shape[1]} channels with {len(labels)} labels"
            assert x.shape[1] % graph.tensors[name].shape[axis] == 0, f"axis {axis} of {name!r} has another size"
            found[name] = x.sum(0)
        assert found, "no weight reads activations"
        sums.append(found)
    for name, whole in sums[0].items():
        assert_close(sums[1][name] + sums[2][name], whole, f"the activations of {name!r} in two halves")

    patches: list[tuple[str, int, Any, int, NDArray[np.float64]]] = []

    def see_patches(name: str, axis: int, labels: Any, groups: int, x: Any, _: Any) -> None:
        patches.append((name, axis, labels, groups, host(x).astype(np.float64)))

    calibration.weight_input_patches(graph, example.inputs, list(sums[0]), see_patches)
    for name, axis, labels, groups, x in patches:
        assert x.shape[1] == len(labels), f"{name!r} has patches of {x.shape[1]} channels with {len(labels)} labels"
        columns, size = x.shape[1] // groups * x.shape[2], graph.tensors[name].shape[axis]
        assert columns % size == 0, f"axis {axis} of {name!r} has size {size}, the patches have {columns} columns"
        if x.shape[2] == 1:
            assert_close(x.sum((0, 2)), sums[0][name], f"the patches of {name!r}")


def check_layer_inputs_have_the_columns_of_the_weights(example: FrameworkExample) -> None:
    """`layer_inputs` passes the activations of each sample that each weight reads, one for each of its columns."""
    framework, model = example.framework, example.model()
    weights = {w.name: w for w in framework.masking.weight_matrices(model) if not w.kept}
    sums: list[dict[str, Any]] = [{}, {}, {}]
    for inputs, found in zip((example.inputs, example.inputs[::2], example.inputs[1::2]), sums, strict=True):

        def see(name: str, _axis: int, groups: int, x: Any, found: Any = found) -> None:
            rows = host(x).astype(np.float64).reshape(x.shape[0], groups, -1)
            found[name] = found.get(name, 0.0) + rows.sum(0)

        framework.calibration.layer_inputs(model, inputs, list(weights), see)
    assert set(sums[0]) == set(weights), f"layer_inputs sees {sorted(sums[0])}; expected {sorted(weights)}"
    for name, whole in sums[0].items():
        groups, _, kernel, columns = matrix_shape(weights[name])
        assert whole.shape == (groups, kernel * columns), f"{name!r} reads {whole.shape[1]} columns"
        assert_close(sums[1][name] + sums[2][name], whole, f"the inputs of {name!r} in two halves")


def check_inputs_of_a_pruned_model_are_paired_with_those_of_the_original(example: FrameworkExample) -> None:
    """`paired_inputs` passes what the same layer reads in both models, for the layers in `reading_order`."""
    framework, model = example.framework, example.model()
    calibration, graph = framework.calibration, example.graph(model)
    pruned, _ = framework.surgery.prune(model, plan(graph, Goal(macs=0.6)), graph, verify=False)
    names = list(calibration.linear_layers(graph))
    assert names, "the model has no linear layers"
    order = [name for stage in calibration.reading_order(graph, pruned, example.inputs, names) for name in stage]
    assert sorted(order) == sorted(set(order)), f"a layer is listed twice: {order}"
    sums: list[dict[str, Any]] = [{}, {}, {}]

    def add(found: dict[str, Any], name: str, x: Any) -> None:
        found[name] = found.get(name, 0) + host(x).astype(np.float64).sum(0)

    def see_pair(name: str, _: tuple[int, int], x: Any, y: Any) -> None:
        assert x.shape[0] == y.shape[0], f"{name!r} reads {x.shape[0]} and {y.shape[0]} positions"
        add(sums[0], name, x)
        add(sums[1], name, y)

    calibration.paired_inputs(graph, pruned, example.inputs, order, lambda _name, _outputs: None, see_pair)
    assert set(sums[0]) == set(order), f"the activations of {set(order) - set(sums[0])} are missing"
    for traced, found in ((graph, sums[0]), (example.graph(pruned), sums[1])):
        sums[2].clear()
        calibration.weight_input_patches(
            traced, example.inputs, order, lambda name, _axis, _labels, _groups, x, _experts: add(sums[2], name, x)
        )
        for name in order:
            assert_close(found[name], sums[2][name], f"the activations of {name!r}")
    whole, sums[:2] = sums[:2], [{}, {}]
    for start in (0, 1):
        calibration.paired_inputs(graph, pruned, example.inputs, order, partial(_every_other, start), see_pair)
    for found, expected in zip(sums[:2], whole, strict=True):
        for name in order:
            assert_close(found[name], expected[name], f"the activations of {name!r} for half of the outputs, twice")
    ((original, small),) = calibration.paired_outputs(graph, pruned, example.inputs)
    assert_close(original, framework.inference.predict(model, example.inputs), "the outputs of the original")
    assert_close(small, framework.inference.predict(pruned, example.inputs), "the outputs of the pruned model")


def _every_other(start: int, name: str, outputs: int) -> NDArray[np.int64]:
    """Return the numbers of every other output."""
    del name
    return np.arange(start, outputs, 2, dtype=np.int64)


def check_parameters_and_statistics_of_a_model_can_be_set(example: FrameworkExample) -> None:
    """`set_parameters` sets the named parameters alone; an estimate of batch normalization changes no parameter."""
    surgery, model = example.framework.surgery, example.model()
    graph = example.graph(model)
    before = {name: surgery.parameter_values(model, graph, name) for name in graph.parameters}
    name = next(iter(example.framework.calibration.linear_layers(graph)))
    surgery.set_parameters(model, graph, {name: 2 * before[name]})
    surgery.estimate_batch_norms(model, [(len(example.inputs), example.inputs)])
    for other, value in before.items():
        expected = 2 * value if other == name else value
        assert np.array_equal(surgery.parameter_values(model, graph, other), expected), f"{other!r} has other values"
    assert surgery.batch_norms(model), "the model has no batch normalization"
    estimated = example.framework.inference.predict(model, example.inputs)
    surgery.estimate_batch_norms(model, [(len(example.inputs), example.inputs)])
    assert_close(example.framework.inference.predict(model, example.inputs), estimated, "a second estimate")


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return LABEL_LOSSES["cross-entropy"](logits, labels)


def _moved(example: FrameworkExample, model: Any, steps: Mapping[str, NDArray[np.float64]]) -> Any:
    """Return a model whose weights are those of another model plus steps."""
    moved = example.model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        example.framework.inference.save_weights(model, path)
        weights = load_file(path)
        changed = {name: (weights[name] + step).astype(weights[name].dtype) for name, step in steps.items()}
        save_file({**weights, **changed}, path)
        example.framework.inference.load_weights(moved, path)
    return moved


CALIBRATION_CHECKS = (
    check_gradients_predict_the_change_of_loss_and_gradient,
    check_loss_without_units_is_that_of_the_pruned_model,
    check_outputs_without_units_are_those_of_the_pruned_model,
    check_activations_belong_to_weights_and_samples,
    check_layer_inputs_have_the_columns_of_the_weights,
    check_inputs_of_a_pruned_model_are_paired_with_those_of_the_original,
    check_parameters_and_statistics_of_a_model_can_be_set,
)
"""The checks, in the order in which an implementation needs them."""
