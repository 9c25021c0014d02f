"""What a model is, independent of any array library."""
