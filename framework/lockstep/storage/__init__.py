"""Crash-safe files, weights, and where checkpoints come from."""
