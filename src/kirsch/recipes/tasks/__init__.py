"""Data sets of recipes, with their classes and preprocessing. Importing this package registers the built-in ones."""

from kirsch.recipes.tasks import cifar10, digits

__all__ = ["cifar10", "digits"]
