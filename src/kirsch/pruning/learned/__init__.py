"""Pruning that is learned in training."""
