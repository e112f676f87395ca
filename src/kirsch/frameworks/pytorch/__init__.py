"""Implementation of the protocols for PyTorch; `framework.py` lists the modules."""
