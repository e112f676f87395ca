"""Pruning: importances, choice of units, removal, storage of pruned models."""
