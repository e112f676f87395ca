"""Conformance suites for importances, losses and frameworks: tuples of checks that take the object to test."""

from kirsch.testing.framework_example import FrameworkExample
from kirsch.testing.frameworks import FRAMEWORK_CHECKS
from kirsch.testing.importances import IMPORTANCE_CHECKS, PERMUTATION_CHECKS
from kirsch.testing.losses import LOSS_CHECKS

__all__ = ["FRAMEWORK_CHECKS", "IMPORTANCE_CHECKS", "LOSS_CHECKS", "PERMUTATION_CHECKS", "FrameworkExample"]
