"""Masks that keep weights of a PyTorch model at zero while it is trained."""
