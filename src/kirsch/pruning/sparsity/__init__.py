"""Sparsity without a change of shapes: weights that are set to zero, one by one or in patterns.

A subpackage of pruning, because it uses the statistics of calibration data of `kirsch.pruning.importance`.
"""
