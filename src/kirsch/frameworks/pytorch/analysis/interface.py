"""`Analysis` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.frameworks.pytorch.analysis.input_specifications import inputs_like
from kirsch.frameworks.pytorch.analysis.trace import trace

__all__ = ["count", "inputs_like", "trace"]
