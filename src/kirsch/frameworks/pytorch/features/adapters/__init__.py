"""Adapters: trainable modules that convert the values of student and teacher for the loss that compares them."""

from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter
from kirsch.frameworks.pytorch.features.adapters.build import build
from kirsch.frameworks.pytorch.features.adapters.memory import bank_bytes

__all__ = ["ADAPTERS", "Adapter", "bank_bytes", "build"]
