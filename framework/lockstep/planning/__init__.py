"""What a run will need, before anything is loaded or bought: memory per device, by part, and time per step, as a range.

    calls.py       what a step asks of models and learners, and what that needs
    rehearsal.py   a backend of shapes: one step of the real algorithm on it leaves a list of calls
    parts.py       what these calls need: bytes of each part, FLOPs
    machines.py    what one device of a kind has: memory, FLOP/s, bandwidth
    plan.py        the training stages of an experiment, rehearsed; the tables

What a call needs for a moment only a backend knows: its `Planner` compiles the call, or traces it.
"""
