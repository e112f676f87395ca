"""Pruning that is learned, in training or by a search."""
