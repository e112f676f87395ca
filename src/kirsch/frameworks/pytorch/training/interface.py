"""`TrainingLoop` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.features.student import gradient_norms
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
    "gradient_norms",
    "gradients_by_path",
    "parameters_by_path",
    "seeded",
    "train",
    "weight_arrays",
]
