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
from pathlib import Path

import numpy as np

from kirsch.data.arrays import host
from kirsch.data.batches import Batch
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.graph.graph import Tracing
from kirsch.graph.plan import Goal
from kirsch.pruning.choose import plan
from kirsch.pruning.learned.gates import UnitGates
from kirsch.testing.calibration import APPROXIMATE, CALIBRATION_CHECKS
from kirsch.testing.framework_example import BATCH, FrameworkExample, assert_close


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
    assert_close(parts, whole, "predictions in batches of 3")
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
    assert_close(next(iter(outputs.values())), inference.predict(model, example.inputs), "the exportable model")


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
    trained = framework.features.student_of(example.trained(held).model)
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
    assert_close(predict(masking.fold(trained), example.inputs), predict(trained, example.inputs), "the folded model")


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
    graph = example.graph(model)
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
    example.trained(model, Training(epochs=1), hooks)
    assert len(steps) == -(-len(example.inputs) // BATCH), f"before_step is called {len(steps)} times"
    assert all(step == set(shapes) for step in steps), f"before_step has gradients of {sorted(steps[0])}"


def check_gates_are_trained_and_folded_into_the_weights(example: FrameworkExample) -> None:
    """A gated model computes the same as the model without gates that it becomes; training moves the gates."""
    training, model = example.framework.training, example.model()
    predict, before = example.framework.inference.predict, example.framework.inference.fingerprint(model)
    graph = example.graph(model)
    gating = UnitGates(graph, Goal(macs=0.6), graph.groups, steps=3, train_weights=True, speed=50.0)
    gated = training.gated(model, gating)
    assert training.gate_values(gated).shape == (gating.size,), "there is not one value for each gate"
    settings, hooks = Training(epochs=1, optimizer="adamw"), TrainingHooks(event=lambda _event: None)
    trained = example.framework.features.student_of(example.trained(gated, settings, hooks).model)
    assert not np.array_equal(training.gate_values(trained), training.gate_values(gated)), "no gate is trained"
    folded = training.without_gates(trained)
    assert_close(predict(folded, example.inputs), predict(trained, example.inputs), "the model without gates")
    assert example.framework.inference.fingerprint(model) == before, "gated changes the model"


def check_training_is_reproducible_and_lowers_the_loss(example: FrameworkExample) -> None:
    """Two runs of one seed end in the same weights with a lower loss; the model itself is not changed."""
    model, fingerprint = example.model(), example.framework.inference.fingerprint
    before = fingerprint(model)
    training, hooks = Training(epochs=3, learning_rate=0.05, weight_decay=0.0), TrainingHooks(event=lambda _event: None)
    first, second = (example.trained(model, training, hooks) for _ in range(2))
    losses = [record["loss"] for record in first.history]
    trained = fingerprint(example.framework.features.student_of(first.model))
    assert fingerprint(model) == before, "train changes the model"
    assert trained != before, "train returns the model as it was"
    assert trained == fingerprint(example.framework.features.student_of(second.model)), "two runs of one seed differ"
    assert losses[-1] < losses[0], f"the loss of the epochs is {losses}"


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
    *CALIBRATION_CHECKS,
    check_features_have_the_shape_of_their_layer,
    check_weight_arrays_are_parameters_with_two_axes,
    check_parameters_are_found_by_the_paths_of_the_graph,
    check_gates_are_trained_and_folded_into_the_weights,
    check_training_is_reproducible_and_lowers_the_loss,
    check_masks_hold_while_a_model_is_trained,
)
"""All checks, in the order in which an implementation needs them."""
