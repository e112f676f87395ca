"""Conformance suite of frameworks: PyTorch passes, and each check fails for a planted fault."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.arrays import map_arrays
from kirsch.frameworks.find import pytorch
from kirsch.testing import FRAMEWORK_CHECKS, FrameworkExample, calibration, frameworks


def images():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def vectors():
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def example(build=vectors, shape=(5,), layer="3", framework=None):
    random, labels = np.random.default_rng(0), np.arange(24) % 3
    inputs = random.standard_normal((24, *shape)) + labels.reshape(-1, *[1] * len(shape))
    return FrameworkExample(framework or pytorch(), build, inputs.astype(np.float32), labels, layer)


@pytest.mark.parametrize("case", [(vectors, (5,), "3"), (images, (1, 6, 6), "3")], ids=["vectors", "images"])
@pytest.mark.parametrize("check", FRAMEWORK_CHECKS, ids=lambda check: check.__name__)
def test_pytorch_passes_the_suite(check, case):
    check(example(*case))


CHECKS = {check.__name__: check for check in FRAMEWORK_CHECKS}


def test_the_suite_contains_every_check_of_its_module():
    checks = vars(frameworks) | vars(calibration)
    assert set(FRAMEWORK_CHECKS) == {value for name, value in checks.items() if name.startswith("check_")}
    assert len(set(FRAMEWORK_CHECKS)) == len(FRAMEWORK_CHECKS)


# ------------------------------------------------------------------------------------------------ planted faults


def planted(protocol, **functions):
    """Return the framework of PyTorch with other functions in one protocol."""
    module = getattr(pytorch(), protocol)
    names = {name: getattr(module, name) for name in module.__all__}
    return dataclasses.replace(pytorch(), **{protocol: SimpleNamespace(**{**names, **functions})})


def changed(model):
    """Return a copy of a model in which one weight differs."""
    other = copy.deepcopy(model)
    other[0].weight.data[0, 0] += 1
    return other


INFERENCE, ANALYSIS, TRAINING = pytorch().inference, pytorch().analysis, pytorch().training
CALIBRATION, SURGERY, MASKING = pytorch().calibration, pytorch().surgery, pytorch().masking


def changing_predict(model, inputs, *, batch_size=256):
    model[1].num_batches_tracked += 1
    return INFERENCE.predict(model, inputs, batch_size=batch_size)


def batch_predict(model, inputs, *, batch_size=256):
    return INFERENCE.predict(model.train(), inputs, batch_size=batch_size) * np.float32(batch_size)


def untrained(model, batches, loss, training, hooks):
    trained = TRAINING.train(model, batches, loss, training, hooks)
    return dataclasses.replace(trained, model=model)


def without_hooks(model, batches, loss, training, hooks):
    return TRAINING.train(model, batches, loss, training, dataclasses.replace(hooks, before_step=None))


def unseeded(model, batches, loss, training, hooks):
    seed = int(torch.randint(1000, ()))
    return TRAINING.train(model, batches, loss, training.changed(seed=seed), hooks)


def uncut(model, plan, graph, *, verify):
    _, verification = pytorch().surgery.prune(model, plan, graph, verify=verify)
    return copy.deepcopy(model), verification


def unverified(model, plan, graph, *, verify):
    return pytorch().surgery.prune(model, plan, graph, verify=False)


def doubled(function):
    return lambda *args: {name: 2 * value for name, value in function(*args).items()}


def doubled_products(function):
    return lambda *args: ({name: 2 * value for name, value in product.items()} for product in function(*args))


def unmasked(model):
    """Return the model with ones in place of zeros."""
    for parameter in model.parameters():
        parameter.data[parameter.data == 0] = 1
    return model


def without_the_first_input(function):
    def observe(model, inputs, names, see):
        function(model, inputs, names, lambda name, axis, groups, x: see(name, axis, groups, x[:, 1:]))

    return observe


def without_the_first_sample(function):
    def observe(graph, inputs, *names_and_see):
        *names, see = names_and_see
        function(graph, inputs, *names, lambda *args: see(*args[:-2], args[-2][1:], args[-1]))

    return observe


def shifted_pairs(graph, pruned, inputs, names, choose, see):
    CALIBRATION.paired_inputs(
        graph, pruned, inputs, names, choose, lambda name, groups, x, y: see(name, groups, x, y.roll(1, 1))
    )


def pairs_of_all_outputs(graph, pruned, inputs, names, choose, see):
    CALIBRATION.paired_inputs(graph, pruned, inputs, names, lambda _name, _outputs: None, see)


FAULTS = [
    ("check_framework_of_a_model_is_found", dataclasses.replace(pytorch(), name="keras"), "framework of the model is"),
    ("check_weights_follow_from_the_seed", planted("training", seeded=lambda build, seed: build()), "of the seed 0"),
    ("check_weights_follow_from_the_seed", planted("inference", fingerprint=lambda model: "0"), "the seeds 0 and 1"),
    ("check_predictions_do_not_depend_on_the_batch_size", planted("inference", predict=batch_predict), "batches of 3"),
    (
        "check_predictions_do_not_depend_on_the_batch_size",
        planted("inference", predict=changing_predict),
        "changes the",
    ),
    (
        "check_inference_is_deterministic",
        planted("inference", nondeterminism=lambda model, inputs: ("It draws random numbers.", "")),
        "It draws",
    ),
    (
        "check_arrays_survive_the_conversion",
        planted(
            "inference",
            from_numpy=lambda arrays, like=None: map_arrays(torch.Tensor.half, INFERENCE.from_numpy(arrays)),
        ),
        "from_numpy changes values",
    ),
    (
        "check_weights_survive_a_file",
        planted("inference", load_weights=lambda model, path: None),
        "loaded weights differ",
    ),
    (
        "check_frozen_copy_equals_the_model",
        planted("inference", frozen_copy=lambda model, like: changed(model)),
        "other weights",
    ),
    (
        "check_frozen_copy_equals_the_model",
        planted("inference", frozen_copy=lambda model, like: model),
        "the model itself",
    ),
    (
        "check_exportable_model_equals_the_model",
        planted("inference", exportable=lambda model, inputs: INFERENCE.exportable(changed(model), inputs)),
        "the exportable model: the largest difference",
    ),
    (
        "check_counted_cost_is_that_of_the_graph",
        planted("analysis", count=lambda model, inputs: (1, ANALYSIS.count(model, inputs)[1])),
        "are counted",
    ),
    (
        "check_pruned_model_is_verified_and_costs_what_the_plan_says",
        planted("surgery", prune=uncut),
        "the pruned model costs",
    ),
    (
        "check_pruned_model_is_verified_and_costs_what_the_plan_says",
        planted("surgery", prune=unverified),
        "no verification",
    ),
    (
        "check_gradients_predict_the_change_of_loss_and_gradient",
        planted("calibration", gradients=doubled(CALIBRATION.gradients)),
        "the loss changes by",
    ),
    (
        "check_gradients_predict_the_change_of_loss_and_gradient",
        planted("calibration", hessian_products=doubled_products(CALIBRATION.hessian_products)),
        "the products with the Hessian",
    ),
    (
        "check_loss_without_units_is_that_of_the_pruned_model",
        planted(
            "calibration",
            loss_without=lambda graph, batch, loss, keep: CALIBRATION.loss_without(graph, batch, loss, keep | True),
        ),
        "the loss is",
    ),
    (
        "check_outputs_without_units_are_those_of_the_pruned_model",
        planted(
            "calibration",
            outputs_without=lambda graph, batches, keep: CALIBRATION.outputs_without(graph, batches, keep | True),
        ),
        "the first output: the largest difference",
    ),
    (
        "check_activations_belong_to_weights_and_samples",
        planted("calibration", weight_inputs=without_the_first_sample(CALIBRATION.weight_inputs)),
        "positions of 24 samples",
    ),
    (
        "check_activations_belong_to_weights_and_samples",
        planted("calibration", weight_input_patches=without_the_first_sample(CALIBRATION.weight_input_patches)),
        "the patches of",
    ),
    (
        "check_activations_belong_to_weights_and_samples",
        planted("calibration", outputs=lambda graph, inputs: CALIBRATION.outputs(graph, 2 * inputs)),
        "the outputs",
    ),
    (
        "check_inputs_of_a_pruned_model_are_paired_with_those_of_the_original",
        planted("calibration", paired_inputs=shifted_pairs),
        "the activations of",
    ),
    (
        "check_inputs_of_a_pruned_model_are_paired_with_those_of_the_original",
        planted("calibration", paired_inputs=pairs_of_all_outputs),
        "for half of the outputs",
    ),
    (
        "check_inputs_of_a_pruned_model_are_paired_with_those_of_the_original",
        planted("calibration", paired_outputs=lambda graph, pruned, inputs: [(np.zeros((24, 3)),) * 2]),
        "the outputs of the original",
    ),
    (
        "check_parameters_and_statistics_of_a_model_can_be_set",
        planted("surgery", set_parameters=lambda model, graph, values: None),
        "has other values",
    ),
    (
        "check_parameters_and_statistics_of_a_model_can_be_set",
        planted("surgery", batch_norms=lambda model: []),
        "no batch normalization",
    ),
    (
        "check_features_have_the_shape_of_their_layer",
        planted("features", shapes=lambda model, inputs: [("3", (1, 8))]),
        "the layer returns",
    ),
    (
        "check_weight_arrays_are_parameters_with_two_axes",
        planted("training", weight_arrays=lambda model: model.parameters()),
        "weight_arrays returns arrays of shapes",
    ),
    (
        "check_weight_arrays_are_parameters_with_two_axes",
        planted("training", batch_norm_scales=lambda model: []),
        "batch_norm_scales returns nothing",
    ),
    (
        "check_parameters_are_found_by_the_paths_of_the_graph",
        planted("training", parameters_by_path=lambda model: dict(model.named_parameters())),
        "the parameters by path are",  # with adapters, the names have a prefix
    ),
    (
        "check_parameters_are_found_by_the_paths_of_the_graph",
        planted("training", gradients_by_path=TRAINING.parameters_by_path),
        "a new model has gradients",
    ),
    (
        "check_parameters_are_found_by_the_paths_of_the_graph",
        planted("training", train=without_hooks),
        "before_step is called 0 times",
    ),
    (
        "check_gates_are_trained_and_folded_into_the_weights",
        planted("training", without_gates=lambda model: copy.deepcopy(model.model)),
        "the model without gates: the largest difference",
    ),
    (
        "check_gates_are_trained_and_folded_into_the_weights",
        planted("training", train=untrained),
        "no gate is trained",
    ),
    (
        "check_training_is_reproducible_and_lowers_the_loss",
        planted("training", train=untrained),
        "returns the model as it was",
    ),
    ("check_training_is_reproducible_and_lowers_the_loss", planted("training", train=unseeded), "two runs of one seed"),
    (
        "check_layer_inputs_have_the_columns_of_the_weights",
        planted("calibration", layer_inputs=without_the_first_input(CALIBRATION.layer_inputs)),
        "reads 4 columns",
    ),
    (
        "check_masks_hold_while_a_model_is_trained",
        planted("masking", fold=lambda model: unmasked(MASKING.fold(model))),
        "masked values that are not 0",
    ),
    (
        "check_masks_hold_while_a_model_is_trained",
        planted("masking", hold=lambda model, masks, values=None: None),
        "model with masks has other masks",
    ),
    (
        "check_masks_hold_while_a_model_is_trained",
        planted("masking", hold=lambda model, masks, values=None: MASKING.hold(model, masks)),
        "the kept values of",
    ),
]


@pytest.mark.parametrize(("check", "framework", "sentence"), FAULTS)
def test_a_check_fails_for_a_planted_fault(check, framework, sentence):
    with pytest.raises(AssertionError, match=sentence):
        CHECKS[check](example(framework=framework))


def test_every_check_has_a_planted_fault():
    assert {check for check, *_ in FAULTS} == {check.__name__ for check in FRAMEWORK_CHECKS}
