"""Built-in models by name. Importing this package registers them."""

from kirsch.frameworks.pytorch.models import digits
from kirsch.frameworks.pytorch.models.registry import MODELS

__all__ = ["MODELS", "digits"]
