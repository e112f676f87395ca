"""Run models: their arguments, their outputs, and errors that explain why a model does not run."""
