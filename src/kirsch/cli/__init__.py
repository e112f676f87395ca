"""The `kirsch` command."""

from kirsch.cli.start import main

__all__ = ["main"]
