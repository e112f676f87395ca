"""Batches, data sets with their sources, and seeded augmentation; knows no framework."""
