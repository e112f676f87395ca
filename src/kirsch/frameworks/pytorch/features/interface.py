"""`Features` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.features.adapters.build import build_adapter
from kirsch.frameworks.pytorch.features.capture import capture, extract
from kirsch.frameworks.pytorch.features.cohort import cohort, members
from kirsch.frameworks.pytorch.features.ensemble import ensemble
from kirsch.frameworks.pytorch.features.gradients import mean_gradients, sources_of
from kirsch.frameworks.pytorch.features.layers import expand, shapes
from kirsch.frameworks.pytorch.features.squashed import is_squashed
from kirsch.frameworks.pytorch.features.student import student_of, with_adapters
from kirsch.frameworks.pytorch.inference.outputs import feature_mask

__all__ = [
    "build_adapter",
    "capture",
    "cohort",
    "ensemble",
    "expand",
    "extract",
    "feature_mask",
    "is_squashed",
    "mean_gradients",
    "members",
    "shapes",
    "sources_of",
    "student_of",
    "with_adapters",
]
