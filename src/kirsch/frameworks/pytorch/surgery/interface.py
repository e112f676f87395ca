"""`Surgery` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.surgery.batch_norm import batch_norms, estimate_batch_norms
from kirsch.frameworks.pytorch.surgery.prune import changed_computed_weights, configure, prune
from kirsch.frameworks.pytorch.surgery.values import parameter_values, set_parameters
from kirsch.frameworks.pytorch.transformers.vocabulary import special_tokens, trim_vocabulary, vocabulary_size
from kirsch.frameworks.pytorch.transformers.widths import configurable

__all__ = [
    "batch_norms",
    "changed_computed_weights",
    "configurable",
    "configure",
    "estimate_batch_norms",
    "parameter_values",
    "prune",
    "set_parameters",
    "special_tokens",
    "trim_vocabulary",
    "vocabulary_size",
]
