"""Protocols that a framework implements, and training settings; each framework has its own subpackage."""
