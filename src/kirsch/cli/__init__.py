"""The `kirsch` command."""

from kirsch.cli.app import main

__all__ = ["main"]
