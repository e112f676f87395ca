"""Distilling in training loops of other people: one file each, which imports what it is called after."""
