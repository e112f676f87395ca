"""Apply a plan to a model: slice tensors, drop residual blocks, rebuild traced graphs."""
