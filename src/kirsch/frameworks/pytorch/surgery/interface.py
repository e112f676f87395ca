"""`Surgery` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.surgery.prune import changed_computed_weights, configure, prune

__all__ = ["changed_computed_weights", "configure", "prune"]
