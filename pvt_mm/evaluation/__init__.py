"""COCO scores."""
