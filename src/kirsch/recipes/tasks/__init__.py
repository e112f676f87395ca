"""What models serve: data sets with their classes and preparation. Importing this registers the built-in ones."""

from kirsch.recipes.tasks import cifar10, digits

__all__ = ["cifar10", "digits"]
