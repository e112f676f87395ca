"""Conformance suites for importances and losses of other packages: tuples of checks that take the object to test."""

from kirsch.testing.importances import IMPORTANCE_CHECKS, WEIGHT_IMPORTANCE_CHECKS
from kirsch.testing.losses import LOSS_CHECKS

__all__ = ["IMPORTANCE_CHECKS", "LOSS_CHECKS", "WEIGHT_IMPORTANCE_CHECKS"]
