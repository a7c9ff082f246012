"""Pictures: features, attention, predictions, training curves."""
