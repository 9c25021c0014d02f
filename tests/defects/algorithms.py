"""Algorithms that are wrong on purpose."""
