"""A package, because a folder without `__init__.py` would have the module name of benchmarks/distillation.py."""
