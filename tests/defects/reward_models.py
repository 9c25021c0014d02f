"""Reward models that are wrong on purpose."""
