"""`Masking` of PyTorch, see `kirsch.frameworks.masking`."""

from kirsch.frameworks.pytorch.masking.hold import fold, hold, masks
from kirsch.frameworks.pytorch.masking.weights import values, weight_matrices

__all__ = ["fold", "hold", "masks", "values", "weight_matrices"]
