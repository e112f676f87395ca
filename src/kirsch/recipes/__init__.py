"""Recipes: description of a run, data sets, run folder, and the runner."""
