"""The arithmetic of learning: randomness, numerics, losses, optimisation."""
