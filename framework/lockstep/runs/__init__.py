"""Experiments: stages, identities, where results live, and the loop."""
