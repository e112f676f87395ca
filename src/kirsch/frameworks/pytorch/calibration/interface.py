"""`Calibration` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.calibration.blocks import block_features, outputs
from kirsch.frameworks.pytorch.calibration.gradients import gradients, hessian_products, loss_without, weights
from kirsch.frameworks.pytorch.calibration.masked_outputs import outputs_without
from kirsch.frameworks.pytorch.calibration.paired_inputs import (
    linear_layers,
    paired_inputs,
    paired_outputs,
    reading_order,
)
from kirsch.frameworks.pytorch.calibration.weight_inputs import layer_inputs, weight_input_patches, weight_inputs

__all__ = [
    "block_features",
    "gradients",
    "hessian_products",
    "layer_inputs",
    "linear_layers",
    "loss_without",
    "outputs",
    "outputs_without",
    "paired_inputs",
    "paired_outputs",
    "reading_order",
    "weight_input_patches",
    "weight_inputs",
    "weights",
]
