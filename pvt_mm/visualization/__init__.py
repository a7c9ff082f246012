"""Pictures of features, attention, predictions and training curves."""
