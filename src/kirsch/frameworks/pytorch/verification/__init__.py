"""Numerical comparison of a pruned model with the masked original."""
