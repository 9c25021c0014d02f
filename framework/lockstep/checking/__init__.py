"""Proof: the conformance kit, parity, and the templates that plugins start from."""
