"""Labelers, which rank fresh responses: one contract, `lockstep.interfaces.Labeler`.

scores.py   ranking by a reward model or a judge
"""
