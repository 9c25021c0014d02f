"""Gradients, Adam, micro-batches and restoring. The subject is a `World` whose backend is to be checked, with a policy on
it."""
