"""`Masking` of PyTorch, see `kirsch.frameworks.masking`."""

from kirsch.frameworks.pytorch.masking.hold import fold, hold, mask_bytes, masks, patterns, set_patterns
from kirsch.frameworks.pytorch.masking.weights import values, weight_matrices

__all__ = ["fold", "hold", "mask_bytes", "masks", "patterns", "set_patterns", "values", "weight_matrices"]
