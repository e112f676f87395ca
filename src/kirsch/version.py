"""The version of Kirsch."""

__version__ = "0.1.0"
