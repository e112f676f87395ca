"""Adapters between features of student and teacher: their names, options and choice, the same for every framework."""

from kirsch.frameworks.adapters.options import ADAPTER_OPTIONS, AdapterOptions, complete_options
from kirsch.frameworks.adapters.shapes import choose_adapter

__all__ = ["ADAPTER_OPTIONS", "AdapterOptions", "choose_adapter", "complete_options"]
