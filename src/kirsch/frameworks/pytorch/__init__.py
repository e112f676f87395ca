"""The PyTorch leaf."""
