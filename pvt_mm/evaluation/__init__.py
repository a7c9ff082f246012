"""Evaluation: COCO scores, and options of evaluators."""
