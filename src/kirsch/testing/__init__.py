"""Conformance suites for what others plug into Kirsch."""
