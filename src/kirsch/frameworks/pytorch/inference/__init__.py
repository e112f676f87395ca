"""Running a model in inference mode: its arguments, its outputs, and the errors of both."""
