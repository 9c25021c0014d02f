"""Files that survive, weights, and where checkpoints come from."""
