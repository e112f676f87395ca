"""Features of layers: capture, adapters, and students with adapters."""
