"""Sources of data sets by name. Importing this package registers the built-in ones."""

from kirsch.data.sources import cifar10, digits
from kirsch.data.sources.registry import SOURCES, load_data

__all__ = ["SOURCES", "cifar10", "digits", "load_data"]
