"""PyTorch modules as they are: copies, graph modules, submodules, and what is not supported."""
