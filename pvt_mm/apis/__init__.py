"""What a script calls: inference, a swap of backbones, the cost of a model."""
