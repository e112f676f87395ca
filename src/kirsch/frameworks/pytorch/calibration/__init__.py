"""Runs of a traced model on calibration data: outputs without blocks, gradients, products with the Hessian."""
