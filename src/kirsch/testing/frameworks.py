"""Conformance suite for framework packages. Each check takes a `FrameworkExample` and asserts one property.

```python
EXAMPLE = FrameworkExample(framework, build, inputs, labels, layer="hidden")


@pytest.mark.parametrize("check", FRAMEWORK_CHECKS, ids=lambda check: check.__name__)
def test_framework_conforms(check):
    check(EXAMPLE)
```
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from kirsch.data.arrays import host
from kirsch.data.batches import ArrayData, Batch
from kirsch.distillation.objective import Objective
from kirsch.distillation.step import DistillationStep
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.graph.graph import Tracing
from kirsch.graph.plan import Goal
from kirsch.pruning.choose import plan
from kirsch.pruning.learned.gates import UnitGates
from kirsch.pruning.sparsity.matrix import matrix_shape
from kirsch.tasks.label_losses import LABEL_LOSSES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kirsch.frameworks.protocols import Framework
    from kirsch.frameworks.training import Trained
    from kirsch.graph.graph import Graph

ROUNDING = 1e-5
"""Tolerance for sums in float32 in another order, relative to the largest value."""

BATCH = 8
"""Batch size of the trainings."""

APPROXIMATE = 0.05
"""Tolerance for differences in place of derivatives, relative to the norm."""


@dataclass(frozen=True)
class FrameworkExample:
    """A framework and a small classifier to test it with.

    Args:
        framework: framework to test.
        build: function that returns a new model with random weights; it has at least one batch normalization.
        inputs: float32 samples on the first axis, at least 16; the model takes this one array.
        labels: class numbers of the samples, shape (N,).
        layer: path of a hidden layer with one output.
    """

    framework: Framework
    build: Callable[[], Any]
    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    layer: str

    def model(self, seed: int = 0) -> Any:
        """Return a new model in inference mode with the random weights of a seed."""
        return self.framework.inference.inference_mode(self.framework.training.seeded(self.build, seed))


def check_framework_of_a_model_is_found(example: FrameworkExample) -> None:
    """`framework_of` returns a framework with the name of the example's framework."""
    found = framework_of(example.model()).name
    assert found == example.framework.name, f"the framework of the model is {found!r}"


def check_weights_follow_from_the_seed(example: FrameworkExample) -> None:
    """Two models of one seed have the same fingerprint, models of two seeds have different ones."""
    fingerprint = example.framework.inference.fingerprint
    first, again, other = (fingerprint(example.model(seed)) for seed in (0, 0, 1))
    assert first == again, "two models of the seed 0 have different fingerprints"
    assert first != other, "models of the seeds 0 and 1 have the same fingerprint"


def check_predictions_do_not_depend_on_the_batch_size(example: FrameworkExample) -> None:
    """Predictions are numpy arrays (N, K) in float32, for any batch size, and do not change the model."""
    model, inference = example.model(), example.framework.inference
    before = inference.fingerprint(model)
    whole, parts = (inference.predict(model, example.inputs, batch_size=size) for size in (len(example.inputs), 3))
    assert isinstance(whole, np.ndarray), f"predict returns a {type(whole).__name__}; expected a numpy array"
    assert whole.ndim == len("NK"), f"predict returns the shape {whole.shape}; expected (N, K)"
    assert len(whole) == len(example.inputs), f"predict returns {len(whole)} rows for {len(example.inputs)} samples"
    assert whole.dtype == np.float32, f"predict returns {whole.dtype}; expected float32"
    _assert_close(parts, whole, "predictions in batches of 3")
    assert inference.fingerprint(model) == before, "predict changes the model"


def check_inference_is_deterministic(example: FrameworkExample) -> None:
    """No nondeterminism is reported for the model."""
    why, _ = example.framework.inference.nondeterminism(example.model(), example.inputs)
    assert not why, f"nondeterminism is reported: {why}"


def check_arrays_survive_the_conversion(example: FrameworkExample) -> None:
    """Arrays that are converted to the framework, or moved to the device of a model, keep their values."""
    inference, model = example.framework.inference, example.model()
    array = inference.from_numpy(example.inputs)
    batch = inference.to_device(Batch(example.inputs, example.labels, np.arange(len(example.labels))), model)
    for name, found, expected in (
        ("from_numpy", array, example.inputs),
        ("from_numpy with `like`", inference.from_numpy(example.inputs, like=array), example.inputs),
        ("from_numpy of a dict", inference.from_numpy({"x": example.inputs})["x"], example.inputs),
        ("the inputs of to_device", batch.inputs, example.inputs),
        ("the targets of to_device", batch.targets, example.labels),
    ):
        assert np.array_equal(host(found), expected), f"{name} changes values"


