"""Conformance suites for what others plug into Kirsch: tuples of checks, each taking the thing under test."""

from kirsch.testing.importances import IMPORTANCE_CHECKS, WEIGHT_IMPORTANCE_CHECKS
from kirsch.testing.losses import LOSS_CHECKS

__all__ = ["IMPORTANCE_CHECKS", "LOSS_CHECKS", "WEIGHT_IMPORTANCE_CHECKS"]
