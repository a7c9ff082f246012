"""Data sets, checked before a training and guarded during it."""
