"""What a run will need, before anything is loaded or bought: memory per device, by part, and time per step, as a range.

    calls.py       the calls that a step makes to models and learners, and what each needs
    rehearsal.py   a backend of shapes: a step of the real algorithm on it records a list of calls
    parts.py       what these calls need: bytes of each part, FLOPs
    machines.py    what a device of each kind has: memory, FLOP/s, bandwidth
    plan.py        the training stages of an experiment, rehearsed: memory and time of each

Only a backend knows the temporary memory of a call: its `Planner` compiles the call, or traces it.
"""
