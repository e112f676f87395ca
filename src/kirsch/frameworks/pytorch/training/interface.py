"""`TrainingLoop` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.features.student import gradient_norms
from kirsch.frameworks.pytorch.gates.gated import gate_values, gated, without_gates
from kirsch.frameworks.pytorch.training.regularized import (
    batch_norm_scales,
    gradients_by_path,
    parameters_by_path,
    weight_arrays,
)
from kirsch.frameworks.pytorch.training.seed import seeded
from kirsch.frameworks.pytorch.training.train import train

__all__ = [
    "batch_norm_scales",
    "gate_values",
    "gated",
    "gradient_norms",
    "gradients_by_path",
    "parameters_by_path",
    "seeded",
    "train",
    "weight_arrays",
    "without_gates",
]
