"""Reports results; makes none."""
