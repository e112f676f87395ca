"""`Surgery` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.surgery.prune import changed_computed_weights, configure, prune
from kirsch.frameworks.pytorch.transformers.widths import configurable

__all__ = ["changed_computed_weights", "configurable", "configure", "prune"]
