"""ONNX export, weight files, fingerprints and model hubs."""
