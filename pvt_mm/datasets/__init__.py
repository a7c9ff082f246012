"""Data sets: checks before a training, and clear errors during it."""
