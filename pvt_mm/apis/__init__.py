"""What a script calls: inference, swap_backbone, multiply-adds of a model."""
