"""Distillation in the trainers of other libraries: one module per library, which imports that library."""
