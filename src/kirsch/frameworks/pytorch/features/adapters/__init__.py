"""What stands between the values of student and teacher and the loss that compares them; it is trained along."""

from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter
from kirsch.frameworks.pytorch.features.adapters.build import build
from kirsch.frameworks.pytorch.features.adapters.memory import bank_bytes

__all__ = ["ADAPTERS", "Adapter", "bank_bytes", "build"]
