"""What a model is, apart from any array library."""
