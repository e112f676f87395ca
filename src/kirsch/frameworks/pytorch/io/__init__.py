"""Files: ONNX export, weights, fingerprints, model hubs."""
