"""What shows results and does not make them."""
