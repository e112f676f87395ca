"""From a plan to a smaller model: slices of tensors, dropped blocks, rebuilt graphs."""
