"""Proof: the conformance kit, parity, and templates for new plugins."""
