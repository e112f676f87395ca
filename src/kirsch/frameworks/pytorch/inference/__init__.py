"""Run a model in inference mode: arguments, outputs, and errors for both."""