def check_weights_survive_a_file(example: FrameworkExample) -> None:
    """Saved weights, loaded into another model, give the same fingerprint and predictions."""
    inference, model, other = example.framework.inference, example.model(0), example.model(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        inference.save_weights(model, path)
        inference.load_weights(other, path)
    assert inference.fingerprint(other) == inference.fingerprint(model), "loaded weights differ from the saved ones"
    found, expected = (inference.predict(each, example.inputs) for each in (other, model))
    assert np.array_equal(found, expected), "a model with loaded weights has other predictions"


def check_frozen_copy_equals_the_model(example: FrameworkExample) -> None:
    """A frozen copy is another object with the same weights."""
    model = example.model()
    copy = example.framework.inference.frozen_copy(model, model)
    assert copy is not model, "frozen_copy returns the model itself"
    fingerprints = {example.framework.inference.fingerprint(each) for each in (copy, model)}
    assert len(fingerprints) == 1, "the frozen copy has other weights"


def check_exportable_model_equals_the_model(example: FrameworkExample) -> None:
    """The exportable model, called with arrays, has one output: the predictions of the model."""
    inference, model = example.framework.inference, example.model()
    exportable = inference.exportable(model, inference.from_numpy(example.inputs))
    outputs = exportable.outputs([example.inputs])
    assert len(outputs) == 1, f"the exportable model has the outputs {', '.join(outputs)}; expected one"
    _assert_close(next(iter(outputs.values())), inference.predict(model, example.inputs), "the exportable model")


def check_counted_cost_is_that_of_the_graph(example: FrameworkExample) -> None:
    """Parameters and multiply-accumulates of the graph are those counted in a forward pass."""
    model, inputs = example.model(), example.framework.inference.from_numpy(example.inputs[:1])
    graph = example.framework.analysis.trace(model, inputs, Tracing())
    counted = example.framework.analysis.count(model, inputs)
    assert (graph.cost.parameters, graph.cost.macs) == counted, f"the graph has {graph.cost}; {counted} are counted"


def check_pruned_model_is_verified_and_costs_what_the_plan_says(example: FrameworkExample) -> None:
    """A pruned model passes the verification, costs what its plan predicts, and the original is not changed."""
    framework, model = example.framework, example.model()
    inputs, before = framework.inference.from_numpy(example.inputs[:1]), framework.inference.fingerprint(model)
    graph = framework.analysis.trace(model, inputs, Tracing())
    chosen = plan(graph, Goal(macs=0.6))
    pruned, verification = framework.surgery.prune(model, chosen, graph, verify=True)
    assert verification is not None, "prune returns no verification"
    assert verification.power > 0, "the verification compares with a mask that has no effect"
    assert verification.error <= verification.tolerance, f"the verification finds an error of {verification.error}"
    counted = framework.analysis.count(pruned, inputs)
    expected = (chosen.after.parameters, chosen.after.macs)
    assert counted == expected, f"the pruned model costs {counted}, the plan predicts {expected}"
    assert framework.inference.fingerprint(model) == before, "prune changes the original"


def check_gradients_predict_the_change_of_loss_and_gradient(example: FrameworkExample) -> None:
    """A small step along the gradient changes the loss by step · gradient, and the gradient by Hessian · step."""
    calibration, model = example.framework.calibration, example.model()
    graph, batch = _traced(example, model), Batch(example.inputs, example.labels)
    gradient = calibration.gradients(graph, batch, _cross_entropy)
    product = calibration.hessian_products(graph, batch, _cross_entropy, gradient)
    assert set(gradient) == set(graph.parameters), "gradients and parameters have different names"
    arrays = {name: host(value).astype(np.float64) for name, value in gradient.items()}
    square = sum(float((value**2).sum()) for value in arrays.values())
    step = 1e-4 / square**0.5  # the gradient jumps where a ReLU changes its sign, so the step is small
    losses, gradients = [], []
    for sign in (1, -1):
        moved = _moved(example, model, {name: sign * step * value for name, value in arrays.items()})
        graph = _traced(example, moved)
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
    graph, batch = _traced(example, model), Batch(example.inputs, example.labels)
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
    graph = _traced(example, model)
    chosen, before = plan(graph, Goal(macs=0.6)), framework.inference.fingerprint(model)
    pruned, _ = framework.surgery.prune(model, chosen, graph, verify=False)
    for each, keep in ((model, graph.keep({})), (pruned, chosen.keep(graph))):
        found = framework.calibration.outputs_without(graph, example.inputs, keep)
        assert all(isinstance(output, np.ndarray) for output in found), "an output is not a numpy array"
        _assert_close(found[0], framework.inference.predict(each, example.inputs), "the first output")
    assert framework.inference.fingerprint(model) == before, "outputs_without changes the model"


def check_activations_belong_to_weights_and_samples(example: FrameworkExample) -> None:
    """`weight_inputs` and `weight_input_patches` pass the activations of each sample for each channel of a weight."""
    calibration, model = example.framework.calibration, example.model()
    graph = _traced(example, model)
    outputs = calibration.outputs(graph, example.inputs)
    _assert_close(outputs[0], example.framework.inference.predict(model, example.inputs), "the outputs")
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
        _assert_close(sums[1][name] + sums[2][name], whole, f"the activations of {name!r} in two halves")

    patches: list[tuple[str, int, Any, int, NDArray[np.float64]]] = []

    def see_patches(name: str, axis: int, labels: Any, groups: int, x: Any, _: Any) -> None:
        patches.append((name, axis, labels, groups, host(x).astype(np.float64)))

    calibration.weight_input_patches(graph, example.inputs, list(sums[0]), see_patches)
    for name, axis, labels, groups, x in patches:
        assert x.shape[1] == len(labels), f"{name!r} has patches of {x.shape[1]} channels with {len(labels)} labels"
        columns, size = x.shape[1] // groups * x.shape[2], graph.tensors[name].shape[axis]
        assert columns % size == 0, f"axis {axis} of {name!r} has size {size}, the patches have {columns} columns"
        if x.shape[2] == 1:
            _assert_close(x.sum((0, 2)), sums[0][name], f"the patches of {name!r}")


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
        _assert_close(sums[1][name] + sums[2][name], whole, f"the inputs of {name!r} in two halves")


def check_masks_hold_while_a_model_is_trained(example: FrameworkExample) -> None:
    """Masked weights are zero in the held, the trained and the folded model; other weights are trained."""
    framework, model = example.framework, example.model()
    masking, predict, before = framework.masking, framework.inference.predict, framework.inference.fingerprint(model)
    weights = [w for w in masking.weight_matrices(model) if not w.kept]
    random = np.random.default_rng(0)
    masks = {w.name: random.random(w.shape) < APPROXIMATE + 0.5 for w in weights}
    held = masking.fold(model)
    values = {name: masking.values(held, name) for name in masks}
    masking.hold(held, masks, {weights[0].name: -values[weights[0].name]})
    assert framework.inference.fingerprint(model) == before, "hold changes another model"
    trained = framework.features.student_of(_trained(example, held).model)
    for each, what in ((held, "model with masks"), (trained, "trained model"), (masking.fold(trained), "folded model")):
        folded = what == "folded model"
        found = masking.masks(each)
        same = found.keys() == masks.keys() and all(np.array_equal(found[name], masks[name]) for name in masks)
        assert folded or same, f"the {what} has other masks"
        assert not (folded and found), "the folded model has masks"
        for name, mask in masks.items():
            zeros = masking.values(each, name)[~mask]
            assert not zeros.any(), f"{name!r} of the {what} has {np.count_nonzero(zeros)} masked values that are not 0"
            changed = np.any(masking.values(each, name)[mask] != values[name][mask])
            assert changed == (each is not held or name == weights[0].name), f"the kept values of {name!r}, {what}"
    _assert_close(predict(masking.fold(trained), example.inputs), predict(trained, example.inputs), "the folded model")


def check_inputs_of_a_pruned_model_are_paired_with_those_of_the_original(example: FrameworkExample) -> None:
    """`paired_inputs` passes what the same layer reads in both models, for the layers in `reading_order`."""
    framework, model = example.framework, example.model()
    calibration, graph = framework.calibration, _traced(example, model)
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

    calibration.paired_inputs(graph, pruned, example.inputs, order, see_pair)
    assert set(sums[0]) == set(order), f"the activations of {set(order) - set(sums[0])} are missing"
    for traced, found in ((graph, sums[0]), (_traced(example, pruned), sums[1])):
        sums[2].clear()
        calibration.weight_input_patches(
            traced, example.inputs, order, lambda name, _axis, _labels, _groups, x, _experts: add(sums[2], name, x)
        )
        for name in order:
            _assert_close(found[name], sums[2][name], f"the activations of {name!r}")
    ((original, small),) = calibration.paired_outputs(graph, pruned, example.inputs)
    _assert_close(original, framework.inference.predict(model, example.inputs), "the outputs of the original")
    _assert_close(small, framework.inference.predict(pruned, example.inputs), "the outputs of the pruned model")


def check_parameters_and_statistics_of_a_model_can_be_set(example: FrameworkExample) -> None:
    """`set_parameters` sets the named parameters alone; an estimate of batch normalization changes no parameter."""
    surgery, model = example.framework.surgery, example.model()
    graph = _traced(example, model)
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
    _assert_close(example.framework.inference.predict(model, example.inputs), estimated, "a second estimate")


def _traced(example: FrameworkExample, model: Any) -> Graph:
    inputs = example.framework.inference.from_numpy(example.inputs[:1])
    return example.framework.analysis.trace(model, inputs, Tracing())


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


def check_features_have_the_shape_of_their_layer(example: FrameworkExample) -> None:
    """The feature of a layer has the output shape of the layer, and a capture returns the same values."""
    features, model, layers = example.framework.features, example.model(), (example.layer,)
    inputs = example.framework.inference.from_numpy(example.inputs)
    assert features.expand(model, example.layer, inputs) == [example.layer], f"{example.layer!r} is expanded"
    shape = dict(features.shapes(model, inputs)).get(example.layer)
    extracted = host(features.extract(model, layers, inputs)[example.layer])
    assert extracted.shape == shape, f"the feature has shape {extracted.shape}, the layer returns {shape}"
    capture = features.capture(model, layers)
    captured = host(example.framework.inference.infer(capture, inputs)[example.layer])
    capture.close()
    assert np.array_equal(captured, extracted), "a capture returns other values than extract"


def check_weight_arrays_are_parameters_with_two_axes(example: FrameworkExample) -> None:
    """Weights for regularizers are parameters with two or more axes, scales of batch normalization have one."""
    model = example.model()
    shapes = set(example.framework.inference.parameter_shapes(model).values())
    weights = [tuple(weight.shape) for weight in example.framework.training.weight_arrays(model)]
    scales = [tuple(scale.shape) for scale in example.framework.training.batch_norm_scales(model)]
    for name, found, axes in (("weight_arrays", weights, range(2, 9)), ("batch_norm_scales", scales, range(1, 2))):
        assert found, f"{name} returns nothing"
        assert set(found) <= shapes, f"{name} returns arrays of other shapes than the parameters"
        assert all(len(shape) in axes for shape in found), f"{name} returns arrays of shapes {found}"


def check_parameters_are_found_by_the_paths_of_the_graph(example: FrameworkExample) -> None:
    """`parameters_by_path` has the names and shapes of the graph, also with adapters; new models have no gradients."""
    framework, model = example.framework, example.model()
    graph = _traced(example, model)
    student = framework.features.with_adapters(model, ("logits",), {}, {}, None)
    for found in (framework.training.parameters_by_path(model), framework.training.parameters_by_path(student)):
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        assert shapes == framework.inference.parameter_shapes(model), f"the parameters by path are {shapes}"
        missing = [name for name in graph.parameters if shapes.get(name) != graph.tensors[name].shape]
        assert not missing, f"{missing} of the graph are missing, or have other shapes"
    gradients = framework.training.gradients_by_path(model)
    assert not gradients, f"a new model has gradients for {list(gradients)}"
    steps: list[set[str]] = []
    hooks = TrainingHooks(
        event=lambda _event: None,
        before_step=lambda trained: steps.append(set(framework.training.gradients_by_path(trained))),
    )
    _trained(example, model, Training(epochs=1), hooks)
    assert len(steps) == -(-len(example.inputs) // BATCH), f"before_step is called {len(steps)} times"
    assert all(step == set(shapes) for step in steps), f"before_step has gradients of {sorted(steps[0])}"


def check_gates_are_trained_and_folded_into_the_weights(example: FrameworkExample) -> None:
    """A gated model computes the same as the model without gates that it becomes; training moves the gates."""
    training, model = example.framework.training, example.model()
    predict, before = example.framework.inference.predict, example.framework.inference.fingerprint(model)
    graph = _traced(example, model)
    gating = UnitGates(graph, Goal(macs=0.6), graph.groups, steps=3, train_weights=True, speed=50.0)
    gated = training.gated(model, gating)
    assert training.gate_values(gated).shape == (gating.size,), "there is not one value for each gate"
    settings, hooks = Training(epochs=1, optimizer="adamw"), TrainingHooks(event=lambda _event: None)
    trained = example.framework.features.student_of(_trained(example, gated, settings, hooks).model)
    assert not np.array_equal(training.gate_values(trained), training.gate_values(gated)), "no gate is trained"
    folded = training.without_gates(trained)
    _assert_close(predict(folded, example.inputs), predict(trained, example.inputs), "the model without gates")
    assert example.framework.inference.fingerprint(model) == before, "gated changes the model"


def check_training_is_reproducible_and_lowers_the_loss(example: FrameworkExample) -> None:
    """Two runs of one seed end in the same weights with a lower loss; the model itself is not changed."""
    model, fingerprint = example.model(), example.framework.inference.fingerprint
    before = fingerprint(model)
    training, hooks = Training(epochs=3, learning_rate=0.05, weight_decay=0.0), TrainingHooks(event=lambda _event: None)
    first, second = (_trained(example, model, training, hooks) for _ in range(2))
    losses = [record["loss"] for record in first.history]
    trained = fingerprint(example.framework.features.student_of(first.model))
    assert fingerprint(model) == before, "train changes the model"
    assert trained != before, "train returns the model as it was"
    assert trained == fingerprint(example.framework.features.student_of(second.model)), "two runs of one seed differ"
    assert losses[-1] < losses[0], f"the loss of the epochs is {losses}"


def _trained(example: FrameworkExample, model: Any, training: Training, hooks: TrainingHooks) -> Trained:
    """Return a model after training on the labels."""
    framework = example.framework
    shape = framework.inference.predict(model, example.inputs[:2]).shape[1:]
    step = DistillationStep(framework.features, Objective.labels(), logits_shape=tuple(shape))
    data = ArrayData(example.inputs, example.labels, batch_size=BATCH)
    student = framework.features.with_adapters(model, ("logits",), {}, {}, None)
    return framework.training.train(student, data, step, training, hooks)


def _assert_close(found: Any, expected: NDArray[Any], what: str) -> None:
    error, scale = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    assert error <= ROUNDING * scale, f"{what}: the largest difference is {error:.3g}, the largest value {scale:.3g}"


FRAMEWORK_CHECKS = (
    check_framework_of_a_model_is_found,
    check_weights_follow_from_the_seed,
    check_predictions_do_not_depend_on_the_batch_size,
    check_inference_is_deterministic,
    check_arrays_survive_the_conversion,
    check_weights_survive_a_file,
    check_frozen_copy_equals_the_model,
    check_exportable_model_equals_the_model,
    check_counted_cost_is_that_of_the_graph,
    check_pruned_model_is_verified_and_costs_what_the_plan_says,
    check_gradients_predict_the_change_of_loss_and_gradient,
    check_loss_without_units_is_that_of_the_pruned_model,
    check_outputs_without_units_are_those_of_the_pruned_model,
    check_activations_belong_to_weights_and_samples,
    check_layer_inputs_have_the_columns_of_the_weights,
    check_inputs_of_a_pruned_model_are_paired_with_those_of_the_original,
    check_parameters_and_statistics_of_a_model_can_be_set,
    check_features_have_the_shape_of_their_layer,
    check_weight_arrays_are_parameters_with_two_axes,
    check_parameters_are_found_by_the_paths_of_the_graph,
    check_gates_are_trained_and_folded_into_the_weights,
    check_training_is_reproducible_and_lowers_the_loss,
    check_masks_hold_while_a_model_is_trained,
)
"""All checks, in the order in which an implementation needs them."""
