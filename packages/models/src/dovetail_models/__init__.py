"""Model families as plain flax NNX modules."""
