"""What a run will need, before anything is loaded or bought: memory per device, by part, and time per step, as a range.

    rehearsal.py   a backend of shapes: one step of the real algorithm on it leaves a list of calls
    parts.py       what these calls need: bytes of each part, FLOPs
    machines.py    what one device of a kind has: memory, FLOP/s, bandwidth
    plan.py        the training stages of an experiment, rehearsed; the tables

A backend may know better than arithmetic what a call needs: `Backend.measure` compiles it, or traces it.
"""
