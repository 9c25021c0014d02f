"""Who ranks fresh responses: one contract, `lockstep.interfaces.Labeler`.

scores.py   a reward model, or a judge
"""
