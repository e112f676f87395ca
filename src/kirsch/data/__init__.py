"""Batches, data sets with their sources, and seeded augmentation, independent of a framework."""
