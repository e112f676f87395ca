"""Copies, graph modules, submodules and unsupported kinds of PyTorch modules."""
